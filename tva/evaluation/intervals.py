"""How sure a number is: intervals, paired comparisons, and whether a bound is met, all from per-example scores.

Everything is computed from scores that lie in the same order, so that before and after are compared on the same
examples. What is drawn at random is drawn from a fixed seed: the same scores always give the same interval.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from scipy import optimize, stats

from tva.report.edit_report import Comparison

NUM_RESAMPLES = 4000
SEED = 0


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


def mean_interval(scores: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Compute an interval of a mean: Wilson's where scores are right or wrong, else a BCa bootstrap.

    Args:
        scores: One score an example, boolean or float, shape (examples,).
        confidence: Two-sided.

    Returns:
        Lower and upper end. Of scores that are all the same and not boolean it is that value twice.
    """
    if is_binary(scores):
        return wilson_interval(float(scores.mean()), len(scores), confidence)
    scores = scores.astype(np.float64)
    if len(scores) < 2 or np.ptp(scores) == 0:
        return float(scores[0]), float(scores[0])
    found = stats.bootstrap(
        (scores,), np.mean, n_resamples=NUM_RESAMPLES, confidence_level=confidence, batch=256, rng=SEED
    ).confidence_interval
    return float(found.low), float(found.high)


def quick_interval(scores: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Compute an interval of a mean in no time: Wilson's where scores are right or wrong, else Student's t.

    For curves of many points; `mean_interval` is for the numbers that decide.

    Args:
        scores: One score an example, boolean or float, shape (examples,).
        confidence: Two-sided.

    Example:
        >>> low, high = quick_interval(np.array([1.0, 2.0, 3.0]))
        >>> round(low, 2), round(high, 2)
        (-0.48, 4.48)
    """
    if is_binary(scores):
        return wilson_interval(float(scores.mean()), len(scores), confidence)
    mean = float(scores.mean(dtype=np.float64))
    if len(scores) < 2 or np.ptp(scores) == 0:
        return mean, mean
    width = stats.t.ppf(0.5 + confidence / 2, len(scores) - 1) * scores.std(ddof=1, dtype=np.float64)
    width /= len(scores) ** 0.5
    return mean - float(width), mean + float(width)


def is_binary(*scores: np.ndarray) -> bool:
    """Whether scores say right or wrong."""
    return all(column.dtype == np.bool_ for column in scores)


def compare(edited: np.ndarray, base: np.ndarray, confidence: float = 0.95) -> Comparison:
    """Compare two models on the same examples.

    Args:
        edited: One score an example, shape (examples,).
        base: The base's, in the same order.
        confidence: Of the intervals, two-sided.

    Returns:
        Difference and ratio of the means with percentile intervals of a paired bootstrap. Where scores are right or
        wrong the bootstrap draws from the 2 × 2 table with ½ added to each cell, without which no disagreement in
        few examples would look like certainty.

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
    if is_binary(edited, base):
        pairs = np.array([(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])  # (edited, base)
        counts = np.array([(edited & base).sum(), (~edited & base).sum(), (edited & ~base).sum(), 0])
        counts[3] = len(base) - counts.sum()
        draws = np.random.default_rng(SEED).multinomial(len(base), (counts + 0.5) / (len(base) + 2), NUM_RESAMPLES)
        means = draws @ pairs / len(base)  # (resamples, 2)
        lost, gained = int(counts[1]), int(counts[2])
        p_value = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    else:
        pairs = np.stack([edited, base], axis=1).astype(np.float64)  # (examples, 2)
        means = np.concatenate([pairs[rows].mean(axis=1) for rows in resamples(len(base))])
        changed = np.ptp(pairs[:, 0] - pairs[:, 1]) > 0
        p_value = float(stats.ttest_rel(pairs[:, 0], pairs[:, 1]).pvalue) if changed and len(base) > 1 else None
    return compare_means(float(edited.mean()), float(base.mean()), means, p_value, confidence)


def resamples(num_examples: int, num_resamples: int = NUM_RESAMPLES, batch: int = 64) -> list[np.ndarray]:
    """Draw examples with replacement, the same rows at every call; arrays of shape (≤ batch, examples)."""
    generator = np.random.default_rng(SEED)
    sizes = [min(batch, num_resamples - start) for start in range(0, num_resamples, batch)]
    return [generator.integers(num_examples, size=(size, num_examples)) for size in sizes]


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


# --- is a bound met?


def slack(edited: np.ndarray, base: np.ndarray, slope: float, confidence: float, above: bool = True) -> float:
    r"""Say by how much :math:`\bar e - s \bar b` must clear a bound for that to be believed.

    Args:
        edited: One score an example of the edited model, shape (examples,).
        base: The base's, in the same order.
        slope: :math:`s`, what the base's mean is multiplied by in the bound.
        confidence: One-sided, in [0.5, 1).
        above: Whether the bound must be cleared upwards (``>=``) or downwards (``<=``).

    Returns:
        The distance between the point estimate and its one-sided confidence limit, at least 0.

    The limit is the mean at which a test would just reject. Where scores are right or wrong the test draws from the
    likeliest 2 × 2 table with that mean, in which the costliest cell may be filled though it was never observed: no
    loss in 40 examples does not prove that there is none. For other scores it is Student's t with its first Edgeworth
    correction, for the skewness that few but costly losses bring.

    Source: Efron, "Nonparametric standard errors and confidence intervals", Canadian Journal of Statistics 1981, for
    tilting; Owen, "Empirical likelihood", 2001, for the weights; Hall, "Inverting an Edgeworth expansion", Annals of
    Statistics 1983.
    """
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must lie in [0.5, 1), where 0.5 is the point estimate; found {confidence}.")
    if confidence == 0.5:
        return 0.0
    sign = 1.0 if above else -1.0
    if is_binary(edited, base):
        return _tilted_slack(*_table(edited, base, slope, sign), confidence)
    differences = sign * (edited.astype(np.float64) - slope * base.astype(np.float64))
    count = len(differences)
    deviation = float(differences.std(ddof=1)) if count > 1 else 0.0
    if deviation == 0:
        return 0.0
    z = NormalDist().inv_cdf(confidence)
    skewness = float((((differences - differences.mean()) / deviation) ** 3).mean())
    return max(z, z - skewness * (2 * z * z + 1) / (6 * count**0.5)) * deviation / count**0.5


def clears(
    edited: np.ndarray, base: np.ndarray, slope: float, offset: float, confidence: float, above: bool = True
) -> bool:
    r"""Test whether :math:`\bar e` lies beyond :math:`s \bar b + o` with a confidence, as `slack` would say.

    Args:
        edited: As for `slack`.
        base: As for `slack`.
        slope: As for `slack`.
        offset: :math:`o`.
        confidence: One-sided, in (0.5, 1).
        above: Beyond is above (or below).
    """
    sign = 1.0 if above else -1.0
    mean = sign * (float(edited.mean()) - slope * float(base.mean()) - offset)
    if mean < 0:
        return False
    if not is_binary(edited, base):
        return mean >= slack(edited, base, slope, confidence, above)
    values, counts = _table(edited, base, slope, sign)
    return sign * offset <= values.min() or _tilted_p_value(values, counts, sign * offset) <= 1 - confidence


def _table(edited: np.ndarray, base: np.ndarray, slope: float, sign: float) -> tuple[np.ndarray, np.ndarray]:
    """Give the four cells' values and counts: both right, the base alone, the edited alone, neither."""
    counts = np.array([(edited & base).sum(), (~edited & base).sum(), (edited & ~base).sum(), 0])
    counts[3] = len(base) - counts.sum()
    return sign * np.array([1 - slope, -slope, 1.0, 0.0]), counts


def _tilted_p_value(values: np.ndarray, counts: np.ndarray, null: float) -> float:
    """How often a table with the mean ``null``, not above the observed one, reaches the observed mean."""
    count = int(counts.sum())
    draws = np.random.default_rng(SEED).multinomial(count, tilt(values, counts, null), NUM_RESAMPLES)
    reached = int((draws @ values >= float(values @ counts) - 1e-9).sum())
    return (reached + 1) / (NUM_RESAMPLES + 1)


def _tilted_slack(values: np.ndarray, counts: np.ndarray, confidence: float) -> float:
    """Distance from the mean of a table down to the mean that a test at this confidence just rejects."""
    mean = float(values @ counts) / int(counts.sum())
    low, high = float(values.min()) + 1e-9, mean
    for _ in range(16):
        middle = (low + high) / 2
        rejected = _tilted_p_value(values, counts, middle) <= 1 - confidence
        low, high = (middle, high) if rejected else (low, middle)
    return mean - low


def tilt(values: np.ndarray, counts: np.ndarray, mean: float) -> np.ndarray:
    """Give the likeliest probabilities of a table whose mean is given and not above the observed one.

    Args:
        values: Value of each cell.
        counts: How often each was observed; the cell of the smallest value may be empty and yet become likely.
        mean: The mean they must have, above the smallest value.

    Example:
        >>> tilt(np.array([0.0, 1.0]), np.array([0, 10]), 0.75)
        array([0.25, 0.75])
    """
    shares, gaps = counts / counts.sum(), values - mean
    limit = -1 / gaps.min()  # beyond it the smallest value's probability would be negative

    def residual(multiplier: float) -> float:
        return float((shares * gaps / (1 + multiplier * gaps)).sum())

    top = limit * (1 - 1e-12)
    multiplier = limit if residual(top) > 0 else optimize.brentq(residual, 0.0, top) if residual(0.0) > 0 else 0.0
    denominators = 1 + multiplier * gaps
    weights = np.where(shares > 0, shares / np.where(shares > 0, denominators, 1.0), 0.0)
    weights[np.argmin(values)] += max(0.0, 1 - weights.sum())
    return weights / weights.sum()


def flip_test(differences: np.ndarray, num_flips: int = 20_000) -> np.ndarray:
    """Test whether sums of paired differences are above 0, by flipping signs.

    Args:
        differences: For each example how much worse each candidate is than one reference, shape (examples,
            candidates).
        num_flips: Random signs that are tried; the smallest p-value is 1 / (num_flips + 1).

    Returns:
        One-sided p-values, shape (candidates,): how often signs at random give a sum as large.

    Source: Fisher, "The design of experiments", 1935, section 21; with right or wrong it is McNemar's exact test.
    """
    differences = differences[np.abs(differences).sum(axis=1) > 0].astype(np.float32)
    observed = differences.sum(axis=0)
    generator, reached = np.random.default_rng(SEED), np.zeros(differences.shape[1], dtype=np.int64)
    for _ in range(0, num_flips, 1000):
        signs = generator.integers(0, 2, size=(1000, len(differences)), dtype=np.int8).astype(np.float32) * 2 - 1
        reached += (signs @ differences >= observed - 1e-6 * np.abs(differences).sum(axis=0)).sum(axis=0)
    return (reached + 1) / (num_flips + 1)
