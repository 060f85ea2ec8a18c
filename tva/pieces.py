"""Tensors of a base and its vectors, read piece by piece into memory that is used over and over.

Where the dtypes allow, a piece of the base and of each vector lies in a row of its own, as stored, and `tva.kernels`
computes with the rows; else torch computes with one tensor after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy
import torch
from torch import Tensor

from tva import kernels
from tva.sources import Source
from tva.state_dict import is_edited, sum_dtype
from tva.steps import LOAD, ZERO, Program, Step, Steps, encode
from tva.weights import Entry, LazyWeights

AHEAD = 2**23  # elements that the system is told to read ahead
FUSED_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as `tva.kernels` numbers them


class Space(threading.local):
    """Memory that a thread uses over and over, taken and given back as from a stack, so that it stays in the cache."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        self._rows = torch.empty(0, 0, dtype=torch.uint8)
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

    def rows(self, num_rows: int, num_bytes: int) -> Tensor:
        """Give rows of at least so many bytes, with any contents; the next call gives the same memory."""
        if self._rows.shape[0] < num_rows or self._rows.shape[1] < num_bytes:
            self._rows = torch.empty(num_rows, -(-num_bytes // 64) * 64, dtype=torch.uint8)
        return self._rows


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
        inputs = [base, *(source.weights for source in sources.values())]
        self._entries = [weights.entry(name) if name in weights else None for weights in inputs]
        self._base = self._reader(self._entries[0])
        self.fused = False
        self.vectors: dict[str, Reader | None] = {}
        if edited and is_edited(self.spec):
            found = {
                key: None if entry is None else self._reader(entry)
                for key, entry in zip(sources, self._entries[1:], strict=True)
            }
            moving = {
                key: read if read and (sources[key].origin is not None or self._differs(read)) else None
                for key, read in found.items()
            }
            self.vectors = moving if any(moving.values()) else {}
        present = [entry for entry in self._entries if entry is not None]
        self.fused = bool(self.vectors) and not isinstance(space, NewSpace)
        self.fused &= all(entry.dtype in FUSED_DTYPES and entry.in_parts for entry in present)
        if self.fused:
            widest = max(entry.dtype.itemsize for entry in present)
            self._rows = space.rows(len(self._entries), min(piece, self.length) * widest)
            self._views = self._rows.numpy().view(numpy.uint16), self._rows.numpy().view(numpy.float32)
            self._kinds = numpy.array([FUSED_DTYPES[entry.dtype] if entry else 0 for entry in self._entries])
            self._relative = numpy.array([False, *(source.origin is None for source in sources.values())])
            self._loaded: set[int] = set()

    def starts(self) -> range:
        """Give where the pieces begin; an empty tensor has one, so that every tensor is seen."""
        return range(0, max(1, self.length), self.piece)

    def _reader(self, entry: Entry) -> Reader:
        if self.length > self.piece and entry.in_parts:
            return lambda start, stop, space: entry.slice_into(space.take(entry.dtype, stop - start), start)
        whole = cache(lambda: entry.read().reshape(-1))
        return lambda start, stop, space: whole()[start:stop]

    def base_piece(self, start: int) -> Tensor:
        """Read one piece of the base, into memory that is free again with the next piece."""
        self.space.next_piece()
        if start % AHEAD < self.piece and self.length > AHEAD:  # let the system read while this is computed with
            for entry in filter(None, self._entries):
                entry.will_need(min(start + AHEAD, self.length), min(start + 2 * AHEAD, self.length))
        stop = min(start + self.piece, self.length)
        if not self.fused:
            return self._base(start, stop, self.space)
        self._loaded.clear()
        return self._load(0, start, stop)

    def _load(self, row: int, start: int, stop: int) -> Tensor:
        """Read a piece into its row."""
        entry = self._entries[row]
        out = self._rows[row, : (stop - start) * entry.dtype.itemsize].view(entry.dtype)
        self._loaded.add(row)
        return entry.slice_into(out, start)

    def program(self, steps: Steps) -> Program | None:
        """Turn steps into a program for this tensor's rows, if its dtypes allow."""
        if not self.fused:
            return None
        keys = list(self.sources)
        placed = (
            step if step.kind != LOAD else Step(LOAD, step.count + 1) if self.vectors[keys[step.count]] else Step(ZERO)
            for step in steps
        )
        return encode(tuple(placed))

    def run(self, program: Program, start: int, length: int) -> Tensor:
        """Compute a program on the piece that `base_piece` has read; gives float32 in memory of the space."""
        out = self.space.take(torch.float32, length)
        kernels.evaluate(*self._prepared(program, start, length), out.numpy())
        return out

    def edit(self, program: Program, start: int, scaling_coef: float, out: Tensor) -> tuple[int, int, float, float]:
        """Compute ``base + scaling_coef * program`` on the piece that `base_piece` has read.

        Returns:
            Elements whose delta is not zero; elements that change; sums of squares of the change and of the base.
        """
        written = out.view(torch.uint8).numpy()
        floats = written.view(numpy.float32) if out.dtype == torch.float32 else numpy.empty(0, numpy.float32)
        with numpy.errstate(over="ignore"):  # what overflows is an error of the edit, said there
            coef = numpy.float32(scaling_coef)
        return kernels.edit(
            *self._prepared(program, start, len(out)),
            coef,
            FUSED_DTYPES[out.dtype],
            len(out),
            written.view(numpy.uint16),
            floats,
        )

    def _prepared(self, program: Program, start: int, length: int) -> tuple[Any, ...]:
        for row in program.vectors - self._loaded:
            self._load(row, start, start + length)
        return program.steps, program.numbers, program.depth, *self._views, self._kinds, self._relative, start

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
        self._opened, self._start, self._length = opened, start, len(base)
        self._base = base if opened.fused else opened.widened(base)

    def run(self, steps: Steps) -> Tensor | None:
        """Compute steps on this piece, where the dtypes allow."""
        program = self._opened.program(steps)
        return None if program is None else self._opened.run(program, self._start, self._length)

    def __getitem__(self, key: str) -> Tensor:
        opened, space = self._opened, self._opened.space
        if opened.fused:
            return self.run((Step(LOAD, list(opened.sources).index(key)),))
        read = opened.vectors[key]
        if read is None:
            return space.take(torch.float32, self._length).zero_()
        stored = read(self._start, self._start + self._length, space)
        delta = opened.sources[key].delta(stored, self._base, space.take)
        space.give_back(stored)
        return delta

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened.vectors)

    def __len__(self) -> int:
        return len(self._opened.vectors)
