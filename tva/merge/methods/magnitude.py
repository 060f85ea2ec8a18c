"""Methods that keep some of the elements of one task vector by their magnitude."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from numpy import ndarray

from tva._torch import Tensor
from tva.merge.base import Chunk, Method
from tva.merge.order_statistics import HELD_BYTES, PASSES, Threshold, check_density, trim
from tva.merge.program import TRIM, Step, Steps


@dataclass(frozen=True)
class Magnitude(Method):
    """Keep the fraction ``density`` of elements of largest magnitude in each tensor, and zero the others.

    Elements that equal the smallest one kept are kept too. One pass, or two.

    Args:
        density: Fraction to keep, in (0, 1].
    """

    density: float

    name = "magnitude"
    usage = "magnitude(v, density=0.2)"
    num_vectors = 1
    num_passes = PASSES
    counts = True

    def __post_init__(self) -> None:
        check_density(self.density)

    @property
    def usual_passes(self) -> int:
        return 1

    def observing_bytes(self, num_vectors: int) -> int:
        return HELD_BYTES

    def start(self, num_vectors: int) -> Threshold:
        return Threshold(self.density)

    def observe(self, state: Threshold, deltas: Iterable[Tensor | ndarray], chunk: Chunk, pass_number: int) -> None:
        for delta in deltas:
            state.observe(delta, pass_number)

    def finish(self, state: Threshold, pass_number: int) -> None:
        state.finish(pass_number)

    def ready(self, state: Threshold, pass_number: int) -> bool:
        return state.found

    def merge(self, deltas: Sequence[Tensor], state: Threshold, chunk: Chunk) -> Tensor:
        return trim(deltas[0], state.value)

    def in_steps(self, arguments: Sequence[Steps], state: Threshold, chunk: Chunk) -> Steps:
        return (*arguments[0], Step(TRIM, numbers=(state.limit,)))
