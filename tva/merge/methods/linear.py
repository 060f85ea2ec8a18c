"""Methods that are fixed linear combinations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tva._torch import Tensor
from tva.merge.base import Chunk, Method
from tva.merge.program import ADD, DIV, SUB, Step, Steps, sum_of


@dataclass(frozen=True)
class Analogy(Method):
    r"""Infer a fourth task: "A is to B as C is to the result", :math:`\tau_C + (\tau_B - \tau_A)`.

    Source: Ilharco et al., "Editing models with task arithmetic", ICLR 2023, section 5.
    """

    name = "analogy"
    usage = "analogy(a, b, c), which is c + (b - a)"
    num_vectors = 3
    linear = True

    def merge(self, deltas: Sequence[Tensor], state: Any, chunk: Chunk) -> Tensor:
        a, b, c = deltas
        return c + (b - a)

    def in_steps(self, arguments: Sequence[Steps], state: Any, chunk: Chunk) -> Steps:
        a, b, c = arguments
        return (*c, *b, *a, Step(SUB), Step(ADD))


@dataclass(frozen=True)
class Mean(Method):
    r"""Average task vectors, :math:`\frac{1}{T} \sum_t \tau_t`, which averages their fine-tuned models.

    Source: Wortsman et al., "Model soups", ICML 2022.
    """

    name = "mean"
    usage = "mean(a, b, …)"
    linear = True

    def merge(self, deltas: Sequence[Tensor], state: Any, chunk: Chunk) -> Tensor:
        return add_up(deltas) / len(deltas)

    def in_steps(self, arguments: Sequence[Steps], state: Any, chunk: Chunk) -> Steps:
        return (*sum_of(arguments), Step(DIV, numbers=(len(arguments),)))


def add_up(deltas: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors, in their order, as a new tensor."""
    if len(deltas) == 1:
        return deltas[0].clone()
    total = deltas[0] + deltas[1]
    for delta in deltas[2:]:
        total += delta
    return total
