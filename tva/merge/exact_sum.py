"""Sums over tensors that are seen piece by piece, the same to the last bit whatever the pieces."""

from __future__ import annotations

import math

from tva._torch import Tensor, torch
from tva.merge.base import Place

BLOCK = 2**14  # elements; torch sums as many in one thread, in an order that depends on nothing else


class Sum:
    """Add up float64 values: within blocks that begin at multiples of `BLOCK`, then exactly over blocks and tensors.

    The pieces of one tensor must come in their order; those of several tensors may come in any.
    """

    def __init__(self) -> None:
        self._blocks: list[float] = []
        self._open: dict[str, Tensor] = {}  # the begun block of each tensor that is not through

    def add(self, values: Tensor, place: Place) -> None:
        """Add one piece, flat, of the tensor ``place.tensor``."""
        is_last = place.start + len(values) >= math.prod(place.shape)
        values = values.double()
        if place.tensor in self._open:
            values = torch.cat([self._open.pop(place.tensor), values])
        stop = len(values) if is_last else len(values) // BLOCK * BLOCK
        self._blocks += [float(block.sum()) for block in values[:stop].split(BLOCK)]
        if not is_last:
            self._open[place.tensor] = values[stop:].clone()

    @property
    def total(self) -> float:
        """The sum of all that was added, blocks added without rounding."""
        return math.fsum(self._blocks)
