"""WUDI: the vector whose difference from each task's vector is least felt where that task's vector acts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tva._torch import Tensor, torch
from tva.merge.base import Chunk
from tva.merge.linalg import eigen, pseudo_inverse
from tva.merge.matrix import EMBEDDINGS, OrientedMethod


@dataclass(frozen=True)
class Wudi(OrientedMethod):
    r"""Minimize :math:`\sum_t \|(\tau - \tau_t)\,\tau_t^\top\|_F^2 / \|\tau_t\|_F^2` for each matrix, without data.

    The rows of a linear layer's delta stand for the inputs it was trained on, so that this is the interference felt on
    them. The search starts from :math:`\sum_t \tau_t`. With ``solve="adam"`` it is the paper's: ``steps`` steps of Adam
    at the rate ``lr``, which ends before the minimum. With ``solve="exact"`` it is the minimum nearest to the start, in
    closed form. With ``solve="filtered"`` it is gradient flow that stops at ``time``, in closed form: along an
    eigenvector of :math:`G = \sum_t \tau_t^\top \tau_t / \|\tau_t\|_F^2` with eigenvalue :math:`\lambda` the step to
    the minimum is multiplied by :math:`1 - e^{-\text{time} \cdot \lambda}`, and it is 0 past the ``rank`` leading. The
    problem is ill-posed: small eigenvalues carry noise, which Adam's early stop and this filter both leave out. All
    tensors that are not matrices stay at the base, and so do tables of tokens and positions. One vector gives that
    vector, in its matrices.

    Args:
        exclude: Regular expression; matrices in whose names it is found stay at the base.
        conv: Kernels of convolutions stay at the base (``"mean"``), or are taken as matrices (``"matrix"``).
        inputs_first: Regular expression; matrices in whose names it is found are (inputs, outputs), as GPT-2's
            ``Conv1D``, rather than (outputs, inputs), as `torch.nn.Linear`.
        solve: ``"adam"``, ``"exact"`` or ``"filtered"``.
        steps: Steps of Adam; the paper's are 300.
        lr: Learning rate of Adam; the paper's is 1e-5.
        time: Of the filtered solution; 0 is the sum of the vectors, infinity the exact solution.
        rank: Of the filtered solution: how many eigenvectors count, ``"all"``, or ``"participation"``, which is
            :math:`(\sum_k \lambda_k)^2 / \sum_k \lambda_k^2` of the matrix's own eigenvalues, rounded.

    Source: Cheng et al., "Whoever started the interference should end it: guiding data-free model merging via task
    vectors", ICML 2025; the filter is SWUDI's, arXiv 2606.07289 (``"participation"``: SWUDI-A).
    """

    exclude: str = EMBEDDINGS
    solve: Literal["adam", "exact", "filtered"] = "adam"
    steps: int = 300
    lr: float = 1e-5
    time: float = 50.0
    rank: int | str = "all"

    name = "wudi"
    usage = (
        'wudi(a, b, …, solve="adam" or "exact", steps=300, lr=1e-5, inputs_first="regular expression") '
        'or wudi(a, b, …, solve="filtered", time=50, rank="all" or "participation" or a number)'
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solve not in ("adam", "exact", "filtered"):
            raise ValueError(f"wudi has solve 'adam', 'exact' or 'filtered'; found {self.solve!r}.")
        if not self.steps >= 0 or not self.lr > 0:
            raise ValueError(f"wudi has steps of at least 0 and a positive lr; found {self.steps}, {self.lr}.")

        if not self.time >= 0:
            raise ValueError(f"wudi has a time of at least 0; found {self.time}.")
        counted = isinstance(self.rank, (int, float)) and self.rank >= 1 and self.rank == int(self.rank)
        if not (counted or self.rank in ("all", "participation")):
            raise ValueError(
                f"wudi has a rank of 'all', 'participation' or a whole number of at least 1; found {self.rank!r}."
            )

    def merge_matrices(self, matrices: list[Tensor], chunk: Chunk) -> Tensor:
        start = sum(matrices)
        columns = start.shape[1]
        gram, slope = start.new_zeros(columns, columns), torch.zeros_like(start)
        for matrix in matrices:
            square = matrix.square().sum()
            if square > 0:
                own = matrix.T @ matrix / square  # (inputs, inputs)
                gram += own
                slope += (start - matrix) @ own  # half the gradient at the start; exactly 0 for one vector
        if self.solve == "exact":
            return start - slope @ pseudo_inverse(gram)
        if self.solve == "filtered":
            return start - _filtered(gram, slope, self.time, self.rank)
        return start + _adam(gram, slope, int(self.steps), self.lr)

    def merge_others(self, deltas: Sequence[Tensor]) -> Tensor:
        return torch.zeros_like(deltas[0])


def _filtered(gram: Tensor, slope: Tensor, time: float, rank: int | str) -> Tensor:
    """Return the step of gradient flow from 0 to ``time``, negated, along the ``rank`` leading eigenvectors."""
    vectors, roots = eigen(gram)
    values = roots.square()
    if rank == "participation":
        rank = max(1, round(float(values.sum().square() / values.square().sum().clamp(min=1e-300))))
    kept = len(values) if rank == "all" else int(rank)
    values, vectors = values[:kept], vectors[:, :kept]
    filtered = torch.where(values > 0, -torch.expm1(-time * values) / values, 0)
    return ((slope @ vectors) * filtered) @ vectors.T


def _adam(gram: Tensor, slope: Tensor, steps: int, lr: float) -> Tensor:
    """Minimize the quadratic function with gradient ``2 (x gram + slope)`` from 0, all tasks in one product a step."""
    # Moments of the gradient as in torch.optim.Adam at its defaults; in float32, where the cost is
    gram, slope = gram.float(), slope.float()
    moved, first, second = (torch.zeros_like(slope) for _ in range(3))
    for step in range(1, steps + 1):
        gradient = torch.addmm(slope, moved, gram).mul_(2)
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
        moved.addcdiv_(first, scale, value=-lr / (1 - 0.9**step))
    return moved.double()
