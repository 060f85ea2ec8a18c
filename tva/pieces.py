"""Tensors of a base and its vectors, read piece by piece into memory that is used over and over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from tva.sources import Source
from tva.state_dict import is_edited, sum_dtype
from tva.weights import LazyWeights

AHEAD = 2**23  # elements that the system is told to read ahead


class Space(threading.local):
    """Memory that a thread uses over and over, taken and given back as from a stack, so that it stays in the cache."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        self.next_piece()

    def next_piece(self) -> None:
        """Take everything back."""
        self._taken: dict[torch.dtype, list[Tensor]] = {}

    def take(self, dtype: torch.dtype, length: int) -> Tensor:
        """Give a tensor of one dimension, with any contents."""
        taken = self._taken.setdefault(dtype, [])
        buffers = self._buffers.setdefault(dtype, [])
        if len(taken) == len(buffers):
            buffers.append(torch.empty(length, dtype=dtype))
        elif len(buffers[len(taken)]) < length:
            buffers[len(taken)] = torch.empty(length, dtype=dtype)
        taken.append(buffers[len(taken)][:length])
        return taken[-1]

    def give_back(self, tensor: Tensor) -> None:
        """Free a tensor if it is the last of its dtype that was taken; others wait for the next piece."""
        taken = self._taken.get(tensor.dtype)
        if taken and taken[-1] is tensor:
            taken.pop()


class NewSpace(Space):
    """New memory each time, for pieces that are handed on."""

    def take(self, dtype: torch.dtype, length: int) -> Tensor:
        return torch.empty(length, dtype=dtype)


Reader = Callable[[int, int, Space], Tensor]


class OpenedTensor:
    """One tensor of the base and of the vectors that move it, read a piece at a time."""

    def __init__(
        self, name: str, base: LazyWeights, sources: Mapping[str, Source], piece: int, edited: bool, space: Space
    ) -> None:
        self.name, self.spec, self.sources, self.space = name, base.spec(name), sources, space
        self.length, self.piece = self.spec.shape.numel(), piece
        inputs = (base, *(source.weights for source in sources.values()))
        self._inputs = [weights.entry(name) for weights in inputs if name in weights]
        self._base = self._reader(base)
        self.vectors: dict[str, Reader | None] = {}
        if edited and is_edited(self.spec):
            found = {key: self._reader(s.weights) if name in s.weights else None for key, s in sources.items()}
            moving = {
                key: read if read and (sources[key].origin is not None or self._differs(read)) else None
                for key, read in found.items()
            }
            self.vectors = moving if any(moving.values()) else {}

    def starts(self) -> range:
        """Give where the pieces begin; an empty tensor has one, so that every tensor is seen."""
        return range(0, max(1, self.length), self.piece)

    def _reader(self, weights: LazyWeights) -> Reader:
        entry = weights.entry(self.name)
        if self.length > self.piece and entry.in_parts:
            return lambda start, stop, space: entry.slice_into(space.take(entry.dtype, stop - start), start)
        whole = entry.read().reshape(-1)
        return lambda start, stop, space: whole[start:stop]

    def base_piece(self, start: int) -> Tensor:
        """Read one piece of the base, into memory that is free again with the next piece."""
        self.space.next_piece()
        if start % AHEAD < self.piece and self.length > AHEAD:  # let the system read while this is computed with
            for entry in self._inputs:
                entry.will_need(min(start + AHEAD, self.length), min(start + 2 * AHEAD, self.length))
        return self._base(start, min(start + self.piece, self.length), self.space)

    def widened(self, base: Tensor) -> Tensor:
        """Give a piece of the base in the dtype of sums."""
        if base.dtype == sum_dtype(base):
            return base
        wide = self.space.take(sum_dtype(base), len(base)).copy_(base)
        self.space.give_back(base)
        return wide

    def _differs(self, read: Reader) -> bool:
        """Whether any element differs from the base; stops at the first piece where one does."""
        head = min(self.length, 4096)  # enough for most tensors
        if not torch.equal(read(0, head, self.space), self._base(0, head, self.space)):
            return True
        for start in self.starts():
            base = self.base_piece(start)
            if not torch.equal(read(start, start + len(base), self.space), base):
                return True
        return False


class Deltas(Mapping[str, Tensor]):
    """The deltas of one piece, each made anew when it is asked for: so the memory in use stays in the cache."""

    def __init__(self, opened: OpenedTensor, base: Tensor, start: int) -> None:
        self._opened, self._base, self._start = opened, base, start

    def __getitem__(self, key: str) -> Tensor:
        read, space = self._opened.vectors[key], self._opened.space
        if read is None:
            return space.take(torch.float32, len(self._base)).zero_()
        stored = read(self._start, self._start + len(self._base), space)
        delta = self._opened.sources[key].delta(stored, self._base, space.take)
        space.give_back(stored)
        return delta

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened.vectors)

    def __len__(self) -> int:
        return len(self._opened.vectors)
