"""Task vectors on disk that are read in chunks: files, and checkpoints whose deltas are computed as they are read."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tva._torch import Tensor, torch
from tva.arithmetic import BATCH_NORM_STATISTICS, is_edited, subtract, sum_dtype
from tva.checkpoints import (
    HashedWeights,
    LazyWeights,
    NameFilter,
    Spec,
    check_not_quantized,
    open_finetuned,
    open_weights,
)
from tva.checkpoints.fingerprint import copies_in, has_values
from tva.checkpoints.lazy import Entry, as_real
from tva.checkpoints.names import CopyOf, KeyMap
from tva.checkpoints.with_adapter import parts_of
from tva.errors import MismatchError, some
from tva.vectors.content import check_content
from tva.vectors.geometry import TensorReader
from tva.vectors.header import Origin, is_vector_file, read_origin
from tva.vectors.kind import KEY
from tva.vectors.matching import match_vector, renamed_origin
from tva.vectors.new_rows import CHOICES, NewRows, cut, grown


class LazyTaskVector:
    """A task vector on disk: a task vector file, or a fine-tuned checkpoint whose deltas are computed as it is read.

    Args:
        path: The file or folder.
        base: The base that it is applied to. A checkpoint needs one, and a file's shapes must be the
            base's, as its names must by one mapping of `tva.checkpoints.match_names`.
        name: Its name in a recipe; by default the path.
        allow_other_base: Whether a task vector file may be of another base.
        key_map: For the vector's or checkpoint's names; see `tva.checkpoints.map_names`.
        which: Of a checkpoint with two sets of weights.
        only: Which names take part, on the side of the base as on the vector's; the others are not moved.
        new_rows: What becomes of rows that a checkpoint has and the base has not, as those of new tokens: an error, or
            none is moved and they are in ``more_rows``. None: an error that advises nothing about it.
        opened: A checkpoint under the base's names, in place of opening ``path``.

    Attributes:
        path: The file or folder.
        name: Its name in messages.
        weights: What is stored there.
        is_checkpoint: Whether it is a checkpoint rather than a task vector file.
        origin: Where it comes from; of a checkpoint the kind, and the base where `open_vector` opened it.
        buffers: Names of running statistics, kept apart from parameters.
        untouched: Names that it does not move, each with the reason; of a checkpoint only those left out by ``only``.
        more_rows: Tensors of a checkpoint that have more rows than the base's, whole, by name.

    Raises:
        MismatchError: Keys or shapes are not the base's.
        ValueError: It is neither a vector nor a checkpoint, or it is a checkpoint and there is no base.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        base: LazyWeights | None = None,
        *,
        name: str | None = None,
        allow_other_base: bool = False,
        key_map: Mapping[str, str] | None = None,
        which: str = "checkpoint",
        only: NameFilter | None = None,
        new_rows: NewRows | None = None,
        opened: LazyWeights | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.name, self.base = name or self.path, None if base is None else as_real(base)
        self.more_rows: dict[str, Entry] = {}
        self.is_checkpoint = opened is not None or len(parts_of(path)) > 1 or not is_vector_file(path)
        only = only or NameFilter()
        kept = None if base is None else only.kept(base)
        if base is not None:
            check_not_quantized(base, str(base.path))
        if not self.is_checkpoint:
            weights = as_real(open_weights(path))
            self.origin, buffers, untouched = read_origin(weights)
            self.untouched = {name: reason for name, reason in untouched.items() if only.keeps(name)}
            self.buffers = {name for name in buffers if only.keeps(name)}
            self._file = weights = HashedWeights(weights)
            weights = weights.renamed({name: name for name in only.kept(weights)}, *only.note(weights, ""))
            if base is not None:
                weights = self._matched(weights, kept, key_map or {}, copies_in(base))
        elif base is None:
            format_ = open_weights(path).info.format  # says what is wrong if it is not a checkpoint either
            raise ValueError(f"{path} is a checkpoint ({format_}), not a task vector file. Give its base with --base.")
        else:
            opened = _open_checkpoint(self.path, base, key_map or {}, which, only) if opened is None else opened
            weights = as_real(opened)
            weights = weights.renamed({name: name for name in weights}, *_rounded(weights, self.base))
            if new_rows not in (None, "error"):
                weights, self.more_rows = cut(weights, self.base)
            self.origin, self.untouched = Origin(kind=weights.metadata.get(KEY)), {}
            self.buffers = {name for name in weights if name.rpartition(".")[2] in BATCH_NORM_STATISTICS}
        self.weights = HashedWeights(weights)
        if base is not None:
            _check_names(self.path, self.weights, self.names, self.base, kept, new_rows)
            self.untouched |= {name: "excluded" for name in base if not only.keeps(name)}
        self._check_base = self.origin.base is not None and not allow_other_base
        self._kept = None if kept is None or len(kept) == len(base) else set(kept)

    def _matched(
        self, weights: LazyWeights, names: Collection[str], key_map: KeyMap = (), copy_in_base: CopyOf | None = None
    ) -> LazyWeights:
        """Name the tensors of a task vector file, and what its header says of the others, as a base does."""
        try:
            found = match_vector([*weights, *self.untouched], names, self.origin, weights.get, key_map, copy_in_base)
        except MismatchError as error:
            path = getattr(self.base, "path", None)
            base = f" against the base {path}" if path else ""
            raise MismatchError(f"{self.path}{base}: {error}") from error
        if found is None:
            return weights
        new, text = found
        self.untouched = {name: self.untouched[old] for name, old in new.items() if old in self.untouched}
        self.buffers = {name for name, old in new.items() if old in self.buffers}
        self.origin = renamed_origin(self.origin, new)
        same = all(name == old for name, old in new.items())
        return weights.renamed({name: old for name, old in new.items() if old in weights}, *([] if same else [text]))

    def matched_to(self, other: LazyTaskVector) -> LazyTaskVector:
        """Return this task vector file under the names of another vector, if one mapping fits; else as it is."""
        if self.is_checkpoint or self.names == other.names:
            return self
        mine = copy.copy(self)
        try:
            mine.weights = HashedWeights(mine._matched(self.weights, other.names))
        except MismatchError:
            return self
        return mine

    @property
    def names(self) -> set[str]:
        """All names of the base's tensors."""
        return {*self.weights, *self.untouched}

    @property
    def facts(self) -> dict[str, str]:
        """What the header says, beside what `Origin` holds: encoding, creation time, version, norm."""
        return {key.removeprefix("tva."): text for key, text in self.weights.metadata.items()}

    @property
    def deltas(self) -> dict[str, TensorReader]:
        """The parameters that it moves, in the order of the base."""
        if self.is_checkpoint:
            base = self.base
            names = [name for name in base if name in self.weights and name not in self.buffers]
            names = [name for name in names if is_edited(base.spec(name))]
            return {name: _difference(self.weights.entry(name), base.entry(name)) for name in names}
        order = [*(self.origin.base.tensors if self.origin.base else ()), *self.weights]  # a file may have another
        names = [name for name in dict.fromkeys(order) if name in self.weights and name not in self.buffers]
        return {name: stored(self.weights.entry(name)) for name in names}

    def identity(self) -> str:
        """Return what identifies the vector for methods that draw random numbers; a checkpoint is read through once."""
        if self.is_checkpoint:
            return self.weights.fingerprint().digest
        return self.origin.finetuned or self.name

    def delta(self, stored: Tensor, base: Tensor, space: Callable[[torch.dtype, int], Tensor] | None = None) -> Tensor:
        """Return the delta of one chunk, in new memory or in that of ``space`` for a dtype and length."""
        dtype = sum_dtype(stored, base) if self.is_checkpoint else sum_dtype(stored)
        out = None if space is None else space(dtype, len(stored))
        if self.is_checkpoint:
            return subtract(stored, base, out)
        return stored.to(dtype, copy=True) if out is None else out.copy_(stored)

    def unchecked(self) -> LazyTaskVector:
        """Return the same vector for use with any base."""
        other = copy.copy(self)
        other._check_base = False
        return other

    def check(self, name: str, digest: str) -> None:
        """Check that one tensor of the base is what a task vector file was taken from.

        Raises:
            MismatchError: It is another.
        """
        if self._check_base and not self._is_of(name, digest):
            raise MismatchError(
                f"The task vector {self.name} was taken from the base {self.origin.base.digest}, and in the base given "
                f"{name!r} is another (the first found that differs). Give it its own base, or pass allow_other_base "
                f"if the other base is meant."
            )

    def _is_of(self, name: str, digest: str) -> bool:
        """Whether a tensor of the base is what this vector was taken from, in whatever floating dtype."""
        if self._kept is not None and name not in self._kept:
            return True
        recorded = self.origin.base.tensors.get(name)
        return recorded == digest or (recorded is not None and has_values(self.base, name, recorded))

    def check_content(self) -> bool:
        """Check, best when it has been read, that a task vector file holds what was written; see `check_content`."""
        return not self.is_checkpoint and check_content(self._file)

    def check_base(self, base: HashedWeights) -> None:
        """Check that a base is what a task vector file was taken from; the base is read through for it.

        Raises:
            MismatchError: It is another.
        """
        if not self._check_base:
            return
        different = [name for name in base if not self._is_of(name, base.digest(name))]
        if different:
            raise MismatchError(
                f"{self.path} was taken from the base {self.origin.base.digest}, and the base given is "
                f"{base.fingerprint().digest}: {len(different)} of {len(base)} tensors differ. Give its own base, or "
                f"--allow_other_base if the other base is meant."
            )


