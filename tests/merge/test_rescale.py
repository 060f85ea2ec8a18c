"""Rescale gives a vector another one's norm, tensor by tensor."""

import pytest
import torch

from tva import TaskVector
from tva.compose.recipe import Recipe


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2)])
def test_each_tensor_gets_the_others_norm(norm, order):
    deltas = {"w": torch.randn(20, 30, dtype=torch.float64), "b": torch.randn(7, dtype=torch.float64)}
    given = {"a": TaskVector(deltas)}
    sparse = Recipe("magnitude(a, density=0.2)", given).evaluate(given).deltas
    found = Recipe(f'rescale(magnitude(a, density=0.2), a, norm="{norm}")', given).evaluate(given).deltas
    for name, delta in deltas.items():
        ratio = torch.linalg.vector_norm(delta, order) / torch.linalg.vector_norm(sparse[name], order)
        torch.testing.assert_close(found[name], sparse[name] * ratio, rtol=1e-12, atol=0)


def test_a_zero_on_either_side_leaves_the_tensor_as_it_is():
    given = {"a": TaskVector({"w": torch.ones(3)}), "z": TaskVector({"w": torch.zeros(3)})}
    assert torch.equal(Recipe("rescale(a, z)", given).evaluate(given).deltas["w"], torch.ones(3))
    assert torch.equal(Recipe("rescale(z, a)", given).evaluate(given).deltas["w"], torch.zeros(3))


def test_a_norm_has_a_name():
    given = {"a": TaskVector({"w": torch.ones(3)})}
    with pytest.raises(ValueError, match="norm 'l1' or 'l2'; found 'l3'"):
        Recipe('rescale(a, a, norm="l3")', given)
