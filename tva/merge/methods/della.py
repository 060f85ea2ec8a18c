"""DELLA: drop deltas at random, small ones more often than large ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tva._torch import Tensor, torch
from tva.merge.base import Chunk, Method
from tva.merge.methods.dare import random_bits


@dataclass(frozen=True)
class Della(Method):
    r"""Keep each element with a probability that grows with the rank of its magnitude in its row.

    In a row of :math:`n` elements, the one of rank :math:`r` from the smallest (from 0) is kept with probability
    :math:`p = d - \epsilon + 2 \epsilon\, r / (n - 1)`, where :math:`d` is ``density``. A row is one output channel of
    a matrix, and all of a tensor of one dimension. A row of one element is kept with probability :math:`d`. Which
    elements are dropped depends on (seed, vector, tensor name, element index) only, as with ``dare``.

    Args:
        density: Mean fraction to keep, in (0, 1]; 1 keeps all.
        epsilon: Half the range of the probabilities; ``density`` plus and minus it must be in (0, 1).
        seed: Any integer.
        rescale: What is kept is divided by its probability (``"probability"``, as in the paper), which leaves the
            expected value as it was, or stays as it is (``"none"``).

    Source: Deep et al., "DELLA-Merging: reducing interference in model merging through magnitude-based sampling", 2024.
    """

    density: float = 0.5
    epsilon: float = 0.15
    seed: int = 0
    rescale: Literal["probability", "none"] = "probability"

    name = "della"
    usage = 'della(v, density=0.5, epsilon=0.15, seed=0, rescale="probability" or "none")'
    num_vectors = 1
    random = True
    whole = True

    def __post_init__(self) -> None:
        inside = self.density - self.epsilon > 0 and self.density + self.epsilon < 1
        if not 0 < self.density <= 1 or self.epsilon < 0 or (self.density < 1 and not inside):
            raise ValueError(
                f"della needs a density in (0, 1], and density - epsilon and density + epsilon in (0, 1); "
                f"found density {self.density} and epsilon {self.epsilon}."
            )
        if self.rescale not in ("probability", "none"):
            raise ValueError(f"della has rescale 'probability' or 'none'; found {self.rescale!r}.")

    def merge(self, deltas: Sequence[Tensor], state: Any, chunk: Chunk) -> Tensor:
        (delta,) = deltas
        if self.density == 1 or delta.numel() == 0:
            return delta.clone()
        rows = delta.view(chunk.shape[0] if len(chunk.shape) > 1 else 1, -1)
        length = rows.shape[1]
        ranks = rows.abs().argsort(dim=1, stable=True).argsort(dim=1).double()
        keep = (self.density - self.epsilon) + ranks * (2 * self.epsilon / (length - 1)) if length > 1 else None
        keep = torch.full_like(ranks, self.density) if keep is None else keep
        drawn = (random_bits(delta.numel(), chunk, self.seed).double() + 2**31) / 2**32  # uniform in [0, 1)
        kept = torch.where(drawn.view_as(keep).to(keep.device) < keep, rows, 0)
        return (kept / keep if self.rescale == "probability" else kept).reshape(-1).to(delta.dtype)
