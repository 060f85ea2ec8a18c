"""Intervals and paired comparisons: against formulas written out here, and by simulation."""

import math

import numpy as np
import pytest
from scipy.stats import binom, norm
from scipy.stats import t as student

from tva.evaluation.intervals import (
    compare,
    flip_test,
    is_binary,
    mean_interval,
    mean_ratio_interval,
    quick_interval,
    wilson_interval,
)
from tva.evaluation.result import Evaluation


@pytest.mark.parametrize(("correct", "count"), [(0, 1), (1, 1), (0, 50), (50, 50), (17, 60), (1999, 2000), (3, 7)])
def test_wilson_interval_is_the_formula_and_holds_the_proportion(correct, count):
    low, high = wilson_interval(correct / count, count)
    p, z = correct / count, 1.959963984540054
    center = (p + z * z / (2 * count)) / (1 + z * z / count)
    spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    assert low == pytest.approx(max(0.0, center - spread), abs=1e-9)
    assert high == pytest.approx(min(1.0, center + spread), abs=1e-9)
    assert low <= p <= high


def test_the_interval_of_a_mean_is_a_bootstrap_the_same_at_every_call():
    scores = np.random.default_rng(1).exponential(size=200)
    low, high = mean_interval(scores)
    error = scores.std(ddof=1) / 200**0.5
    assert scores.mean() - 2.5 * error < low < scores.mean() - 1.5 * error
    assert scores.mean() + 1.5 * error < high < scores.mean() + 3 * error
    assert mean_interval(scores) == (low, high)
    assert mean_interval(np.full(5, 0.25)) is None  # five equal scores say nothing about the spread
    assert quick_interval(np.full(5, 0.25)) is None
    assert mean_interval(np.array([0.25])) is None


def test_mcnemars_p_value_is_the_binomial_tail_of_the_pairs_that_differ():
    base = np.array([True] * 30 + [False] * 20)
    edited = base.copy()
    edited[:9] = False  # nine lost
    edited[30:32] = True  # two gained
    assert compare(edited, base).p_value == pytest.approx(2 * binom.cdf(2, 11, 0.5))
    assert compare(base, base).p_value == 1.0


def test_no_disagreement_in_few_examples_is_not_certainty():
    same = compare(np.ones(40, bool), np.ones(40, bool))
    assert same.ratio == 1.0
    assert same.ratio_low < 0.99
    assert same.difference_low < -0.005


def drawn(generator, rows, weights=None, num=8000):
    """Return the means of ``num`` samples of rows, each as large as the sum of the weights less those of halves."""
    size = len(rows) if weights is None else int((weights == 1).sum())
    share = None if weights is None else weights / weights.sum()
    return np.stack([rows[generator.choice(len(rows), size, p=share)].mean(axis=0) for _ in range(num)])


def agree(found, expected, error=0.04):
    """Check ends within the error of random draws, a share of the width."""
    assert found == pytest.approx(expected, abs=error * (expected[1] - expected[0]))


def test_the_interval_of_a_mean_is_efrons_bca():
    generator, scores = np.random.default_rng(3), np.random.default_rng(1).exponential(size=80)
    means = drawn(generator, scores)
    shift = norm.ppf((means < scores.mean()).mean())
    off = scores.mean() - (scores.sum() - scores) / 79
    curve = (off**3).sum() / (6 * (off**2).sum() ** 1.5)
    at = [shift + z for z in norm.ppf([0.025, 0.975])]
    agree(mean_interval(scores), np.quantile(means, [norm.cdf(shift + z / (1 - curve * z)) for z in at]))


