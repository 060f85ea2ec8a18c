"""Statistics files that merge methods read beside the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from tva._torch import Tensor
from tva.checkpoints import HashedWeights, LazyWeights, open_weights
from tva.checkpoints.names import WRAPPERS
from tva.errors import some
from tva.merge.matrix import MatrixMethod

_CHUNK = 2**20  # elements of a file that are read at once


class _Statistics:
    """Shared base of both methods: one statistics file per vector, in the order of the vectors, all opened at once."""

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
        found = []
        for opened in self._opened:
            file = opened if name in opened else _without_wrapper(opened, name)
            found.append(file)
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
        return found


def _without_wrapper(file: LazyWeights, name: str) -> LazyWeights:
    """Return a file whose names have a wrapper's prefix that the base's have not, or the other way round."""
    for prefix in WRAPPERS:
        if prefix + name in file:
            return file.renamed({name: prefix + name})
        if name.removeprefix(prefix) in file:
            return file.renamed({name: name.removeprefix(prefix)})
    return file
