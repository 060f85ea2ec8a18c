"""Is a bound met: against formulas written out here and drawn weights, and by simulation of edits exactly at it."""

import math

import numpy as np
import pytest
from scipy import stats

from tva.evaluation.bounds import clears, mean_limit, needed_examples, slack, worst


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2, 5, 20, 200])
def test_the_limit_of_a_mean_is_the_quantile_of_randomly_weighted_means(num):
    generator = np.random.default_rng(num)
    for values in (generator.normal(size=num), -generator.exponential(size=num), np.zeros(num)):
        lowest = values.min() - 2
        weights = generator.dirichlet(np.ones(num + 1), size=100_000)  # Gaffke's, as it is written
        means = weights @ np.append(values, lowest)
        limit = mean_limit(values, lowest, 0.95)
        share = (means <= limit).mean()
        assert share == pytest.approx(0.05, abs=0.004)
        assert lowest < limit < values.mean()


@pytest.mark.parametrize(("right", "num"), [(40, 40), (59, 60), (17, 60), (380, 400), (1, 3), (1, 1)])
def test_the_limit_of_right_and_wrong_is_clopper_and_pearsons(right, num):
    scores = np.arange(num) < right
    exact = stats.beta.ppf(0.05, right, num - right + 1)
    assert right / num - slack(scores, scores, 0.0, 0.95) == pytest.approx(exact)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32, np.float64])
def test_59_right_answers_of_which_none_is_lost_show_that_95_percent_are_kept_and_58_do_not(dtype):
    for num, shown in ((1, False), (5, False), (20, False), (40, False), (58, False), (59, True)):
        right = np.ones(num, dtype=dtype)
        assert clears(right, right, 0.95, 0.0, 0.95) is shown


def test_scores_that_are_not_right_or_wrong_need_student_s_t_at_least():
    generator = np.random.default_rng(0)
    for num in (2, 5, 20):
        base = generator.normal(5, 1, num)
        edited = base + generator.normal(0, 1, num)
        differences = edited - 1.05 * base
        t = stats.t.ppf(0.95, num - 1) * differences.std(ddof=1) / num**0.5
        assert slack(edited, base, 1.05, 0.95, above=False) >= t - 1e-12
        skewness = (((differences - differences.mean()) / differences.std(ddof=1)) ** 3).mean()
        z = stats.norm.ppf(0.95)
        corrected = t + skewness * (2 * z * z + 1) / (6 * num**0.5) * differences.std(ddof=1) / num**0.5
        assert slack(edited, base, 1.05, 0.95, above=False, guard=False) == pytest.approx(max(t, corrected))


def test_one_score_that_is_not_right_or_wrong_never_shows_anything():
    assert slack(np.array([1.04]), np.array([1.0]), 1.05, 0.95, above=False) == math.inf
    assert not clears(np.array([1.0]), np.array([1.0]), 1.05, 0.0, 0.95, above=False)
    assert not clears(np.array([0.5]), np.array([5.0]), 1.05, 0.0, 0.95, above=False)


def test_equal_differences_are_not_certainty():
    base = np.full(20, 1.0)
    found = slack(base + 0.04, base, 1.05, 0.95, above=False)
    # a share of 1 - 0.05 ** (1 / 20) that shows itself in none of 20 could have the loss 2 * 1.04
    assert found == pytest.approx((1 - 0.05 ** (1 / 20)) * (2 * 1.04 - 1.04))
    assert not clears(base + 0.04, base, 1.05, 0.0, 0.95, above=False)
    assert not clears(np.array([1.0490, 1.0491]), np.ones(2), 1.05, 0.0, 0.95, above=False)


def test_scores_that_are_not_finite_show_nothing():
    for odd in (math.nan, math.inf, -math.inf):
        edited = np.array([1.0, 1.1, odd, 0.9])
        assert slack(edited, np.ones(4), 1.05, 0.95, above=False) == math.inf
        assert not clears(edited, np.ones(4), 1.05, 0.0, 0.95, above=False)


def test_the_worst_of_one_example():
    losses = np.array([0.5, 2.0]), np.array([0.25, 1.0])
    assert worst(*losses, 1.05, above=False) == pytest.approx(-(4 - 1.05 * 0.25))
    shares = np.array([0.5, 0.75]), np.array([0.25, 0.875])
    assert worst(*shares, 0.9) == pytest.approx(0 - 0.9 * 0.875)
    logs = np.array([-1.0, -3.0]), np.array([-2.0, -0.5])
    assert worst(*logs, 1.0) == pytest.approx(-6 + 0.5)
    right = np.array([1.0, 0.0]), np.array([1.0, 1.0])
    assert worst(*right, 0.95) == pytest.approx(-0.95)
    assert worst(*right, 0.95, above=False) == pytest.approx(-1)
    assert worst(*right, -1.0) == 0


@pytest.mark.parametrize("kind", ["right or wrong", "losses"])
def test_slack_is_the_distance_to_where_the_test_turns(kind):
    generator = np.random.default_rng(3)
    base = generator.random(300) < 0.8 if kind == "right or wrong" else generator.gamma(4, size=300)
    edited = base & (generator.random(300) < 0.93) if kind == "right or wrong" else base + generator.normal(size=300)
    for above in (True, False):
        width = slack(edited, base, 0.9, 0.95, above)
        mean = edited.mean() - 0.9 * base.mean()
        limit = mean - width if above else mean + width
        inside, outside = (limit - 1e-4, limit + 1e-4) if above else (limit + 1e-4, limit - 1e-4)
        assert clears(edited, base, 0.9, inside, 0.95, above)
        assert not clears(edited, base, 0.9, outside, 0.95, above)
    assert slack(edited, base, 0.9, 0.5) == 0
    with pytest.raises(ValueError, match=r"\[0.5, 1\)"):
        slack(edited, base, 0.9, 1.0)


