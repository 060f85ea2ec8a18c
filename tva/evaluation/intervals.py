"""Intervals and paired comparisons from scores by example.

Scores of two models are in the same order, so that before and after are compared on the same examples. What is random
comes from a fixed seed: the same scores always give the same interval. Whether a bound is met is in `bounds`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from scipy import stats

from tva.report.edit_report import Comparison

Ends = tuple[float, float] | None  # of an interval, where there is one
NUM_RESAMPLES = 4000
NUM_FLIPS = 20_000  # random signs that `flip_test` tries
SEED = 0
FEW = 50  # examples below which a bootstrap of a mean is too short
FEWEST = 20  # examples, or effective groups, below which no interval of a mean of scores other than 0 and 1 covers


def wilson_interval(proportion: float, num_examples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute Wilson's score interval of a proportion.

    Args:
        proportion: Observed proportion, in [0, 1].
        num_examples: Examples it was observed on, at least 1.
        confidence: Two-sided.

    Returns:
        Lower and upper end, in [0, 1]; they enclose ``proportion``.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.

    Example:
        >>> low, high = wilson_interval(0.9, 10)
        >>> round(low, 3), round(high, 3)
        (0.596, 0.982)
    """
    found = stats.binomtest(round(proportion * num_examples), num_examples).proportion_ci(confidence, method="wilson")
    return min(proportion, float(found.low)), max(proportion, float(found.high))


