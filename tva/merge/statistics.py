"""Methods that weight task vectors by statistics of their models, read from files: Fisher and RegMean merging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tva.later import Tensor, torch
from tva.merge.matrices import EMBEDDINGS, MatrixMethod, OrientedMethod, pseudo_inverse
from tva.merge.method import Method, Place
from tva.merge.sums import Sum
from tva.state_dict import some
from tva.weights import HashedWeights, LazyWeights, open_weights

_PIECE = 2**20  # elements of a file that are read at once


class _Statistics:
    """What both methods have: one file for each vector, in the order of the vectors, opened at once."""

    files: Sequence[str]

    def _open(self, name: str) -> None:
        if isinstance(self.files, str) or not isinstance(self.files, Sequence) or not self.files:
            raise ValueError(f"{name} needs files=(…), one path for each vector; found {self.files!r}.")
        assert self._opened

    @cached_property
    def _opened(self) -> list[HashedWeights]:
        return [HashedWeights(open_weights(path)) for path in self.files]

    def inputs(self) -> dict[str, HashedWeights]:
        return dict(zip(self.files, self._opened, strict=True))

    def _files_of(self, name: str, vectors: Sequence[Tensor], shape: tuple[int, ...]) -> list[LazyWeights]:
        if len(self._opened) != len(vectors):
            raise ValueError(f"files names {len(self._opened)} files for {len(vectors)} vectors; give each vector one.")
        for file in self._opened:
            if name not in file:
                way = ", or name it in exclude to have it averaged" if isinstance(self, MatrixMethod) else ""
                raise ValueError(
                    f"{file.path} has no statistics of {name!r}; it has those of {some(file)}. Measure them on the "
                    f"model that the vector is of (tva.callbacks.MergeStatistics){way}."
                )
            if tuple(file.spec(name).shape) != shape:
                raise ValueError(
                    f"The statistics of {name!r} must have shape {list(shape)}, and in {file.path} they have "
                    f"{list(file.spec(name).shape)}."
                )
        return self._opened


@dataclass(frozen=True)
class Fisher(_Statistics, Method):
    r"""Average vectors, each element weighted by its Fisher information: :math:`\sum_t F_t \tau_t / \sum_t F_t`.

    The weights of an element add up to 1, so that this is the paper's average of models, on task vectors. One vector
    gives that vector, up to rounding. No sweeps; the files are read beside the vectors, piece by piece.

    Args:
        files: For each vector, in their order, a file of the diagonal Fisher information of its model: a tensor of the
            weight's name and shape for every weight that moves, in any format that `tva.open_weights` reads.
            `tva.callbacks.MergeStatistics` writes it.
        weights: A positive number for each vector that multiplies its :math:`F_t`; by default all are 1.
        floor: Smallest Fisher information, above 0; the paper's is 1e-6. Where all are below it the average is plain.
        normalize: Divide each model's :math:`F_t` by its Euclidean norm over its whole file, after the floor, so that a
            task with large gradients does not outweigh the others; the files are read once more for it.

    Source: Matena and Raffel, "Merging models with Fisher-weighted averaging", NeurIPS 2022.
    """

    files: Sequence[str] = ()
    weights: Sequence[float] = ()
    floor: float = 1e-6
    normalize: bool = False

    usage = 'fisher(a, b, …, files=("fisher_a.safetensors", "fisher_b.safetensors", …), floor=1e-6, normalize=True)'

    def __post_init__(self) -> None:
        self._open("fisher")
        if self.weights and not (len(self.weights) == len(self.files) and all(weight > 0 for weight in self.weights)):
            raise ValueError(f"weights are positive numbers, one for each of the files; found {self.weights!r}.")
        if not self.floor > 0:
            raise ValueError(f"floor must be above 0; found {self.floor}.")

    def merge(self, deltas: Sequence[Tensor], state: Any, place: Place) -> Tensor:
        files = self._files_of(place.tensor, deltas, place.shape)
        merged, total = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
        for delta, file, weight in zip(deltas, files, self._coefs, strict=True):
            stop = place.start + len(delta)
            fisher = file.slice(place.tensor, place.start, stop).to(delta.dtype).clamp_(min=self.floor).mul_(weight)
            merged += delta * fisher
            total += fisher
        return merged.div_(total)

    @cached_property
    def _coefs(self) -> list[float]:
        """What each file's values are multiplied by."""
        weights = self.weights or [1.0] * len(self.files)
        norms = [_norm(file) for file in self._opened] if self.normalize else [1.0] * len(self.files)
        return [weight / norm if norm else 0.0 for weight, norm in zip(weights, norms, strict=True)]


def _norm(file: LazyWeights) -> float:
    """Compute the Euclidean norm over all tensors of a file, the same for any pieces."""
    total = Sum()
    for name in file:
        shape = tuple(file.spec(name).shape)
        for start in range(0, max(1, math.prod(shape)), _PIECE):
            values = file.slice(name, start, min(start + _PIECE, math.prod(shape)))
            total.add(values.double().square_(), Place(name, start, shape=shape))
    return math.sqrt(total.total)


@dataclass(frozen=True)
class RegMean(_Statistics, OrientedMethod):
    r"""Fit the outputs of every linear layer by least squares: :math:`(\sum_t \tau_t G_t)\,(\sum_t G_t)^{-1}`.

    :math:`G_t = X_t^\top X_t` is the Gram matrix of the layer's inputs on task :math:`t`. The paper's formula is for
    models, :math:`\theta = (\sum_t \theta_t G_t)(\sum_t G_t)^{-1}`, which is the base plus this. In directions that no
    input has, and for tensors that are no matrices, the result is the mean. One vector gives that vector.

    Args:
        exclude: Regular expression; matrices in whose names it is found are averaged. By default the tables of tokens
            and positions.
        conv: Kernels of convolutions are averaged (``"mean"``), or taken as matrices (``"matrix"``).
        inputs_first: Regular expression; matrices in whose names it is found are (inputs, outputs), as GPT-2's
            ``Conv1D``, rather than (outputs, inputs), as `torch.nn.Linear`.
        files: For each vector, in their order, a file of Gram matrices: for every matrix that moves a tensor of its
            name, shape (inputs, inputs). `tva.callbacks.MergeStatistics` writes it.
        off_diagonal: What elements beside the diagonal are multiplied by, in [0, 1]; mostly 0.9 in the paper.

    Source: Jin et al., "Dataless knowledge fusion by merging weights of language models", ICLR 2023.
    """

    exclude: str = EMBEDDINGS
    files: Sequence[str] = ()
    off_diagonal: float = 0.9

    usage = 'regmean(a, b, …, files=("gram_a.safetensors", "gram_b.safetensors", …), off_diagonal=0.9)'

    def __post_init__(self) -> None:
        super().__post_init__()
        self._open("regmean")
        if not 0 <= self.off_diagonal <= 1:
            raise ValueError(f"off_diagonal must lie in [0, 1]; found {self.off_diagonal}.")

    def merge_matrices(self, matrices: list[Tensor], place: Place) -> Tensor:
        columns = matrices[0].shape[1]
        files = self._files_of(place.tensor, matrices, (columns, columns))
        mean = sum(matrices) / len(matrices)
        total, correction = mean.new_zeros(columns, columns), torch.zeros_like(mean)
        for matrix, file in zip(matrices, files, strict=True):
            gram = file[place.tensor].double()
            gram = gram.mul(self.off_diagonal).diagonal_scatter(gram.diagonal())
            total += gram
            correction += (matrix - mean) @ gram
        return mean + correction @ pseudo_inverse(total)