def at_most_5_percent(passed, runs):
    return passed / runs <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5


def right_or_wrong(generator, num, right, kept, gained):
    base = generator.random(num) < right
    return np.where(base, generator.random(num) < kept, generator.random(num) < gained), base


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num", "right", "kept", "gained"),
    [
        (400, 0.9, 0.95, 0.0),  # some are lost, none gained
        (40, 1.0, 0.95, 0.0),  # so few that often none is seen to be lost
        (100, 0.5, 0.95, 0.0),  # so few right that often none is lost
        (100, 0.99, 0.95, 0.5),
        (400, 0.6, 0.9, 0.1),  # as many gained as lost
        (1000, 0.999, 0.97, 0.0),
    ],
)
def test_at_95_percent_confidence_an_edit_at_its_bound_passes_at_most_one_time_in_twenty(num, right, kept, gained):
    generator, passed, believed, runs = np.random.default_rng(0), 0, 0, 800
    slope = (right * kept + (1 - right) * gained) / right
    for _ in range(runs):
        edited, base = (side.astype(np.float32) for side in right_or_wrong(generator, num, right, kept, gained))
        passed += clears(edited, base, slope, 0.0, 0.95)
        believed += edited.mean(dtype=np.float64) >= slope * base.mean(dtype=np.float64)
    assert at_most_5_percent(passed, runs)
    assert believed > 0.4 * runs  # the point estimate passes every other time


@pytest.mark.slow
def test_the_gate_does_not_just_refuse_everything():
    generator = np.random.default_rng(0)
    passed = sum(clears(*right_or_wrong(generator, 400, 0.9, 0.95, 0.0), 0.95, 0.0, 0.95) for _ in range(1000))
    assert passed > 20
    kept = sum(clears(*right_or_wrong(generator, 400, 0.9, 0.98, 0.0), 0.95, 0.0, 0.95) for _ in range(200))
    assert kept > 100
    same = [generator.gamma(4, 0.25, size=400) for _ in range(50)]
    assert sum(clears(base + generator.normal(0, 0.02, 400), base, 1.05, 0.0, 0.95, above=False) for base in same) > 20


LOSSES = {
    "normal": lambda g, b: 1.05 * b + g.normal(0, 0.1, len(b)),
    "rare and large": lambda g, b: b + g.normal(0, 0.01, len(b)) + 2.5 * (g.random(len(b)) < 0.02),
    "a tenth": lambda g, b: b + g.normal(0, 0.01, len(b)) + 0.5 * (g.random(len(b)) < 0.1),
    "skewed": lambda g, b: b * 1.05 * g.lognormal(-0.125, 0.5, len(b)),
}


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2, 5, 20, 50, 100, 200])
@pytest.mark.parametrize("damage", LOSSES)
def test_losses_at_their_bound_pass_at_most_one_time_in_twenty_with_rare_damage_too(damage, num):
    generator, passed, runs = np.random.default_rng(0), 0, 300
    for _ in range(runs):
        base = generator.normal(1, 0.1, num)
        passed += clears(LOSSES[damage](generator, base), base, 1.05, 0.0, 0.95, above=False)  # its mean is 1.05
    assert at_most_5_percent(passed, runs)


@pytest.mark.parametrize(("accuracy", "needed"), [(1.0, 59), (0.5, 118), (0.28, 211)])
def test_the_examples_that_are_needed_hold_59_right_answers(accuracy, needed):
    assert math.log(0.05) / math.log(0.95) == pytest.approx(58.4, abs=0.01)
    base = np.arange(100) < round(100 * accuracy)
    assert needed_examples(base, 0.95, 0.0, 0.95) == needed
    assert needed_examples(base, 1.0, 0.0, 0.95) is None  # no room to spare
    assert needed_examples(base, 1.0, 0.01, 0.95) is None


def test_as_many_losses_as_are_said_to_be_needed_suffice_and_fewer_do_not():
    base = np.random.default_rng(0).gamma(4, 0.25, 200)
    needed = needed_examples(base, 1.05, 0.0, 0.95, above=False)
    for num, shown in ((needed, True), (needed - 1, False)):
        scores = np.quantile(base, (np.arange(num) + 0.5) / num)
        assert clears(scores, scores, 1.05, 0.0, 0.95, above=False) is shown


def test_groups_that_are_needed_are_more_than_there_are_where_these_do_not_suffice():
    sizes, draw = np.array([1] * 130 + [6] * 10), np.random.default_rng(0)
    groups = np.repeat(draw.permutation(len(sizes)), sizes)
    base, bound = draw.gamma(16, 0.5, len(groups)), (1.0, 0.4, 0.95, False)
    needed = needed_examples(base, *bound, groups=groups)
    assert needed > needed_examples(base, *bound) > len(sizes)
    for times, shown in ((needed // len(sizes), False), (-(-needed // len(sizes)), True)):
        more = np.concatenate([groups + len(sizes) * time for time in range(times)])
        assert clears(np.tile(base, times), np.tile(base, times), *bound, groups=more) is shown
    few = needed_examples(base, 1.0, 8.0, 0.95, above=False, groups=groups)
    assert few < len(sizes)
