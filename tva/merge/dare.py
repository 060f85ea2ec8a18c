"""DARE: drop deltas at random and rescale the rest, by random numbers that depend on their place alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import xxhash
from torch import Tensor

from tva.merge.method import Method, Place

_PIECE = 2**32  # elements that share the upper part of their index


@dataclass(frozen=True)
class Dare(Method):
    r"""Drop each element with probability ``drop`` and divide the others by ``1 - drop``.

    Which elements are dropped depends on (seed, vector, tensor name, element index) alone: the same for any order of
    tensors, any chunks, threads and device.

    Args:
        drop: Probability, in [0, 1).
        seed: Any integer.

    Source: Yu et al., "Language models are super Mario", ICML 2024.
    """

    drop: float = 0.9
    seed: int = 0

    usage = "dare(v, drop=0.9, seed=0)"
    num_vectors = 1
    random = True

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must lie in [0, 1), where 0 keeps all; found {self.drop}.")

    def merge(self, deltas: Sequence[Tensor], state: Any, place: Place) -> Tensor:
        (delta,) = deltas
        bits = random_bits(delta.numel(), place, self.seed).numpy()
        keep = (bits >= round(self.drop * 2**32) - 2**31).astype(numpy.float32)  # torch takes longer for booleans
        return (delta / (1 - self.drop)).mul_(torch.from_numpy(keep).to(delta.device))


def random_bits(count: int, place: Place, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Give uniform random int32 numbers for elements ``place.start`` and following.

    Args:
        count: How many elements.
        place: Its tensor name, first source and start are the key.
        seed: Any integer.
        device: Where to compute; the numbers do not depend on it.

    Returns:
        Shape (count,), int32, uniform over all of its values.

    Example:
        >>> whole = random_bits(8, Place("w", 0, ("a",)), seed=0)
        >>> torch.equal(whole[3:], random_bits(5, Place("w", 3, ("a",)), seed=0))
        True
    """
    source = place.sources[0] if place.sources else ""
    pieces = []
    start, stop = place.start, place.start + count
    while start < stop:
        upper = start // _PIECE
        length = min(stop, (upper + 1) * _PIECE) - start
        key = xxhash.xxh3_64_intdigest(f"{seed}\0{source}\0{place.tensor}\0{upper}".encode())
        begin = start - upper * _PIECE
        bits = numpy.arange(begin, begin + length, dtype=numpy.uint32)
        bits ^= numpy.uint32(key >> 32)
        _mix(bits)
        bits ^= numpy.uint32(key & 0xFFFFFFFF)
        _mix(bits)
        pieces.append(bits)
        start += length
    bits = pieces[0] if len(pieces) == 1 else numpy.concatenate([numpy.empty(0, numpy.uint32), *pieces])
    return torch.from_numpy(bits.view(numpy.int32)).to(device)


def _mix(x: numpy.ndarray) -> None:
    """Mix uint32 in place, each bit into all others: the ``lowbias32`` permutation of Chris Wellons."""
    x ^= x >> 16
    x *= numpy.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= numpy.uint32(0x846CA68B)
    x ^= x >> 16
