"""Exact order statistics of tensors that are seen piece by piece, without sorting."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
import torch
from torch import Tensor

_BINS = 2**16  # values of the upper, and of the lower, 16 bits of a float32
_ENOUGH = 2**18  # elements to count at once: adding the counts of few takes longer than counting them


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
        self._counts = torch.zeros(_BINS if signed else _BINS // 2, dtype=torch.int64)
        self._seen: list[numpy.ndarray] = []  # upper bits that are not counted yet
        self._within: dict[int, numpy.ndarray] = {}  # bin to the counts of its lower bits
        self._wanted: list[tuple[int, int]] = []  # bin, and rank within the bin

    def observe(self, piece: Tensor, sweep: int) -> None:
        """Count one piece, flat."""
        bits = piece.float().contiguous().cpu().numpy().view(numpy.uint32)
        if self._signed:
            bits = _ordered(bits)
        if sweep == 0:
            upper = bits.view(numpy.uint16)[1::2].copy()
            upper &= numpy.uint16(len(self._counts) - 1)  # of magnitudes not the sign
            self._seen.append(upper)
            if sum(map(len, self._seen)) >= _ENOUGH:
                self._count_seen()
            return
        shift = 0 if self._signed else 1  # which takes the sign off
        for high, counts in self._within.items():  # numpy finds the few elements of a bin ten times as fast as torch
            lower = bits << shift
            lower -= numpy.uint32((high * _BINS + 1) << shift)
            lower = lower[lower < (_BINS - 1) << shift] >> shift  # less 1; of 0, which zeros have, it is a large number
            if len(lower) < _BINS // 8:
                numpy.add.at(counts, lower + 1, 1)
            else:
                counts[1:] += numpy.bincount(lower, minlength=_BINS - 1)

    def _count_seen(self) -> None:
        upper = numpy.concatenate([numpy.empty(0, numpy.uint16), *self._seen])
        upper = upper.astype(numpy.int32) if self._signed else upper.view(numpy.int16)
        self._counts += torch.bincount(torch.from_numpy(upper), minlength=len(self._counts))
        self._seen = []

    def finish(self, sweep: int) -> None:
        """Close a pass."""
        if sweep == 0:
            self._count_seen()
            count = int(self._counts.sum())
            self._wanted = [_locate(self._counts, rank) for rank in self._ranks(count)] if count else []
            self._within = {high: numpy.zeros(_BINS, numpy.int64) for high, _ in self._wanted}
            return
        for high, counts in self._within.items():
            counts[0] = int(self._counts[high]) - counts.sum()
        for high, rank in self._wanted:
            low, _ = _locate(torch.from_numpy(self._within[high]), rank)
            self.values.append(_value(high * _BINS + low, self._signed))


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


def _locate(counts: Tensor, rank: int) -> tuple[int, int]:
    """Find the bin that holds a rank, and the rank within that bin."""
    up_to = counts.cumsum(0)
    position = int(torch.searchsorted(up_to, rank, right=True))
    return position, rank - int(up_to[position] - counts[position])


def _ordered(bits: numpy.ndarray) -> numpy.ndarray:
    """Turn the bits of float32 values so that, as unsigned integers, they order as the values do."""
    bits = (bits.view(numpy.float32) + numpy.float32(0)).view(numpy.int32)  # makes -0.0 the 0.0 that it equals
    return (((bits >> 31) | numpy.int32(-(2**31))) ^ bits).view(numpy.uint32)


def _value(key: int, signed: bool) -> float:
    bits = key if not signed else key ^ 0x80000000 if key >= 2**31 else key ^ 0xFFFFFFFF
    return float(numpy.array(bits, numpy.uint32).view(numpy.float32))
