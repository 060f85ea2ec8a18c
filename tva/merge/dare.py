"""DARE: drop deltas at random and rescale the rest, by random numbers that depend on their place alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
        keep = random_bits(delta.numel(), place, self.seed, delta.device) >= round(self.drop * 2**32) - 2**31
        return torch.where(keep, delta / (1 - self.drop), 0)


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
        first, second = _signed(key >> 32), _signed(key & 0xFFFFFFFF)
        begin = start - upper * _PIECE
        index = torch.arange(begin, begin + length, device=device).to(torch.int32)  # wraps to the same 32 bits
        pieces.append(_mix(_mix(index.bitwise_xor_(first)).bitwise_xor_(second)))
        start += length
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)


def _mix(x: Tensor) -> Tensor:
    """Mix int32 in place, each bit into all others: the ``lowbias32`` permutation of Chris Wellons."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value
