"""Split a checkpoint into safetensors files, and write one of them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tva.checkpoints.atomic import make_room
from tva.checkpoints.spec import Elements, Spec, encode_header

NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # tva writes through no link that somebody else may have put there


@dataclass
class Shard:
    """One safetensors file to be written, and where in it each tensor begins, in bytes.

    Attributes:
        path: The file.
        tensors: Name to dtype and shape.
        prefix: Prefix of the names, which the file leaves out.
        offsets: Where they begin.
        file: The open file.
    """

    path: Path
    tensors: dict[str, Spec]
    prefix: str = ""
    offsets: dict[str, int] = field(default_factory=dict)
    file: int = -1

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """Return the header, and note where the tensors begin."""
        stored = {name.removeprefix(self.prefix): spec for name, spec in self.tensors.items()}
        header = encode_header(stored, metadata)
        end = len(header)
        for name, spec in self.tensors.items():
            self.offsets[name] = end
            end += spec.num_bytes
        return header

    def open(self) -> None:
        """Open the file, which is there."""
        self.file = os.open(self.path, os.O_RDWR | NO_LINK)

    def close(self) -> None:
        """Close the file, if it is open."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def write(self, name: str, start: int, chunk: Elements) -> None:
        """Write elements of a tensor, flattened, from ``start`` on."""
        data = memoryview(chunk.data)
        offset = self.offsets[name] + start * Spec(chunk.dtype_name, ()).itemsize
        while data.nbytes:
            count = os.pwrite(self.file, data, offset)
            data, offset = data[count:], offset + count

    def begin(self, header: bytes) -> None:
        """Make the file, with room for its tensors."""
        with self.path.open("xb") as file:
            file.write(header)
            file.flush()
            make_room(file.fileno(), len(header) + sum(spec.num_bytes for spec in self.tensors.values()))


def shard_tensors(tensors: Mapping[str, Spec], max_shard_bytes: int) -> list[dict[str, Spec]]:
    """Split a checkpoint into shards of at most a size, in order; a larger tensor is a shard of its own."""
    shards: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, spec in tensors.items():
        if shards[-1] and filled + spec.num_bytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.num_bytes
    return shards


def shard_names(tensors: Mapping[str, Spec], max_shard_bytes: int, stem: str) -> list[str]:
    """Return the names of a checkpoint's files, its index among them."""
    count = len(shard_tensors(tensors, max_shard_bytes))
    if count == 1:
        return [f"{stem}.safetensors"]
    shards = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    return [*shards, f"{stem}.safetensors.index.json"]
