"""Sums over tensors that are seen chunk by chunk, bit for bit independent of the chunks."""

from __future__ import annotations

import math

from tva._torch import Tensor, torch
from tva.merge.base import Chunk

BLOCK = 2**14  # elements; torch sums as many in one thread, in an order that depends on nothing else


class Sum:
    """Add up float64 values: within blocks that begin at multiples of `BLOCK`, then exactly over blocks and tensors.

    The chunks of one tensor must come in their order; those of several tensors may come in any.
    """

    def __init__(self) -> None:
        self._blocks: list[float] = []
        self._open: dict[str, Tensor] = {}  # the begun block of each tensor that is not through

    def add(self, values: Tensor, chunk: Chunk) -> None:
        """Add one chunk, flat, of the tensor ``chunk.tensor``."""
        is_last = chunk.start + len(values) >= math.prod(chunk.shape)
        values = values.double()
        if chunk.tensor in self._open:
            values = torch.cat([self._open.pop(chunk.tensor), values])
        stop = len(values) if is_last else len(values) // BLOCK * BLOCK
        self._blocks += [float(block.sum()) for block in values[:stop].split(BLOCK)]
        if not is_last:
            self._open[chunk.tensor] = values[stop:].clone()

    def close(self) -> None:
        """Keep only the total: nothing will be added."""
        self._blocks = [self.total]

    @property
    def total(self) -> float:
        """The sum of all that was added, blocks added without rounding."""
        return math.fsum(self._blocks)
