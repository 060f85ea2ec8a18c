r"""Test with a stated confidence if a bound :math:`\bar e \ge s \bar b + o` is met, from two models' scores by example.

No test can exclude what no example has shown, damage to a few examples that is as large as one likes. What is excluded
is damage up to a `worst` value of one example: of right and wrong that is exact, of other scores it is an assumption,
which is part of the statement.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from scipy import optimize, stats

from tva.evaluation.intervals import by_group, effective_groups, group_error, is_binary

MAX_EXAMPLES = 200_000  # beyond which it is not said how many are needed


def slack(
    edited: np.ndarray,
    base: np.ndarray,
    slope: float,
    confidence: float,
    above: bool = True,
    guard: bool = True,
    groups: np.ndarray | None = None,
) -> float:
    r"""Compute by how much :math:`\bar e - s \bar b` must clear a bound to be believed.

    Args:
        edited: One score an example of the edited model, shape (examples,), of any dtype.
        base: The base's, in the same order.
        slope: :math:`s`, what the base's mean is multiplied by in the bound.
        confidence: One-sided, in [0.5, 1).
        above: Whether the bound must be cleared upwards (``>=``) or downwards (``<=``).
        guard: Whether damage up to `worst` that no example shows must be excluded too; for right and wrong it always
            is.
        groups: The group of each example, where groups are the independent draws; the worst of a group is that of an
            example in all examples of the largest.

    Returns:
        The distance between the point estimate and its one-sided confidence limit, at least 0. Infinite for a single
        example whose score is not right or wrong, and for scores that are not finite.

    The limit is that of `mean_limit`: no loss in 40 examples does not prove that there is none. Scores that are not
    right or wrong must pass Student's t with n − 1 degrees of freedom too, with its first Edgeworth correction, for
    skewness.

    Source: Hall, "Inverting an Edgeworth expansion", Annals of Statistics 1983.
    """
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be in [0.5, 1), where 0.5 is the point estimate; found {confidence}.")
    if confidence == 0.5:
        return 0.0
    sign = 1.0 if above else -1.0
    differences = sign * (edited.astype(np.float64) - slope * base.astype(np.float64))
    binary = is_binary(edited, base)
    if not (binary or (len(differences) > 1 and np.isfinite(differences).all())):
        return math.inf
    if groups is not None:
        return _group_slack(differences, groups, worst(edited, base, slope, above), confidence, guard or binary)
    by_t = 0.0 if binary else _student_slack(differences, confidence)
    if not (binary or guard):
        return by_t
    limit = mean_limit(differences, worst(edited, base, slope, above), confidence)
    return max(by_t, float(differences.mean()) - limit)


def _group_slack(
    differences: np.ndarray, groups: np.ndarray, worst_value: float, confidence: float, guard: bool
) -> float:
    values, mean = by_group(differences, groups), float(differences.mean())
    if len(values) < 2:
        return math.inf
    by_t = _student_slack(values, confidence, effective_groups(groups), group_error(values, groups))
    if not guard:
        return by_t
    largest = int(np.unique(groups, return_counts=True)[1].max())
    lowest = mean + len(values) * largest / len(differences) * (worst_value - mean)
    return max(by_t, mean - mean_limit(values, lowest, confidence))


def _student_slack(
    differences: np.ndarray, confidence: float, effective: float | None = None, error: float | None = None
) -> float:
    count = len(differences)
    deviation = float(differences.std(ddof=1))
    if deviation == 0:
        return 0.0
    z, t = NormalDist().inv_cdf(confidence), float(stats.t.ppf(confidence, (effective or count) - 1))
    skewness = float((((differences - differences.mean()) / deviation) ** 3).mean())
    error = deviation / count**0.5 if error is None else error
    return max(t, t - skewness * (2 * z * z + 1) / (6 * count**0.5)) * error


def worst(edited: np.ndarray, base: np.ndarray, slope: float, above: bool = True) -> float:
    r"""Return the worst value of :math:`\pm(e - s b)` that is assumed possible for one example.

    Right or wrong: wrong now, and before whatever makes that count most. Other scores: the edited model may score as
    much worse again than the worst score of either model as that is from 0 (twice the largest loss; 0 where higher is
    better and no score is negative), and the base as favorably as on any example.

    Args:
        edited: As for `slack`.
        base: As for `slack`.
        slope: As for `slack`.
        above: As for `slack`; larger is worse where the bound must be cleared downwards.

    Example:
        >>> worst(np.array([1.0, 3.0]), np.array([1.5, 2.0]), slope=0.5, above=False)  # -(6 - 0.5 * 1.5)
        -5.25
    """
    sign = 1.0 if above else -1.0
    if is_binary(edited, base):
        return min(0.0, sign) + min(0.0, -sign * slope)
    seen = float(min((sign * scores.astype(np.float64)).min() for scores in (edited, base)))
    return seen - abs(seen) + float((-sign * slope * base.astype(np.float64)).min())


def mean_limit(values: np.ndarray, lowest: float, confidence: float) -> float:
    r"""Compute the lower confidence limit of a mean whose values are at least ``lowest``.

    It is the quantile of :math:`\sum_i w_i x_i` with weights from the uniform Dirichlet distribution on the values and
    ``lowest``; where there are two values, that is Clopper and Pearson's exact limit. The weights are exponential
    variables over their sum, so that the limit is the :math:`q` at which :math:`\sum_i E_i (x_i - q)` is positive with
    this probability, here by Lugannani and Rice's saddlepoint formula. No distribution is known of which the limit is
    too high more often than 1 - ``confidence``.

    Args:
        values: Observed values, shape (examples,), finite.
        lowest: At most the smallest of them.
        confidence: One-sided.

    Returns:
        The limit, between ``lowest`` and the mean.

    Source: Gaffke, "Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative
    variable", Mathematical Methods of Statistics 2005; Learned-Miller and Thomas, "A new confidence interval for the
    mean of a bounded random variable", 2019; Lugannani and Rice, "Saddle point approximation for the distribution of
    the sum of independent random variables", Advances in Applied Probability 1980.

    Example:
        >>> limit = mean_limit(np.ones(20), 0.0, 0.95)  # of 20 right answers: 0.05 ** (1 / 20)
        >>> round(limit, 3), round(0.05 ** (1 / 20), 3)
        (0.861, 0.861)
    """
    mean = float(values.mean(dtype=np.float64))
    cells, counts = np.unique(np.append(values, min(lowest, values.min())), return_counts=True)
    low, width = float(cells[0]), mean - float(cells[0])
    if width <= 0:
        return low

    if len(cells) == 2:  # Clopper and Pearson's
        return low + float(cells[1] - cells[0]) * float(stats.beta.ppf(1 - confidence, counts[1], counts[0]))

    def excess(limit: float) -> float:
        return _share_positive(cells - limit, counts) - confidence

    low += 1e-9 * width
    if excess(mean) >= 0:
        return mean
    return low if excess(low) <= 0 else float(optimize.brentq(excess, low, mean, xtol=1e-9 * width))


def _share_positive(rates: np.ndarray, counts: np.ndarray) -> float:
    """Return the probability that a sum of exponential variables, ``counts`` of each rate, is positive."""
    if rates.max() <= 0:
        return 0.0
    if rates.min() >= 0:
        return 1.0

    def slope_at(point: float) -> float:
        return float((counts * rates / (1 - point * rates)).sum())

    total, inside = float(counts @ rates), 1 - 1e-13
    point = 0.0
    if total < 0:
        point = optimize.brentq(slope_at, 0.0, inside / float(rates.max()))
    elif total > 0:
        point = optimize.brentq(slope_at, inside / float(rates.min()), 0.0)
    scaled = rates / (1 - point * rates)
    variance = float(counts @ scaled**2)
    u = point * variance**0.5
    normal = NormalDist()
    if abs(u) < 1e-4:  # the formula's limit at the mean
        return 0.5 + float(counts @ scaled**3) / (3 * (2 * math.pi) ** 0.5 * variance**1.5)
    r = math.copysign(math.sqrt(max(0.0, 2 * float(counts @ np.log1p(-point * rates)))), point)
    return 1 - normal.cdf(r) + normal.pdf(r) * (1 / u - 1 / r)


def clears(
    edited: np.ndarray,
    base: np.ndarray,
    slope: float,
    offset: float,
    confidence: float,
    above: bool = True,
    guard: bool = True,
    groups: np.ndarray | None = None,
) -> bool:
    r"""Test whether :math:`\bar e` is beyond :math:`s \bar b + o` with a confidence, by `slack`.

    Args:
        edited: As for `slack`.
        base: As for `slack`.
        slope: As for `slack`.
        offset: :math:`o`.
        confidence: One-sided, in [0.5, 1).
        above: Whether beyond means above; otherwise below.
        guard: As for `slack`.
        groups: As for `slack`.
    """
    sign = 1.0 if above else -1.0
    margin = sign * (float(edited.mean(dtype=np.float64)) - slope * float(base.mean(dtype=np.float64)) - offset)
    return 0 <= margin < math.inf and margin >= slack(edited, base, slope, confidence, above, guard, groups)


def allowed_loss(
    base: np.ndarray,
    slope: float,
    offset: float,
    confidence: float,
    above: bool = True,
    groups: np.ndarray | None = None,
) -> float | None:
    r"""Return the largest loss on these examples at which a bound is still shown to be met, if nothing is gained.

    Right and wrong answers are lost one by one, evenly over the examples; of other scores every example loses alike.

    Args:
        base: The base's scores, shape (examples,).
        slope: As for `slack`.
        offset: As for `clears`.
        confidence: One-sided, in (0.5, 1).
        above: As for `slack`.
        groups: As for `slack`.

    Returns:
        How much worse the mean may be, at least 0; None where not even an edit without any loss is shown to meet it.

    Example:
        >>> allowed_loss(np.ones(100, dtype=bool), slope=0.95, offset=0.0, confidence=0.95)  # 98 right are not enough
        0.01
    """
    sign, binary = (1.0 if above else -1.0), is_binary(base)
    room = sign * float(base.mean(dtype=np.float64) * (1 - slope) - offset)
    if binary:
        rows = np.flatnonzero(base.astype(bool) == above)
        losses = np.arange(min(len(rows), math.ceil(max(room, 0.0) * len(base)) + 1) + 1) / len(base)
    else:
        losses = np.linspace(0.0, max(room, 0.0), 101)

    def shown(place: int) -> bool:
        if not binary:
            edited = base.astype(np.float64) - sign * losses[place]
        else:
            edited = base.astype(bool).copy()
            edited[rows[np.arange(place) * len(rows) // max(1, place)]] = not above
        return clears(edited, base, slope, offset, confidence, above, groups=groups)

    if not shown(0):
        return None
    low, high = 0, len(losses)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if shown(middle) else (low, middle)
    return float(losses[low])


def needed_examples(
    base: np.ndarray,
    slope: float,
    offset: float,
    confidence: float,
    above: bool = True,
    groups: np.ndarray | None = None,
) -> int | None:
    r"""Return how many examples are needed to show that a bound is met by an edit that changes no score at all.

    With fewer, no edit can be shown to meet it unless it improves the metric.

    Args:
        base: The base's scores on the examples there are; more of them are taken to be alike.
        slope: As for `slack`.
        offset: As for `clears`.
        confidence: One-sided, in (0.5, 1).
        above: As for `slack`.
        groups: As for `slack`; more of them are taken to be alike.

    Returns:
        The number, of groups where there are any; None where the base itself does not meet the bound with room to
        spare, or more than 200,000 are needed.

    Example:
        >>> needed_examples(np.ones(100, dtype=bool), slope=0.95, offset=0.0, confidence=0.95)  # 0.95 ** 59 < 0.05
        59
    """
    sign, mean = (1.0 if above else -1.0), float(base.mean(dtype=np.float64))
    if not sign * (mean - slope * mean - offset) > 0:
        return None

    def shown(count: int) -> bool:
        labels = None
        if groups is not None:
            rows, labels = _groups_alike(groups, count)
            scores = base[rows]
        elif is_binary(base):
            scores = np.arange(count) < math.floor(mean * count + 1e-9)
        else:
            scores = np.quantile(base.astype(np.float64), (np.arange(count) + 0.5) / count)
        return clears(scores, scores, slope, offset, confidence, above, groups=labels)

    low, high = 0, 1 if groups is None else len(np.unique(groups))
    while not shown(high):
        low, high = high, 2 * high  # the lower is not enough
        if high > MAX_EXAMPLES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high


def _groups_alike(groups: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of ``count`` groups of the sizes there are, the largest among them, and the group of each row."""
    _, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    chosen = np.argsort(-sizes, kind="stable")[np.arange(count) * len(sizes) // count]
    lengths, starts = sizes[chosen], (np.cumsum(sizes) - sizes)[chosen]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows = np.argsort(index, kind="stable")[np.repeat(starts, lengths) + within]
    return rows, np.repeat(np.arange(count), lengths)
