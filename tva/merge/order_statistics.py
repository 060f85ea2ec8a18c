"""Exact order statistics of tensors that are seen chunk by chunk, without sorting."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy

from tva._torch import Tensor, torch

PASSES = 4  # passes that `OrderStatistics` takes at most; one, or two, are usual
_WINDOW = 2**18  # keys that are counted each by itself; those of 0.8 to 1.6% of a value's neighbours on either side
_COARSE = 16  # lower bits that a sample's counts leave out
_ENOUGH = 2**17  # elements of the first chunk, from which a rank's place is expected
_SAMPLED = 61  # one element in this many is sampled, in every chunk
_KEPT = 16  # counts, of 2 MiB each

HELD_BYTES = 8 * (_WINDOW + 2 + 2**_COARSE)  # that each thread takes for each rank that is looked for

_spare: list[numpy.ndarray] = []  # counts, all zero: new memory would cost more than what is counted in it


@dataclass
class _Wanted:
    """A rank's value: keys between which it is, and the window in which it is looked for.

    Attributes:
        low: The smallest key that it may have.
        high: The largest.
        start: First key of the window.
        shift: Keys are counted by their bits above this many.
    """

    low: int
    high: int
    start: int = 0
    shift: int = 0

    def expect(self, key: int) -> None:
        """Set the window around a key, if there is one."""
        self.start, self.shift = min(max(self.low, key - _WINDOW // 2), max(self.low, self.high - _WINDOW + 1)), 0

    def narrow(self, position: int) -> None:
        """Update the bounds: the key was found before the window (0), in one of its bins, or behind it."""
        if position == 0:
            self.high = self.start - 1
        elif position > _WINDOW:
            self.low = self.start + (_WINDOW << self.shift)
        else:
            self.low = self.start + ((position - 1) << self.shift)
            self.high = self.low + (1 << self.shift) - 1
        self.start = self.low
        self.shift = max(0, (self.high - self.low).bit_length() - _WINDOW.bit_length() + 1)


class OrderStatistics:
    """Find some of the values that sorting would bring to given ranks, by counting, from chunks seen a few times.

    The bits of float32 values, turned where negative, are keys that order as the values do. A pass counts how many keys
    are below a window in which a rank is expected, and the keys within it, each by itself: nearly all that has to be
    done is to compare. The beginning of the first chunk says where the window is, and in the second pass a sample of
    all; should the rank be outside both times, a third pass counts all that is left coarsely and a fourth finds it. The
    values depend neither on the chunks nor on their order, nor on what was expected. Float64 input is rounded to
    float32.

    Args:
        ranks: Returns the ranks wanted, from 0 for the smallest, given how many values there are (at least one).
        signed: Whether values may be negative; their magnitudes are meant otherwise.

    Attributes:
        values: When they are found: the value of each rank; empty if nothing was seen.
        found: Whether no further pass is needed; so it is after ``PASSES``.

    Example:
        >>> median = OrderStatistics(lambda count: [count // 2])
        >>> for pass_number in range(PASSES):
        ...     median.observe(torch.tensor([3.0, -1.0, 2.0]), pass_number)
        ...     median.finish(pass_number)
        >>> median.values
        [2.0]
    """

    def __init__(self, ranks: Callable[[int], list[int]], signed: bool = False) -> None:
        self.values: list[float] = []
        self.found = False
        self._ranks, self._signed = ranks, signed
        self._num_keys = 2**32 if signed else 2**31
        self._lock = threading.Lock()
        self._wanted: list[_Wanted] = []
        self._counts: dict[tuple[int, int], numpy.ndarray] = {}  # of each thread and rank: before, each bin, behind
        self._sample: dict[int, numpy.ndarray] = {}  # of each thread: by the upper bits

    def __getstate__(self) -> dict[str, object]:
        """Return, for another process, what was found."""
        return {"values": self.values, "found": self.found}

    def observe(self, chunk: Tensor | numpy.ndarray, pass_number: int) -> None:
        """Count one chunk, flat; an array is of float32. Several threads may at once."""
        from tva.merge.kernels import count_upper, count_window

        values = chunk if isinstance(chunk, numpy.ndarray) else chunk.detach().float().contiguous().cpu().numpy()
        if self.found or len(values) == 0:
            return
        thread = threading.get_ident()
        if pass_number == 0:
            with self._lock:
                if not self._wanted:
                    first = self._zeros_of_sample()
                    count_upper(values[:_ENOUGH], self._signed, first)
                    self._wanted = [_Wanted(0, self._num_keys - 1) for _ in self._ranks(1)]
                    self._expect(first)
            if thread not in self._sample:
                self._sample[thread] = self._zeros_of_sample()
            count_upper(numpy.ascontiguousarray(values[::_SAMPLED]), self._signed, self._sample[thread])
        for j, wanted in enumerate(self._wanted):
            counts = self._counts.get((thread, j))
            if counts is None:
                with suppress(IndexError):  # none is left
                    counts = _spare.pop()
                self._counts[thread, j] = counts = _zeros(_WINDOW + 2) if counts is None else counts
            count_window(values, self._signed, wanted.start, wanted.shift, counts)

    def _zeros_of_sample(self) -> numpy.ndarray:
        return _zeros(self._num_keys >> _COARSE)

    def _expect(self, sample: numpy.ndarray) -> None:
        """Set the windows around where the ranks are in a sample."""
        from tva.merge.kernels import locate

        for wanted, rank in zip(self._wanted, self._ranks(int(sample.sum())), strict=True):
            wanted.expect((locate(sample, rank)[0] << _COARSE) + (1 << _COARSE) // 2)

    def finish(self, pass_number: int) -> None:
        """Close a pass."""
        from tva.merge.kernels import locate

        if self.found:
            return
        for j, wanted in enumerate(self._wanted):
            counts = _total([counts for (_, mine), counts in self._counts.items() if mine == j])
            wanted.narrow(locate(counts, self._ranks(int(counts.sum()))[j])[0])
        for counts in self._counts.values():
            if len(_spare) < _KEPT:
                counts.fill(0)
                _spare.append(counts)
        self._counts = {}
        self.found = all(wanted.low == wanted.high for wanted in self._wanted)
        if self.found:
            self.values = [_value(wanted.low, self._signed) for wanted in self._wanted]
        elif pass_number == 0:
            self._expect(_total(list(self._sample.values())))
        if self.found or pass_number == 0:
            self._sample = {}


class Threshold(OrderStatistics):
    """Find the magnitude above which the fraction ``density`` of largest values is, at least one.

    Args:
        density: Fraction of values to keep, in (0, 1].
    """

    def __init__(self, density: float) -> None:
        super().__init__(lambda count: [count - num_kept(density, count)])

    @property
    def value(self) -> float:
        """When found: magnitudes of at least this are kept; 0 keeps all."""
        return self.values[0] if self.values else 0.0

    @property
    def limit(self) -> float:
        """The largest magnitude that is zeroed; negative if all are kept."""
        return limit(self.value)


def num_kept(density: float, count: int) -> int:
    """Return how many of ``count`` elements a density keeps: rounded down, but at least one of any tensor."""
    return min(count, max(1, math.floor(density * count + 1e-9)))


def check_density(density: float) -> None:
    """Raise if a density is outside of (0, 1]."""
    if not 0 < density <= 1:
        raise ValueError(f"density is the fraction of elements to keep, in (0, 1]; found {density}.")


def limit(threshold: float) -> float:
    """Return the largest magnitude that a threshold zeroes; negative if it keeps all."""
    return after(threshold, 0) if threshold else -1.0


def trim(delta: Tensor, threshold: float) -> Tensor:
    """Zero the elements whose magnitude, in float32, is below a threshold; the result may be ``delta`` itself."""
    if threshold == 0:
        return delta
    if delta.dtype != torch.float32:
        return torch.where(delta.float().abs() >= threshold, delta, 0)
    return torch.hardshrink(delta, limit(threshold))  # zeroes what is at most this: one pass, a tenth of the time


def after(value: float, towards: float = math.inf) -> float:
    """Return the float32 number next to one."""
    return float(numpy.nextafter(numpy.float32(value), numpy.float32(towards)))


def _zeros(count: int) -> numpy.ndarray:
    return numpy.zeros(count, numpy.int64)


def _total(counts: list[numpy.ndarray]) -> numpy.ndarray:
    return counts[0] if len(counts) == 1 else sum(counts[1:], counts[0])


def _value(key: int, signed: bool) -> float:
    bits = key if not signed else key ^ 0x80000000 if key >= 2**31 else key ^ 0xFFFFFFFF
    return float(numpy.array(bits, numpy.uint32).view(numpy.float32))
