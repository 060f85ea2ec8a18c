"""Write folders that ``torch.distributed.checkpoint`` loads, each tensor in one archive of known layout.

A file of such a folder is a row of the zip archives that ``torch.save`` writes, one a tensor, and ``.metadata`` lists
their places. All of an archive but its tensor's bytes follows from dtype and shape, so that it is written first, and
the bytes then go to their places in any order, as into a safetensors file. Like torch with
``set_crc32_options(False)``, it leaves out the checksum of the bytes, which torch does not read.

Source: the format of ``torch.distributed.checkpoint.filesystem`` and of ``torch.save``, PyTorch 2.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tva._torch import torch
from tva.checkpoints.shards import Shard
from tva.checkpoints.spec import Spec

RECORD = "tva.json"  # beside the weights: what is in the header of a safetensors file
_STORAGES = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage",
    "uint8": "ByteStorage", "bool": "BoolStorage", "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}  # fmt: skip
_LARGE = 0xFFFFFFFF


@dataclass
class DcpShard(Shard):
    """One ``.distcp`` file.

    Attributes:
        archives: Start and length in bytes of each tensor's archive.
    """

    archives: dict[str, tuple[int, int]] = field(default_factory=dict)
    _frames: list[tuple[int, bytes]] = field(default_factory=list)

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """Note where the tensors and their archives begin; the file itself has no header."""
        self._frames, end = [], 0
        for name, spec in self.tensors.items():
            before, after = _frame(spec)
            self.offsets[name] = end + len(before)
            stop = self.offsets[name] + spec.num_bytes
            self._frames += [(end, before), (stop, after)]
            self.archives[name] = end, stop + len(after) - end
            end = stop + len(after)
        return b""

    def begin(self, header: bytes) -> None:
        """Make the file, with all of it but the tensors' bytes."""
        super().begin(header)
        with self.path.open("r+b") as file:
            for start, data in self._frames:
                file.seek(start)
                file.write(data)


def dcp_files(shards: Sequence[Shard], metadata: Mapping[str, str]) -> dict[str, bytes]:
    """Return the files beside the weights: torch's ``.metadata``, and the text that a header would hold.

    Args:
        shards: The files of the weights.
        metadata: Text by key; a key that is none of tva's is the other name of a tied weight, as in safetensors.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors, places = {}, {}
    for shard in shards:
        assert isinstance(shard, DcpShard)
        for name, spec in shard.tensors.items():
            start = torch.Size([0] * len(spec.sizes))
            chunk = ChunkStorageMetadata(start, spec.shape)
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=spec.dtype), spec.shape, [chunk])
            places[MetadataIndex(name, start, 0)] = _StorageInfo(shard.path.name, *shard.archives[name])
    for alias, kept in metadata.items():
        if kept in tensors and alias not in tensors and not alias.startswith("tva.") and alias != "format":
            tensors[alias] = tensors[kept]
            start = torch.Size([0] * len(tensors[kept].size))
            places[MetadataIndex(alias, start, 0)] = places[MetadataIndex(kept, start, 0)]
    found = Metadata(tensors, planner_data={name: (name,) for name in tensors}, storage_data=places)
    return {".metadata": pickle.dumps(found), RECORD: json.dumps(dict(metadata), indent=1).encode()}


def check_format(output: Path, format: str, **others: object) -> None:
    """Check the requested format of an output.

    Args:
        output: Where it goes.
        format: ``"safetensors"`` or ``"dcp"``.
        others: Options by name, which are for safetensors only.

    Raises:
        ValueError: There is no such format, or it does not go with the others.
    """
    given = [name for name, value in others.items() if value]
    if format not in ("safetensors", "dcp"):
        raise ValueError(f"format must be 'safetensors' or 'dcp'; found {format!r}.")
    if format == "dcp" and output.suffix in (".safetensors", ".gguf"):
        raise ValueError(f"format='dcp' writes a folder, and the output is {output}. Give a name without an ending.")
    if format == "dcp" and given:
        raise ValueError(
            f"format='dcp' cannot be combined with {', '.join(given)}. Leave that out, or write safetensors."
        )


class _Bytes:
    def __init__(self, spec: Spec) -> None:
        kind = _STORAGES.get(spec.dtype_name)
        count = spec.numel() if kind else spec.num_bytes
        self.key = ("storage", getattr(torch, kind) if kind else torch.UntypedStorage, "0", "cpu", count)


class _Whole:
    """Pickles as a contiguous tensor does."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __reduce__(self) -> tuple[Any, ...]:
        spec = self.spec
        stride = [1]
        for size in reversed(spec.sizes[1:]):
            stride.insert(0, stride[0] * max(size, 1))
        layout = (_Bytes(spec), 0, spec.sizes, tuple(stride[: len(spec.sizes)]), False, OrderedDict())
        if spec.dtype_name in _STORAGES:
            return torch._utils._rebuild_tensor_v2, layout
        return torch._utils._rebuild_tensor_v3, (*layout, spec.dtype)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.key if isinstance(obj, _Bytes) else None


def _frame(spec: Spec) -> tuple[bytes, bytes]:
    """Return the parts of a tensor's archive before its bytes and after them."""
    text = io.BytesIO()
    _Pickler(text, protocol=2).dump(_Whole(spec))
    small = {"data.pkl": text.getvalue(), "byteorder": b"little", "version": b"3\n"}
    before, central, num_entries = b"", b"", 0
    for name, data in small.items():
        central += _entry(name, len(data), zlib.crc32(data), len(before))
        before += _local(name, len(data), zlib.crc32(data)) + data
        num_entries += 1
    central += _entry("data/0", spec.num_bytes, 0, len(before))
    before += _local("data/0", spec.num_bytes, 0)
    start = len(before) + spec.num_bytes
    end = b""
    if start >= _LARGE:
        end = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, *[num_entries + 1] * 2, len(central), start)
        end += struct.pack("<4sIQI", b"PK\6\7", 0, start + len(central), 1)
    end += struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, *[num_entries + 1] * 2, len(central), min(start, _LARGE), 0)
    return before, central + end


def _sizes(size: int) -> tuple[int, bytes]:
    """Return a size as the fields of zip hold it, and the extra field that a large one needs."""
    return (size, b"") if size < _LARGE else (_LARGE, struct.pack("<HHQQ", 1, 16, size, size))


def _local(name: str, size: int, crc: int) -> bytes:
    path, (short, extra) = f"archive/{name}".encode(), _sizes(size)
    return struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 33, crc, short, short, len(path), len(extra)) + path + extra


def _entry(name: str, size: int, crc: int, offset: int) -> bytes:
    path, (short, extra) = f"archive/{name}".encode(), _sizes(size)
    fields = (45, 45, 0, 0, 0, 33, crc, short, short, len(path), len(extra), 0, 0, 0, 0, offset)
    return struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields) + path + extra
