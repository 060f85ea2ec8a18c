"""LiNeS: scale a task vector by the depth of its layers, read from the tensors' names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tva.merge.method import Method, Place

# "model.layers.3.mlp…", "blocks.3.…", "layer3.0.…", "encoder_layer_3.…": what precedes the first number is the stack
_NUMBERED = re.compile(r"(.*?(?:^|\.|layers?_?|blocks?_?|stages?_?))(\d+)\.")


@dataclass(frozen=True)
class Lines(Method):
    r"""Scale each layer by its depth: layer :math:`l` of :math:`L` by ``first + (last - first) * (l - 1) / (L - 1)``.

    Shallow layers hold general features and want little change, deep ones the task's. A layer is what the first number
    in a tensor's name says (``encoder.layers.3.``); a model with several stacks (encoder and decoder) counts each for
    itself. Tensors without a number, such as embeddings and heads, are scaled by ``first``. Layers are counted in the
    tensors that the recipe moves, by one sweep; ``layers`` saves that sweep, and is needed where the last layers were
    frozen. Works on any vector, a merged one too: ``lines(ties(a, b), first=0.3, last=1.0)``.

    Args:
        first: Factor of the first layer; the paper's :math:`\alpha`.
        last: Factor of the last layer; the paper's :math:`\alpha + \beta`.
        layers: How many layers each stack has; 0 counts them.

    Source: Wang et al., "LiNeS: post-training layer scaling prevents forgetting and enhances model merging", ICLR 2025.
    """

    first: float
    last: float
    layers: int = 0

    usage = "lines(v, first=0.2, last=1.0) or lines(v, first=0.2, last=1.0, layers=12)"
    num_vectors = 1

    @property
    def num_sweeps(self) -> int:
        return 0 if self.layers else 1

    @property
    def over_model(self) -> bool:
        return not self.layers

    def start(self, num_vectors: int) -> dict[str, int]:
        return {}

    def observe(self, state: dict[str, int], deltas: Sequence[Tensor], place: Place, sweep: int) -> None:
        stack, number = layer_of(place.tensor)
        if number is not None:
            state[stack] = max(state.get(stack, 0), number + 1)

    def finish(self, state: dict[str, int], sweep: int) -> None:
        if not state:
            raise ValueError(
                "lines scales layers by their number, and no tensor's name has one, as in 'layers.3.weight'."
            )

    def merge(self, deltas: Sequence[Tensor], state: dict[str, int] | None, place: Place) -> Tensor:
        stack, number = layer_of(place.tensor)
        count = self.layers or state.get(stack, 0)
        if number is None or count == 1:
            return deltas[0] * self.first
        if number >= count:
            raise ValueError(f"{place.tensor!r} lies in layer {number + 1}, but lines was given layers={count}.")
        return deltas[0] * (self.first + (self.last - self.first) * number / (count - 1))


def layer_of(name: str) -> tuple[str, int | None]:
    """Give the stack and the number, from 0, of the layer that a tensor lies in; None if it lies in no layer.

    Example:
        >>> layer_of("encoder.block.3.layer.1.weight")
        ('encoder.block.', 3)
        >>> layer_of("lm_head.weight")
        ('', None)
    """
    found = _NUMBERED.match(name)
    return (found[1], int(found[2])) if found else ("", None)
