"""LiNeS: scale a task vector by the depth of its layers, read from the tensors' names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tva._torch import Tensor
from tva.merge.base import Chunk, Method
from tva.merge.program import MUL, Step, Steps


@dataclass(frozen=True)
class Lines(Method):
    r"""Scale each layer by its depth: layer :math:`l` of :math:`L` by ``first + (last - first) * (l - 1) / (L - 1)``.

    Shallow layers hold general features and want little change, deep ones the task's. Layers are those of
    `tva.layers.layers_of`, counted in all tensors of the model, frozen ones too; a model with several stacks (encoder
    and decoder) counts each for itself. Tensors in no layer, such as embeddings and heads, are scaled by ``first``.
    Works on any vector, a merged one too: ``lines(ties(a, b), first=0.3, last=1.0)``. No passes.

    Args:
        first: Factor of the first layer; the paper's :math:`\alpha`.
        last: Factor of the last layer; the paper's :math:`\alpha + \beta`.

    Source: Wang et al., "LiNeS: post-training layer scaling prevents forgetting and enhances model merging", ICLR 2025.
    """

    first: float
    last: float

    name = "lines"
    usage = "lines(v, first=0.2, last=1.0)"
    num_vectors = 1

    def merge(self, deltas: Sequence[Tensor], state: None, chunk: Chunk) -> Tensor:
        return deltas[0] * self._factor(chunk)

    def in_steps(self, arguments: Sequence[Steps], state: None, chunk: Chunk) -> Steps:
        return (*arguments[0], Step(MUL, numbers=(self._factor(chunk),)))

    def _factor(self, chunk: Chunk) -> float:
        if not chunk.layers:
            raise ValueError(
                "lines scales layers by their number, and no tensor's name has one, as in 'layers.3.weight'."
            )
        layer, count = chunk.layers.get(chunk.tensor, (0, 1))
        return self.first + (self.last - self.first) * layer / max(1, count - 1)
