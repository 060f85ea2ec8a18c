"""Intervals of metrics that are no mean over examples (F1, AUROC), by leaving out a part of the examples at a time.

Where such intervals cover, and where there are none, was simulated: docs/results/gate.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from tva.evaluation.intervals import SEED, Ends, effective_groups
from tva.report.edit_report import Comparison

NUM_PARTS = 200  # left out one at a time
NUM_SPLITS = 10  # into two halves each, which show a bias
FEWEST_UNITS = 50  # examples, or groups, below which there is no interval
FEWEST_OF_A_CLASS = 8  # of each class that occurs
TOLERATED_BIAS = 0.3  # standard errors by which halves may be off


@dataclass(frozen=True)
class Jackknife:
    """A metric of all examples and of most of them.

    Attributes:
        value: Of all.
        without: Without one part at a time, shape (parts,).
        halves: The mean over halves of the examples.
        enough: Whether there are enough examples, in all and of each class.
    """

    value: float
    without: np.ndarray
    halves: float
    enough: bool

    @property
    def is_share(self) -> bool:
        """Whether all values are in [0, 1]."""
        return bool((self.without >= 0).all() and (self.without <= 1).all()) and 0 <= self.value <= 1

    @property
    def covered(self) -> bool:
        """Whether an interval would cover: enough examples, a spread, no end of the scale and no visible bias."""
        error = standard_error(self.without)
        at_end = self.is_share and self.value in (0, 1)
        if not self.enough or not error > 0 or at_end or not math.isfinite(self.value + self.halves + error):
            return False
        return abs(self.halves - self.value) <= TOLERATED_BIAS * error

    def interval(self) -> Ends:
        r"""Compute the 95% interval.

        Returns:
            Lower and upper end, on the scale of the logit for a metric in [0, 1], else Student's. None where such an
            interval would not cover: of fewer than 50 examples, or fewer than 8 of a class; of 0 and of 1; and where
            the metric of half of the examples differs from that of all by more than 0.3 standard errors, for then the
            metric has a bias, as a calibration error has.

        Source: Tukey's jackknife, by Efron and Tibshirani, "An introduction to the bootstrap", 1993, chapter 11; of
        AUROC it is DeLong's variance (Arvesen, "Jackknifing U-statistics", 1969). Its standard error is too large
        rather than too small (Efron and Stein, 1981), hence the normal quantile with the logit.
        """
        if not self.covered:
            return None
        if not self.is_share:
            half = float(stats.t.ppf(0.975, len(self.without) - 1)) * standard_error(self.without)
            return self.value - half, self.value + half
        # a part with the only errors: without it the metric is 1, whose logit is infinite
        inside = self.without.clip(self.value / 4, 1 - (1 - self.value) / 4)
        half = float(stats.norm.ppf(0.975)) * standard_error(np.log(inside / (1 - inside)))
        odds = self.value / (1 - self.value)
        low, high = odds * math.exp(-half), odds * math.exp(half)
        return low / (1 + low), high / (1 + high)


def standard_error(without: np.ndarray) -> float:
    """Return the jackknife's standard error from the values without one part at a time."""
    return float(np.sqrt((len(without) - 1) * without.var()))


def jackknife(
    value: float,
    compute: Callable[[np.ndarray], float],
    num_examples: int,
    labels: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> Jackknife:
    """Compute a metric without one part of the examples at a time, and of halves.

    Args:
        value: The metric of all examples.
        compute: Computes it of the examples with these numbers, in ascending order.
        num_examples: Examples.
        labels: The class of each, where they have one.
        groups: The group of each, where groups are the independent draws; they are left out as a whole.

    Source: Kott, "The delete-a-group jackknife", Journal of Official Statistics 2001, for parts of several examples.
    """
    units = np.arange(num_examples) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(units.max()) + 1
    generator = np.random.default_rng(SEED)
    part = (generator.permutation(count) % min(count, NUM_PARTS))[units]
    enough = (count if groups is None else effective_groups(groups)) >= FEWEST_UNITS
    if enough and labels is not None:
        pairs = np.unique(np.stack([labels, units]), axis=1)
        enough = int(np.unique(pairs[0], return_counts=True)[1].min()) >= FEWEST_OF_A_CLASS
    if not enough:
        return Jackknife(value, np.array([value, value]), value, enough=False)
    without = np.array([compute(np.flatnonzero(part != left_out)) for left_out in range(int(part.max()) + 1)])
    halves = []
    for _ in range(NUM_SPLITS):
        side = (generator.permutation(count) % 2)[units]
        halves += [compute(np.flatnonzero(side == half)) for half in (0, 1)]
    return Jackknife(value, without, float(np.mean(halves)), enough=True)


def compare_jackknives(edited: Jackknife, base: Jackknife) -> Comparison:
    r"""Compare a metric with the base's on the same examples, each part of which is left out of both.

    Returns:
        Difference and ratio, with intervals where both metrics have one and they do not move as one. Of metrics in
        [0, 1] they are made of the two intervals and the correlation :math:`\rho` of the metrics (the method of
        variance estimates recovery): :math:`d - \sqrt{(a - l_a)^2 - 2 \rho (a - l_a)(u_b - b) + (u_b - b)^2}` is the
        difference's lower end; the ratio's are those of the logarithms. Else they are the jackknife's.

    Source: Zou and Donner, "Construction of confidence limits about effect measures: a general approach", Statistics
    in Medicine 2008; Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", 1998, for the correlation.
    """
    difference = edited.value - base.value
    ratio = edited.value / base.value if base.value > 0 else None
    ends: Ends = None
    factors: Ends = None
    if edited.covered and base.covered and standard_error(edited.without - base.without) > 0:
        ours, theirs = edited.interval(), base.interval()
        assert ours is not None
        assert theirs is not None
        if edited.is_share and base.is_share:
            correlation = float(np.corrcoef(edited.without, base.without)[0, 1])
            ends = _recovered(edited.value, ours, base.value, theirs, correlation)
            a, b = math.log(edited.value), math.log(base.value)
            logs = [(math.log(low), math.log(high)) for low, high in (ours, theirs)]
            low, high = _recovered(a, logs[0], b, logs[1], correlation)
            factors = math.exp(low), math.exp(high)
        else:
            quantile = float(stats.t.ppf(0.975, len(base.without) - 1))
            half = quantile * standard_error(edited.without - base.without)
            ends = difference - half, difference + half
            if ratio and (edited.without > 0).all() and (base.without > 0).all():
                half = quantile * standard_error(np.log(edited.without / base.without))
                factors = ratio * math.exp(-half), ratio * math.exp(half)
    (low_end, high_end), (low_factor, high_factor) = (each or (None, None) for each in (ends, factors))
    return Comparison(difference, low_end, high_end, ratio, low_factor, high_factor, None)


def _recovered(
    a: float, a_ends: tuple[float, float], b: float, b_ends: tuple[float, float], correlation: float
) -> tuple[float, float]:
    """Return the ends of the interval of a - b, from those of both and their correlation."""

    def length(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))

    return a - b - length(a - a_ends[0], b_ends[1] - b), a - b + length(a_ends[1] - a, b - b_ends[0])
