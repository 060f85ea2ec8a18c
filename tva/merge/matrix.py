"""Methods on whole weight matrices: which tensors are matrices, and their decompositions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tva._torch import Tensor
from tva.merge.base import Chunk, Method
from tva.merge.methods.linear import add_up
from tva.patterns import pattern_of

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
            (``"matrix"``), which the papers do not do.
    """

    exclude: str = TABLES
    conv: Literal["mean", "matrix"] = "mean"

    whole = True

    def __post_init__(self) -> None:
        if self.conv not in ("mean", "matrix"):
            raise ValueError(f"conv is 'mean' or 'matrix'; found {self.conv!r}.")
        pattern_of(self.exclude, "exclude")

    def merge(self, deltas: Sequence[Tensor], state: Any, chunk: Chunk) -> Tensor:
        if not self.is_matrix(chunk):
            return self.merge_others(deltas)
        rows = chunk.shape[0]
        merged = self.merge_matrices([self.widened(delta.view(rows, -1)) for delta in deltas], chunk)
        return merged.reshape(-1).to(deltas[0].dtype)

    def is_matrix(self, chunk: Chunk) -> bool:
        """Whether the tensor is a matrix for this method."""
        enough = len(chunk.shape) == 2 or (self.conv == "matrix" and len(chunk.shape) > 2)
        left_out = self.exclude and pattern_of(self.exclude, "exclude").search(chunk.tensor)
        return enough and 0 not in chunk.shape and not left_out

    def widened(self, matrix: Tensor) -> Tensor:
        """Return a matrix in the precision that the method computes in."""
        return matrix.double()

    def merge_matrices(self, matrices: list[Tensor], chunk: Chunk) -> Tensor:
        """Combine the matrices of all vectors, float64 unless `widened` says otherwise, shape (rows, columns)."""
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
        exclude: See `MatrixMethod`.
        conv: See there.
        inputs_first: Regular expression; matrices in whose names it is found are (inputs, outputs), as GPT-2's
            ``Conv1D``.
    """

    inputs_first: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        pattern_of(self.inputs_first, "inputs_first")

    def merge(self, deltas: Sequence[Tensor], state: Any, chunk: Chunk) -> Tensor:
        if not self.is_matrix(chunk):
            return super().merge(deltas, state, chunk)
        if not self.inputs_first and len(chunk.shape) == 2 and _looks_inputs_first(chunk):
            raise ValueError(
                f"{chunk.tensor!r} has shape {list(chunk.shape)}, which with this name is a Conv1D of GPT-2, stored "
                f"(inputs, outputs); weights must be (outputs, inputs). Pass inputs_first='c_attn|c_fc|c_proj' to have "
                f"such weights turned, or inputs_first='^$' if it is (outputs, inputs) nonetheless."
            )
        turned_by = pattern_of(self.inputs_first, "inputs_first")
        if not (self.inputs_first and len(chunk.shape) == 2 and turned_by.search(chunk.tensor)):
            return super().merge(deltas, state, chunk)
        turned = [delta.view(chunk.shape).T.reshape(-1) for delta in deltas]
        merged = super().merge(turned, state, replace(chunk, shape=chunk.shape[::-1]))
        return merged.view(chunk.shape[::-1]).T.reshape(-1)


def _looks_inputs_first(chunk: Chunk) -> bool:
    """Whether a name of GPT-2's goes with a shape that `torch.nn.Linear` would not have there."""
    rows, columns = chunk.shape
    found = re.search(r"(?:^|\.)(c_attn|c_fc|mlp\.c_proj)\.weight$", chunk.tensor)
    return found is not None and (rows > columns if found[1] == "mlp.c_proj" else rows < columns)