def open_vector(
    path: str | os.PathLike[str],
    base: HashedWeights | None = None,
    *,
    allow_other_base: bool = False,
    key_map: Mapping[str, str] | None = None,
    which: str = "checkpoint",
    only: NameFilter | None = None,
) -> LazyTaskVector:
    """Open a task vector file, or with a base a fine-tuned checkpoint, and check that it is of this base.

    Args:
        path: The file or folder.
        base: What a checkpoint's deltas are taken to; a task vector file must have been taken from it.
        allow_other_base: Whether a task vector file may be of another base.
        key_map: For a checkpoint's names; see `tva.checkpoints.map_names`.
        which: Of a checkpoint with raw and averaged weights.
        only: Which names take part.

    Raises:
        MismatchError: It is of another base or architecture.
        ValueError: It is neither a vector nor a checkpoint, or it is a checkpoint and there is no base.
    """
    vector = LazyTaskVector(path, base, allow_other_base=allow_other_base, key_map=key_map, which=which, only=only)
    if base is not None:
        vector.check_base(base)
        if vector.is_checkpoint:
            vector.origin = replace(vector.origin, base=base.fingerprint())
    return vector


def _open_checkpoint(
    path: str, base: LazyWeights, key_map: Mapping[str, str], which: str, only: NameFilter
) -> LazyWeights:
    """Open a fine-tuned checkpoint; ``which`` counts where there are two sets of weights, and not elsewhere."""
    model, *adapter = parts_of(path)
    if adapter:
        return open_finetuned(adapter[0], _open_checkpoint(model, base, key_map, which, only), only=only)
    opened = open_finetuned(path, base, key_map=key_map, only=only)
    if which != "checkpoint" and opened.info.which != "as stored":
        return open_finetuned(path, base, key_map=key_map, which=which, only=only)
    return opened


