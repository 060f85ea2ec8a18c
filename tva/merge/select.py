"""Exact order statistics of tensors that are seen piece by piece, without sorting."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy
import torch
from torch import Tensor

_BINS = 2**16  # values of the upper, and of the lower, 16 bits of a float32


class OrderStatistics:
    """Find some of the values that sorting would bring to given ranks, by counting, from pieces seen twice.

    The bits of float32 values, turned where negative, order as the values do. The first pass counts their upper 16 bits
    and finds the bin of each rank wanted; the second counts the lower 16 bits within these bins. Counts depend neither
    on the pieces nor on their order. Float64 input is rounded to float32.

    Args:
        ranks: Gives the ranks wanted, from 0 for the smallest, when told how many values there are (at least one).
        signed: Whether values may be negative; their magnitudes are meant otherwise.

    Attributes:
        values: After both passes: the value of each rank; empty if nothing was seen.

    Example:
        >>> median = OrderStatistics(lambda count: [count // 2])
        >>> for sweep in (0, 1):
        ...     median.observe(torch.tensor([3.0, -1.0, 2.0]), sweep)
        ...     median.finish(sweep)
        >>> median.values
        [2.0]
    """

    def __init__(self, ranks: Callable[[int], list[int]], signed: bool = False) -> None:
        self.values: list[float] = []
        self._ranks, self._signed = ranks, signed
        self._counts: dict[tuple[int, int], numpy.ndarray] = {}  # of each thread: all bins (-1), or within one
        self._wanted: list[tuple[int, int]] = []  # bin, and rank within the bin

    def observe(self, piece: Tensor, sweep: int) -> None:
        """Count one piece, flat; several threads may at once."""
        from tva.kernels import count_lower, count_upper

        values = piece.detach().float().contiguous().cpu().numpy()
        if sweep == 0:
            count_upper(values, self._signed, self._mine(-1))
        else:
            for high in {high for high, _ in self._wanted}:
                count_lower(values, self._signed, high, self._mine(high))

    def _mine(self, which: int) -> numpy.ndarray:
        key = (threading.get_ident(), which)
        if key not in self._counts:
            self._counts[key] = numpy.zeros(_BINS, numpy.int64)
        return self._counts[key]

    def _all(self, which: int) -> numpy.ndarray:
        return sum((counts for (_, mine), counts in self._counts.items() if mine == which), numpy.zeros(1, numpy.int64))

    def finish(self, sweep: int) -> None:
        """Close a pass."""
        if sweep == 0:
            counts = self._all(-1)
            count = int(counts.sum())
            self._wanted = [_locate(counts, rank) for rank in self._ranks(count)] if count else []
        else:
            for high, rank in self._wanted:
                low, _ = _locate(self._all(high), rank)
                self.values.append(_value(high * _BINS + low, self._signed))
        self._counts = {}


class Threshold(OrderStatistics):
    """Find the magnitude from which on the fraction ``density`` of largest values lies, one at least.

    Args:
        density: Fraction of values to keep, in (0, 1].
    """

    def __init__(self, density: float) -> None:
        super().__init__(lambda count: [count - num_kept(density, count)])

    @property
    def value(self) -> float:
        """After both passes: magnitudes of at least this are kept; 0 keeps all."""
        return self.values[0] if self.values else 0.0

    @property
    def limit(self) -> float:
        """The largest magnitude that is zeroed; negative if all are kept."""
        return after(self.value, 0) if self.value else -1.0


def num_kept(density: float, count: int) -> int:
    """Say how many of ``count`` elements a density keeps: rounded down, but at least one of any tensor."""
    return min(count, max(1, math.floor(density * count + 1e-9)))


def check_density(density: float) -> None:
    """Refuse a density outside of (0, 1]."""
    if not 0 < density <= 1:
        raise ValueError(f"density is the fraction of elements to keep, in (0, 1]; found {density}.")


def trim(delta: Tensor, threshold: float) -> Tensor:
    """Zero the elements whose magnitude, in float32, is below a threshold; the result may be ``delta`` itself."""
    if threshold == 0:
        return delta
    if delta.dtype != torch.float32:
        return torch.where(delta.float().abs() >= threshold, delta, 0)
    return torch.hardshrink(delta, after(threshold, 0))  # zeroes what is at most this: one pass, a tenth of the time


def after(value: float, towards: float = math.inf) -> float:
    """Give the float32 number next to one."""
    return float(numpy.nextafter(numpy.float32(value), numpy.float32(towards)))


def _locate(counts: numpy.ndarray, rank: int) -> tuple[int, int]:
    """Find the bin that holds a rank, and the rank within that bin."""
    up_to = counts.cumsum()
    position = int(numpy.searchsorted(up_to, rank, side="right"))
    return position, rank - int(up_to[position] - counts[position])


def _value(key: int, signed: bool) -> float:
    bits = key if not signed else key ^ 0x80000000 if key >= 2**31 else key ^ 0xFFFFFFFF
    return float(numpy.array(bits, numpy.uint32).view(numpy.float32))