def by_group(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    r"""Return one value per group, whose mean is that of all examples and whose spread is that of the mean's error.

    Examples of a group, such as blocks of one document, are no independent draws; groups are. With sums :math:`S_g` and
    sizes :math:`m_g` of :math:`G` groups it is :math:`\bar x + G (S_g - m_g \bar x) / \sum m_g`: the group's mean where
    all are of one size.

    Args:
        values: One value an example, shape (examples,).
        groups: The group of each, shape (examples,); any labels.

    Returns:
        float64, shape (groups,), in the order of the labels.

    Source: Cochran, "Sampling techniques", 1977, section 9A.

    Example:
        >>> by_group(np.array([1.0, 0.0, 1.0, 1.0]), np.array([5, 5, 7, 7]))
        array([0.5, 1. ])
    """
    _, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    mean = float(values.mean(dtype=np.float64))
    sums = np.bincount(index, weights=values.astype(np.float64))
    return mean + len(sizes) * (sums - sizes * mean) / len(values)


def effective_groups(groups: np.ndarray) -> float:
    r"""Return the number of equal groups that carry as much information as these: :math:`(\sum m_g)^2 / \sum m_g^2`.

    A few large groups among many small ones decide the mean, so that their number is what counts: less one, it is the
    degrees of freedom of Student's interval.

    Source: Kish, "Survey sampling", 1965; Carter, Schnepel and Steigerwald, "Asymptotic behavior of a t-test robust to
    cluster heterogeneity", Review of Economics and Statistics 2017.

    Example:
        >>> effective_groups(np.array([1, 1, 2, 2])), round(effective_groups(np.array([1, 1, 1, 1, 1, 1, 2, 3])), 2)
        (2.0, 1.68)
    """
    sizes = np.unique(groups, return_counts=True)[1].astype(np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def group_error(values: np.ndarray, groups: np.ndarray) -> float:
    r"""Return the standard error of the mean of groups of any sizes, by leaving out one group at a time.

    Of one size it is the standard error of their means; a large group, which draws the mean towards itself, counts for
    more: without group g the mean is off by :math:`(v_g - \bar v) / G (1 - m_g / \sum m)`.

    Args:
        values: Those of `by_group`, shape (groups,).
        groups: The group of each example, shape (examples,).

    Source: Bell and McCaffrey, "Bias reduction in standard errors for linear regression with multi-stage samples",
    Survey Methodology 2002, for the jackknife (CR3).
    """
    sizes, count = np.unique(groups, return_counts=True)[1], len(values)
    without = (values - values.mean()) / (count * (1 - sizes / sizes.sum()))
    return float(math.sqrt((count - 1) * without.var()))


def mean_interval(
    scores: np.ndarray, confidence: float = 0.95, groups: np.ndarray | None = None
) -> tuple[float, float] | None:
    """Compute an interval of a mean: Wilson's where scores are right or wrong, else a BCa bootstrap.

    Below 50 examples a bootstrap of other scores is too short; there it is widened to enclose Student's t. Below 20
    that is too short too where scores are skewed, so that there is none.

    Args:
        scores: One score an example, shape (examples,), of any dtype.
        confidence: Two-sided.
        groups: The group of each example, where groups are the independent draws and not examples; see `by_group`.

    Returns:
        Lower and upper end; None of fewer than 20 scores other than right and wrong, and of scores that are all the
        same and neither 0 nor 1, which say nothing about their spread.

    Source: Efron, "Better bootstrap confidence intervals", JASA 1987.
    """
    if groups is not None:
        return _of_groups(scores, groups, confidence, mean_interval)
    if is_binary(scores):
        return wilson_interval(float(scores.mean(dtype=np.float64)), len(scores), confidence)
    scores = scores.astype(np.float64)
    if len(scores) < FEWEST or np.ptp(scores) == 0:
        return None
    found = stats.bootstrap(
        (scores,), np.mean, n_resamples=NUM_RESAMPLES, confidence_level=confidence, batch=256, rng=SEED
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    if len(scores) >= FEW:
        return low, high
    by_t = student_interval(scores, confidence)
    return (low, high) if by_t is None else (min(low, by_t[0]), max(high, by_t[1]))


def _of_groups(scores: np.ndarray, groups: np.ndarray, confidence: float, interval: Callable[..., Ends]) -> Ends:
    """Compute an interval whose draws are groups, of unequal ones at least as wide as Student's; clip it to [0, 1]."""
    values, count = by_group(scores, groups), effective_groups(groups)
    found = interval(values, confidence) if count >= FEWEST else None
    if found is not None and count < len(values) - 1e-6:
        by_t = student_interval(values, confidence, count, group_error(values, groups))
        assert by_t is not None
        found = min(found[0], by_t[0]), max(found[1], by_t[1])
    return (max(0.0, found[0]), min(1.0, found[1])) if found is not None and is_binary(scores) else found


def quick_interval(
    scores: np.ndarray, confidence: float = 0.95, groups: np.ndarray | None = None
) -> tuple[float, float] | None:
    """Compute an interval of a mean quickly: Wilson's where scores are right or wrong, else Student's t.

    For curves of many points; `mean_interval`, whose arguments it has, is for the numbers that decide.

    Example:
        >>> low, high = quick_interval(np.arange(1, 22))
        >>> round(low, 2), round(high, 2)
        (8.18, 13.82)
    """
    if groups is not None:
        return _of_groups(scores, groups, confidence, quick_interval)
    if is_binary(scores):
        return wilson_interval(float(scores.mean(dtype=np.float64)), len(scores), confidence)
    if len(scores) < FEWEST or np.ptp(scores) == 0:
        return None
    return student_interval(scores.astype(np.float64), confidence)


def student_interval(
    values: np.ndarray, confidence: float = 0.95, count: float | None = None, error: float | None = None
) -> tuple[float, float] | None:
    """Compute Student's t interval of the mean of a few independent numbers, such as one per seed.

    Args:
        values: Shape (numbers,).
        confidence: Two-sided.
        count: One more than the degrees of freedom, where it is not how many values there are; see `effective_groups`.
        error: Standard error of the mean, where it is not that of independent values of one weight; see `group_error`.

    Returns:
        Lower and upper end; None for fewer than two numbers, which say nothing about their spread.

    Source: Student, "The probable error of a mean", Biometrika 1908.

    Example:
        >>> low, high = student_interval(np.array([1.0, 2.0, 3.0]))
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    if len(values) < 2:
        return None
    quantile = stats.t.ppf((1 + confidence) / 2, (count or len(values)) - 1)
    half = float(quantile * (np.std(values, ddof=1) / math.sqrt(len(values)) if error is None else error))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def is_binary(*scores: np.ndarray) -> bool:
    """Return whether all scores are right or wrong: booleans, or numbers of any dtype that are all 0 or 1.

    Example:
        >>> is_binary(np.array([True, False]), np.array([1.0, 0.0])), is_binary(np.array([0.0, 0.5]))
        (True, False)
    """
    return all(column.dtype == np.bool_ or bool(np.isin(column, (0, 1)).all()) for column in scores)


def compare(
    edited: np.ndarray, base: np.ndarray, confidence: float = 0.95, groups: np.ndarray | None = None
) -> Comparison:
    """Compare two models on the same examples.

    Args:
        edited: One score an example, shape (examples,).
        base: The base's, in the same order.
        confidence: Of the intervals, two-sided.
        groups: As for `mean_interval`; resampled and tested are groups then.

    Returns:
        Difference and ratio of the means with percentile intervals of a paired bootstrap. Where scores are right or
        wrong the bootstrap draws from the 2 × 2 table with ½ added to each cell, without which no disagreement in
        few examples would look like certainty; with groups, from them and half a group of each cell. Of other scores
        there are no intervals below 20 examples, where they would not cover. With groups of several sizes they are
        at least as wide as Student's.

    Source: Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", Statistics in
    Medicine 2005, for the ½; McNemar, "Note on the sampling error of the difference between correlated proportions",
    Psychometrika 1947.

    Example:
        >>> before = np.array([True] * 90 + [False] * 10)
        >>> after = np.array([True] * 80 + [False] * 20)
        >>> found = compare(after, before)
        >>> round(found.difference, 3), round(found.ratio, 3), found.p_value < 0.01
        (-0.1, 0.889, True)
    """
    if groups is not None:
        return _compare_groups(edited, base, confidence, groups)
    means = _paired_means(edited, base)
    if not is_binary(edited, base):
        return _compare_numbers(edited, base, confidence, means)
    edited, base = edited.astype(bool), base.astype(bool)
    lost, gained = int((~edited & base).sum()), int((edited & ~base).sum())
    p_value = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    return compare_means(float(edited.mean()), float(base.mean()), means, p_value, confidence)


def _compare_numbers(edited: np.ndarray, base: np.ndarray, confidence: float, means: np.ndarray) -> Comparison:
    """Compare scores other than right and wrong by Student's test and resampled means."""
    differences = edited.astype(np.float64) - base.astype(np.float64)
    changed = np.ptp(differences) > 0
    p_value = (
        float(stats.ttest_rel(edited.astype(np.float64), base.astype(np.float64)).pvalue)
        if changed and len(base) > 1
        else None
    )
    level = widened(confidence, len(base)) if FEWEST <= len(base) < FEW else confidence
    found = compare_means(float(edited.mean()), float(base.mean()), means, p_value, level)
    if len(base) < FEWEST:
        return _without_intervals(found)
    return found if len(base) >= FEW else _enclosing(found, quick_interval(differences, confidence), None)


def _without_intervals(found: Comparison) -> Comparison:
    return replace(found, difference_low=None, difference_high=None, ratio_low=None, ratio_high=None)


def _enclosing(found: Comparison, difference: Ends, ratio: Ends) -> Comparison:
    """Widen a comparison's intervals so that they enclose others, where there are some."""
    if difference is not None and found.difference_low is not None and found.difference_high is not None:
        low, high = min(found.difference_low, difference[0]), max(found.difference_high, difference[1])
        found = replace(found, difference_low=low, difference_high=high)
    if ratio is not None and found.ratio_low is not None and found.ratio_high is not None:
        low, high = min(found.ratio_low, ratio[0]), max(found.ratio_high, ratio[1])
        found = replace(found, ratio_low=low, ratio_high=high)
    return found


def _compare_groups(edited: np.ndarray, base: np.ndarray, confidence: float, groups: np.ndarray) -> Comparison:
    """Compare with groups as draws; groups of unequal sizes count as their effective number, with Student's test."""
    values, count = (by_group(edited, groups), by_group(base, groups)), effective_groups(groups)
    unequal = count < len(values[0]) - 1e-6
    # groups of one size are as examples are, and fewer than FEW are widened already
    level = widened(confidence, count) if unequal and len(values[0]) >= FEW and count >= FEWEST else confidence
    if is_binary(*values):
        found = compare(*values, level)
    else:
        found = _compare_numbers(*values, level, _paired_means(*values, is_binary(edited, base)))
    if unequal and count > 1 and found.p_value is not None:
        found = _of_unequal(found, *values, confidence, groups)
    return found if count >= FEWEST else _without_intervals(found)


def _of_unequal(
    found: Comparison, edited: np.ndarray, base: np.ndarray, confidence: float, groups: np.ndarray
) -> Comparison:
    """Apply Student's test to values of groups of unequal sizes, with intervals at least as wide as Student's."""
    count, differences = effective_groups(groups), edited - base
    t = float(np.mean(differences)) / group_error(differences, groups)
    ends = student_interval(differences, confidence, count, group_error(differences, groups))
    factors: Ends = None
    if found.ratio is not None:
        rest = edited - found.ratio * base  # its mean is 0, and its error is the ratio's times the base's mean
        around = student_interval(rest, confidence, count, group_error(rest, groups))
        assert around is not None
        low, high = (found.ratio + end / float(np.mean(base)) for end in around)
        factors = low, high
    found = replace(found, p_value=float(2 * stats.t.sf(abs(t), count - 1)))
    return _enclosing(found, ends, factors)


def _paired_means(edited: np.ndarray, base: np.ndarray, halves: bool = False) -> np.ndarray:
    """Resample examples, or values of groups, for `compare`; return the means of both, shape (resamples, 2).

    Args:
        edited: As for `compare`.
        base: As for `compare`.
        halves: Whether half a group of each cell is added, for values of groups whose scores are right or wrong.
    """
    cells = np.array([(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])  # (edited, base)
    if not is_binary(edited, base):
        pairs = np.stack([edited, base], axis=1).astype(np.float64)  # (examples, 2)
        if halves:  # each group twice, and each cell once
            pairs = np.concatenate([pairs, pairs, cells])
        return np.concatenate([pairs[rows].mean(axis=1) for rows in resamples(len(base), among=len(pairs))])
    edited, base = edited.astype(bool), base.astype(bool)
    counts = np.array([(edited & base).sum(), (~edited & base).sum(), (edited & ~base).sum(), 0])
    counts[3] = len(base) - counts.sum()
    draws = np.random.default_rng(SEED).multinomial(len(base), (counts + 0.5) / (len(base) + 2), NUM_RESAMPLES)
    return draws @ cells / len(base)


def mean_ratio_interval(pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray | None]]) -> Ends:
    """Compute a 95% interval of the mean over tasks of a ratio of two means of the same examples.

    Args:
        pairs: For each task the scores of numerator and denominator, one an example in the same order, and their
            groups, or None; see `by_group`. The examples of different tasks are taken to be independent.

    Returns:
        Lower and upper end, by resampling the examples of each task as `compare` does; None where a task has fewer than
        20 scores other than right and wrong, or its denominator may be 0.
    """
    draws, few = [], float(FEW)
    for place, (above, below, groups) in enumerate(pairs):
        halves = groups is not None and is_binary(above, below)
        if groups is not None:
            above, below, few = by_group(above, groups), by_group(below, groups), min(few, effective_groups(groups))
        if not is_binary(above, below):
            few = min(few, len(above))
        means = _paired_means(above, below, halves)
        if few < FEWEST or not (means[:, 1] > 0).all():
            return None
        order = np.random.default_rng([SEED, place]).permutation(len(means))  # tasks are independent, seeds are alike
        draws.append(means[order, 0] / means[order, 1])
    level = 0.95 if few == FEW else widened(0.95, few)
    low, high = np.percentile(np.mean(draws, axis=0), [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def widened(confidence: float, num_examples: float) -> float:
    """Return the confidence of a percentile bootstrap whose intervals are as wide as Student's t makes them.

    Source: Hesterberg, "What teachers should know about the bootstrap", The American Statistician 2015, section 3.

    Example:
        >>> round(widened(0.95, 5), 4), round(widened(0.95, 50), 4)
        (0.9981, 0.9576)
    """
    t = stats.t.ppf(0.5 + confidence / 2, num_examples - 1) * (num_examples / (num_examples - 1)) ** 0.5
    return float(2 * stats.norm.cdf(t) - 1)


def resamples(num_examples: int, among: int) -> list[np.ndarray]:
    """Draw examples among some with replacement, the same rows at every call; arrays of shape (≤ 64, examples)."""
    generator = np.random.default_rng(SEED)
    sizes = [min(64, NUM_RESAMPLES - start) for start in range(0, NUM_RESAMPLES, 64)]
    return [generator.integers(among, size=(size, num_examples)) for size in sizes]


def compare_means(
    edited: float, base: float, resampled: np.ndarray, p_value: float | None = None, confidence: float = 0.95
) -> Comparison:
    """Make a comparison from two values and their joint resamples, shape (resamples, 2), edited first."""
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    difference = edited - base
    low, high = np.percentile(resampled[:, 0] - resampled[:, 1], tails)
    ratio = ratio_low = ratio_high = None
    if base > 0:
        ratio = edited / base
    if ratio is not None and (resampled[:, 1] > 0).all():
        found = np.percentile(resampled[:, 0] / resampled[:, 1], tails)
        ratio_low, ratio_high = min(ratio, float(found[0])), max(ratio, float(found[1]))
    return Comparison(
        difference, min(difference, float(low)), max(difference, float(high)), ratio, ratio_low, ratio_high, p_value
    )


def flip_test(differences: np.ndarray) -> np.ndarray:
    """Test whether sums of paired differences are above 0, by flipping signs.

    Args:
        differences: For each example how much worse each candidate is than one reference, shape (examples,
            candidates).

    Returns:
        One-sided p-values, shape (candidates,): how often signs at random give a sum as large; the smallest is
        1 / (NUM_FLIPS + 1).

    Source: Fisher, "The design of experiments", 1935, section 21; with right or wrong it is McNemar's exact test.
    """
    differences = differences[np.abs(differences).sum(axis=1) > 0].astype(np.float32)
    observed = differences.sum(axis=0)
    generator, reached = np.random.default_rng(SEED), np.zeros(differences.shape[1], dtype=np.int64)
    for _ in range(0, NUM_FLIPS, 1000):
        signs = generator.integers(0, 2, size=(1000, len(differences)), dtype=np.int8).astype(np.float32) * 2 - 1
        reached += (signs @ differences >= observed - 1e-6 * np.abs(differences).sum(axis=0)).sum(axis=0)
    return (reached + 1) / (NUM_FLIPS + 1)
