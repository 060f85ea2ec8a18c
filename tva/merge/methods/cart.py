"""CART: the mean of the vectors, and the leading directions in which each differs from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tva._torch import Tensor
from tva.merge.base import Chunk
from tva.merge.linalg import leading
from tva.merge.matrix import MatrixMethod


@dataclass(frozen=True)
class Cart(MatrixMethod):
    r"""Add to the mean :math:`m` of the vectors the ``rank`` leading directions of each :math:`\tau_t - m`.

    Of each matrix becomes :math:`m + c \sum_t (\tau_t - m)_{\text{rank}}`, where :math:`c` is ``scale`` and the
    subscript keeps the leading singular triplets. Tensors that are not matrices are averaged. One vector gives that
    vector.

    Args:
        exclude: See `MatrixMethod`.
        conv: See there.
        rank: Fraction of each matrix's full rank to keep, in (0, 1], at least one triplet.
        scale: Coefficient of the low-rank parts.

    Source: Choi et al., "Revisiting weight averaging for model merging", 2024.
    """

    rank: float = 0.08
    scale: float = 1.0

    name = "cart"
    usage = 'cart(a, b, …, rank=0.08, scale=1.0, conv="mean" or "matrix", exclude="regular expression")'

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rank <= 1 or not math.isfinite(self.scale):
            raise ValueError(f"cart has a rank in (0, 1] and a finite scale; found {self.rank} and {self.scale}.")

    def merge_matrices(self, matrices: list[Tensor], chunk: Chunk) -> Tensor:
        mean = sum(matrices) / len(matrices)
        rank = max(1, int(self.rank * min(mean.shape)))
        merged = mean.clone()
        for matrix in matrices:
            left, values, right = leading(matrix - mean, rank)
            merged += self.scale * ((left * values) @ right.T)
        return merged
