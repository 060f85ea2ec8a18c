"""Intervals, paired comparisons and the gate: against formulas written out here, and by simulation."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from tva.evaluation.intervals import clears, compare, flip_test, mean_interval, slack, tilt, wilson_interval


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
    assert mean_interval(np.full(5, 0.25)) == (0.25, 0.25)


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


def test_the_tilted_table_has_the_mean_and_fills_the_worst_cell_only_if_it_must():
    values = np.array([0.05, -0.95, 1.0, 0.0])
    weights = tilt(values, np.array([50, 4, 1, 5]), -0.02)
    assert weights.sum() == pytest.approx(1)
    assert weights @ values == pytest.approx(-0.02)
    unseen = tilt(values, np.array([40, 0, 0, 0]), 0.0)
    assert unseen == pytest.approx([0.95, 0.05, 0, 0])


def test_slack_is_the_distance_to_where_the_test_turns():
    generator = np.random.default_rng(3)
    base = generator.random(300) < 0.8
    edited = base & (generator.random(300) < 0.93)
    for above in (True, False):
        width = slack(edited, base, 0.9, 0.95, above)
        mean = edited.mean() - 0.9 * base.mean()
        limit = mean - width if above else mean + width
        inside, outside = (limit - 0.002, limit + 0.002) if above else (limit + 0.002, limit - 0.002)
        assert clears(edited, base, 0.9, inside, 0.95, above)
        assert not clears(edited, base, 0.9, outside, 0.95, above)
    assert slack(edited, base, 0.9, 0.5) == 0
    with pytest.raises(ValueError, match=r"\[0.5, 1\)"):
        slack(edited, base, 0.9, 1.0)


def gate_passes(num, right, kept, gained, runs, seed=0):
    """How often the gate passes an edit that is exactly at the bound; and how often its point estimate does."""
    generator, passed, believed = np.random.default_rng(seed), 0, 0
    slope = (right * kept + (1 - right) * gained) / right
    for _ in range(runs):
        base = generator.random(num) < right
        edited = np.where(base, generator.random(num) < kept, generator.random(num) < gained)
        passed += clears(edited, base, slope, 0.0, 0.95)
        believed += edited.mean() >= slope * base.mean()
    return passed / runs, believed / runs


@pytest.mark.parametrize(
    ("num", "right", "kept", "gained"),
    [
        (400, 0.9, 0.95, 0.0),  # some are lost, none gained
        (40, 1.0, 0.95, 0.0),  # so few that often none is seen to be lost
        (100, 0.99, 0.95, 0.5),
        (400, 0.6, 0.9, 0.1),  # as many gained as lost
        (1000, 0.999, 0.97, 0.0),
    ],
)
def test_at_95_percent_confidence_the_gate_passes_a_failing_edit_at_most_one_time_in_twenty(num, right, kept, gained):
    runs = 1000
    passed, believed = gate_passes(num, right, kept, gained, runs)
    assert passed <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5
    assert believed > 0.4  # the point estimate passes every other time


def test_the_gate_is_not_merely_refusing_everything():
    assert gate_passes(400, 0.9, 0.95, 0.0, 1000)[0] > 0.02


def test_the_gate_on_losses_of_moderate_skewness():
    generator, passed, runs = np.random.default_rng(0), 0, 2000
    for _ in range(runs):
        base = generator.gamma(4, size=200)
        edited = base + 0.5 + generator.normal(scale=0.5, size=200)  # truly at the bound, base + 0.5
        passed += clears(edited, base, 1.0, 0.5, 0.95, above=False)
    assert passed / runs <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5


def test_the_sign_flip_test_is_mcnemars_where_scores_are_right_or_wrong():
    differences = np.zeros((80, 2))
    differences[:9, 0], differences[9:12, 0] = 1, -1
    differences[:3, 1] = 1
    found = flip_test(differences)
    assert found[0] == pytest.approx(binom.sf(8, 12, 0.5), abs=0.01)
    assert found[1] == pytest.approx(0.125, abs=0.01)
    assert flip_test(np.zeros((5, 1)))[0] == 1