def test_intervals_of_pairs_are_those_of_a_bootstrap_with_half_a_pair_of_each_kind():
    generator = np.random.default_rng(4)
    base = generator.random(150) < 0.8
    edited = base & (generator.random(150) < 0.9)
    cells = np.array([(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
    rows = np.concatenate([np.stack([edited, base], axis=1), cells])
    means = drawn(generator, rows, np.array([1.0] * 150 + [0.5] * 4))
    found, tails = compare(edited, base), [0.025, 0.975]
    ratios = means[:, 0] / means[:, 1]
    agree((found.difference_low, found.difference_high), np.quantile(means[:, 0] - means[:, 1], tails))
    agree((found.ratio_low, found.ratio_high), np.quantile(ratios, tails))
    agree(mean_ratio_interval([(edited, base, None)]), np.quantile(ratios, tails))
    three = sum(generator.permutation(ratios) for _ in range(3)) / 3  # tasks are independent
    agree(mean_ratio_interval([(edited, base, None)] * 3), np.quantile(three, tails), 0.06)


def test_intervals_of_unequal_groups_are_students_with_each_group_left_out_or_a_wider_bootstrap():
    generator = np.random.default_rng(5)
    groups = np.repeat(np.arange(60), generator.integers(1, 9, size=60))
    base = generator.random(len(groups)) < 0.8
    edited = base & (generator.random(60) < 0.9)[groups]
    change = edited.astype(float) - base
    found, sizes = compare(edited, base, groups=groups), np.bincount(groups)
    without = np.array([change[groups != left_out].mean() for left_out in range(60)])
    error, freedom = (59 * without.var()) ** 0.5, sizes.sum() ** 2 / (sizes**2).sum() - 1
    assert found.p_value == pytest.approx(2 * student.sf(abs(change.mean()) / error, freedom))
    values = [
        column.mean() + 60 / len(groups) * (np.bincount(groups, column) - sizes * column.mean())
        for column in (edited.astype(float), base.astype(float))
    ]
    rows = np.concatenate([np.stack(values, axis=1), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]])
    means = drawn(generator, rows, np.array([1.0] * 60 + [0.5] * 4))
    wider = norm.sf(student.isf(0.025, freedom) * ((freedom + 1) / freedom) ** 0.5)  # as wide as Student's
    low, high = np.quantile(means[:, 0] - means[:, 1], [wider, 1 - wider])
    half = student.isf(0.025, freedom) * error
    agree(
        (found.difference_low, found.difference_high), (min(low, change.mean() - half), max(high, change.mean() + half))
    )
    ratio = edited.mean() / base.mean()
    rest = np.array([(edited - ratio * base)[groups != left_out].mean() for left_out in range(60)])
    half = student.isf(0.025, freedom) * (59 * rest.var()) ** 0.5 / base.mean()
    low, high = np.quantile(means[:, 0] / means[:, 1], [wider, 1 - wider])
    agree((found.ratio_low, found.ratio_high), (min(low, ratio - half), max(high, ratio + half)))


@pytest.mark.parametrize(("num", "right", "kept"), [(100, 0.9, 0.9), (400, 0.6, 0.5), (60, 0.95, 0.97)])
def test_the_interval_of_the_ratio_covers_it_19_times_in_20(num, right, kept):
    generator, covered, runs = np.random.default_rng(0), 0, 200
    truth = (right * kept + (1 - right) * 0.1) / right
    for _ in range(runs):
        base = generator.random(num) < right
        edited = np.where(base, generator.random(num) < kept, generator.random(num) < 0.1)
        found = compare(edited, base)
        covered += found.ratio_low <= truth <= found.ratio_high
    assert covered / runs > 0.95 - 3 * (0.05 * 0.95 / runs) ** 0.5


def test_the_sign_flip_test_is_mcnemars_where_scores_are_right_or_wrong():
    differences = np.zeros((80, 2))
    differences[:9, 0], differences[9:12, 0] = 1, -1
    differences[:3, 1] = 1
    found = flip_test(differences)
    assert found[0] == pytest.approx(binom.sf(8, 12, 0.5), abs=0.01)
    assert found[1] == pytest.approx(0.125, abs=0.01)
    assert flip_test(np.zeros((5, 1)))[0] == 1


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32, np.float64])
def test_right_or_wrong_is_so_by_its_values_and_not_by_its_dtype(dtype):
    right = (np.arange(40) % 7 > 0).astype(dtype)
    other = (np.arange(40) % 5 > 0).astype(dtype)
    assert is_binary(right, other)
    assert mean_interval(right) == pytest.approx(wilson_interval(34 / 40, 40))
    assert quick_interval(right) == mean_interval(right)
    assert compare(right, other) == compare(right.astype(bool), other.astype(bool))
    assert not is_binary(np.array([0.0, 1.0, 0.5]))
    assert not is_binary(np.array([0.0, 1.0, np.nan]))
    assert not is_binary(np.array([0, 1, 2]))


DRAWS = {"normal": lambda g, n: g.normal(1, 1, n), "exponential": lambda g, n: g.exponential(1, n)}


@pytest.mark.slow
@pytest.mark.parametrize(("draw", "num"), [("normal", 20), ("normal", 30), ("exponential", 20)])
def test_the_interval_of_a_mean_covers_it_19_times_in_20_with_few_examples_too(draw, num):
    generator, runs, covered, differences, ratios = np.random.default_rng(0), 200, 0, 0, 0
    for _ in range(runs):
        low, high = mean_interval(DRAWS[draw](generator, num))
        covered += low <= 1 <= high
        base = 2 + generator.random(num)
        found = compare(base + DRAWS["normal"](generator, num), base)
        differences += found.difference_low <= 1 <= found.difference_high
        ratios += found.ratio_low <= 3.5 / 2.5 <= found.ratio_high
    least = 0.95 - 3 * (0.05 * 0.95 / runs) ** 0.5
    assert differences / runs >= least
    assert ratios / runs >= least
    # a bootstrap of 20 exponential scores covers 91%
    assert covered / runs >= (least if draw == "normal" else 0.90)


def test_no_interval_is_read_off_a_metrics_name():
    logged = Evaluation({"accuracy": 0.8, "loss": 0.5}, 200)
    assert logged.interval("accuracy") is None
    assert logged.interval("loss") is None
    assert logged.quick_interval("accuracy") is None
    scored = Evaluation({"accuracy": 0.8}, 200, {"accuracy": np.arange(200) < 160})
    assert scored.interval("accuracy") == wilson_interval(0.8, 200)


def test_few_scores_other_than_right_and_wrong_have_no_interval_for_none_would_cover():
    """Intervals of exponential scores covered 88% at 5 examples and 94% at 20."""
    draw = np.random.default_rng(0)
    few, enough = draw.exponential(size=19), draw.exponential(size=20)
    assert mean_interval(few) is quick_interval(few) is None
    assert mean_interval(few > 1) is not None  # Wilson's covers
    assert mean_interval(enough)[0] < enough.mean() < mean_interval(enough)[1]
    found = compare(few * 1.1, few)
    assert (found.ratio, found.difference) == pytest.approx((1.1, 0.1 * few.mean()))
    assert [found.difference_low, found.difference_high, found.ratio_low, found.ratio_high] == [None] * 4
    assert compare(enough * 1.1, enough).ratio_low is not None
    assert compare(few > 2, few > 1).difference_low is not None
