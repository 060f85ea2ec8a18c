"""SVC: calibrate the singular values of a merged matrix by how much of each task's vector they carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tva._torch import Tensor, torch
from tva.merge.base import Chunk
from tva.merge.linalg import leading
from tva.merge.matrix import MatrixMethod


@dataclass(frozen=True)
class Svc(MatrixMethod):
    r"""Divide the singular values of the first vector by the mean response that the others have in their directions.

    With :math:`U S V^\top` the first vector's matrix :math:`M`, the response of direction :math:`r` to vector
    :math:`\tau_t` is :math:`s_{r,t} = \langle u_r^\top M, u_r^\top \tau_t \rangle / \|u_r^\top \tau_t\|^2`, and
    :math:`S_r` becomes :math:`S_r\, T / \sum_t \max(f, s_{r,t})` with ``floor`` :math:`f`: a direction in which the
    tasks' vectors add up is shortened, one in which they cancel is lengthened. Written around a merge:
    ``svc(a + b, a, b)``. Tensors that are not matrices stay those of the first vector.

    Args:
        exclude: Regular expression; matrices in whose names it is found stay the first vector's.
        conv: Kernels of convolutions stay the first vector's (``"mean"``), or are taken as ``"matrix"``.
        floor: Smallest response that counts; the paper's is 0.1.

    Source: "Singular value calibration" of arXiv 2602.05536.
    """

    floor: float = 0.1

    name = "svc"
    usage = 'svc(merged, a, b, …, floor=0.1, conv="mean" or "matrix", exclude="regular expression")'

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.floor > 0:
            raise ValueError(f"svc has a positive floor; found {self.floor}.")

    def merge(self, deltas: Sequence[Tensor], state: Any, chunk: Chunk) -> Tensor:
        if len(deltas) < 2:
            raise ValueError("svc takes a merged vector and the vectors it was merged from: svc(a + b, a, b).")
        return super().merge(deltas, state, chunk)

    def merge_matrices(self, matrices: list[Tensor], chunk: Chunk) -> Tensor:
        merged, *tasks = matrices
        left, values, right = leading(merged, min(merged.shape))
        rows = left.T @ merged  # (directions, columns)
        responses = torch.zeros_like(values)
        for task in tasks:
            own = left.T @ task
            square = own.square().sum(dim=1)
            response = (rows * own).sum(dim=1) / torch.where(square > 0, square, 1)
            responses += torch.where(square > 0, response, 0).clamp(min=self.floor)
        return (left * (values * len(tasks) / responses)) @ right.T

    def merge_others(self, deltas: Sequence[Tensor]) -> Tensor:
        return deltas[0].clone()