def _rounded(weights: LazyWeights, base: LazyWeights) -> list[str]:
    """Note in one line where a fine-tuned model is stored in a narrower dtype than its base, or nothing."""
    coarse: dict[tuple[str, str], int] = {}
    for name in weights:
        if name in base and is_edited(weights.spec(name)) and is_edited(base.spec(name)):
            mine, theirs = weights.spec(name).dtype_name, base.entry(name).written_dtype
            if Spec(mine, ()).itemsize < Spec(theirs, ()).itemsize:
                coarse[mine, theirs] = coarse.get((mine, theirs), 0) + 1
    return [
        f"{count} of {len(weights)} tensors are stored in {mine}, and the base's in {theirs}: their deltas hold the "
        f"rounding to {mine} too, also where fine-tuning moved nothing"
        for (mine, theirs), count in coarse.items()
    ]


def _check_names(
    path: str,
    weights: LazyWeights,
    names: Collection[str],
    base: LazyWeights,
    base_names: Collection[str],
    new_rows: NewRows | None,
) -> None:
    sizes = {name: (list(base.spec(name).sizes), list(weights.spec(name).sizes)) for name in weights if name in base}
    sizes = {name: pair for name, pair in sizes.items() if pair[0] != pair[1]}
    missing, extra = set(base_names) - names, names - set(base_names)
    problems = {
        f"{path} lacks": missing,
        "the base lacks": extra,
        "shapes differ:": [f"{name} {old} and {new}" for name, (old, new) in sizes.items()],
    }
    if any(problems.values()):
        found = "; ".join(f"{what} {some(sorted(which))}" for what, which in problems.items() if which)
        advice = "Take both from the same architecture, or leave the names that differ out by exclude."
        rows = {(old[0], new[0]) for old, new in sizes.values() if old and new and old[1:] == new[1:]}
        if new_rows is not None and not missing and not extra and grown(weights, base):
            advice = CHOICES.format(*next(iter(rows)))
        elif len(rows) == 1 and not missing and not extra and all(o[1:] == n[1:] for o, n in sizes.values()):
            advice = (
                "Only their numbers of rows differ, {} and {}, as those of embeddings and heads do where a vocabulary "
                "or the number of classes has grown. Give both the same one (of transformers: "
                "base.resize_token_embeddings, then save_pretrained), or leave these tensors out by exclude."
            ).format(*next(iter(rows)))
        raise MismatchError(f"The base and {path} must have the same keys and shapes, but {found}. {advice}")


