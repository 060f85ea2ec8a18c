"""Folders of ``torch.distributed.checkpoint`` (FSDP, FSDP2, tensor parallel), read in one process and without it.

torch reads a folder's ``.metadata`` by plain unpickling; here it is read inert (see
`tva.checkpoints.inert_pickle`), and the
stored chunks are found and put together by it.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tva._torch import Tensor, torch
from tva.checkpoints.dcp_writer import RECORD
from tva.checkpoints.foreign import ForeignFileError, is_plain_name, read_bytes, read_json, shown
from tva.checkpoints.inert_pickle import Inert, InertUnpickler, load_archive
from tva.checkpoints.lazy import Entry, Info, LazyWeights, OpenFile, Which
from tva.errors import some

# Where trainers put the weights: Lightning's FSDP2 and FSDP strategies, and torch's own examples.
SECTIONS = ("state_dict", "model")
METADATA_BYTES = 2**30
ALLOWED = ("torch.", "collections.", "builtins.", "pathlib.")


def matches(path: Path) -> bool:
    """Return whether a folder was written by ``torch.distributed.checkpoint``."""
    return (path / ".metadata").exists()


@dataclass
class _Chunk:
    """A box of a tensor, saved by itself at a place of a file."""

    file: OpenFile
    start: int
    length: int
    offsets: tuple[int, ...]
    sizes: torch.Size
    dtype: torch.dtype
    _entry: Entry | None = field(default=None, repr=False)

    def entry(self) -> Entry:
        if self._entry is None:
            try:
                entry, _ = load_archive(self.file, self.start, self.length)
            except Exception as error:  # a stranger's bytes are parsed: they may provoke any
                raise ForeignFileError(
                    f"{self.file.path} is damaged at bytes {self.start} to {self.start + self.length} ({error}). Copy "
                    f"the checkpoint again from its source."
                ) from error
            if not isinstance(entry, Entry) or entry.shape != self.sizes or entry.dtype != self.dtype:
                raise ValueError(
                    f"{self.file.path} does not hold what .metadata says: a tensor of shape {list(self.sizes)} and "
                    f"{self.dtype} was expected at byte {self.start}. Copy the checkpoint again from its source."
                )
            self._entry = entry
        return self._entry


@dataclass(frozen=True)
class Chunked(Entry):
    """A tensor in boxes; a part is read from the boxes it touches where all are cut along the first dimension."""

    dtype: torch.dtype
    shape: torch.Size
    chunks: tuple[_Chunk, ...]

    def read(self) -> Tensor:
        whole = torch.empty(self.shape, dtype=self.dtype)
        for chunk in self.chunks:
            box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[box] = chunk.entry().read()
        return whole

    @property
    def in_parts(self) -> bool:
        return all(chunk.sizes[1:] == self.shape[1:] for chunk in self.chunks)

    def slice(self, start: int, stop: int) -> Tensor:
        if not self.in_parts:
            return self.read().reshape(-1)[start:stop].clone()
        out = torch.empty(stop - start, dtype=self.dtype)
        row = self.shape[1:].numel()
        for chunk in self.chunks:
            first = chunk.offsets[0] * row if chunk.offsets else 0
            low, high = max(start, first), min(stop, first + chunk.sizes.numel())
            if low < high:
                out[low - start : high - start] = chunk.entry().slice(low - first, high - first)
        return out


def open(path: Path, which: Which = "checkpoint") -> LazyWeights:
    """Open a folder of ``torch.distributed.checkpoint``.

    Where the saved state had named parts, the weights are those under ``state_dict`` (Lightning with FSDP2) or
    ``model`` (Lightning with FSDP), without that name in front; ``info.notes`` says so.

    Raises:
        ValueError: The metadata cannot be read, or parts of a tensor are missing.
        FileNotFoundError: A shard is missing.
    """
    data = read_bytes(path / ".metadata", METADATA_BYTES)
    try:
        return _open(path, _read_metadata(data))
    except (ForeignFileError, FileNotFoundError):
        raise
    except Exception as error:  # a stranger's bytes are parsed: they may provoke any
        raise _refused(path, error) from error


def _refused(folder: Path, reason: BaseException) -> ValueError:
    return ValueError(
        f"{folder / '.metadata'} is refused: it is damaged, or not written by torch.distributed.checkpoint ({reason})."
    )


def _open(folder: Path, metadata: Mapping[str, Any]) -> LazyWeights:
    described: Mapping[str, Any] = metadata["state_dict_metadata"]
    paths: Mapping[str, Any] = metadata.get("planner_data") or {}
    tensors = {name: value.state for name, value in described.items() if value.name.endswith(".TensorStorageMetadata")}
    parts = {name: tuple(paths.get(name, (name,))) for name in described}
    if not all(isinstance(part, str | int) for name, path in parts.items() for part in (name, *path)) or () in [
        *parts.values()
    ]:
        raise TypeError("a name is not text")
    present = list(dict.fromkeys(str(path[0]) for path in parts.values() if len(path) > 1))
    section = next((name for name in SECTIONS if name in present), None)
    notes = []
    if section is not None:
        notes.append(f"the weights are those under {section!r}, of {some(present)}")
        names = {name: ".".join(map(str, path[1:])) for name, path in parts.items() if str(path[0]) == section}
        names = {name: short for name, short in names.items() if short}
        if len(set(names.values())) < len(names):
            raise ValueError(f"two names under {section!r} are the same")
    else:
        names = {name: name for name in described}
    left = [names[name] for name in names if name not in tensors]
    if left:
        notes.append(f"left out as they are not tensors: {some(left)}")
    chunks = _stored_chunks(folder, metadata)
    entries = {names[name]: _chunked(folder, name, tensors[name], chunks) for name in tensors if name in names}
    if not entries:
        raise ForeignFileError(f"{folder} holds no tensors; its .metadata names {some(described) or 'nothing'}.")
    record = folder / RECORD
    text = read_json(record, {str: str}) if record.is_file() else {}
    return LazyWeights(Info(folder, "torch.distributed checkpoint", notes=tuple(notes)), entries, text)


def _read_metadata(data: bytes) -> Mapping[str, Any]:
    unpickler = InertUnpickler(data)
    made = unpickler.load()
    foreign = sorted(name for name in unpickler.inert if not name.startswith(ALLOWED))
    if foreign:
        raise pickle.UnpicklingError(f"it names {some(foreign)}, which is not part of such a checkpoint")
    if not isinstance(made, Inert) or made.name != "torch.distributed.checkpoint.metadata.Metadata":
        found = repr(made) if isinstance(made, Inert) else shown(made)
        raise pickle.UnpicklingError(f"it holds {found} where torch's Metadata was expected")
    state = made.state
    if not isinstance(state["state_dict_metadata"], Mapping) or not isinstance(state["storage_data"], Mapping):
        raise pickle.UnpicklingError("it lacks the list of tensors or of their places")
    return state


def _stored_chunks(
    folder: Path, metadata: Mapping[str, Any]
) -> dict[tuple[str, tuple[int, ...]], tuple[OpenFile, Any]]:
    files: dict[str, OpenFile] = {}
    found = {}
    for index, info in metadata["storage_data"].items():
        if index.state.get("offset") is None:
            continue  # not a tensor
        relative, offset = info.state["relative_path"], tuple(index.state["offset"])
        places = (info.state["offset"], info.state["length"], *offset)
        if not isinstance(relative, str) or not all(isinstance(place, int) for place in places):
            raise TypeError("the place of a part is not a name and numbers")
        if relative not in files:
            if not is_plain_name(relative) or not (folder / relative).exists():
                raise FileNotFoundError(
                    f"{folder / '.metadata'} names the shard {shown(relative)}, which is not in {folder}. Copy it "
                    f"there."
                )
            files[relative] = OpenFile(folder / relative)
        found[index.state["fqn"], offset] = files[relative], info.state
    return found


def _chunked(folder: Path, name: str, state: Mapping[str, Any], found: Mapping[Any, tuple[OpenFile, Any]]) -> Chunked:
    dtype, shape = state["properties"].state[0], torch.Size(state["size"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} has no dtype")
    chunks = []
    for chunk in state["chunks"]:
        offsets, sizes = tuple(torch.Size(chunk.state["offsets"])), torch.Size(chunk.state["sizes"])
        if (name, offsets) not in found:
            raise ForeignFileError(
                f"{folder} lacks the part of {name!r} at {list(offsets)}. Copy the checkpoint again."
            )
        file, place = found[name, offsets]
        if place.get("transform_descriptors"):
            raise ForeignFileError(
                f"{folder} stores {name!r} transformed by extensions, which is not undone here. Save it without "
                f"extensions."
            )
        chunks.append(_Chunk(file, place["offset"], place["length"], offsets, sizes, dtype))
    stored = sum(chunk.sizes.numel() for chunk in chunks)
    if stored != shape.numel():
        raise ForeignFileError(
            f"{folder} stores {stored} of the {shape.numel()} elements of {name!r}. Copy the checkpoint again."
        )
    if not _tile(chunks, shape):
        raise ForeignFileError(
            f"{folder} stores {name!r} of shape {list(shape)} in parts that overlap or are outside of it. Copy the "
            f"checkpoint again."
        )
    return Chunked(dtype, shape, tuple(chunks))


def _tile(chunks: list[_Chunk], shape: torch.Size) -> bool:
    """Return whether boxes that have as many elements as the tensor are all inside of it and do not overlap."""
    for chunk in chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
            return False
        limits = zip(chunk.offsets, chunk.sizes, shape, strict=True)
        if any(start < 0 or size < 0 or start + size > whole for start, size, whole in limits):
            return False
    filled = [chunk for chunk in chunks if chunk.sizes.numel()]
    open_boxes: list[_Chunk] = []  # those that reach beyond the first row of the next one
    for chunk in sorted(filled, key=lambda chunk: chunk.offsets):
        first = chunk.offsets[0] if shape else 0
        open_boxes = [other for other in open_boxes if not shape or other.offsets[0] + other.sizes[0] > first]
        if any(_overlap(chunk, other) for other in open_boxes):
            return False
        open_boxes.append(chunk)
    return True


def _overlap(one: _Chunk, other: _Chunk) -> bool:
    edges = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + height and b < a + width for a, width, b, height in edges)
