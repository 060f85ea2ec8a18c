"""Methods on whole weight matrices: which tensors are matrices, and their decompositions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tva.later import Tensor, torch
from tva.merge.linear import add_up
from tva.merge.method import Method, Place

# Tables that are looked up, tied output layers, and the projection that the authors of TSV-M leave out too
TABLES = r"embed_tokens|token_embedding|word_embeddings|\bshared\b|\bwte\b|lm_head|text_projection"
EMBEDDINGS = r"embed|\bshared\b|\bwte\b|\bwpe\b|lm_head"  # tables of any kind: nothing flows into them
RANK = 1e-6  # singular values below this part of the largest are rounding noise of float32, and count as 0


@dataclass(frozen=True)
class MatrixMethod(Method):
    """Base class of methods that combine whole matrices; all other tensors are averaged.

    Args:
        exclude: Regular expression; matrices in whose names it is found are averaged. By default the tables of tokens.
        conv: Kernels of convolutions are averaged (``"mean"``), or taken as matrices of one row for each output channel
            (``"matrix"``).
    """

    exclude: str = TABLES
    conv: Literal["mean", "matrix"] = "mean"

    whole = True

    def __post_init__(self) -> None:
        if self.conv not in ("mean", "matrix"):
            raise ValueError(f"conv is 'mean' or 'matrix'; found {self.conv!r}.")
        try:
            re.compile(self.exclude)
        except re.error as error:
            raise ValueError(f"exclude is no regular expression: {error}; found {self.exclude!r}.") from error

    def merge(self, deltas: Sequence[Tensor], state: Any, place: Place) -> Tensor:
        if not self.is_matrix(place):
            return self.merge_others(deltas)
        rows = place.shape[0]
        merged = self.merge_matrices([delta.view(rows, -1).double() for delta in deltas], place)
        return merged.reshape(-1).to(deltas[0].dtype)

    def is_matrix(self, place: Place) -> bool:
        """Whether the tensor is a matrix for this method."""
        enough = len(place.shape) == 2 or (self.conv == "matrix" and len(place.shape) > 2)
        return enough and 0 not in place.shape and not (self.exclude and re.search(self.exclude, place.tensor))

    def merge_matrices(self, matrices: list[Tensor], place: Place) -> Tensor:
        """Combine the matrices of all vectors, float64, shape (rows, columns)."""
        raise NotImplementedError  # every subclass says how

    def merge_others(self, deltas: Sequence[Tensor]) -> Tensor:
        """Combine tensors that are no matrices: their mean."""
        return add_up(deltas) / len(deltas)


@dataclass(frozen=True)
class OrientedMethod(MatrixMethod):
    """Base class of methods for which it matters which side of a matrix the inputs are on.

    Weights are (outputs, inputs), as those of `torch.nn.Linear`. Matrices with ``inputs_first`` in their names are
    turned before and after. That cannot be read off a square matrix, and models of either kind share names; where names
    and shapes are GPT-2's, it must be said.

    Args:
        exclude: Regular expression; matrices in whose names it is found are averaged. By default the tables of tokens.
        conv: Kernels of convolutions are averaged (``"mean"``), or taken as matrices (``"matrix"``).
        inputs_first: Regular expression; matrices in whose names it is found are (inputs, outputs).
    """

    inputs_first: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.inputs_first)
        except re.error as error:
            raise ValueError(f"inputs_first is no regular expression: {error}; found {self.inputs_first!r}.") from error

    def merge(self, deltas: Sequence[Tensor], state: Any, place: Place) -> Tensor:
        if not self.is_matrix(place):
            return super().merge(deltas, state, place)
        if not self.inputs_first and len(place.shape) == 2 and _looks_inputs_first(place):
            raise ValueError(
                f"{place.tensor!r} has shape {list(place.shape)}, which with this name is a Conv1D of GPT-2, stored "
                f"(inputs, outputs); weights must be (outputs, inputs). Pass inputs_first='c_attn|c_fc|c_proj' to have "
                f"such weights turned, or inputs_first='^$' if it is (outputs, inputs) nonetheless."
            )
        if not (self.inputs_first and len(place.shape) == 2 and re.search(self.inputs_first, place.tensor)):
            return super().merge(deltas, state, place)
        turned = [delta.view(place.shape).T.reshape(-1) for delta in deltas]
        merged = super().merge(turned, state, replace(place, shape=place.shape[::-1]))
        return merged.view(place.shape[::-1]).T.reshape(-1)


def _looks_inputs_first(place: Place) -> bool:
    """Whether a name of GPT-2's goes with a shape that `torch.nn.Linear` would not have there."""
    rows, columns = place.shape
    found = re.search(r"(?:^|\.)(c_attn|c_fc|mlp\.c_proj)\.weight$", place.tensor)
    return found is not None and (rows > columns if found[1] == "mlp.c_proj" else rows < columns)


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
    r"""Give the ``rank`` leading singular triplets, by the eigenvectors of the smaller Gram matrix.

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
    r"""Give the orthonormal factor :math:`P Q^\top` of :math:`P S Q^\top`, and all singular values.

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