def untie(base: LazyWeights, sources: Iterable[LazyTaskVector]) -> dict[str, str]:
    """Return which tied weights of the base stay tied: those that every vector moves alike.

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


def stored(entry: Entry) -> TensorReader:
    """Return the reader of a tensor in a file; a tensor that cannot be read in parts is held while it is read."""
    length = entry.shape.numel()
    if entry.in_parts:
        return TensorReader(length, entry.slice)
    kept: list[Tensor] = []

    def read(start: int, stop: int) -> Tensor:
        if not kept:
            kept.append(entry.read().reshape(-1))
        chunk = kept[0][start:stop]
        if stop == length:
            kept.clear()
        return chunk

    return TensorReader(length, read)


def _difference(finetuned: Entry, base: Entry) -> TensorReader:
    new, old = stored(finetuned), stored(base)
    return TensorReader(new.length, lambda start, stop: subtract(new.read(start, stop), old.read(start, stop)))


def header_facts(vector: LazyTaskVector) -> dict[str, Any]:
    """Return what a task vector file's header says, without the names and digests of single tensors."""
    origin, facts = vector.origin, vector.facts
    found = {
        "task": origin.task,
        "base": origin.base.digest if origin.base else None,
        "finetuned": origin.finetuned,
        "step": origin.step,
        "epoch": origin.epoch,
        "since_step": origin.since_step,
        "weights": origin.weights,
        "averaged": origin.averaged,
        "metrics": dict(origin.metrics) or None,
        "hyperparameters": dict(origin.hyperparameters) or None,
        "encoding": facts.get("encoding"),
        "run": origin.run,
        "kind": origin.kind,
        "created": facts.get("created"),
        "version": facts.get("version"),
    }
    return {key: value for key, value in found.items() if value is not None}


def size_of(path: Path) -> int:
    """Return the bytes on disk of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def labels(paths: Sequence[str], tasks: Sequence[str | None]) -> list[str]:
    """Return short display names: the tasks where these differ, else what differs in the paths.

    Example:
        >>> labels(["runs/1/last.tv.safetensors", "runs/2/last.tv.safetensors"], ["mnist", "mnist"])
        ['1', '2']
    """
    known = [task for task in tasks if task]
    return known if len(set(known)) == len(paths) else short_paths(paths)


def short_paths(paths: Sequence[str]) -> list[str]:
    """Return paths without the folders that all share, in front and behind, and without the endings.

    Example:
        >>> short_paths(["runs/mnist/last.tv.safetensors", "runs/svhn/last.tv.safetensors"])
        ['mnist', 'svhn']
        >>> short_paths(["runs/mnist/last.tv.safetensors"])
        ['last']
        >>> short_paths(["/tmp/mnist.tv.safetensors", "svhn.tv.safetensors"])
        ['/tmp/mnist', 'svhn']
    """
    plain = [Path(path).with_name(Path(path).name.removesuffix(".safetensors").removesuffix(".tv")) for path in paths]
    parts = [list(path.parts) for path in plain]
    if len(set(map(tuple, parts))) == 1:
        return [path.name for path in plain]
    while len({part[0] for part in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [part[1:] for part in parts]
    while len({part[-1] for part in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [part[:-1] for part in parts]
    return [str(Path(*part)) for part in parts]
