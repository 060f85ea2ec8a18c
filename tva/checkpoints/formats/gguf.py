"""GGUF files, as llama.cpp has them: tensors of the types that the ``gguf`` package dequantizes.

Names, and in some architectures the order of rows, are those of llama.cpp and not of the model that was converted.

Source: the format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy

from tva._torch import Tensor, torch
from tva.checkpoints.dequantized import Dequantized
from tva.checkpoints.foreign import read_start
from tva.checkpoints.lazy import Entry, Info, LazyWeights, OpenFile, Stored, Which
from tva.checkpoints.spec import Spec
from tva.errors import MismatchError, some

ENDINGS = (".gguf",)
FORMAT = "GGUF file"
PLAIN = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
}  # fmt: skip
MAX_ITEMS = 3_000_000  # texts in an array, tensors and values; vocabularies have some 100,000
MAX_NAME, MAX_DIMENSIONS = 2**16, 8
_UINT32, _TEXT, _ARRAY = 4, 8, 9  # types of values
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def matches(path: Path) -> bool:
    """Return whether a file begins as a GGUF file does."""
    return not path.is_dir() and read_start(path, 4) == b"GGUF"


@dataclass(frozen=True, eq=False)
class Blocks(Dequantized):
    """A tensor of a quantized type, row by row."""

    kind: Any  # of the package's GGMLQuantizationType

    def rows(self, first: int, last: int) -> Tensor:
        width = self.parts["codes"].spec.sizes[1]
        data = self.parts["codes"].slice(first * width, last * width).numpy().reshape(-1, width)
        return torch.from_numpy(_package().quants.dequantize(data, self.kind)).double()

    def codes(self, values: Tensor) -> dict[str, Tensor]:
        rows = values.reshape(-1, self.sizes[-1]).float().numpy()
        return {"codes": torch.from_numpy(_package().quants.quantize(rows, self.kind).copy())}

    @property
    def requantizes(self) -> bool:
        gguf = _package()
        return _can(
            gguf.quants.quantize, numpy.zeros((1, gguf.GGML_QUANT_SIZES[self.kind][0]), numpy.float32), self.kind
        )


def open(path: Path, which: Which = "checkpoint") -> LazyWeights:
    """Open a GGUF file; see `tva.open_weights`.

    Raises:
        ValueError: It is damaged, the package ``gguf`` is missing, or it does not dequantize the type of a tensor.
    """
    gguf = _package(path)
    try:
        found = _tensors(path, gguf)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a GGUF file, or is damaged ({error}). Copy it again.") from error
    file, entries, unknown = OpenFile(path), dict[str, Entry](), set()
    kinds = Counter(kind.name for _, kind, _ in found.values())
    for name, (sizes, kind, offset) in found.items():
        if kind.name in PLAIN:
            entries[name] = Stored(file, offset, Spec(PLAIN[kind.name], sizes))
        else:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if not _can(gguf.quants.dequantize, numpy.zeros((1, size), numpy.uint8), kind):
                unknown.add(kind.name)
            rows = Spec("uint8", (math.prod(sizes[:-1]), sizes[-1] // block * size))
            parts = {"codes": Stored(file, offset, rows)}
            entries[name] = Blocks(f"GGUF {kind.name}", {"codes": name}, parts, sizes, kind)
    if unknown:
        raise ValueError(
            f"{path} holds tensors of {some(sorted(unknown))}, which the package gguf does not dequantize. Update it, "
            f"or give the checkpoint that the file was converted from."
        )
    quantized = {kind: count for kind, count in kinds.items() if kind not in PLAIN}
    notes = [f"dequantized {count} tensors of {kind}" for kind, count in quantized.items()]
    return LazyWeights(Info(path, FORMAT, notes=tuple(notes)), entries)


class _Cursor:
    """Reads a header from its start, within a file and within limits."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.size, self.position = file, size, 0

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.bytes(struct.calcsize(form)))[0])

    def bytes(self, length: int) -> bytes:
        self.check(length)
        self.position += length
        return self.file.read(length)

    def skip(self, length: int) -> None:
        self.check(length)
        self.position += length
        self.file.seek(length, os.SEEK_CUR)

    def check(self, length: int) -> None:
        if length > self.size - self.position:
            raise EOFError(f"{length:,} bytes are said to follow byte {self.position:,} of {self.size:,}")

    def text(self) -> str:
        if (length := self.number("<Q")) > MAX_NAME:
            raise ValueError(f"a name of {length:,} bytes")
        return self.bytes(length).decode()

    def skip_value(self, kind: int) -> None:
        """Skip a value of the metadata; of an array, all that it holds."""
        if kind == _ARRAY:
            kind, count = self.number("<I"), self.number("<Q")
            if kind == _ARRAY or (kind == _TEXT and count > MAX_ITEMS):
                raise ValueError(f"an array of {count:,} {'arrays' if kind == _ARRAY else 'texts'}")
            if kind != _TEXT:
                self.skip(_size_of(kind) * count)
                return
            for _ in range(count):
                self.skip(self.number("<Q"))
        else:
            self.skip(self.number("<Q") if kind == _TEXT else _size_of(kind))


