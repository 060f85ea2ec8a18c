"""SCE against its three steps, written out in float64."""

import numpy as np
import pytest
import torch

from tva import TaskVector
from tva.compose.recipe import Recipe


def reference(stacked, density):
    stacked = stacked.copy()
    variance = stacked.var(axis=0)
    kept = np.argsort(-variance.ravel(), kind="stable")[: int(density * np.count_nonzero(variance))]
    if density < 1:
        mask = np.zeros(variance.size)
        mask[kept] = 1
        stacked *= mask.reshape(variance.shape)
    weights = (stacked**2).sum(axis=tuple(range(1, stacked.ndim)))
    merged = np.zeros(stacked.shape[1:])
    for place in np.ndindex(merged.shape):
        values = stacked[(slice(None), *place)]
        elected = 1 if values.sum() >= 0 else -1
        agree = np.sign(values) == elected
        if agree.any():
            merged[place] = (weights * values)[agree].sum() / weights[agree].sum()
    return merged


def merge(text, stacked):
    given = {name: TaskVector({"w": torch.tensor(m)}) for name, m in zip("abc", stacked, strict=False)}
    return Recipe(text, given).evaluate(given).deltas["w"].numpy()


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_select_calculate_erase(density):
    stacked = np.random.default_rng(0).standard_normal((3, 6, 5)) * np.array([1, 2, 3])[:, None, None]
    found = merge(f"sce(a, b, c, density={density})", stacked)
    np.testing.assert_allclose(found, reference(stacked, density), rtol=1e-12)


def test_one_vector_stays_and_zeros_stay_zero():
    one = np.random.default_rng(1).standard_normal((4, 3))
    np.testing.assert_allclose(merge("sce(a)", [one]), one, rtol=1e-12)
    np.testing.assert_array_equal(merge("sce(a, b)", [0 * one, 0 * one]), 0 * one)


def test_a_density_is_a_fraction():
    with pytest.raises(ValueError, match=r"density is the fraction.*found 1.5"):
        merge("sce(a, density=1.5)", [np.ones((1, 1))])
