"""SCE: select the elements that differ most between the vectors, calculate weights, erase minority signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tva._torch import Tensor, torch
from tva.merge.base import Chunk, Method
from tva.merge.methods.linear import add_up
from tva.merge.order_statistics import check_density


@dataclass(frozen=True)
class Sce(Method):
    r"""Keep the elements of largest variance over the vectors, and average those of the elected sign by their energy.

    Of each tensor the fraction ``density`` of elements with the largest variance over the vectors is kept, of those
    whose variance is not 0. Each vector's weight in a tensor is its sum of squares there, divided by that of all
    vectors; an element's result is the weighted mean of the vectors whose sign is that of their sum (positive where
    the sum is 0).

    Args:
        density: Fraction of elements to keep, in (0, 1]; 1 keeps all.
        floor: mergekit's 1e-6, where the paper has none: vectors whose mean squares in a tensor add up to less weigh
            the same there, and an element is divided by at least this share of the weights.

    Source: Wan et al., "FuseChat: knowledge fusion of chat models", 2024.
    """

    density: float = 1.0
    floor: float = 0.0

    name = "sce"
    usage = "sce(a, b, …, density=1.0, floor=0)"
    whole = True

    def __post_init__(self) -> None:
        check_density(self.density)
        if not 0 <= self.floor < 1:
            raise ValueError(f"sce has a floor in [0, 1); found {self.floor}.")

    def merge(self, deltas: Sequence[Tensor], state: Any, chunk: Chunk) -> Tensor:
        vectors = [delta.double() for delta in deltas]
        if vectors[0].numel() == 0:
            return deltas[0].clone()
        if self.density < 1:
            mean = add_up(vectors) / len(vectors)
            variance = add_up([(vector - mean).square() for vector in vectors])
            count = int(self.density * torch.count_nonzero(variance))
            kept = torch.zeros_like(mean)
            kept[variance.argsort(descending=True, stable=True)[:count]] = 1
            vectors = [vector * kept for vector in vectors]
        elected = torch.where(add_up(vectors) < 0, -1.0, 1.0)
        energies = [float(vector.square().sum()) for vector in vectors]
        if sum(energies) / vectors[0].numel() < self.floor:
            energies = [1.0] * len(vectors)
        agreeing = [(vector.sign() == elected).double() for vector in vectors]
        weights = [agrees * energy for agrees, energy in zip(agreeing, energies, strict=True)]
        total = add_up(weights).clamp_(min=self.floor * sum(energies))
        merged = add_up([vector * weight for vector, weight in zip(vectors, weights, strict=True)])
        return (merged / torch.where(total > 0, total, 1)).to(deltas[0].dtype)
