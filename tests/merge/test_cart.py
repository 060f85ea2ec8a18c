"""CART against its formula, written out with numpy's singular value decomposition in float64."""

import numpy as np
import pytest
import torch

from tva import TaskVector
from tva.compose.recipe import Recipe

A, B, C = (np.array(m, float) for m in ([[1, 0, 2], [0, 1, 0]], [[0, 1, 0], [2, 0, 1]], [[2, -1, 1], [-1, 3, 1]]))


def merge(text, **matrices):
    given = {name: TaskVector({"w": torch.tensor(matrix)}) for name, matrix in matrices.items()}
    return Recipe(text, given).evaluate(given).deltas["w"].numpy()


def low_rank(matrix, rank):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def test_the_mean_gets_the_leading_directions_of_each_difference():
    mean = (A + B + C) / 3
    expected = mean + 0.7 * sum(low_rank(matrix - mean, 1) for matrix in (A, B, C))
    np.testing.assert_allclose(merge("cart(a, b, c, rank=0.5, scale=0.7)", a=A, b=B, c=C), expected, atol=1e-9)


def test_the_published_example():
    found = merge("cart(a, b, c, rank=0.5)", a=A, b=B, c=C) - (A + B + C) / 3
    expected = [[-0.119355, 0.128744, 0.251924], [-0.000058, 0.189015, 0.188958]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_of_full_rank_the_differences_cancel():
    np.testing.assert_allclose(merge("cart(a, b, c, rank=1)", a=A, b=B, c=C), (A + B + C) / 3, atol=1e-9)


def test_a_rank_is_a_fraction():
    with pytest.raises(ValueError, match=r"rank in \(0, 1\].*found 8"):
        merge("cart(a, b, rank=8)", a=A, b=B)
