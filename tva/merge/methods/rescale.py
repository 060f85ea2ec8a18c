"""Rescale: give a vector the size of another one, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tva._torch import Tensor
from tva.merge.base import Chunk, Method
from tva.merge.exact_sum import Sum


@dataclass(frozen=True)
class Rescale(Method):
    r"""Scale each tensor of the first vector so that its norm is that of the second vector's.

    ``rescale(magnitude(a, density=0.2), a)`` has what ``magnitude`` keeps, and the norm that ``a`` had. A tensor in
    which either norm is 0 is left as it is. One pass.

    Args:
        norm: ``"l1"``, the sum of magnitudes, as mergekit's ``rescale: true``; or ``"l2"``.
    """

    norm: Literal["l1", "l2"] = "l1"

    name = "rescale"
    usage = 'rescale(v, like, norm="l1" or "l2")'
    num_vectors = 2
    num_passes = 1

    def __post_init__(self) -> None:
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"rescale has norm 'l1' or 'l2'; found {self.norm!r}.")

    def start(self, num_vectors: int) -> tuple[Sum, Sum]:
        return Sum(), Sum()

    def observe(self, state: tuple[Sum, Sum], deltas: Sequence[Tensor], chunk: Chunk, pass_number: int) -> None:
        for part, delta in zip(state, deltas, strict=True):
            delta = delta.double()
            part.add(delta.abs() if self.norm == "l1" else delta.square(), chunk)

    def merge(self, deltas: Sequence[Tensor], state: tuple[Sum, Sum], chunk: Chunk) -> Tensor:
        own, like = (part.total for part in state)
        ratio = like / own if own and like else 1.0
        return deltas[0] * (ratio if self.norm == "l1" else math.sqrt(ratio))
