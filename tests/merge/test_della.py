"""DELLA: which elements it keeps, how often, and how it rescales."""

import math

import pytest
import torch

from tva import TaskVector
from tva.compose.recipe import Recipe


def merge(text, delta, name="w"):
    given = {"a": TaskVector({name: delta})}
    return Recipe(text, given).evaluate(given).deltas[name]


def test_an_element_is_kept_as_often_as_its_rank_says():
    """Each of 4,000 equal rows draws anew; five standard deviations hold for 20 columns at once."""
    row = torch.arange(1, 21, dtype=torch.float64) * torch.tensor([1.0, -1] * 10, dtype=torch.float64)
    kept = merge('della(a, density=0.4, epsilon=0.3, seed=1, rescale="none")', row.repeat(4000, 1)) != 0
    expected = 0.4 - 0.3 + torch.arange(20, dtype=torch.float64) * 0.6 / 19
    away = (kept.double().mean(0) - expected).abs()
    assert (away <= 5 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_what_is_kept_is_divided_by_its_probability():
    delta = torch.randn(50, 30, dtype=torch.float64)
    plain = merge('della(a, density=0.5, epsilon=0.2, rescale="none")', delta)
    scaled = merge("della(a, density=0.5, epsilon=0.2)", delta)
    ranks = delta.abs().argsort(dim=1).argsort(dim=1).double()
    assert torch.equal(plain, torch.where(plain != 0, delta, 0))
    torch.testing.assert_close(scaled, plain / (0.3 + ranks * 0.4 / 29), rtol=1e-12, atol=0)


def test_seed_vector_and_name_decide_what_is_dropped():
    delta = torch.randn(300)
    once = merge("della(a, seed=3)", delta)
    assert torch.equal(once, merge("della(a, seed=3)", delta))
    assert not torch.equal(once, merge("della(a, seed=4)", delta))
    assert not torch.equal(once, merge("della(a, seed=3)", delta, name="v"))


@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (0, 4)])
def test_odd_shapes(shape):
    delta = torch.ones(shape)
    kept = merge("della(a, density=0.5, epsilon=0.1)", delta)
    assert kept.shape == delta.shape
    assert all(value in (0, 2) for value in kept.reshape(-1).tolist())
    assert torch.equal(merge("della(a, density=1)", delta), delta)


def test_probabilities_must_be_probabilities():
    with pytest.raises(ValueError, match=r"density - epsilon and density \+ epsilon in \(0, 1\); found density 0.9"):
        merge("della(a, density=0.9, epsilon=0.15)", torch.ones(math.prod((2, 2))))
