"""Dtypes by name, shapes and sizes in bytes of tensors, without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy

from tva._torch import Tensor, torch

SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
NAMES_OF_DTYPES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_ITEMSIZES = {
    name: 1 if "8" in code or code == "BOOL" else int(code[-2:]) // 8 for name, code in NAMES_OF_DTYPES.items()
}

REAL_DTYPES = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}  # of their parts


def dtype_name(dtype: torch.dtype | str) -> str:
    """Return a dtype's name, such as ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


class Spec:
    """Dtype and shape of a tensor, known without reading it.

    Args:
        dtype: Or its name.
        shape: The size of each dimension.

    Attributes:
        dtype_name: Such as ``"bfloat16"``.
        sizes: The shape as a plain tuple.

    Example:
        >>> Spec("bfloat16", (2, 3)) == (torch.bfloat16, torch.Size([2, 3]))
        True
    """

    __slots__ = ("dtype_name", "sizes")

    def __init__(self, dtype: torch.dtype | str, shape: Sequence[int]) -> None:
        self.dtype_name, self.sizes = dtype_name(dtype), tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype."""
        return getattr(torch, self.dtype_name)

    @property
    def shape(self) -> torch.Size:
        """The shape."""
        return torch.Size(self.sizes)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return _ITEMSIZES.get(self.dtype_name) or self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return self.numel() * self.itemsize

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def is_floating_point(self) -> bool:
        """Whether the elements are real floating-point numbers."""
        return self.dtype_name.startswith(("float", "bfloat"))

    def is_complex(self) -> bool:
        """Whether the elements are complex numbers."""
        return self.dtype_name.startswith("complex")

    def real_parts(self) -> Spec:
        """Return the dtype and shape of the real and imaginary parts of complex elements, shape (…, 2)."""
        return Spec(REAL_DTYPES[self.dtype_name], (*self.sizes, 2))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Spec):
            return (self.dtype_name, self.sizes) == (other.dtype_name, other.sizes)
        return (self.dtype, self.shape) == other

    def __hash__(self) -> int:
        return hash((self.dtype_name, self.sizes))

    def __repr__(self) -> str:
        return f"Spec({self.dtype_name}, {list(self.sizes)})"


def encode_header(
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str],
    room: int = 0,
    offsets: Mapping[str, tuple[int, int]] | None = None,
) -> bytes:
    """Return the start of a safetensors file, up to its first tensor.

    Args:
        specs: All tensors, in the order of the file.
        metadata: Text for the header.
        room: Bytes that the header takes, filled with spaces; by default as many as it needs, a multiple of 8.
        offsets: Where each tensor begins and ends, in bytes after the header; by default one after the other.

    Raises:
        ValueError: A dtype has no name in the format.
        RuntimeError: The header needs more than ``room``.

    Source: the format is described at https://github.com/huggingface/safetensors#format
    """
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, spec in specs.items():
        if spec.dtype_name not in NAMES_OF_DTYPES:
            raise ValueError(f"{name!r} is torch.{spec.dtype_name}, which cannot be written to safetensors.")
        start, end = offsets[name] if offsets else (end, end + spec.num_bytes)
        dtype = NAMES_OF_DTYPES[spec.dtype_name]
        fields[name] = {"dtype": dtype, "shape": list(spec.sizes), "data_offsets": [start, end]}
    text = json.dumps(fields).encode()
    room = room or len(text) + -len(text) % 8
    if len(text) > room:
        raise RuntimeError(f"The header takes {len(text)} bytes, but room was left for {room}.")
    return room.to_bytes(8, "little") + text.ljust(room)


class Elements(NamedTuple):
    """Some elements of a tensor, in order, as bytes.

    Attributes:
        data: Shape (bytes,), uint8.
        dtype_name: Such as ``"bfloat16"``.
    """

    data: numpy.ndarray
    dtype_name: str

    @classmethod
    def of(cls, tensor: Tensor) -> Elements:
        """Return the elements of a tensor on the CPU, in its memory where that is contiguous."""
        flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))  # one element is contiguous with any stride
        return cls(flat.view(torch.uint8).numpy(), dtype_name(tensor.dtype))

    def tensor(self) -> Tensor:
        """Return a tensor of one dimension in the same memory."""
        data, dtype = torch.from_numpy(self.data), getattr(torch, self.dtype_name)
        return data.view(dtype) if len(data) else data.to(dtype)
