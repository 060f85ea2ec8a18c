"""Methods that compare each vector with the sum of all: TALL masks and Consensus task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tva._torch import Tensor, torch
from tva.merge.base import Chunk, Method
from tva.merge.methods.linear import add_up


@dataclass(frozen=True)
class Consensus(Method):
    r"""Keep the sum of the vectors where at least ``min_agree`` of them find it useful.

    Vector :math:`t` finds an element useful if :math:`|\tau_t| > c\,|\sum_s \tau_s - \tau_t|` (its TALL mask). Elements
    useful to none or to few are noise or selfish, and stay at the base. The paper chooses :math:`c` for each task on
    validation data; here it is one for all. No passes.

    Args:
        min_agree: How many vectors must find an element useful; the paper's is 2. 0 keeps all, which is the sum.
        tall: :math:`c`, at least 0; the paper searches 0.2 to 0.6.

    Source: Wang et al., "Localizing task information for improved model merging and compression", ICML 2024.
    """

    min_agree: int = 2
    tall: float = 0.4

    name = "consensus"
    usage = "consensus(a, b, …, min_agree=2, tall=0.4)"

    def __post_init__(self) -> None:
        _check(self.tall)

    def merge(self, deltas: Sequence[Tensor], state: None, chunk: Chunk) -> Tensor:
        if self.min_agree > len(deltas):
            raise ValueError(
                f"consensus has min_agree={self.min_agree} and was given {len(deltas)} vectors, so that nothing would "
                f"be kept; lower min_agree, or give more vectors."
            )
        total = add_up(deltas)
        useful = torch.zeros_like(total)
        for delta in deltas:
            useful += _tall_mask(delta, total, self.tall)
        return total.mul_(useful.sub_(self.min_agree - 0.5).sign_().clamp_(min=0))


@dataclass(frozen=True)
class Tall(Method):
    r"""Localize one task in the sum of all: :math:`m_t \circ \sum_s \tau_s` with the TALL mask :math:`m_t`.

    The model of task :math:`t` is the base plus this; of the sum and one bit per element for each task all tasks can be
    restored. One vector gives that vector. No passes.

    Args:
        task: Which vector is the task's, from 1.
        tall: :math:`c` in the mask :math:`|\tau_t| > c\,|\sum_s \tau_s - \tau_t|`; the paper searches 0.2 to 0.6.

    Source: Wang et al., "Localizing task information for improved model merging and compression", ICML 2024.
    """

    task: int
    tall: float = 0.4

    name = "tall"
    usage = "tall(a, b, …, task=1, tall=0.4)"

    def __post_init__(self) -> None:
        _check(self.tall)

    def merge(self, deltas: Sequence[Tensor], state: None, chunk: Chunk) -> Tensor:
        own = pick_task(deltas, self.task)
        total = add_up(deltas)
        return _tall_mask(own, total, self.tall).mul_(total)


def pick_task(deltas: Sequence[Tensor], task: int) -> Tensor:
    """Return the delta of one task, counted from 1."""
    if task not in range(1, len(deltas) + 1):
        raise ValueError(f"task is the position of the task's vector, from 1 to {len(deltas)} here; found {task}.")
    return deltas[int(task) - 1]


def _tall_mask(delta: Tensor, total: Tensor, tall: float) -> Tensor:
    """Return 1 where the mask is set, else 0; in floating point, where this takes a quarter of the time of booleans."""
    return delta.abs().sub_((total - delta).abs_().mul_(tall)).sign_().clamp_(min=0)


def _check(tall: float) -> None:
    if not tall >= 0:
        raise ValueError(f"tall is the paper's factor on what the other vectors add, at least 0; found {tall}.")
