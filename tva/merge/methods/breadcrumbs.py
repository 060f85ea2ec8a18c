"""Model Breadcrumbs: drop each tensor's largest and smallest deltas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from numpy import ndarray

from tva._torch import Tensor, torch
from tva.merge.base import Chunk, Method
from tva.merge.order_statistics import HELD_BYTES, PASSES, OrderStatistics, after, limit, trim
from tva.merge.program import MUL, SUB, TRIM, Step, Steps


@dataclass(frozen=True)
class Breadcrumbs(Method):
    r"""Zero the elements of smallest and of largest magnitude in each tensor, and keep those between.

    Of a tensor of :math:`n` elements the ``floor(top * n)`` largest and the ``floor(bottom * n)`` smallest magnitudes
    go; elements that equal the largest or smallest one kept are kept too. The paper sums such vectors:
    ``0.3 * (breadcrumbs(a) + breadcrumbs(b))``. This is the paper's rule, over whole tensors, in one pass or two; its
    authors' code goes row by row instead: ``rows=True``, which needs whole tensors and no pass.

    Args:
        top: Fraction of outliers to drop, in [0, 1); the paper keeps what is below its quantile 99.3%.
        bottom: Fraction of small elements to drop, in [0, 1); the paper's is 85%. ``top + bottom`` is below 1.
        density: Fraction to keep in place of ``bottom``, as in mergekit: ``int(density * n)`` elements, those below the
            ``int(top * n)`` largest, or the smallest of all where there are not as many below. 0: ``bottom`` counts.
        rows: Take both fractions of every row, that is of the last dimension, instead of every tensor.

    Source: Davari and Belilovsky, "Model breadcrumbs: scaling multi-task model merging with sparse masks", ECCV 2024.
    """

    top: float = 0.007
    bottom: float = 0.85
    density: float = 0.0
    rows: bool = False

    name = "breadcrumbs"
    usage = "breadcrumbs(v, top=0.007, bottom=0.85), breadcrumbs(v, top=0.01, density=0.15) or …, rows=True)"
    num_vectors = 1
    counts = True

    def __post_init__(self) -> None:
        if self.density and not (0 <= self.top < 1 and 0 < self.density <= 1):
            raise ValueError(
                f"top is the fraction of elements to drop, in [0, 1), and density the fraction to keep, in (0, 1]; "
                f"found top={self.top}, density={self.density}."
            )
        if not self.density and not (self.top >= 0 and self.bottom >= 0 and self.top + self.bottom < 1):
            raise ValueError(
                f"top and bottom are the fractions of elements to drop, at least 0 and together below 1; "
                f"found top={self.top}, bottom={self.bottom}."
            )

    @property
    def num_passes(self) -> int:
        return 0 if self.rows else PASSES

    @property
    def usual_passes(self) -> int:
        return min(self.num_passes, 1)

    @property
    def whole(self) -> bool:
        return bool(self.rows)

    def observing_bytes(self, num_vectors: int) -> int:
        return 0 if self.rows else 2 * HELD_BYTES

    def start(self, num_vectors: int) -> OrderStatistics:
        return OrderStatistics(self._smallest_and_largest_kept)

    def _smallest_and_largest_kept(self, count: int) -> list[int]:
        if self.density:
            kept = max(1, int(self.density * count))
            first = min(max(0, count - kept - int(self.top * count)), count - kept)
            return [first, first + kept - 1]
        dropped = [math.floor(fraction * count + 1e-9) for fraction in (self.bottom, self.top)]
        return [min(dropped[0], count - 1 - dropped[1]), count - 1 - dropped[1]]

    def _keeps_none(self, chunk: Chunk) -> bool:
        return self.density > 0 and self.density * math.prod(chunk.shape) < 1

    def observe(
        self, state: OrderStatistics, deltas: Iterable[Tensor | ndarray], chunk: Chunk, pass_number: int
    ) -> None:
        for delta in deltas:
            state.observe(delta, pass_number)

    def finish(self, state: OrderStatistics, pass_number: int) -> None:
        state.finish(pass_number)

    def ready(self, state: OrderStatistics, pass_number: int) -> bool:
        return state.found

    def merge(self, deltas: Sequence[Tensor], state: OrderStatistics | None, chunk: Chunk) -> Tensor:
        if self.rows:
            return self._merge_rows(deltas[0], chunk.shape[-1] if chunk.shape else 1)
        if not state.values:
            return deltas[0]
        if self._keeps_none(chunk):
            return deltas[0] * 0
        smallest, largest = state.values
        return trim(deltas[0], smallest) - trim(deltas[0], after(largest))  # without rounding: all, one, or none is 0

    def in_steps(self, arguments: Sequence[Steps], state: OrderStatistics | None, chunk: Chunk) -> Steps | None:
        if self.rows:
            return None
        if not state.values:
            return arguments[0]
        if self._keeps_none(chunk):
            return (*arguments[0], Step(MUL, numbers=(0.0,)))
        smallest, largest = state.values
        upper = Step(TRIM, numbers=(limit(after(largest)),))
        return (*arguments[0], Step(TRIM, numbers=(limit(smallest),)), *arguments[0], upper, Step(SUB))

    def _merge_rows(self, delta: Tensor, columns: int) -> Tensor:
        if not delta.numel():
            return delta.clone()
        if self.density and self.density * columns < 1:
            return delta * 0
        rows = delta.view(-1, columns)
        ordered = rows.abs().sort(dim=1).values
        smallest, largest = (ordered[:, rank, None] for rank in self._smallest_and_largest_kept(columns))
        return torch.where((rows.abs() >= smallest) & (rows.abs() <= largest), rows, 0).view(-1)
