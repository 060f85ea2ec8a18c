"""A checkpoint as a lazy, read-only mapping: names, what is known without reading, and bytes of files read on request.

A whole tensor of some size is a private mapping of its bytes, which are read as they are touched; all else is read to
fresh memory by byte range. Either way a tensor that is edited in place changes neither the file nor a later read, and a
file that gets another one under its name is still read as it was opened.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy

from tva._torch import Tensor, torch
from tva.checkpoints.foreign import open_regular
from tva.checkpoints.spec import Elements, Spec

Which = Literal["checkpoint", "raw", "averaged"]  # see `tva.open_weights`
MAPPED_BYTES = 2**20  # from this size on a whole tensor is mapped; below, reading it costs less than a mapping


class OpenFile:
    """A file held open: when another file takes its name, reads still go to the one that was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = open_regular(path)
        self._lock = threading.Lock()
        self.size = os.fstat(self._descriptor).st_size

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer of bytes from ``offset`` on; threads and forked processes may read at once."""
        while buffer.nbytes:
            if hasattr(os, "preadv"):  # the file's position is shared with forked processes; this does not move it
                count = os.preadv(self._descriptor, [buffer], offset)
            else:
                with self._lock:
                    os.lseek(self._descriptor, offset, os.SEEK_SET)
                    data = os.read(self._descriptor, buffer.nbytes)
                count = len(data)
                buffer[:count] = data
            if count == 0:
                raise self._ended(offset, buffer.nbytes)
            buffer, offset = buffer[count:], offset + count

    def map(self, offset: int, length: int) -> tuple[mmap.mmap, int]:
        """Map some bytes, copied when written to; return the mapping and where in it they start."""
        size = os.fstat(self._descriptor).st_size
        if size < offset + length:  # touching a page behind the end would kill the process
            raise self._ended(size, offset + length - size)
        skip = offset % mmap.ALLOCATIONGRANULARITY
        return mmap.mmap(self._descriptor, length + skip, access=mmap.ACCESS_COPY, offset=offset - skip), skip

    def will_need(self, offset: int, length: int) -> None:
        """Ask the system to read bytes ahead, if it supports that."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def _ended(self, offset: int, lacking: int) -> ValueError:
        return ValueError(
            f"{self.path} ended at byte {offset} where {lacking} more were expected; it is cut off, or was changed "
            f"while it was read. Write it again from its source."
        )

    def read(self, offset: int, length: int) -> bytes:
        """Read some bytes."""
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)