def _size_of(kind: int) -> int:
    if kind not in _SIZES:
        raise ValueError(f"a value of the unknown type {kind}")
    return _SIZES[kind]


def _tensors(path: Path, gguf: Any) -> dict[str, tuple[tuple[int, ...], Any, int]]:
    """Read the header: names to shapes, types of the package's enumeration and places in the file.

    The package's own reader believes the counts in a file, however large, so that a few bytes keep it busy forever.
    """
    with path.open("rb") as file:
        cursor = _Cursor(file, path.stat().st_size)
        cursor.skip(4)
        version, count, values = (cursor.number(form) for form in ("<I", "<Q", "<Q"))
        if version & 0xFFFF == 0:
            raise ValueError("it is big-endian: convert it with gguf-convert-endian")
        if version not in (2, 3) or count > MAX_ITEMS or values > MAX_ITEMS:
            raise ValueError(f"version {version} with {count:,} tensors and {values:,} values")
        alignment = 32
        for _ in range(values):
            key, kind = cursor.text(), cursor.number("<I")
            if key != "general.alignment":
                cursor.skip_value(kind)
            elif kind != _UINT32 or (alignment := cursor.number("<I")) == 0:
                raise ValueError("general.alignment is not a positive integer")
        found = {}
        for _ in range(count):
            name, dimensions = cursor.text(), cursor.number("<I")
            if name in found or dimensions > MAX_DIMENSIONS:
                raise ValueError(f"tensor {name!r} is there twice, or has {dimensions} dimensions")
            sizes = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
            kind = gguf.GGMLQuantizationType(cursor.number("<I"))
            found[name] = sizes, kind, cursor.number("<Q")
        start = -(-cursor.position // alignment) * alignment
        for name, (sizes, kind, offset) in found.items():
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if kind.name not in PLAIN and (not sizes or sizes[-1] == 0 or sizes[-1] % block):
                raise ValueError(f"tensor {name!r} of shape {list(sizes)} is not of whole blocks of {block}")
            if start + offset + math.prod(sizes) // block * size > cursor.size:
                raise ValueError(f"tensor {name!r} of shape {list(sizes)} ends behind the file's {cursor.size:,} bytes")
        return {name: (sizes, kind, start + offset) for name, (sizes, kind, offset) in found.items()}


def is_gguf(weights: object) -> bool:
    """Return whether weights are those of a GGUF file."""
    return isinstance(weights, LazyWeights) and weights.info.format == FORMAT


def check_both_gguf(weights: LazyWeights | Path, base: Mapping[str, Tensor], key_map: object) -> None:
    """Check that a GGUF file is not mixed with other weights, but for those that have llama.cpp's names.

    Args:
        weights: Of a fine-tuned model, or the path of an adapter.
        base: The base's.
        key_map: What is to rename the weights.

    Raises:
        MismatchError: They are mixed.
    """
    mixed = is_gguf(weights) != is_gguf(base)
    if mixed and (isinstance(weights, Path) or key_map or not weights.keys() & base.keys()):
        path = weights if isinstance(weights, Path) else weights.path
        raise MismatchError(
            f"One of the base and {path} is a GGUF file, which has names of its own, and in some architectures another "
            f"order of rows (of the attention's queries and keys), so that key_map is not enough. Give both as GGUF "
            f"files, or both as the checkpoints that these are made from."
        )


def _package(path: Path | None = None) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"{path or 'A GGUF file'} is read by the package gguf, which is not installed: pip install 'tva[gguf]'."
        ) from error
    return gguf


def _can(function: Any, example: numpy.ndarray, kind: Any) -> bool:
    """Return whether the package does this for a type."""
    try:
        function(example, kind)
    except NotImplementedError:
        return False
    return True
