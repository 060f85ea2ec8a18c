"""Task vectors on disk, opened to be read in pieces: files, and checkpoints whose deltas are taken as they are read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tva._torch import Tensor
from tva.arithmetic import is_edited, subtract
from tva.checkpoints import Fingerprint, LazyWeights, fingerprint, open_weights
from tva.checkpoints.lazy import Entry
from tva.errors import MismatchError
from tva.vectors.geometry import Part
from tva.vectors.header import Origin, is_vector_file, read_origin
from tva.vectors.sources import Source


@dataclass
class Vector:
    """A task vector on disk, or a fine-tuned checkpoint whose deltas are taken as they are read.

    Attributes:
        path: The file or folder.
        weights: What is stored there.
        parts: The parameters that it moves.
        buffers: Names of running statistics, kept apart.
        untouched: Names that it does not move, each with the reason; unknown for a checkpoint.
        origin: Where it comes from.
    """

    path: str
    weights: LazyWeights
    parts: dict[str, Part]
    buffers: set[str]
    untouched: dict[str, str]
    origin: Origin

    @property
    def facts(self) -> dict[str, str]:
        """What the header says, beside what `Origin` holds: encoding, creation time, version, norm."""
        return {key.removeprefix("tva."): text for key, text in self.weights.metadata.items()}

    @property
    def names(self) -> set[str]:
        """All names of the base's tensors."""
        return {*self.weights, *self.untouched}


class Base:
    """A base that checkpoints are compared with, fingerprinted when that is first asked for."""

    def __init__(self, path: str) -> None:
        self.weights = open_weights(path)
        self._tree: Fingerprint | None = None

    @property
    def tree(self) -> Fingerprint:
        """Its fingerprint; the first time it is read through."""
        self._tree = self._tree or fingerprint(self.weights)
        return self._tree


def open_vector(
    path: str | os.PathLike[str],
    base: Base | None = None,
    *,
    allow_other_base: bool = False,
    key_map: Mapping[str, str] | None = None,
    which: str = "checkpoint",
) -> Vector:
    """Open a task vector file, or with a base a fine-tuned checkpoint, to be read in pieces.

    Args:
        path: The file or folder.
        base: What a checkpoint's deltas are taken to; a task vector file must have been taken from it.
        allow_other_base: A task vector file may be of another base.
        key_map: For a checkpoint's names; see `tva.checkpoints.map_names`.
        which: Of a checkpoint with raw and averaged weights.

    Raises:
        MismatchError: It is of another base or architecture.
        ValueError: It is neither vector nor checkpoint, or a checkpoint and no base is given.
    """
    path = os.fspath(path)
    if is_vector_file(path):
        weights = open_weights(path) if base is None else Source(path, path, base.weights, allow_other_base).weights
        origin, buffers, untouched = read_origin(weights)
        if base is not None and not allow_other_base:
            _check_base(path, origin, base.tree)
        order = [*(origin.base.tensors if origin.base else ()), *weights]  # the base's: a file may have another
        names = [name for name in dict.fromkeys(order) if name in weights and name not in buffers]
        parts = {name: stored(weights.entry(name)) for name in names}
        return Vector(path, weights, parts, buffers, untouched, origin)
    if base is None:
        format_ = open_weights(path).info.format  # says what is wrong if it is no checkpoint either
        raise ValueError(f"{path} is a checkpoint ({format_}), not a task vector file. Give its base with --base.")
    source = Source(path, path, base.weights, key_map=key_map, which=which)
    names = [name for name in base.weights if name not in source.buffers and is_edited(base.weights.spec(name))]
    parts = {name: _difference(source.weights.entry(name), base.weights.entry(name)) for name in names}
    origin = Origin(base=base.tree, kind=source.kind)
    return Vector(path, source.weights, parts, source.buffers & {*base.weights}, {}, origin)


def _check_base(path: str, origin: Origin, base: Fingerprint) -> None:
    if origin.base is not None and origin.base.digest != base.digest:
        raise MismatchError(
            f"{path} was taken from the base {origin.base.digest}, and the base given is {base.digest}: "
            f"{base.num_different(origin.base.tensors)} of {len(base.tensors)} tensors differ. Give its own base, or "
            f"--allow_other_base if the other base is meant."
        )


def stored(entry: Entry) -> Part:
    """Make a part of a tensor in a file; one that cannot be read in parts is kept while it is read."""
    length = entry.shape.numel()
    if entry.in_parts:
        return Part(length, entry.slice)
    kept: list[Tensor] = []

    def read(start: int, stop: int) -> Tensor:
        if not kept:
            kept.append(entry.read().reshape(-1))
        piece = kept[0][start:stop]
        if stop == length:
            kept.clear()
        return piece

    return Part(length, read)


def _difference(finetuned: Entry, base: Entry) -> Part:
    new, old = stored(finetuned), stored(base)
    return Part(new.length, lambda start, stop: subtract(new.read(start, stop), old.read(start, stop)))


def header_facts(vector: Vector) -> dict[str, Any]:
    """Give what a task vector file's header says, but for the names and digests of single tensors."""
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
    """Give the bytes on disk of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def labels(paths: Sequence[str], tasks: Sequence[str | None]) -> list[str]:
    """Name vectors shortly: by their tasks where these differ, else by what differs in their paths.

    Example:
        >>> labels(["runs/1/last.tv.safetensors", "runs/2/last.tv.safetensors"], ["mnist", "mnist"])
        ['1', '2']
    """
    known = [task for task in tasks if task]
    return known if len(set(known)) == len(paths) else short_paths(paths)


def short_paths(paths: Sequence[str]) -> list[str]:
    """Leave out of paths the folders that all share, in front and behind, and the endings.

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
