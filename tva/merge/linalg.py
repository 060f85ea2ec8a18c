"""Decompositions of matrices that merge methods share."""

from __future__ import annotations

from tva._torch import Tensor, torch
from tva.merge.matrix import RANK


def eigen(gram: Tensor, norm: float = 0.0) -> tuple[Tensor, Tensor]:
    """Decompose a Gram matrix of float64.

    Returns:
        Eigenvectors as columns, and square roots of the eigenvalues, largest first; those that are noise, beside the
        largest or beside ``norm``, are 0.
    """
    values, vectors = torch.linalg.eigh(gram)
    roots = values.flip(0).clamp_(min=0).sqrt_()
    return vectors.flip(1), roots.masked_fill_(roots <= RANK * roots[:1].clamp(min=norm), 0)


def leading(matrix: Tensor, rank: int, norm: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the ``rank`` leading singular triplets, by the eigenvectors of the smaller Gram matrix.

    In float64 the relative error of a singular value :math:`\sigma` is about :math:`10^{-16} (\sigma_1 / \sigma)^2`,
    where a float32 singular value decomposition has :math:`10^{-7} \sigma_1 / \sigma`: better for all singular values
    above :math:`10^{-9} \sigma_1`, and several times faster.

    Args:
        matrix: Float64.
        rank: How many; at most the smaller side.
        norm: Norm of what the matrix is the remainder of, beside which its own values may be noise.

    Returns:
        Left vectors (rows, rank), singular values (rank), right vectors (columns, rank); columns of noise are 0.
    """
    rows, columns = matrix.shape
    if rows > columns:
        right, values, left = leading(matrix.T, rank, norm)
        return left, values, right
    vectors, values = eigen(matrix @ matrix.T, norm)
    left, values = vectors[:, :rank], values[:rank]
    right = (matrix.T @ left).mul_(_inverse(values))
    return left * (values > 0), values, right


def polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the orthonormal factor :math:`P Q^\top` of :math:`P S Q^\top`, and all singular values.

    Directions whose singular value is 0, in which the factor is not determined, are left out of it.
    """
    rows, columns = matrix.shape
    if rows > columns:
        factor, values = polar(matrix.T)
        return factor.T, values
    vectors, values = eigen(matrix @ matrix.T)
    return (vectors * _inverse(values)) @ (vectors.T @ matrix), values


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values > 0, 1 / values, 0)


def pseudo_inverse(gram: Tensor) -> Tensor:
    """Invert a positive semi-definite float64 matrix in the directions in which it is not zero."""
    vectors, roots = eigen(gram)
    return (vectors * _inverse(roots.square())) @ vectors.T
