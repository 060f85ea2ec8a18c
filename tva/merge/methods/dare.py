"""DARE: drop deltas at random and rescale the rest, by random numbers that depend on their place only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import xxhash

from tva._torch import Tensor, torch
from tva.merge.base import Chunk, Method
from tva.merge.program import DROP, Step, Steps

_CHUNK = 2**32  # elements that share the upper part of their index


@dataclass(frozen=True)
class Dare(Method):
    r"""Drop each element with probability ``drop`` and divide the others by ``1 - drop``.

    mergekit's ``dare_ties`` and ``dare_linear`` restore the sum of magnitudes instead: ``rescale(dare(v), v)``.

    Which elements are dropped depends on (seed, vector, tensor name, element index) only: the same for any order of
    tensors, any chunks, threads and device.

    Args:
        drop: Probability, in [0, 1).
        seed: Any integer.
        rescale: Divide what is kept by ``1 - drop`` (``"probability"``, as in the paper), or leave it (``"none"``).

    Source: Yu et al., "Language models are super Mario", ICML 2024.
    """

    drop: float = 0.9
    seed: int = 0
    rescale: Literal["probability", "none"] = "probability"

    name = "dare"
    usage = 'dare(v, drop=0.9, seed=0, rescale="probability" or "none")'
    num_vectors = 1
    random = True

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be in [0, 1), where 0 keeps all; found {self.drop}.")
        if self.rescale not in ("probability", "none"):
            raise ValueError(f"dare has rescale 'probability' or 'none'; found {self.rescale!r}.")

    def merge(self, deltas: Sequence[Tensor], state: Any, chunk: Chunk) -> Tensor:
        (delta,) = deltas
        keep = (random_bits(delta.numel(), chunk, self.seed) >= self._lowest).to(delta.dtype)
        return (delta / self._divisor).mul_(keep.to(delta.device))

    @property
    def _divisor(self) -> float:
        return 1 - self.drop if self.rescale == "probability" else 1.0

    @property
    def _lowest(self) -> int:
        """Random bits that keep an element, as int32, are at least this."""
        return round(self.drop * 2**32) - 2**31

    def in_steps(self, arguments: Sequence[Steps], state: Any, chunk: Chunk) -> Steps | None:
        if math.prod(chunk.shape) > _CHUNK:
            return None
        return (*arguments[0], Step(DROP, self._lowest, (self._divisor,), _key(chunk, self.seed, 0)))


def random_bits(count: int, chunk: Chunk, seed: int) -> Tensor:
    """Return uniform random int32 numbers for elements ``chunk.start`` and following.

    Args:
        count: How many elements.
        chunk: Its tensor name, first source and start are the key.
        seed: Any integer.

    Returns:
        Shape (count,), int32, uniform over all of its values.

    Example:
        >>> whole = random_bits(8, Chunk("w", 0, ("a",)), seed=0)
        >>> torch.equal(whole[3:], random_bits(5, Chunk("w", 3, ("a",)), seed=0))
        True
    """
    from tva.merge import kernels

    bits = torch.empty(count, dtype=torch.int32)
    start, stop = chunk.start, chunk.start + count
    for upper in range(start // _CHUNK, -(-stop // _CHUNK)):
        low, high = max(start, upper * _CHUNK), min(stop, (upper + 1) * _CHUNK)
        part = bits[low - start : high - start].numpy()
        kernels.random_bits(low - upper * _CHUNK, *_key(chunk, seed, upper), part)
    return bits


def _key(chunk: Chunk, seed: int, upper: int) -> tuple[int, int]:
    """Return the two halves of the key of a stretch of `_CHUNK` elements."""
    source = chunk.sources[0] if chunk.sources else ""
    key = xxhash.xxh3_64_intdigest(f"{seed}\0{source}\0{chunk.tensor}\0{upper}".encode())
    return key >> 32, key & 0xFFFFFFFF
