"""GGUF files, as llama.cpp has them: tensors of the types that the ``gguf`` package dequantizes.

Names, and in some architectures the order of rows, are those of llama.cpp and not of the model that was converted.

Source: the format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        reader = gguf.GGUFReader(path)
    except Exception as error:  # a stranger's bytes: the package checks little
        raise ValueError(f"{path} is not a GGUF file, or is damaged ({error}). Copy it again.") from error
    if getattr(reader, "endianess", gguf.GGUFEndian.LITTLE) != gguf.GGUFEndian.LITTLE:
        raise ValueError(f"{path} is a big-endian GGUF file. Convert it with gguf-convert-endian.")
    file, entries, unknown = OpenFile(path), dict[str, Entry](), set()
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    for tensor in reader.tensors:
        sizes, kind = tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type
        if kind.name in PLAIN:
            entries[tensor.name] = Stored(file, tensor.data_offset, Spec(PLAIN[kind.name], sizes))
        else:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            if not _can(gguf.quants.dequantize, numpy.zeros((1, size), numpy.uint8), kind):
                unknown.add(kind.name)
            rows = Spec("uint8", (tensor.n_elements // sizes[-1], sizes[-1] // block * size))
            parts = {"codes": Stored(file, tensor.data_offset, rows)}
            entries[tensor.name] = Blocks(f"GGUF {kind.name}", {"codes": tensor.name}, parts, sizes, kind)
    if unknown:
        raise ValueError(
            f"{path} holds tensors of {some(sorted(unknown))}, which the package gguf does not dequantize. Update it, "
            f"or give the checkpoint that the file was converted from."
        )
    quantized = {kind: count for kind, count in kinds.items() if kind not in PLAIN}
    notes = [f"dequantized {count} tensors of {kind}" for kind, count in quantized.items()]
    return LazyWeights(Info(path, FORMAT, notes=tuple(notes)), entries)


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
        MismatchError: It is.
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
            f"{path or 'A GGUF file'} is read through the package gguf, which is not installed: pip install gguf."
        ) from error
    return gguf


def _can(function: Any, example: numpy.ndarray, kind: Any) -> bool:
    """Return whether the package does this for a type."""
    try:
        function(example, kind)
    except NotImplementedError:
        return False
    return True
