"""Tensors stored as codes and scales: dequantized in float64 when read, and quantized again in the same scheme."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tva._torch import Tensor, torch
from tva.checkpoints.fingerprint import Hashed
from tva.checkpoints.lazy import Described, Entry, InMemory, LazyWeights
from tva.checkpoints.spec import Spec

EDITED = "bfloat16"  # the dtype in which an edit of a dequantized tensor is written, unless another is asked for
_last = threading.local()  # the unit that a thread has read last


@dataclass(frozen=True, eq=False)
class Dequantized(Described):
    """A tensor that is dequantized when it is read; subclasses implement one scheme.

    Attributes:
        scheme: Its name for messages.
        names: Role of each part to its name in the file: ``codes`` and what else the scheme needs.
        parts: Role to what is stored.
        sizes: Shape of the weights.
    """

    scheme: str
    names: Mapping[str, str]
    parts: Mapping[str, Entry]
    sizes: tuple[int, ...]

    @property
    def spec(self) -> Spec:
        return Spec("float64", self.sizes)

    @property
    def written_dtype(self) -> str:
        return EDITED

    @property
    def stored_bytes(self) -> int:
        return sum(part.stored_bytes for part in self.parts.values())

    @property
    def held_bytes(self) -> int:
        return 2**16 * 8 * 3

    @property
    def stored(self) -> dict[str, Entry]:
        """Return the stored parts by their names in the file."""
        return {self.names[role]: part for role, part in self.parts.items()}

    def slice(self, start: int, stop: int) -> Tensor:
        width = self.sizes[-1]
        if start == stop:
            return torch.empty(0, dtype=torch.float64)
        first = start // width
        rows = self.rows(first, -(-stop // width)).reshape(-1)
        return rows[start - first * width : stop - first * width].clone()

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows of the weights as a float64 matrix, leading dimensions flattened."""
        raise NotImplementedError  # every scheme that is read in rows says how

    def codes(self, values: Tensor) -> dict[str, Tensor]:
        """Return the parts, by role, that represent other values best in this scheme.

        Args:
            values: Float64, of the shape of the weights.
        """
        raise NotImplementedError  # where `requantizes` is true, the scheme says how

    def quantized(self, values: Tensor) -> Dequantized:
        """Return other values in this scheme; parts that do not depend on the values are kept."""
        new = {role: InMemory(tensor.reshape(self.parts[role].shape)) for role, tensor in self.codes(values).items()}
        return replace(self, parts={**self.parts, **new})

    @property
    def requantizes(self) -> bool:
        """Whether tva can quantize in this scheme."""
        return type(self).codes is not Dequantized.codes


@dataclass(frozen=True, eq=False)
class ByUnit(Dequantized):
    """A tensor that can only be dequantized a matrix at a time, such as one that is stored transposed."""

    @property
    def unit(self) -> int:
        """Elements of such a matrix."""
        return self.sizes[-1] * self.sizes[-2]

    @property
    def held_bytes(self) -> int:
        return 3 * 8 * self.unit

    def matrix(self, index: int) -> Tensor:
        """Return one matrix of the weights in float64; ``index`` counts over the leading dimensions."""
        raise NotImplementedError  # every scheme that is read in matrices says how

    def slice(self, start: int, stop: int) -> Tensor:
        found = [torch.empty(0, dtype=torch.float64)]
        for index in range(start // self.unit, -(-stop // self.unit)):
            if getattr(_last, "of", None) is not self or _last.index != index:
                _last.of, _last.index, _last.matrix = self, index, self.matrix(index).contiguous().reshape(-1)
            first = index * self.unit
            found.append(_last.matrix[max(0, start - first) : stop - first])
        return torch.cat(found)


def dequantized_entry(weights: Mapping[str, Any], name: str) -> Dequantized | None:
    """Return the codes and scales of a tensor; None if it is not quantized."""
    entry: Entry | None = weights.entry(name) if isinstance(weights, LazyWeights) else None
    entry = entry.entry if isinstance(entry, Hashed) else entry
    return entry if isinstance(entry, Dequantized) else None


def dequantized_entries(weights: Mapping[str, Any]) -> dict[str, Dequantized]:
    """Return all tensors that are stored quantized, by name; none is read."""
    found = {name: dequantized_entry(weights, name) for name in weights}
    return {name: entry for name, entry in found.items() if entry is not None}


def as_stored(weights: LazyWeights) -> LazyWeights:
    """Return quantized weights as they are stored: codes and scales under their names in the file."""

    def entries() -> Iterator[tuple[str, Entry]]:
        for name in weights:
            entry = dequantized_entry(weights, name)
            yield from {name: weights.entry(name)}.items() if entry is None else entry.stored.items()

    return LazyWeights(weights.info, dict(entries()), weights.metadata)


def in_blocks(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the largest magnitude in each block of a matrix.

    Args:
        values: Shape (…, rows, columns).
        block: Rows and columns of a block; the last ones may be smaller.
    """
    rows, columns = values.shape[-2:]
    padded = torch.nn.functional.pad(values.abs(), (0, -columns % block[1], 0, -rows % block[0]))
    padded = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))  # [..., R, b0, C, b1]
    return padded.amax((-1, -3))
