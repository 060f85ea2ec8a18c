"""Methods that elect a sign for each element and merge what agrees with it: TIES and sign consensus."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from numpy import ndarray

from tva._torch import Tensor, torch
from tva.merge.base import Chunk, Method
from tva.merge.methods.linear import add_up
from tva.merge.order_statistics import HELD_BYTES, PASSES, Threshold, check_density, trim
from tva.merge.program import TIES, Step, Steps


@dataclass(frozen=True)
class Ties(Method):
    r"""Trim, elect a sign, and merge what agrees with it.

    Each vector keeps its ``density`` largest magnitudes, :math:`\hat\tau_t`. The elected sign of an element is that of
    :math:`\sum_t \hat\tau_t`; the result is the mean (or sum) of the :math:`\hat\tau_t` that are not zero and have that
    sign. Vectors vote as they are
    given: ``ties(2 * a, b)`` weights a's vote and its part of the mean. One pass, or two.

    mergekit's rule is ``trim="tensor", undecided="positive"``, but for one thing: of elements that equal the smallest
    magnitude kept, all are kept here, and there as many as fill the fraction, those that an unstable sort happens to
    bring to the front.

    Args:
        density: Fraction to keep, in (0, 1]; the paper's default is 0.2.
        trim: ``"model"``: over each vector as a whole, as in the paper, that is all tensors that at least one of the
            recipe's vectors moves; ``"tensor"``: tensor by tensor, as mergekit and peft do.
        elect: Which vectors vote where ``weights`` are given: ``"weighted"`` ones, as in mergekit, or
            ``"unweighted"``, as in peft.
        combine: ``"mean"`` of those that agree, as in the paper, or their ``"sum"``; both are weighted by ``weights``.
        weights: A number for each vector; by default all are 1. A vector of weight 0 takes no part. One of a negative
            weight votes and counts as if it were turned round, and its weight is negative in the sum by which the mean
            divides, as in mergekit; where that sum is 0, nothing is divided.
        undecided: An element whose sum is exactly zero has no elected sign and stays at the ``"base"``, or takes the
            ``"positive"`` sign, as in mergekit.

    Source: Yadav et al., "TIES-Merging: resolving interference when merging models", NeurIPS 2023.
    """

    density: float = 0.2
    trim: Literal["model", "tensor"] = "model"
    elect: Literal["weighted", "unweighted"] = "weighted"
    combine: Literal["mean", "sum"] = "mean"
    weights: Sequence[float] = ()
    undecided: Literal["base", "positive"] = "base"

    name = "ties"
    usage = 'ties(a, b, …, density=0.2, trim="model" or "tensor", combine=…, elect=…, weights=…, undecided=…)'
    num_passes = PASSES
    counts = True

    def __post_init__(self) -> None:
        check_density(self.density)
        if self.trim not in ("model", "tensor") or self.combine not in ("mean", "sum"):
            raise ValueError(
                f"ties has trim 'model' or 'tensor' and combine 'mean' or 'sum'; found {self.trim!r}, {self.combine!r}."
            )
        if self.elect not in ("weighted", "unweighted"):
            raise ValueError(f"ties has elect 'weighted' or 'unweighted'; found {self.elect!r}.")
        if self.undecided not in ("base", "positive"):
            raise ValueError(f"ties has undecided 'base' or 'positive'; found {self.undecided!r}.")
        if not isinstance(self.weights, Sequence) or not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"weights are finite numbers, such as (1, 0.5); found {self.weights!r}.")
        if self.elect == "unweighted" and not all(weight > 0 for weight in self.weights):
            raise ValueError(f"elect='unweighted' needs positive weights, such as (1, 0.5); found {self.weights!r}.")

    @property
    def over_model(self) -> bool:
        return self.trim == "model"

    @property
    def usual_passes(self) -> int:
        return 2 if self.over_model else 1

    def observing_bytes(self, num_vectors: int) -> int:
        return num_vectors * HELD_BYTES

    def start(self, num_vectors: int) -> list[Threshold]:
        if self.weights and len(self.weights) != num_vectors:
            raise ValueError(
                f"ties was given {num_vectors} vectors and {len(self.weights)} weights; give one for each."
            )
        return [Threshold(self.density) for _ in range(num_vectors)]

    def observe(
        self, state: list[Threshold], deltas: Iterable[Tensor | ndarray], chunk: Chunk, pass_number: int
    ) -> None:
        for threshold, delta in zip(state, deltas, strict=True):
            threshold.observe(delta, pass_number)

    def finish(self, state: list[Threshold], pass_number: int) -> None:
        for threshold in state:
            threshold.finish(pass_number)

    def ready(self, state: list[Threshold], pass_number: int) -> bool:
        return all(threshold.found for threshold in state)

    def merge(self, deltas: Sequence[Tensor], state: list[Threshold], chunk: Chunk) -> Tensor:
        trimmed = [trim(delta, threshold.value) for delta, threshold in zip(deltas, state, strict=True)]
        weights = self.weights or [1.0] * len(deltas)
        voters = zip(trimmed, weights, strict=True) if self.elect == "weighted" else ((t, 1.0) for t in trimmed)
        elected = add_up([delta if weight == 1 else delta * weight for delta, weight in voters])
        elected = elected.sign_() if self.undecided == "base" else torch.where(elected < 0, -1.0, 1.0).to(elected)
        if min(weights) < 0:
            return self._merge_signed(trimmed, elected, weights)
        return merge_agreeing(trimmed, elected, self.combine == "mean", weights)

    def _merge_signed(self, trimmed: Sequence[Tensor], elected: Tensor, weights: Sequence[float]) -> Tensor:
        turned = [delta * weight for delta, weight in zip(trimmed, weights, strict=True)]
        agreeing = [(value * elected > 0).to(value) for value in turned]
        merged = add_up([value * agrees for value, agrees in zip(turned, agreeing, strict=True)])
        if self.combine == "sum":
            return merged
        total = add_up([agrees * weight for agrees, weight in zip(agreeing, weights, strict=True)])
        return merged / torch.where(total == 0, 1, total)

    def in_steps(self, arguments: Sequence[Steps], state: list[Threshold], chunk: Chunk) -> Steps | None:
        weights = self.weights or [1.0] * len(arguments)
        if min(weights) < 0:
            return None
        positive = float(self.undecided == "positive")
        rule = (float(self.combine == "mean"), float(self.elect == "weighted"), _least(weights), positive)
        numbers = (*rule, *(threshold.limit for threshold in state), *weights)
        return (*chain(*arguments), Step(TIES, len(arguments), numbers))


@dataclass(frozen=True)
class SignConsensus(Method):
    r"""Elect the sign of each element and merge the vectors that have it: TIES without its trimming.

    Args:
        vote: The elected sign is that of the ``"sum"`` of the values, as in TIES, or of the ``"count"`` of their
            signs. Where neither side wins, the element stays at the base.
        min_agree: Elements on which fewer vectors have the elected sign stay at the base.
        combine: ``"mean"`` of those that agree, or their ``"sum"``.

    Source: the election of Yadav et al., "TIES-Merging", NeurIPS 2023, section 4.
    """

    vote: Literal["sum", "count"] = "sum"
    min_agree: int = 1
    combine: Literal["mean", "sum"] = "mean"

    name = "sign_consensus"
    usage = 'sign_consensus(a, b, …, vote="sum" or "count", min_agree=1, combine="mean" or "sum")'

    def __post_init__(self) -> None:
        if self.vote not in ("sum", "count") or self.combine not in ("mean", "sum"):
            raise ValueError(
                f"sign_consensus has vote 'sum' or 'count' and combine 'mean' or 'sum'; "
                f"found {self.vote!r}, {self.combine!r}."
            )

    def merge(self, deltas: Sequence[Tensor], state: None, chunk: Chunk) -> Tensor:
        elected = add_up(deltas if self.vote == "sum" else [delta.sign() for delta in deltas]).sign_()
        if self.min_agree > 1:
            agreeing = add_up([delta.sign().mul_(elected).clamp_(min=0) for delta in deltas])
            elected *= agreeing >= self.min_agree
        return merge_agreeing(deltas, elected, self.combine == "mean", [1.0] * len(deltas))


def merge_agreeing(deltas: Sequence[Tensor], elected: Tensor, mean: bool, weights: Sequence[float]) -> Tensor:
    """Return the weighted mean, or sum, of the elements that are not zero and have the elected sign.

    Args:
        deltas: One chunk of each vector.
        elected: 1, -1, or 0 where the result is to be 0.
        mean: Divide by the sum of the weights of those that agree.
        weights: One for each vector, at least 0.
    """
    merged, count = torch.zeros_like(elected), torch.zeros_like(elected)
    part = torch.empty_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        torch.mul(delta, elected, out=part).clamp_(min=0)  # the magnitude where it agrees, else 0
        merged += part if weight == 1 else part * weight
        if mean:
            part.sign_()
            count += part if weight == 1 else part * weight
    if mean:
        merged /= count.clamp_(min=_least(weights))
    return merged.mul_(elected)


def _least(weights: Sequence[float]) -> float:
    """Return the smallest weight that counts, so that nothing is divided by zero."""
    return min((weight for weight in weights if weight), default=1.0)
