"""The vectors of a recipe as files: task vector files, and checkpoints whose deltas are taken as they are read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping

from tva._torch import Tensor, torch
from tva.arithmetic import BATCH_NORM_STATISTICS, subtract, sum_dtype
from tva.checkpoints import HashedWeights, LazyWeights, open_finetuned, open_weights
from tva.errors import MismatchError, some
from tva.vectors.header import Origin, is_vector_file, read_origin
from tva.vectors.kind import KEY


class Source:
    """One vector, with the names and shapes of its base.

    Args:
        name: Its name in the recipe.
        path: A task vector file, or a fine-tuned checkpoint.
        base: The base that it is applied to.
        allow_other_base: Whether a task vector file may be of another base.
        key_map: For a checkpoint's names.
        which: Of a checkpoint with two sets of weights.

    Attributes:
        origin: Where a task vector file comes from; None for a checkpoint.
        kind: ``"tangent"`` for one of a linearized network.
        buffers: Names of running statistics.

    Raises:
        MismatchError: Keys or shapes are not the base's.
    """

    def __init__(
        self,
        name: str,
        path: str,
        base: LazyWeights,
        allow_other_base: bool = False,
        key_map: Mapping[str, str] | None = None,
        which: str = "checkpoint",
    ) -> None:
        self.name = name
        self.origin: Origin | None = None
        if is_vector_file(path):
            self.weights = open_weights(path)
            self.origin, self.buffers, untouched = read_origin(self.weights)
            names = self.weights.keys() | untouched.keys()
            self.kind = self.origin.kind
        else:
            self.weights = _open_checkpoint(path, base, key_map or {}, which)
            self.kind = self.weights.metadata.get(KEY)
            names = self.weights.keys()
            self.buffers = {name for name in names if name.rpartition(".")[2] in BATCH_NORM_STATISTICS}
        _check_names(path, self.weights, names, base)
        self.weights = HashedWeights(self.weights)
        self._check_base = self.origin is not None and self.origin.base is not None and not allow_other_base

    def identity(self) -> str:
        """Identify the vector for methods that draw random numbers; a checkpoint is read through once for it."""
        if self.origin is None:
            return self.weights.fingerprint().digest
        return self.origin.finetuned or self.name

    def delta(self, stored: Tensor, base: Tensor, space: Callable[[torch.dtype, int], Tensor] | None = None) -> Tensor:
        """Give the delta of one piece, in new memory or in that of ``space`` for a dtype and length."""
        dtype = sum_dtype(stored, base) if self.origin is None else sum_dtype(stored)
        out = None if space is None else space(dtype, len(stored))
        if self.origin is None:
            return subtract(stored, base, out)
        return stored.to(dtype, copy=True) if out is None else out.copy_(stored)

    def unchecked(self) -> Source:
        """Give the same vector for use with any base."""
        other = copy.copy(self)
        other._check_base = False
        return other

    def check(self, name: str, digest: str) -> None:
        """Check that one tensor of the base is what a task vector file was taken from.

        Raises:
            MismatchError: It is another.
        """
        if self._check_base and self.origin.base.tensors.get(name) != digest:
            raise MismatchError(
                f"The task vector {self.name} was taken from the base {self.origin.base.digest}, and in the base given "
                f"{name!r} is another (the first found that differs). Give it its own base, or pass allow_other_base "
                f"if the other base is meant."
            )


def _open_checkpoint(path: str, base: LazyWeights, key_map: Mapping[str, str], which: str) -> LazyWeights:
    """Open a fine-tuned checkpoint; ``which`` counts where there are two sets of weights, and not elsewhere."""
    opened = open_finetuned(path, base, key_map=key_map)
    if which != "checkpoint" and opened.info.which != "as stored":
        return open_finetuned(path, base, key_map=key_map, which=which)
    return opened


def _check_names(path: str, weights: LazyWeights, names: Collection[str], base: LazyWeights) -> None:
    shapes = [
        f"{name} {list(base.spec(name).sizes)} and {list(weights.spec(name).sizes)}"
        for name in sorted(weights)
        if name in base and weights.spec(name).sizes != base.spec(name).sizes
    ]
    problems = {
        f"{path} lacks": base.keys() - names,
        "the base lacks": names - base.keys(),
        "shapes differ:": shapes,
    }
    if any(problems.values()):
        found = "; ".join(f"{what} {some(sorted(which))}" for what, which in problems.items() if which)
        raise MismatchError(
            f"The base and {path} must have the same keys and shapes, but {found}. Take both "
            f"from the same architecture."
        )


def untie(base: LazyWeights, sources: Iterable[Source]) -> dict[str, str]:
    """Find which tied weights of the base stay tied: those that every vector moves alike.

    Returns:
        Name to the name of the tensor that is stored for both.
    """
    sources = list(sources)
    return {
        alias: kept
        for alias, kept in base.ties().items()
        if all(_same(source.weights, alias, kept) for source in sources)
    }


def _same(weights: LazyWeights, alias: str, kept: str) -> bool:
    if alias not in weights or kept not in weights:
        return alias not in weights and kept not in weights
    place = weights.entry(alias).location
    if place is not None and place == weights.entry(kept).location:
        return True
    return torch.equal(weights[alias], weights[kept])