class Entry:
    """A tensor that can be read, whole or in part; subclasses implement it."""

    dtype: torch.dtype
    shape: torch.Size
    digest: str | None = None  # what `tva.checkpoints.tensor_digest` returns of it, where that is known without reading

    @property
    def spec(self) -> Spec:
        """Dtype and shape."""
        return Spec(self.dtype, self.shape)

    @property
    def written_dtype(self) -> str:
        """Name of the dtype in which an edit of it is written, unless another is asked for."""
        return self.spec.dtype_name

    @property
    def whole(self) -> Spec:
        """Dtype and shape of the tensor that a file says it is, also where its numbers are read apart."""
        return self.spec

    @property
    def in_parts(self) -> bool:
        """Whether a part can be read at the cost of that part."""
        return True

    @property
    def stored_bytes(self) -> int:
        """Bytes that reading all of it reads."""
        return self.spec.num_bytes

    @property
    def held_bytes(self) -> int:
        """Memory that reading a part takes, however small the part."""
        return 0 if self.in_parts else self.stored_bytes

    @property
    def location(self) -> object:
        """Return a value that is equal for tensors that share memory; None if that is not known."""
        return None

    def will_need(self, start: int, stop: int) -> None:
        """Ask the system to read elements ahead, if it supports that."""

    def slice(self, start: int, stop: int) -> Tensor:
        """Read the elements from ``start`` to ``stop`` of the flattened tensor, as fresh memory of one dimension."""
        raise NotImplementedError

    def read_into(self, out: numpy.ndarray, start: int) -> None:
        """Fill ``out``, uint8, with the bytes from element ``start`` on."""
        out[:] = Elements.of(self.slice(start, start + len(out) // self.spec.itemsize)).data

    def read(self) -> Tensor:
        """Read the whole tensor; its file must stay as it is for as long as the tensor is used."""
        return self.load()

    def load(self) -> Tensor:
        """Read the whole tensor to memory of its own: if its file is cut meanwhile, that is an error."""
        return self.slice(0, self.spec.numel()).reshape(self.shape)


class Described(Entry):
    """A tensor whose dtype and shape are those of its ``spec``."""

    @property
    def dtype(self) -> torch.dtype:
        return self.spec.dtype

    @property
    def shape(self) -> torch.Size:
        return self.spec.shape


@dataclass(frozen=True)
class Stored(Described):
    """A tensor as bytes of a file; ``stride`` in elements where it is not contiguous."""

    file: OpenFile
    offset: int
    header: Spec  # what is said of it there
    stride: tuple[int, ...] | None = None

    @property
    def spec(self) -> Spec:
        return self.header

    @property
    def in_parts(self) -> bool:
        return self.stride is None

    @property
    def location(self) -> object:
        return (str(self.file.path), self.offset, self.spec, self.stride) if self.spec.numel() else None

    def will_need(self, start: int, stop: int) -> None:
        width = self.spec.itemsize
        self.file.will_need(self.offset + start * width, (stop - start) * width)

    def slice(self, start: int, stop: int) -> Tensor:
        if self.stride is not None:  # the whole span is read: its elements are in another order
            span = (
                0
                if self.shape.numel() == 0
                else 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
            )
            flat = self._elements(0, span).as_strided(self.shape, self.stride).reshape(-1)
            return flat[start:stop].clone()
        return self._elements(start, stop)

    def read_into(self, out: numpy.ndarray, start: int) -> None:
        if self.stride is not None:
            super().read_into(out, start)
        else:
            self.file.read_into(memoryview(out), self.offset + start * self.spec.itemsize)

    def read(self) -> Tensor:
        count, width = self.spec.numel(), self.spec.itemsize
        if self.stride is not None or count * width < MAPPED_BYTES or self.offset % width:
            return super().read()
        mapped, skip = self.file.map(self.offset, count * width)
        return torch.frombuffer(mapped, dtype=self.dtype, count=count, offset=skip).view(self.shape)

    def _elements(self, start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, dtype=self.dtype)
        self.file.read_into(memoryview(Elements.of(out).data), self.offset + start * self.spec.itemsize)
        return out


@dataclass(frozen=True, eq=False)
class InMemory(Entry):
    """A tensor that is in memory already."""

    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def slice(self, start: int, stop: int) -> Tensor:
        return self.tensor.detach().reshape(-1)[start:stop].clone()


@dataclass(frozen=True)
class Joined(Entry):
    """A tensor whose flattened elements are stretches ``(entry, start, stop)`` of others, one after the other."""

    parts: tuple[tuple[Entry, int, int], ...]
    dtype: torch.dtype
    shape: torch.Size

    @property
    def in_parts(self) -> bool:
        return all(entry.in_parts for entry, _, _ in self.parts)

    def slice(self, start: int, stop: int) -> Tensor:
        chunks = [torch.empty(0, dtype=self.dtype)]
        position = 0
        for entry, first, last in self.parts:
            low, high = max(start, position), min(stop, position + last - first)
            if low < high:
                chunks.append(entry.slice(first + low - position, first + high - position))
            position += last - first
        return torch.cat(chunks)


class Wrapped(Entry):
    """Another entry, read in another way."""

    entry: Entry

    @property
    def written_dtype(self) -> str:
        return self.entry.written_dtype

    @property
    def in_parts(self) -> bool:
        return self.entry.in_parts

    @property
    def stored_bytes(self) -> int:
        return self.entry.stored_bytes

    @property
    def held_bytes(self) -> int:
        return self.entry.held_bytes

    @property
    def location(self) -> object:
        return self.entry.location


@dataclass(frozen=True)
class RealParts(Described, Wrapped):
    """A tensor of complex numbers as their real and imaginary parts, one after the other, shape (…, 2)."""

    entry: Entry

    @property
    def whole(self) -> Spec:
        return self.entry.spec

    @property
    def spec(self) -> Spec:
        return self.entry.spec.real_parts()

    @property
    def written_dtype(self) -> str:
        return self.spec.dtype_name

    def will_need(self, start: int, stop: int) -> None:
        self.entry.will_need(start // 2, -(-stop // 2))

    def slice(self, start: int, stop: int) -> Tensor:
        first = start // 2
        parts = torch.view_as_real(self.entry.slice(first, -(-stop // 2)).resolve_conj())
        return parts.reshape(-1)[start - 2 * first : stop - 2 * first]

    def read_into(self, out: numpy.ndarray, start: int) -> None:
        if start % 2 or len(out) % self.whole.itemsize:
            super().read_into(out, start)
        else:
            self.entry.read_into(out, start // 2)  # the same bytes

    def read(self) -> Tensor:
        return torch.view_as_real(self.entry.read().resolve_conj())


def as_real(weights: LazyWeights) -> LazyWeights:
    """Return weights with the real and imaginary parts of complex tensors in their place, as arithmetic takes them."""
    entries = {name: weights.entry(name) for name in weights}
    if not any(entry.spec.is_complex() for entry in entries.values()):
        return weights
    parts = {name: RealParts(entry) if entry.spec.is_complex() else entry for name, entry in entries.items()}
    return LazyWeights(weights.info, parts, weights.metadata)


@dataclass(frozen=True)
class Info:
    """Where weights come from, and every choice that was made in reading them.

    Attributes:
        path: The file or folder.
        format: The format's name.
        which: ``"averaged"`` or ``"raw"`` where a weight-averaging callback has stored both, else ``"as stored"``.
        notes: One line for every choice: a part chosen, names changed, contents left out.
    """

    path: Path
    format: str
    which: str = "as stored"
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        which = "" if self.which == "as stored" else f", {self.which} weights"
        return "; ".join([f"{self.path} ({self.format}{which})", *self.notes])


class LazyWeights(Mapping[str, Tensor]):
    """A read-only mapping of names to tensors that are read when asked for.

    Attributes:
        info: Where the weights come from and what was decided in reading them.
        metadata: Header metadata of a safetensors file, of shards what all of them say; else empty.
    """

    def __init__(self, info: Info, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> None:
        self.info = info
        self.metadata = dict(metadata or {})
        self._entries = dict(entries)

    @property
    def path(self) -> Path:
        """The file or folder."""
        return self.info.path

    def spec(self, name: str) -> Spec:
        """Return a tensor's dtype and shape without reading it."""
        return self._entries[name].spec

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Read a part of a tensor and no more.

        Args:
            name: The tensor's name.
            start: First element of the flattened (row-major) tensor.
            stop: One past the last element.

        Returns:
            A fresh tensor of ``stop - start`` elements.

        Raises:
            ValueError: The tensor has no such elements.
        """
        entry = self._entries[name]
        if not 0 <= start <= stop <= entry.spec.numel():
            raise ValueError(f"{name!r} has elements 0 to {entry.spec.numel()}; {start} to {stop} were asked for.")
        return entry.slice(start, stop)

    def __getitem__(self, name: str) -> Tensor:
        return self._entries[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"LazyWeights({str(self.path)!r}, {self.info.format}, {len(self)} tensors)"

    def entry(self, name: str) -> Entry:
        """Return the tensor as an entry, to be read later."""
        return self._entries[name]

    def ties(self) -> dict[str, str]:
        """Return the names whose tensors share the memory of another one in the file, with the first such name."""
        first: dict[object, str] = {}
        return {
            name: first[place]
            for name, entry in self._entries.items()
            if (place := entry.location) is not None and first.setdefault(place, name) != name
        }

    def renamed(self, names: Mapping[str, str], *notes: str) -> LazyWeights:
        """Return the same weights under other names.

        Args:
            names: New names to present ones; what it does not name is left out.
            notes: What was done, for ``info.notes``.
        """
        info = replace(self.info, notes=(*self.info.notes, *notes))
        return LazyWeights(info, {new: self._entries[old] for new, old in names.items()}, self.metadata)
