"""Model Stock against its formula in float64."""

from itertools import combinations

import numpy as np
import pytest
import torch

from tva import TaskVector
from tva.compose.recipe import Recipe


def ratio(rows):
    """The paper's ratio for the vectors in the rows: k cos / (1 + (k - 1) cos)."""
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(rows, 2)]
    cosine = np.mean(cosines)
    return len(rows) * cosine / (1 + (len(rows) - 1) * cosine)


def merge(text, stacked):
    given = {name: TaskVector({"w": torch.tensor(m)}) for name, m in zip("abc", stacked, strict=False)}
    return Recipe(text, given).evaluate(given).deltas["w"].numpy()


@pytest.fixture
def stacked():
    generator = np.random.default_rng(0)
    return generator.standard_normal((3, 5, 7)) + generator.standard_normal((5, 7))


def test_the_mean_is_shortened_by_the_angle(stacked):
    expected = ratio(stacked.reshape(3, -1)) * stacked.mean(0)
    np.testing.assert_allclose(merge("model_stock(a, b, c)", stacked), expected, rtol=1e-12)


def test_by_row_each_output_channel_has_its_own_angle(stacked):
    expected = [ratio(stacked[:, row]) * stacked[:, row].mean(0) for row in range(5)]
    np.testing.assert_allclose(merge('model_stock(a, b, c, over="row")', stacked), expected, rtol=1e-12)


@pytest.mark.parametrize("over", ["tensor", "row"])
def test_equal_vectors_stay_and_opposite_ones_give_the_base(stacked, over):
    one = stacked[0]
    np.testing.assert_allclose(merge(f'model_stock(a, b, over="{over}")', [one, one]), one, rtol=1e-12)
    np.testing.assert_array_equal(merge(f'model_stock(a, b, over="{over}")', [one, -one]), 0 * one)


def test_orthogonal_vectors_give_the_base():
    np.testing.assert_array_equal(merge("model_stock(a, b)", np.array([[[1.0, 0]], [[0, 1.0]]])), [[0, 0]])


def test_one_vector_has_no_angle(stacked):
    with pytest.raises(ValueError, match="two vectors or more; found 1"):
        merge("model_stock(a)", stacked[:1])
    with pytest.raises(ValueError, match="two vectors or more; found 1"):
        merge('model_stock(a, over="row")', stacked[:1])
