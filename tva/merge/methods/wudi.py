"""WUDI: the vector whose difference from each task's vector is least felt where that task's vector acts."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tva._torch import Tensor, torch
from tva.merge.base import Chunk
from tva.merge.linalg import eigen, pseudo_inverse
from tva.merge.matrix import EMBEDDINGS, OrientedMethod

SHORT = 300.0  # a time up to which the filter magnifies float32's rounding to no more than 4e-5 of the result
REACH, NODES = 150.0, 64  # of the polynomial: the largest time × eigenvalue, and where the function is evaluated


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

    def widened(self, matrix: Tensor) -> Tensor:
        short = self.solve == "filtered" and self.time <= SHORT
        return matrix if short and matrix.dtype == torch.float32 else matrix.double()

    def merge_matrices(self, matrices: list[Tensor], chunk: Chunk) -> Tensor:
        start = sum(matrices)
        if self.solve == "filtered":
            return start - _filtered(start, matrices, self.time, self.rank)
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
        return start + _adam(gram, slope, int(self.steps), self.lr)

    def merge_others(self, deltas: Sequence[Tensor]) -> Tensor:
        return torch.zeros_like(deltas[0])


def _filtered(start: Tensor, matrices: Sequence[Tensor], time: float, rank: int | str) -> Tensor:
    """Return the step of gradient flow from 0 to ``time``, negated, along the ``rank`` leading eigenvectors.

    With S the rows of all vectors, each vector of norm 1, G is SᵀS and the slope is L S; L S f(SᵀS) = L f(SSᵀ) S.
    """
    norms = [float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) or 1.0 for matrix in matrices]
    units = [matrix / norm for matrix, norm in zip(matrices, norms, strict=True)]
    rows, columns = start.shape
    others = [start - matrix for matrix in matrices]  # exactly 0 for one vector
    if len(matrices) * rows < columns:
        left = torch.cat([other @ unit.T for other, unit in zip(others, units, strict=True)], dim=1)
        stacked = torch.cat(units)
        return _flow(left, _gram(stacked.T), time, rank) @ stacked
    slope = torch.zeros_like(start)
    if 2 * rows < columns:
        gram = _gram(torch.cat(units))
        for other, unit in zip(others, units, strict=True):
            slope.addmm_(other @ unit.T, unit)
    else:
        gram = start.new_zeros(columns, columns)
        for other, unit in zip(others, units, strict=True):
            gram += (own := _gram(unit))
            slope.addmm_(other, own)
    return _flow(slope, gram, time, rank)


def _gram(matrix: Tensor) -> Tensor:
    """Return the product of the transposed matrix and the matrix; blocks below the diagonal are copied."""
    columns = matrix.shape[1]
    found = matrix.new_empty(columns, columns)
    edges = [columns * part // 4 for part in range(5)] if columns >= 256 else [0, columns]
    for first, last in itertools.pairwise(edges):
        torch.mm(matrix[:, first:last].T, matrix[:, first:], out=found[first:last, first:])
        found[last:, first:last] = found[first:last, last:].T
    return found


def _flow(left: Tensor, gram: Tensor, time: float, rank: int | str) -> Tensor:
    """Return ``left f(gram)`` with f(λ) = (1 - e^(-time λ)) / λ, or 0 past the ``rank`` leading eigenvalues."""
    if rank == "all" and gram.dtype == torch.float32:
        square = _gram(gram)
        top = float(square.norm().sqrt())  # the root of the sum of all fourth powers: beyond the largest eigenvalue
        if 0 < time * top <= REACH:
            if len(left) <= len(gram):
                return _chebyshev(left, gram, square, time, top)
            return left @ _chebyshev(torch.eye(len(gram), device=gram.device), gram, square, time, top)
    if rank == "participation":
        rank = max(1, round(float(gram.trace().square() / gram.square().sum().clamp(min=1e-30))))
    kept = len(gram) if rank == "all" else int(rank)
    vectors, roots = eigen(gram)
    values, vectors = roots[:kept].square(), vectors[:, :kept]
    filtered = torch.where(values > 0, -torch.expm1(-time * values) / values, 0)
    return ((left @ vectors) * filtered) @ vectors.T


@functools.cache
def _nodes() -> tuple[Tensor, Tensor]:
    """Return where a function is needed in [-1, 1], and the matrix that makes Chebyshev coefficients of its values."""
    angles = (torch.arange(NODES, dtype=torch.float64) + 0.5) * (math.pi / NODES)
    transform = (torch.arange(NODES)[:, None] * angles).cos() * (2 / NODES)
    transform[0] /= 2
    return angles.cos(), transform


def _chebyshev(left: Tensor, gram: Tensor, square: Tensor, time: float, top: float) -> Tensor:
    r"""Return ``left f(gram)`` by a Chebyshev polynomial on [0, ``top``] with float32's precision.

    Half of the products are saved: the odd terms are :math:`x` times a sum of the even ones, by
    :math:`T_{2k+1}(x) / x = 2 T_{2k}(x) - T_{2k-1}(x) / x`.
    """
    points, transform = _nodes()
    values = top * (1 + points) / 2
    every = transform @ (-torch.expm1(-time * values) / values)
    left_out = every.abs().flip(0).cumsum(0).flip(0)
    coefs = every[: max(2, int((left_out > 1e-7 * time).sum()))].tolist()
    odd = list(itertools.accumulate(reversed(coefs[1::2]), lambda after, coef: coef - after))[::-1]
    once = gram * (2 / top)  # x: the matrix, its eigenvalues moved into [-1, 1]
    twice = (square * (8 / top**2)).sub_(once, alpha=4)  # T_2(x)
    once.diagonal().sub_(1)
    twice.diagonal().add_(1)
    even_sum, odd_sum = coefs[0] * left, odd[0] * left
    before, now = left.clone(), left @ twice
    for place, (even, uneven) in enumerate(itertools.zip_longest(coefs[2::2], odd[1:], fillvalue=0.0)):
        if place:
            before, now = now, before.addmm_(now, twice, beta=-1, alpha=2)
        even_sum.add_(now, alpha=even)
        odd_sum.add_(now, alpha=2 * uneven)
    return even_sum.addmm_(odd_sum, once)


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
