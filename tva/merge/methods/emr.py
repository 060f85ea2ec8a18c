"""EMR: one unified vector, and for each task a mask and a scale of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tva._torch import Tensor, torch
from tva.merge.base import Chunk, Method
from tva.merge.exact_sum import Sum
from tva.merge.methods.consensus import pick_task
from tva.merge.methods.linear import add_up


@dataclass(frozen=True)
class Emr(Method):
    r"""Elect, mask and rescale, without tuning.

    The unified vector :math:`\tau_u` has in each element the sign of :math:`\sum_t \tau_t` and the largest magnitude
    among the vectors of that sign. With ``task`` the result is the task's own model instead, which needs to be known
    when the model is used: :math:`s_t\, M_t \circ \tau_u` with :math:`M_t = [\tau_t \tau_u > 0]` and
    :math:`s_t = \sum |\tau_t| / \sum |M_t \circ \tau_u|` over the whole model. One vector gives that vector either way.
    No passes; one over the model with ``task``.

    Args:
        task: Which vector's task, from 1; 0 for the unified vector.

    Source: Huang et al., "EMR-Merging: tuning-free high-performance model merging", NeurIPS 2024.
    """

    task: int = 0

    name = "emr"
    usage = "emr(a, b, …) or emr(a, b, …, task=1)"

    @property
    def num_passes(self) -> int:
        return 1 if self.task else 0

    @property
    def over_model(self) -> bool:
        return bool(self.task)

    def start(self, num_vectors: int) -> tuple[Sum, Sum]:
        return Sum(), Sum()

    def observe(self, state: tuple[Sum, Sum], deltas: Sequence[Tensor], chunk: Chunk, pass_number: int) -> None:
        own = pick_task(deltas, self.task)
        state[0].add(own.abs(), chunk)
        state[1].add(_masked(own, _unified(deltas)).abs_(), chunk)

    def finish(self, state: tuple[Sum, Sum], pass_number: int) -> None:
        for part in state:
            part.close()

    def merge(self, deltas: Sequence[Tensor], state: tuple[Sum, Sum] | None, chunk: Chunk) -> Tensor:
        unified = _unified(deltas)
        if not self.task:
            return unified
        own, masked = (part.total for part in state)
        return _masked(pick_task(deltas, self.task), unified).mul_(own / masked if masked else 0.0)


def _unified(deltas: Sequence[Tensor]) -> Tensor:
    elected = add_up(deltas).sign_()
    largest, part = torch.zeros_like(elected), torch.empty_like(elected)
    for delta in deltas:
        torch.maximum(largest, torch.mul(delta, elected, out=part), out=largest)
    return largest.mul_(elected)


def _masked(own: Tensor, unified: Tensor) -> Tensor:
    """Keep the unified vector where the task's own has its sign."""
    return unified * own.sign().mul_(unified.sign()).clamp_(min=0)
