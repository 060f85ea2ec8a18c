"""PCB: keep, in each vector, the elements that stand out in it and agree with the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tva._torch import Tensor, torch
from tva.merge.base import Chunk, Method
from tva.merge.methods.linear import add_up
from tva.merge.order_statistics import HELD_BYTES, PASSES, OrderStatistics, num_kept


@dataclass
class _State:
    magnitudes: list[OrderStatistics]
    scores: list[OrderStatistics]
    bounds: list[tuple[float, float]] = field(default_factory=list)  # lowest and highest magnitude, once clamped


@dataclass(frozen=True)
class Pcb(Method):
    r"""Balance the competition of parameters, within each vector and between vectors.

    Over each vector as a whole, of :math:`T`: magnitudes are clamped to their quantiles ``clamp`` and ``1 - clamp``,
    which gives :math:`c_t`, and normalized to [0, 1], which gives :math:`n_t`. The score of an element is
    :math:`\exp(T n_t^2)\,\tanh(\tau_t \sum_s \mathrm{sgn}(\tau_s) n_s)`. Scores below the ``ratio`` largest of their
    vector count as the smallest of those; normalized to [0, 1] they are the weights :math:`w_t` of
    :math:`\sum_t w_t c_t / \sum_t w_t`. An element that is among the largest of no vector stays at the base.

    The authors publish two variants; this is the one of their package. That of their stand-alone script has
    :math:`\tanh(\tau_t \sum_s \tau_s)` and clamps less: ``pcb(a, b, between="raw", clamp=0.0001)``. Two to four
    passes over the model. The paper multiplies each vector by 1.2: ``1.2 * pcb(a, b)``.

    Args:
        ratio: Fraction of elements of each vector that keep a weight, in (0, 1].
        clamp: Fraction of smallest, and of largest, magnitudes to clamp, in [0, 0.5).
        between: What a vector must agree with: the sum of all vectors' signs times their normalized magnitudes
            (``"normalized"``), or the sum of the vectors themselves (``"raw"``).

    Source: Du et al., "Parameter competition balancing for model merging", NeurIPS 2024.
    """

    ratio: float = 0.05
    clamp: float = 0.01
    between: Literal["normalized", "raw"] = "normalized"

    name = "pcb"
    usage = 'pcb(a, b, …, ratio=0.05, clamp=0.01, between="normalized" or "raw")'
    num_passes = 2 * PASSES
    over_model = True

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1 or not 0 <= self.clamp < 0.5:
            raise ValueError(
                f"ratio is the fraction of elements to keep, in (0, 1], and clamp that to clamp at either end, in "
                f"[0, 0.5); found ratio={self.ratio}, clamp={self.clamp}."
            )

        if self.between not in ("normalized", "raw"):
            raise ValueError(f"pcb has between 'normalized' or 'raw'; found {self.between!r}.")

    @property
    def usual_passes(self) -> int:
        return 4

    def observing_bytes(self, num_vectors: int) -> int:
        return 2 * num_vectors * HELD_BYTES

    def start(self, num_vectors: int) -> _State:
        vectors = range(num_vectors)
        return _State(
            [OrderStatistics(self._clamped) for _ in vectors], [OrderStatistics(self._kept, True) for _ in vectors]
        )

    def _clamped(self, count: int) -> list[int]:
        tail = math.floor(self.clamp * count + 1e-9)
        return [tail, count - 1 - tail]

    def _kept(self, count: int) -> list[int]:
        return [count - num_kept(self.ratio, count), count - 1]

    def observe(self, state: _State, deltas: Sequence[Tensor], chunk: Chunk, pass_number: int) -> None:
        seen = deltas if pass_number < PASSES else (score for _, score in self._scores(deltas, state))
        for statistics, values in zip(state.magnitudes if pass_number < PASSES else state.scores, seen, strict=True):
            statistics.observe(values, pass_number % PASSES)

    def finish(self, state: _State, pass_number: int) -> None:
        for statistics in state.magnitudes if pass_number < PASSES else state.scores:
            statistics.finish(pass_number % PASSES)
        if pass_number < PASSES:
            state.bounds = [(low, high) for low, high in (s.values or [0.0, 0.0] for s in state.magnitudes)]

    def ready(self, state: _State, pass_number: int) -> bool:
        return all(s.found for s in (state.magnitudes if pass_number < PASSES else state.scores))

    def merge(self, deltas: Sequence[Tensor], state: _State, chunk: Chunk) -> Tensor:
        merged, total = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
        for (clamped, score), statistics in zip(self._scores(deltas, state), state.scores, strict=True):
            low, high = statistics.values or [0.0, 0.0]
            if high > low:
                weight = score.clamp_(min=low).sub_(low).div_(high - low)
                merged += clamped.mul_(weight)
                total += weight
        return merged.div_(total.clamp_(min=1e-12))

    def _scores(self, deltas: Sequence[Tensor], state: _State) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the clamped values and the scores of each vector in turn, the scores in float32 as their ranks are."""
        signs = [delta.sign() for delta in deltas]
        magnitudes = [delta.abs().clamp_(*bounds) for delta, bounds in zip(deltas, state.bounds, strict=True)]
        normalized = [
            (magnitude - low).div_(high - low) if high > low else torch.zeros_like(magnitude)
            for magnitude, (low, high) in zip(magnitudes, state.bounds, strict=True)
        ]
        if self.between == "raw":
            agreement = add_up(deltas)
        else:
            agreement = add_up([sign * share for sign, share in zip(signs, normalized, strict=True)])
        for delta, sign, magnitude, share in zip(deltas, signs, magnitudes, normalized, strict=True):
            # exp(T (n² - 1)) is exp(T n²) but for a factor that normalizing takes away, and never overflows
            stands_out = share.square_().sub_(1).mul_(len(deltas)).exp_()
            yield magnitude.mul_(sign), (delta * agreement).tanh_().mul_(stands_out).float()
