"""SVC against its formula, written out with numpy's singular value decomposition in float64."""

import numpy as np
import pytest
import torch

from tva import TaskVector
from tva.compose.recipe import Recipe
from tva.errors import RecipeError

A, B, C = (np.array(m, float) for m in ([[1, 0, 2], [0, 1, 0]], [[0, 1, 0], [2, 0, 1]], [[2, -1, 1], [-1, 3, 1]]))


def reference(merged, tasks, floor):
    left, values, right = np.linalg.svd(merged, full_matrices=False)
    scaled = []
    for r, value in enumerate(values):
        row = left[:, r] @ merged
        responses = [row @ (left[:, r] @ task) / np.sum((left[:, r] @ task) ** 2) for task in tasks]
        scaled.append(value * len(tasks) / sum(max(floor, response) for response in responses))
    return left * np.array(scaled) @ right


def merge(text, **matrices):
    given = {name: TaskVector({"w": torch.tensor(matrix)}) for name, matrix in matrices.items()}
    return Recipe(text, given).evaluate(given).deltas["w"].numpy()


@pytest.mark.parametrize("floor", [0.1, 0.6])
def test_singular_values_are_divided_by_the_mean_response(floor):
    found = merge(f"svc(a + b + c, a, b, c, floor={floor})", a=A, b=B, c=C)
    np.testing.assert_allclose(found, reference(A + B + C, [A, B, C], floor), rtol=1e-9, atol=1e-12)


def test_the_published_example():
    found = merge("svc(a + b + c, a, b, c)", a=A, b=B, c=C)
    expected = [[2.265459, -1.819015, 1.810705], [-0.609108, 3.020611, 0.146045]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_task_that_is_silent_in_a_direction_counts_with_the_floor():
    a, b = np.diag([2.0, 0, 0])[:2], np.diag([0, 3.0, 0])[:2]  # each alone in its direction: responses 1 and 0
    np.testing.assert_allclose(merge("svc(a + b, a, b, floor=0.5)", a=a, b=b), (a + b) * 2 / 1.5, rtol=1e-12)


def test_tensors_that_are_not_matrices_stay_the_merged_ones():
    given = {name: TaskVector({"b": torch.tensor(value)}) for name, value in {"a": [1.0, 2], "b": [3.0, -1]}.items()}
    assert torch.equal(Recipe("svc(a + b, a, b)", given).evaluate(given).deltas["b"], torch.tensor([4.0, 1]))


def test_a_merged_vector_and_its_parts_are_required():
    with pytest.raises(ValueError, match=r"svc\(a \+ b, a, b\)"):
        merge("svc(a)", a=A)
    with pytest.raises((ValueError, RecipeError), match="positive floor; found 0"):
        merge("svc(a, a, floor=0)", a=A)
