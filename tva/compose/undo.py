"""Undo files: what is needed beside an edited checkpoint to get its base back, bit for bit.

For each tensor the base is predicted from the edited checkpoint, and the difference of the bit patterns is stored,
taken as integers: small numbers where the edit was small, none where it changed nothing. Their bytes are sorted by
place, high ones first, and compressed by Zstandard, whose checksum finds damage. The file is a safetensors file; each
block of a tensor is a key of its own, ``NAME@START``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tva._torch import Tensor, torch
from tva.checkpoints import Elements, LazyWeights, Output, TensorHash
from tva.checkpoints.foreign import parse_json
from tva.checkpoints.formats import safetensors
from tva.checkpoints.lazy import as_real
from tva.checkpoints.spec import NAMES_OF_DTYPES, Spec, encode_header
from tva.compose.record import Record
from tva.errors import some

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FORMAT = "undo/1"
BYTES_HELD = 8  # copies of a block that encoding and decoding hold
_INTEGERS = {1: "int8", 2: "int16", 4: "int32", 8: "int64", 16: "int64"}
_OPTIONS = {zstd.CompressionParameter.compression_level: 1, zstd.CompressionParameter.checksum_flag: 1}


def undo_path(output: Path) -> Path:
    """Return where the undo file of an edited checkpoint is: beside a file, in a folder."""
    single = output.suffix == ".safetensors"
    return output.with_name(f"{output.stem}.undo.safetensors") if single else output / "undo.safetensors"


def encode(original: Tensor, predicted: Tensor) -> bytes:
    """Store what leads from a predicted tensor to the original.

    Args:
        original: Any dtype, shape (elements,).
        predicted: Of the same dtype and shape; its values matter only for the size.

    Returns:
        Nothing where they are equal in every bit.
    """
    kind = getattr(torch, _INTEGERS[original.element_size()])
    difference = original.view(kind) - predicted.view(kind)  # wraps around
    if not difference.any():
        return b""
    folded = (difference << 1) ^ (difference >> (kind.itemsize * 8 - 1))  # 0, -1, 1, -2 … to 0, 1, 2, 3 …
    places = folded.view(torch.uint8).view(-1, kind.itemsize).T.flip(0).contiguous()
    return zstd.compress(places.numpy(), options=_OPTIONS)


def decode(data: bytes, predicted: Tensor) -> Tensor:
    """Get back the original of `encode` from what it stored and the same prediction.

    Raises:
        ValueError: The data is damaged, or belongs to another tensor.

    Example:
        >>> base, edited = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([1.1, -1.9, 0.0])
        >>> torch.equal(decode(encode(base, edited), edited), base)
        True
    """
    kind = getattr(torch, _INTEGERS[predicted.element_size()])
    size = predicted.numel() * predicted.element_size()
    reader = zstd.ZstdDecompressor()
    try:
        plain = reader.decompress(data, max_length=size + 1)  # no more, whatever the frame says of its size
    except zstd.ZstdError as error:
        raise ValueError(str(error)) from error
    if len(plain) != size or not reader.eof or reader.unused_data:
        found = f"more than {size}" if len(plain) > size else str(len(plain))
        raise ValueError(f"{found} bytes for {predicted.numel()} elements of {predicted.element_size()}")
    places = torch.frombuffer(bytearray(plain), dtype=torch.uint8)
    folded = places.view(kind.itemsize, -1).flip(0).T.reshape(-1).view(kind)
    difference = ((folded >> 1) & torch.iinfo(kind).max) ^ -(folded & 1)
    return (predicted.view(kind) + difference).view(predicted.dtype)


class UndoFile:
    """An undo file being written: takes what predicts the base; whole under its name, or not at all.

    Args:
        path: Where to write; removed again on any error.
        base: The base.
        block: Elements that are stored together at most.
        record: Of the edit.
        facts: Other text for the header.

    Attributes:
        num_bytes: Size of the file, when it is whole.
    """

    def __init__(
        self, path: Path, base: LazyWeights, block: int, record: Record, facts: Mapping[str, str] | None = None
    ) -> None:
        base = as_real(base)  # as a composer predicts it
        self.path, self.base, self.block, self.num_bytes = path, base, block, 0
        self.done: Mapping[str, Any] = {}
        self._metadata = {**record.metadata(), **(facts or {}), "tva.format": FORMAT, "tva.undo_block": str(block)}
        self._metadata["tva.undo_ties"] = json.dumps(base.ties())
        self._metadata["tva.undo_base_metadata"] = json.dumps(base.metadata)
        self._metadata["tva.undo_dtypes"] = json.dumps({name: base.spec(name).dtype_name for name in base})
        self._places: dict[str, tuple[int, int]] = {}  # key to first and last byte of its data
        self._lock, self._whole = threading.Lock(), threading.local()

    def __enter__(self) -> UndoFile:
        starts = {name: range(0, self.base.spec(name).numel(), self.block) for name in self.base}
        most = {f"{name}@{start}": (10**15, 10**15) for name, begins in starts.items() for start in begins}
        self._room = len(self._header(most)) - 8
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._end = 0
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                os.pwrite(self._file, self._header(self._places, self._room), 0)
                os.fsync(self._file)
                self.num_bytes = 8 + self._room + self._end
        finally:
            os.close(self._file)
            if error is not None:
                self.path.unlink(missing_ok=True)

    def _header(self, places: Mapping[str, tuple[int, int]], room: int = 0) -> bytes:
        keys = sorted(places, key=lambda key: places[key])
        specs = {key: Spec("uint8", [places[key][1] - places[key][0] or places[key][1]]) for key in keys}
        return encode_header(specs, self._metadata, room, places)

    def write(self, name: str, start: int, chunk: Elements) -> None:
        """Store what leads from elements that are predicted to those of the base."""
        tensor = chunk.tensor()
        for first in range(0, len(tensor), self.block):
            predicted = tensor[first : first + self.block]
            data = encode(self._original(name, start + first, len(predicted)), predicted)
            if data:
                with self._lock:
                    begin, self._end = self._end, self._end + len(data)
                    self._places[f"{name}@{start + first}"] = begin, self._end
                self._write_all(data, 8 + self._room + begin)

    def finish(self, name: str, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def _write_all(self, data: bytes, offset: int) -> None:
        left = memoryview(data)
        while left.nbytes:
            count = os.pwrite(self._file, left, offset)
            left, offset = left[count:], offset + count

    def _original(self, name: str, start: int, length: int) -> Tensor:
        entry = self.base.entry(name)
        if entry.in_parts:
            return entry.slice(start, start + length)
        if getattr(self._whole, "name", None) != name:
            self._whole.name, self._whole.tensor = name, entry.read().reshape(-1)
        return self._whole.tensor[start : start + length]


class OpenedUndo:
    """An undo file to be read.

    Args:
        path: The file.

    Attributes:
        record: Of the edit that it undoes.
        block: Elements that are stored together.
        with_vectors: Whether the base is predicted from the vectors too.
        dtypes: Names of the dtypes of the base's tensors.
        ties: Names of the base that share a tensor, to the name it is stored by.
        base_metadata: Header of the base.
        metadata: All of its own header.

    Raises:
        ValueError: It is not an undo file, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._blocks = path, safetensors.open(path)
        self.metadata = self._blocks.metadata
        if self.metadata.get("tva.format") != FORMAT:
            raise ValueError(
                f"{path} is not an undo file: its header must have tva.format {FORMAT!r}. Give another by --undo."
            )
        self.record = Record.read(self._blocks)
        self.block: int = self._fact("block", int)
        self.with_vectors: bool = self._fact("with_vectors", bool)
        self.ties: dict[str, str] = self._fact("ties", {str: str})
        self.base_metadata: dict[str, str] = self._fact("base_metadata", {str: str})
        self.dtypes: dict[str, str] = self._fact("dtypes", {str: str})
        if self.block < 1 or not set(self.dtypes.values()) <= NAMES_OF_DTYPES.keys():
            raise ValueError(f"{path} is damaged: its tva.undo_block or tva.undo_dtypes has a value that none has.")

    def _fact(self, key: str, form: Any) -> Any:
        return parse_json(self.metadata.get(f"tva.undo_{key}", "null"), f"{self.path}: tva.undo_{key}", form)

    def check_names(self, edited: LazyWeights) -> None:
        """Check that the edited checkpoint has the base's names.

        Raises:
            ValueError: It has others.
        """
        odd = sorted(edited.keys() ^ self.dtypes.keys())
        if odd:
            raise ValueError(f"{self.path} is for a checkpoint of other names than {edited.path}: {some(odd)}.")

    def restore(self, name: str, start: int, predicted: Tensor) -> Tensor:
        """Get back elements of the base; ``start`` is where a block begins.

        Raises:
            ValueError: The file is damaged.
        """
        chunks = []
        for first in range(0, len(predicted), self.block):
            chunk, key = predicted[first : first + self.block], f"{name}@{start + first}"
            if key in self._blocks:
                try:
                    chunk = decode(self._blocks[key].numpy().tobytes(), chunk)
                except ValueError as error:
                    raise ValueError(
                        f"{self.path} is damaged: what it stores of {name!r} cannot be read ({error}). Nothing was "
                        f"written. Take another copy of it."
                    ) from error
            chunks.append(chunk)
        return chunks[0] if len(chunks) == 1 else torch.cat([predicted[:0], *chunks])


class Restoring:
    """Reconstruct and write the base from its prediction.

    Attributes:
        digests: Of the base's tensors by name.
    """

    def __init__(self, undo: OpenedUndo, out: Output) -> None:
        self.undo, self.out, self.done = undo, out, out.done
        self.digests: dict[str, str] = {name: record["edited"] for name, record in out.done.items()}
        self._hashes: dict[str, TensorHash] = {}

    def write(self, name: str, start: int, chunk: Elements) -> None:
        """Restore and write some elements."""
        restored = Elements.of(self.undo.restore(name, start, chunk.tensor()))
        self._hashes.setdefault(name, TensorHash(self.out.spec(name))).update(restored.data)
        self.out.write(name, start, restored)

    def finish(self, name: str, record: Mapping[str, Any]) -> None:
        """Note the digest of a tensor that is whole."""
        self.digests[name] = self._hashes.pop(name).hexdigest()
        self.out.finish(name, {**record, "edited": self.digests[name]})
