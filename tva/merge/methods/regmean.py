"""RegMean: linear layers whose outputs are those of the fine-tuned models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tva._torch import Tensor, torch
from tva.merge.base import Chunk
from tva.merge.linalg import pseudo_inverse
from tva.merge.matrix import EMBEDDINGS, OrientedMethod
from tva.merge.statistics_file import _Statistics


@dataclass(frozen=True)
class RegMean(_Statistics, OrientedMethod):
    r"""Fit the outputs of every linear layer by least squares: :math:`(\sum_t \tau_t G_t)\,(\sum_t G_t)^{-1}`.

    :math:`G_t = X_t^\top X_t` is the Gram matrix of the layer's inputs on task :math:`t`. The paper's formula is for
    models, :math:`\theta = (\sum_t \theta_t G_t)(\sum_t G_t)^{-1}`, which is the base plus this. In directions that no
    input has, and for tensors that are no matrices, the result is the mean. One vector gives that vector.

    Args:
        exclude: Regular expression; matrices in whose names it is found are averaged. By default the tables of tokens
            and positions.
        conv: See `MatrixMethod`.
        inputs_first: See `OrientedMethod`.
        files: For each vector, in their order, a file of Gram matrices: for every matrix that moves a tensor of its
            name, shape (inputs, inputs). `tva.callbacks.MergeStatistics` writes it.
        off_diagonal: What elements beside the diagonal are multiplied by, in [0, 1]; mostly 0.9 in the paper.

    Source: Jin et al., "Dataless knowledge fusion by merging weights of language models", ICLR 2023.
    """

    exclude: str = EMBEDDINGS
    files: Sequence[str] = ()
    off_diagonal: float = 0.9

    name = "regmean"
    usage = 'regmean(a, b, …, files=("gram_a.safetensors", "gram_b.safetensors", …), off_diagonal=0.9)'

    def __post_init__(self) -> None:
        super().__post_init__()
        self._open("regmean")
        if not 0 <= self.off_diagonal <= 1:
            raise ValueError(f"off_diagonal must be in [0, 1]; found {self.off_diagonal}.")

    def merge_matrices(self, matrices: list[Tensor], chunk: Chunk) -> Tensor:
        columns = matrices[0].shape[1]
        files = self._files_of(chunk.tensor, matrices, (columns, columns))
        mean = sum(matrices) / len(matrices)
        total, correction = mean.new_zeros(columns, columns), torch.zeros_like(mean)
        for matrix, file in zip(matrices, files, strict=True):
            gram = file[chunk.tensor].double()
            gram = gram.mul(self.off_diagonal).diagonal_scatter(gram.diagonal())
            total += gram
            correction += (matrix - mean) @ gram
        return mean + correction @ pseudo_inverse(total)
