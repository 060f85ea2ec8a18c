"""Tensors that a LoRA adapter changes, computed from the base and the adapter's factors when they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from tva._torch import Tensor, torch
from tva.arithmetic import add_scaled
from tva.checkpoints.lazy import Entry

BLOCK = 2**16  # elements of a low-rank product that are computed at a time


@dataclass(frozen=True)
class Factors:
    """The low-rank factors of one module, with the names of their tensors."""

    a: Entry  # [rank, in, …kernel]; of an embedding [rank, number of embeddings]
    b: Entry  # [out, rank, …]
    embedding: bool
    names: tuple[str, ...]
    magnitude: Entry | None = None  # of DoRA: [out], or [1, out, 1 …]; of an embedding [embedding]


@dataclass(frozen=True)
class Adapted(Entry):
    """A base tensor plus ``scaling * b @ a``, computed when it is read; with a magnitude, each output has that norm."""

    base: Entry
    factors: Factors
    module: str
    scaling: float
    transposed: bool
    dtype: torch.dtype
    shape: torch.Size

    @property
    def written_dtype(self) -> str:
        return self.base.written_dtype if self.dtype == self.base.dtype else self.spec.dtype_name

    @property
    def in_parts(self) -> bool:
        return self.base.in_parts

    @property
    def held_bytes(self) -> int:
        a, b = self.factors.a, self.factors.b
        return self.base.held_bytes + (a.shape.numel() + b.shape.numel()) * (a.dtype.itemsize + torch.float32.itemsize)

    def slice(self, start: int, stop: int) -> Tensor:
        left, right = self._sides()
        row = max(1, right.shape[1])
        parts = [torch.empty(0, dtype=self.dtype)]
        for first, last in self._blocks(start // row, -(-stop // row)):
            low, high = max(start, first * row), min(stop, last * row)
            delta = (left[first:last] @ right).mul_(self.scaling)
            if self.factors.magnitude is not None:
                moved = self.base.slice(first * row, last * row).to(delta.dtype).reshape(-1, row).add_(delta)
                part = moved.mul_(self._magnified(moved, first, last)).reshape(-1)
                parts.append(part[low - first * row : high - first * row].to(self.dtype))
            else:
                delta = delta.reshape(-1)[low - first * row : high - first * row]
                parts.append(add_scaled(self.base.slice(low, high), delta, 1.0, dtype=self.dtype))
        return torch.cat(parts)

    def _sides(self) -> tuple[Tensor, Tensor]:
        a, b = self.factors.a.read().flatten(1), self.factors.b.read().flatten(1)  # [rank, in · kernel], [out, rank]
        wide = torch.float64 if torch.float64 in (a.dtype, b.dtype, self.base.dtype) else torch.float32
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return left.to(wide), right.to(wide)

    def _blocks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield blocks of rows that cover some.

        A part of a matrix product may differ in its last bit from the same part of the whole: blocks are therefore
        always the same ones, whatever is asked for.
        """
        inputs, outputs = self.factors.a.shape[1:].numel(), self.factors.b.shape[0]
        height, row = (inputs, outputs) if self.transposed else (outputs, inputs)
        rows = max(1, BLOCK // max(1, row))
        for start in range(first // rows * rows, last, rows):
            yield start, min(start + rows, height)

    def _magnified(self, moved: Tensor, first: int, last: int) -> Tensor:
        """Return by what some rows are multiplied, so that every output has its magnitude as its norm."""
        magnitude = self.factors.magnitude.read().reshape(-1).to(moved.dtype)
        if self.transposed:
            return magnitude / self._norms.to(moved.dtype)
        return (magnitude[first:last] / torch.linalg.vector_norm(moved, dim=1))[:, None]

    @cached_property
    def _norms(self) -> Tensor:
        left, right = self._sides()
        row, total = right.shape[1], torch.zeros(right.shape[1], dtype=torch.float64)
        for first, last in self._blocks(0, len(left)):
            moved = self.base.slice(first * row, last * row).double().reshape(-1, row)
            total += moved.add_((left[first:last] @ right).double(), alpha=self.scaling).square().sum(0)
        return total.sqrt()


@dataclass(frozen=True)
class NewRows(Entry):
    """A matrix some of whose rows are replaced by others, as those of trained tokens."""

    base: Entry
    rows: Entry
    indices: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def written_dtype(self) -> str:
        return self.base.written_dtype

    @property
    def in_parts(self) -> bool:
        return self.base.in_parts

    @property
    def held_bytes(self) -> int:
        return self.base.held_bytes + self.rows.spec.num_bytes

    def slice(self, start: int, stop: int) -> Tensor:
        part, row = self.base.slice(start, stop), self.shape[1]
        for at, index in enumerate(self.indices):
            low, high = max(start, index * row), min(stop, (index + 1) * row)
            if low < high:
                first = (at - index) * row
                part[low - start : high - start] = self.rows.slice(first + low, first + high).to(part.dtype)
        return part
