"""Iso-C and Iso-CTS: equal singular values in a common subspace."""

from __future__ import annotations

from dataclasses import dataclass

from tva._torch import Tensor, torch
from tva.merge.base import Chunk
from tva.merge.linalg import leading, polar
from tva.merge.matrix import MatrixMethod, OrientedMethod


@dataclass(frozen=True)
class IsoC(MatrixMethod):
    r"""Iso-C: give all singular values of the sum of the vectors their mean.

    Of each matrix :math:`\sum_t \tau_t = U S V^\top` becomes :math:`\bar s\, U V^\top`; other tensors are averaged.
    Directions in which the sum is zero stay zero (of low rank adapters, for instance), where singular value
    decompositions would make arbitrary ones as large as the rest. One vector does not give that vector.

    Args:
        exclude: See `MatrixMethod`.
        conv: See there.

    Source: Marczak et al., "No task left behind: isotropic model merging with common and task-specific subspaces",
    ICML 2025.
    """

    name = "iso_c"
    usage = 'iso_c(a, b, …, conv="mean" or "matrix", exclude="regular expression")'

    def merge_matrices(self, matrices: list[Tensor], chunk: Chunk) -> Tensor:
        factor, values = polar(sum(matrices))
        return factor.mul_(values.mean())


@dataclass(frozen=True)
class IsoCts(OrientedMethod):
    r"""Iso-CTS: a common subspace of all tasks and one of each task's own, with equal singular values.

    Of each matrix of rank :math:`r`, the :math:`k` leading singular triplets of :math:`\sum_t \tau_t` span the common
    subspace :math:`U_k`; each vector adds the :math:`(r - k) / T` leading triplets of
    :math:`\tau_t - U_k U_k^\top \tau_t`. All of them together, made orthonormal, get the mean of their singular values.
    :math:`k` is ``common`` times :math:`r`, moved so that all vectors add as many triplets and the sum is :math:`r`.
    Other tensors are averaged. ``common=1`` is Iso-C. One vector does not give that vector.

    Args:
        exclude: See `MatrixMethod`.
        conv: See there.
        inputs_first: Regular expression; matrices in whose names it is found are (inputs, outputs), as GPT-2's
            ``Conv1D``, rather than (outputs, inputs), as `torch.nn.Linear`: the common subspace is one of outputs.
        common: Part of the rank that is common, in [0, 1]; the paper's is 0.8.

    Source: Marczak et al., "No task left behind: isotropic model merging with common and task-specific subspaces",
    ICML 2025.
    """

    common: float = 0.8

    name = "iso_cts"
    usage = 'iso_cts(a, b, …, common=0.8, conv="mean" or "matrix", exclude="regular expression")'

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.common <= 1:
            raise ValueError(f"common is the part of the rank that is common, in [0, 1]; found {self.common}.")

    def merge_matrices(self, matrices: list[Tensor], chunk: Chunk) -> Tensor:
        rank = min(matrices[0].shape)
        own = min(round((rank - int(self.common * rank)) / len(matrices)), rank // len(matrices))
        left, values, right = leading(sum(matrices), rank - own * len(matrices))
        parts = [(left, values, right)]
        if own:
            parts += [leading(matrix - left @ (left.T @ matrix), own, float(matrix.norm())) for matrix in matrices]
        lefts, values, rights = zip(*parts, strict=True)
        left, right = polar(torch.cat(lefts, dim=1))[0], polar(torch.cat(rights, dim=1))[0]
        return (left @ right.T).mul_(torch.cat(values).mean())
