"""Methods that weight task vectors by statistics of their models, read from files: Fisher and RegMean merging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tva._torch import Tensor, torch
from tva.checkpoints import LazyWeights
from tva.merge.base import Chunk, Method
from tva.merge.exact_sum import Sum
from tva.merge.statistics_file import _CHUNK, _Statistics


@dataclass(frozen=True)
class Fisher(_Statistics, Method):
    r"""Average vectors, each element weighted by its Fisher information: :math:`\sum_t F_t \tau_t / \sum_t F_t`.

    The weights of an element add up to 1, so that this is the paper's average of models, on task vectors. One vector
    gives that vector, up to rounding. No passes; the files are read beside the vectors, chunk by chunk.

    Args:
        files: For each vector, in their order, a file of the diagonal Fisher information of its model: a tensor of the
            weight's name and shape for every weight that moves, in any format that `tva.open_weights` reads.
            `tva.callbacks.MergeStatistics` writes it.
        weights: A positive number for each vector that multiplies its :math:`F_t`; by default all are 1.
        floor: Smallest Fisher information, above 0; the paper's is 1e-6. Where all are below it the average is plain.
        normalize: Divide each model's :math:`F_t` by its Euclidean norm over its whole file, after the floor, so that a
            task with large gradients does not outweigh the others; the files are read once more for it.

    Source: Matena and Raffel, "Merging models with Fisher-weighted averaging", NeurIPS 2022.
    """

    files: Sequence[str] = ()
    weights: Sequence[float] = ()
    floor: float = 1e-6
    normalize: bool = False

    name = "fisher"
    usage = 'fisher(a, b, …, files=("fisher_a.safetensors", "fisher_b.safetensors", …), floor=1e-6, normalize=True)'

    def __post_init__(self) -> None:
        self._open("fisher")
        if self.weights and not (len(self.weights) == len(self.files) and all(weight > 0 for weight in self.weights)):
            raise ValueError(f"weights are positive numbers, one for each of the files; found {self.weights!r}.")
        if not self.floor > 0:
            raise ValueError(f"floor must be above 0; found {self.floor}.")

    def merge(self, deltas: Sequence[Tensor], state: Any, chunk: Chunk) -> Tensor:
        files = self._files_of(chunk.tensor, deltas, chunk.shape)
        merged, total = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
        for delta, file, weight in zip(deltas, files, self._coefs, strict=True):
            stop = chunk.start + len(delta)
            fisher = file.slice(chunk.tensor, chunk.start, stop).to(delta.dtype).clamp_(min=self.floor).mul_(weight)
            merged += delta * fisher
            total += fisher
        return merged.div_(total)

    @cached_property
    def _coefs(self) -> list[float]:
        weights = self.weights or [1.0] * len(self.files)
        norms = [_norm(file) for file in self._opened] if self.normalize else [1.0] * len(self.files)
        return [weight / norm if norm else 0.0 for weight, norm in zip(weights, norms, strict=True)]


def _norm(file: LazyWeights) -> float:
    total = Sum()
    for name in file:
        shape = tuple(file.spec(name).shape)
        for start in range(0, max(1, math.prod(shape)), _CHUNK):
            values = file.slice(name, start, min(start + _CHUNK, math.prod(shape)))
            total.add(values.double().square_(), Chunk(name, start, shape=shape))
    return math.sqrt(total.total)
