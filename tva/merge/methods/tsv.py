"""Methods in the singular vectors of weight matrices: TSV-M, Iso-C and Iso-CTS."""

from __future__ import annotations

from dataclasses import dataclass

from tva._torch import Tensor, torch
from tva.merge.base import Chunk
from tva.merge.linalg import leading, polar
from tva.merge.matrix import MatrixMethod


@dataclass(frozen=True)
class Tsv(MatrixMethod):
    r"""TSV-M: keep the leading singular vectors of each task and make those of all tasks orthogonal.

    Of each matrix of rank :math:`r`, every one of the :math:`T` vectors keeps its :math:`r / T` leading singular
    triplets (one at least), :math:`U_t S_t V_t^\top`. With :math:`\hat U = [U_1 \dots U_T]`, likewise :math:`\hat V`
    and :math:`\hat S`, and :math:`U_\perp, V_\perp` the orthonormal factors nearest to them, the result is
    :math:`U_\perp \hat S V_\perp^\top`. Other tensors are averaged. One vector gives that vector, up to rounding.

    Args:
        exclude: See `MatrixMethod`.
        conv: See there.

    Source: Gargiulo et al., "Task singular vectors: reducing task interference in model merging", CVPR 2025.
    """

    name = "tsv"
    usage = 'tsv(a, b, …, conv="mean" or "matrix", exclude="regular expression")'

    def merge_matrices(self, matrices: list[Tensor], chunk: Chunk) -> Tensor:
        rank = max(1, min(matrices[0].shape) // len(matrices))
        lefts, values, rights = zip(*(leading(matrix, rank) for matrix in matrices), strict=True)
        left, right = polar(torch.cat(lefts, dim=1))[0], polar(torch.cat(rights, dim=1))[0]
        return (left * torch.cat(values)) @ right.T
