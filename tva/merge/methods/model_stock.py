"""Model Stock: the mean of the vectors, shortened by the angle between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from tva._torch import Tensor, torch
from tva.merge.base import Chunk, Method
from tva.merge.exact_sum import Sum
from tva.merge.methods.linear import add_up

_SINGULAR = 1e-6  # 1 + (k - 1) cos below which the ratio has no value


@dataclass(frozen=True)
class ModelStock(Method):
    r"""Multiply the mean of the vectors by :math:`\frac{k \cos\theta}{1 + (k - 1) \cos\theta}`.

    :math:`\theta` is the angle between two vectors, its cosine averaged over all pairs of the :math:`k` vectors: the
    more they disagree, the nearer the result is to the base. Where the cosine is so negative that the ratio has no
    value, the result is the base. One pass.

    Args:
        over: The angle is that of each ``"tensor"``, or of each ``"row"`` (an output channel; a tensor of one dimension
            is one row).
        floor: The product of two vectors' norms is taken as at least this where it divides their inner product, so that
            tensors that hardly moved go back to the base: mergekit's 1e-6, where the paper has none.

    Source: Jang et al., "Model Stock: all we need is just a few fine-tuned models", ECCV 2024.
    """

    over: Literal["tensor", "row"] = "tensor"
    floor: float = 0.0

    name = "model_stock"
    usage = 'model_stock(a, b, …, over="tensor" or "row", floor=0)'

    def __post_init__(self) -> None:
        if self.over not in ("tensor", "row"):
            raise ValueError(f"model_stock has over 'tensor' or 'row'; found {self.over!r}.")
        if not 0 <= self.floor < math.inf:
            raise ValueError(f"model_stock has a finite floor of at least 0; found {self.floor}.")

    @property
    def num_passes(self) -> int:
        return 1 if self.over == "tensor" else 0

    @property
    def whole(self) -> bool:
        return self.over == "row"

    def start(self, num_vectors: int) -> dict[tuple[int, int], Sum]:
        pairs = [*combinations(range(num_vectors), 2), *((j, j) for j in range(num_vectors))]
        return {pair: Sum() for pair in pairs}

    def observe(
        self, state: dict[tuple[int, int], Sum], deltas: Sequence[Tensor], chunk: Chunk, pass_number: int
    ) -> None:
        deltas = [delta.double() for delta in deltas]
        for (j, k), products in state.items():
            products.add(deltas[j] * deltas[k], chunk)

    def merge(self, deltas: Sequence[Tensor], state: dict[tuple[int, int], Sum] | None, chunk: Chunk) -> Tensor:
        if len(deltas) < 2:
            raise ValueError(f"model_stock needs two vectors or more; found {len(deltas)}.")
        mean = add_up(deltas) / len(deltas)
        if mean.numel() == 0:
            return mean
        if self.over == "tensor":
            products = {pair: found.total for pair, found in state.items()}
            norms = [math.sqrt(products[j, j]) for j in range(len(deltas))]
            cosines = [
                max(-1.0, min(1.0, products[j, k] / max(norms[j] * norms[k], self.floor)))
                if norms[j] and norms[k]
                else 0.0
                for j, k in combinations(range(len(deltas)), 2)
            ]
            return mean * _ratio(torch.tensor(sum(cosines) / len(cosines), dtype=torch.float64), len(deltas)).item()
        rows = [delta.view(chunk.shape[0] if len(chunk.shape) > 1 else 1, -1).double() for delta in deltas]
        norms = [row.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny) for row in rows]
        units = [row / norm for row, norm in zip(rows, norms, strict=True)]
        cosines = [
            ((a * b).sum(1, keepdim=True) * self._share(m * n)).clamp(-1, 1)
            for (a, m), (b, n) in combinations(zip(units, norms, strict=True), 2)
        ]
        ratio = _ratio(sum(cosines) / len(cosines), len(deltas))
        return (mean.view(rows[0].shape) * ratio).reshape(-1).to(mean.dtype)

    def _share(self, norms: Tensor) -> Tensor | float:
        """Return what remains of a cosine where the product of the norms is below the floor."""
        return (norms / self.floor).clamp(max=1) if self.floor else 1.0


def _ratio(cosine: Tensor, count: int) -> Tensor:
    below = 1 + (count - 1) * cosine
    return torch.where(below.abs() < _SINGULAR, 0, count * cosine / torch.where(below.abs() < _SINGULAR, 1, below))
