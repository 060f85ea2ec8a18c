"""Tensors of a base and its vectors, read chunk by chunk into memory that is used over and over.

Where the dtypes allow, a chunk of the base and of each vector is in a row of its own, as stored, and
`tva.merge.kernels` computes with the rows, without torch; else torch computes with one tensor after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy

from tva._torch import Tensor, torch
from tva.arithmetic import all_finite, equal, is_edited, sum_dtype
from tva.checkpoints import Elements, Entry, LazyWeights
from tva.merge import kernels
from tva.merge.program import LOAD, ZERO, Program, Step, Steps, encode
from tva.vectors.lazy import LazyTaskVector

AHEAD = 2**23  # elements that the system is asked to read ahead
HEAD = 4096  # elements in which most fine-tuned tensors differ from the base
FUSED_DTYPES = {"bfloat16": 0, "float16": 1, "float32": 2}  # as `tva.merge.kernels` numbers them


class Space(threading.local):
    """Memory that a thread uses over and over, taken and given back as from a stack, so that it stays in the cache."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        self._arrays: dict[str, numpy.ndarray] = {}
        self.next_chunk()

    def next_chunk(self) -> None:
        """Take everything back."""
        self._taken: dict[torch.dtype, list[Tensor]] = {}

    def take(self, dtype: torch.dtype, length: int) -> Tensor:
        """Return a tensor of one dimension, with any contents."""
        taken = self._taken.setdefault(dtype, [])
        buffers = self._buffers.setdefault(dtype, [])
        if len(taken) == len(buffers):
            buffers.append(torch.empty(length, dtype=dtype))
        elif len(buffers[len(taken)]) < length:
            buffers[len(taken)] = torch.empty(length, dtype=dtype)
        taken.append(buffers[len(taken)][:length])
        return taken[-1]

    def give_back(self, tensor: Tensor) -> None:
        """Free a tensor if it is the last of its dtype that was taken; others wait for the next chunk."""
        taken = self._taken.get(tensor.dtype)
        if taken and taken[-1] is tensor:
            taken.pop()

    def bytes(self, use: str, num_bytes: int, num_rows: int = 1) -> numpy.ndarray:
        """Return rows of at least ``num_bytes``, of any contents; the next call for this use gives the same memory."""
        found = self._arrays.get(use)
        if found is None or found.shape[0] < num_rows or found.shape[1] < num_bytes:
            width = -(-num_bytes // 64) * 64
            new = numpy.empty(num_rows * width + 64, numpy.uint8)
            aligned = new[-new.ctypes.data % 64 :][: num_rows * width]
            self._arrays[use] = found = aligned.reshape(num_rows, width)
        return found


class NewSpace(Space):
    """New memory each time, for chunks that are handed on."""

    def take(self, dtype: torch.dtype, length: int) -> Tensor:
        return torch.empty(length, dtype=dtype)


def is_fusible(entry: Entry) -> bool:
    """Whether `tva.merge.kernels` can compute with a tensor as it is stored."""
    return entry.spec.dtype_name in FUSED_DTYPES and entry.in_parts


class OpenedTensor:
    """One tensor of the base and of the vectors that move it, read a chunk at a time.

    Attributes:
        vectors: Which vectors move it, by name; empty if none does.
        moved: Whether the recipe moves it.
        fused: Whether `tva.merge.kernels` computes with it.
        whole: Its dtype and shape in the file: ``spec`` is that of the parts of complex numbers.
    """

    def __init__(
        self,
        name: str,
        base: LazyWeights,
        sources: Mapping[str, LazyTaskVector],
        chunk: int,
        edited: bool,
        space: Space,
        with_base: bool = False,
    ) -> None:
        self.with_base = with_base
        self.name, self.spec, self.sources, self.space = name, base.spec(name), sources, space
        self.whole = base.entry(name).whole
        self.base_path = base.path
        self.length, self.chunk = self.spec.numel(), chunk
        inputs = [base, *(source.weights for source in sources.values())]
        self._entries = [weights.entry(name) if name in weights else None for weights in inputs]
        self._whole: dict[int, Tensor] = {}  # what cannot be read in parts, or is no longer than a chunk
        self._loaded: set[int] = set()
        self.vectors: dict[str, bool] = {}
        present = [entry for entry in self._entries if entry is not None]
        edited &= (len(present) > 1 or with_base) and is_edited(self.spec)
        self.fused = edited and not with_base and not isinstance(space, NewSpace) and all(map(is_fusible, present))
        if self.fused:
            width = min(chunk, self.length) * max(entry.spec.itemsize for entry in present)
            self._rows = space.bytes("rows", width, len(self._entries))
            self._views = self._rows.view(numpy.uint16), self._rows.view(numpy.float32)
            self._kinds = numpy.array([FUSED_DTYPES[e.spec.dtype_name] if e else 0 for e in self._entries])
            self._relative = numpy.array([False, *(source.is_checkpoint for source in sources.values())])
        if edited:
            moving = {
                key: entry is not None and (not sources[key].is_checkpoint or self._differs(row))
                for row, (key, entry) in enumerate(zip(sources, self._entries[1:], strict=True), start=1)
            }
            self.vectors = moving if any(moving.values()) or with_base else {}
        self.moved = bool(self.vectors) or (edited and with_base)
        self.fused &= bool(self.vectors)

    def starts(self) -> range:
        """Return where the chunks begin; an empty tensor has one, so that every tensor is seen."""
        return range(0, max(1, self.length), self.chunk)

    def base_chunk(self, start: int) -> Tensor:
        """Read one chunk of the base, into memory that is free again with the next chunk."""
        if self.fused:
            return self.base_elements(start).tensor()
        self._begin(start)
        return self.read(0, start)

    def base_elements(self, start: int) -> Elements:
        """Read one chunk of the base as it is stored, into memory that is free again with the next chunk."""
        self._begin(start)
        if self.fused:
            return self._load(0, start)
        entry, length = self._entries[0], min(self.chunk, self.length - start)
        data = self.space.bytes("copied", length * self.spec.itemsize)[0, : length * self.spec.itemsize]
        entry.read_into(data, start)
        return Elements(data, self.spec.dtype_name)

    def _begin(self, start: int) -> None:
        self.space.next_chunk()
        self._loaded.clear()
        if start % AHEAD < self.chunk and self.length > AHEAD:  # let the system read while this is computed with
            for entry in filter(None, self._entries):
                entry.will_need(min(start + AHEAD, self.length), min(start + 2 * AHEAD, self.length))

    def _load(self, row: int, start: int) -> Elements:
        spec = self._entries[row].spec
        data = self._rows[row, : min(self.chunk, self.length - start) * spec.itemsize]
        self._loaded.add(row)
        self._entries[row].read_into(data, start)
        return Elements(data, spec.dtype_name)

    def read(self, row: int, start: int) -> Tensor:
        """Read a chunk of the base (row 0) or a vector as a tensor."""
        entry, stop = self._entries[row], min(start + self.chunk, self.length)
        if self.length > self.chunk and entry.in_parts:
            out = self.space.take(entry.dtype, stop - start)
            entry.read_into(Elements.of(out).data, start)
            return out
        if row not in self._whole:
            self._whole[row] = entry.load().reshape(-1)
        return self._whole[row][start:stop]

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

    def run(self, program: Program, start: int, out: numpy.ndarray) -> None:
        """Compute a program on the chunk that was begun, into float32."""
        if not kernels.evaluate(*self._prepared(program, start), out):
            raise self.not_finite()

    def edit(self, program: Program, start: int, scaling_coef: float, out: Elements) -> tuple[int, int, float, float]:
        """Compute ``base + scaling_coef * program`` on the chunk that was begun.

        Returns:
            Elements whose delta is not zero; elements that change; sums of squares of the change and of the base.
        """
        wide = out.dtype_name == "float32"
        with numpy.errstate(over="ignore"):  # what overflows is an error of the edit, said there
            coef = numpy.float32(scaling_coef)
        finite, *account = kernels.edit(
            *self._prepared(program, start),
            coef,
            FUSED_DTYPES[out.dtype_name],
            min(self.chunk, self.length - start),
            out.data.view(numpy.uint16),
            out.data.view(numpy.float32) if wide else numpy.empty(0, numpy.float32),
        )
        if not finite:
            raise self.not_finite(out.dtype_name)
        return tuple(account)

    def _prepared(self, program: Program, start: int) -> tuple[Any, ...]:
        for row in program.vectors - self._loaded:
            self._load(row, start)
        return program.steps, program.numbers, program.depth, *self._views, self._kinds, self._relative, start

    def widened(self, base: Tensor) -> Tensor:
        """Return a chunk of the base in the dtype of sums: float64 if its own weights are in the recipe."""
        if self.with_base:
            return base.double()
        if base.dtype == sum_dtype(base):
            return base
        wide = self.space.take(sum_dtype(base), len(base)).copy_(base)
        self.space.give_back(base)
        return wide

    def _differs(self, row: int) -> bool:
        """Whether any element of a vector differs from the base; stops at the first chunk where one does."""
        if self.fused:
            width = min(HEAD, self.length)
            for one in (0, row):
                entry = self._entries[one]
                entry.read_into(self._rows[one, : width * entry.spec.itemsize], 0)
            if not self._rows_agree(row, width):
                return True
        for start in self.starts():
            if self.fused:
                self._begin(start)
                self._load(0, start)
                self._load(row, start)
                same = self._rows_agree(row, min(self.chunk, self.length - start))
            else:
                same = equal(self.base_chunk(start), self.read(row, start))
            if not same:
                return True
        return False

    def not_finite(self, dtype: str = "float32") -> ValueError:
        """Return the error that says why an edited tensor would hold NaN or infinity, written in ``dtype``."""
        damaged = [
            f"{source.weights.path}, the vector {key}"
            for row, (key, source) in enumerate(self.sources.items(), start=1)
            if self._entries[row] is not None and not self._is_finite(row, source)
        ]
        if not damaged and not all(bool(self.base_chunk(start).isfinite().all()) for start in self.starts()):
            damaged = [f"the base {self.base_path}"]
        if damaged:
            why = f"{' and '.join(damaged[:3])} {'holds' if len(damaged) == 1 else 'hold'} such there. Take sound ones"
        else:
            why = f"the coefficient is too large for torch.{dtype}. Give a smaller one"
        return ValueError(f"The edited {self.name!r} would hold NaN or infinity: {why}. Nothing was written.")

    def _is_finite(self, row: int, source: LazyTaskVector) -> bool:
        for start in self.starts():
            base = self.base_chunk(start)
            if not bool(source.delta(self.read(row, start), base).isfinite().all()):
                return False
        return True

    def _rows_agree(self, row: int, length: int) -> bool:
        return kernels.agree(*self._views, self._kinds, row, length)


class Deltas(Mapping[str, Tensor]):
    """The deltas of one chunk, each recomputed when it is asked for, so that the memory in use stays in the cache."""

    def __init__(self, opened: OpenedTensor, start: int, base: Tensor | None = None) -> None:
        self._opened, self._start = opened, start
        self._length = min(opened.chunk, opened.length - start)
        self._base = base if base is None or opened.fused else opened.widened(base)

    def run(self, steps: Steps) -> Tensor | None:
        """Compute steps on this chunk, where the dtypes allow."""
        program = self._opened.program(steps)
        if program is None:
            return None
        out = self._opened.space.take(torch.float32, self._length)
        self._opened.run(program, self._start, out.numpy())
        return out

    @property
    def fused(self) -> bool:
        """Whether the dtypes allow to compute steps."""
        return self._opened.fused

    def run_array(self, steps: Steps) -> numpy.ndarray:
        """Compute steps on this chunk, where the dtypes allow, in memory that the next call uses again."""
        program = self._opened.program(steps)
        out = self._opened.space.bytes("floats", self._length * 4)[0, : self._length * 4].view(numpy.float32)
        self._opened.run(program, self._start, out)
        return out

    def __getitem__(self, key: str) -> Tensor:
        opened, space = self._opened, self._opened.space
        if opened.fused:
            return self.run((Step(LOAD, list(opened.sources).index(key)),))
        if opened.with_base:
            return self._wide(key)
        if not opened.vectors[key]:
            return space.take(torch.float32, self._length).zero_()
        stored = opened.read(1 + list(opened.sources).index(key), self._start)
        delta = opened.sources[key].delta(stored, self._base, space.take)
        if not all_finite(delta):
            raise opened.not_finite()
        space.give_back(stored)
        return delta

    def _wide(self, key: str) -> Tensor:
        """Return a delta in float64, or the base's own elements."""
        opened = self._opened
        if key not in opened.vectors:
            return self._base
        if not opened.vectors[key]:
            return torch.zeros(self._length, dtype=torch.float64)
        delta = opened.sources[key].delta(opened.read(1 + list(opened.sources).index(key), self._start), self._base)
        if not all_finite(delta):
            raise opened.not_finite()
        return delta.double()

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened.vectors)

    def __len__(self) -> int:
        return len(self._opened.vectors)
