"""Exact order statistics of tensors that are seen piece by piece, without sorting."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

_BINS = 2**16  # values of the upper, and of the lower, 16 bits of a float32
_ENOUGH = 2**17  # elements, from which a rank is known to a bin
_LOOKED_INTO = 3  # bins around each rank expected, each an interval of less than 0.8 % of its value


class OrderStatistics:
    """Find some of the values that sorting would bring to given ranks, by counting, from pieces seen twice.

    The bits of float32 values, turned where negative, order as the values do. The first pass counts their upper 16 bits
    and finds the bin of each rank wanted; the second counts the lower 16 bits within these bins. The first pass counts
    those of a few bins too, where the first piece lets the ranks be expected: mostly the second is not needed. Counts
    depend neither on the pieces nor on their order, nor on what was expected. Float64 input is rounded to float32.

    Args:
        ranks: Gives the ranks wanted, from 0 for the smallest, when told how many values there are (at least one).
        signed: Whether values may be negative; their magnitudes are meant otherwise.

    Attributes:
        values: After both passes, or when they are found: the value of each rank; empty if nothing was seen.
        found: Whether a second pass is not needed.

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
        self.found = False
        self._ranks, self._signed = ranks, signed
        self._num_bins = _BINS if signed else _BINS // 2
        self._lock = threading.Lock()
        self._counts: dict[tuple[int, int], numpy.ndarray] = {}  # of each thread: all bins (-1), or within one
        self._near: dict[int, numpy.ndarray] = {}  # of each thread: within the bins that are looked into at once
        self._first: numpy.ndarray | None = None  # of these bins, for each rank
        self._wanted: list[tuple[int, int]] = []  # bin, and rank within the bin

    def observe(self, piece: Tensor, sweep: int) -> None:
        """Count one piece, flat; several threads may at once."""
        from tva.kernels import count_both, count_lower

        if self.found:
            return
        values = piece.detach().float().contiguous().cpu().numpy()
        if sweep == 0:
            if len(values) == 0:
                return
            with self._lock:
                if self._first is None:
                    self._first = self._expect(values)
            near = _own(self._near, threading.get_ident(), len(self._first), _LOOKED_INTO * _BINS)
            count_both(values, self._signed, self._mine(-1), self._first, near)
        else:
            for high in {high for high, _ in self._wanted}:
                count_lower(values, self._signed, high, self._mine(high))

    def _expect(self, values: numpy.ndarray) -> numpy.ndarray:
        """Say which bins to look into at once, from the beginning of the first piece."""
        from tva.kernels import count_upper, locate

        values = values[:_ENOUGH]
        counts = _zeros(self._num_bins)
        count_upper(values, self._signed, counts)
        bins = [locate(counts, rank)[0] for rank in self._ranks(len(values))]
        return numpy.array(sorted({max(0, high - _LOOKED_INTO // 2) for high in bins}), numpy.uint32)

    def _mine(self, which: int) -> numpy.ndarray:
        return _own(self._counts, (threading.get_ident(), which), self._num_bins if which < 0 else _BINS)

    def _all(self, which: int) -> numpy.ndarray:
        """Sum up what the threads have counted."""
        return _total([counts for (_, mine), counts in self._counts.items() if mine == which])

    def _seen_within(self, high: int) -> numpy.ndarray | None:
        """Give the counts within a bin, if the first pass looked into it."""
        for j, first in enumerate([] if self._first is None else self._first):
            if first <= high < first + _LOOKED_INTO:
                start = (high - first) * _BINS
                return _total([near[j, start : start + _BINS] for near in self._near.values()])
        return None

    def finish(self, sweep: int) -> None:
        """Close a pass."""
        from tva.kernels import locate

        if self.found:
            return
        if sweep == 0:
            counts = self._all(-1)
            count = int(counts.sum())
            self._wanted = [locate(counts, rank) for rank in self._ranks(count)] if count else []
            within = {high: self._seen_within(high) for high, _ in self._wanted}
            self.found = all(counts is not None for counts in within.values())
            self._near = {}
        else:
            within = {high: self._all(high) for high, _ in self._wanted}
        if sweep == 1 or self.found:
            for high, rank in self._wanted:
                self.values.append(_value(high * _BINS + locate(within[high], rank)[0], self._signed))
            self.found = True
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


def _zeros(*shape: int) -> numpy.ndarray:
    return numpy.zeros(shape, numpy.int64)


def _total(counts: list[numpy.ndarray]) -> numpy.ndarray:
    return counts[0] if len(counts) == 1 else sum(counts, _zeros(1))


def _own(counts: dict[Any, numpy.ndarray], key: object, *shape: int) -> numpy.ndarray:
    if key not in counts:
        counts[key] = _zeros(*shape)
    return counts[key]


def _value(key: int, signed: bool) -> float:
    bits = key if not signed else key ^ 0x80000000 if key >= 2**31 else key ^ 0xFFFFFFFF
    return float(numpy.array(bits, numpy.uint32).view(numpy.float32))
