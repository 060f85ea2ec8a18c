"""Restore the base of an edited checkpoint, bit for bit, from it and what was stored beside it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tva._torch import load_torch
from tva.checkpoints import (
    Fingerprint,
    HashedWeights,
    NameFilter,
    Output,
    Spec,
    check_own,
    find,
    fingerprint,
    open_weights,
    protect,
    side_files,
    weights_stem,
)
from tva.checkpoints.formats.sentence_transformers import part_of_names
from tva.compose.engine import Composer
from tva.compose.recipe import Recipe
from tva.compose.record import Record, check_inputs, open_edited, open_recipe
from tva.compose.undo import BYTES_HELD, OpenedUndo, Restoring, undo_path
from tva.console import size_text
from tva.report.run_files import CARD, CONFIG, EDIT_JSON, EDITED
from tva.sizes import parse_bytes
from tva.vectors.lazy import LazyTaskVector


@dataclass
class RevertReport:
    """What `revert` wrote.

    Attributes:
        output: The file or folder written.
        base: Its fingerprint, which is that of the base as it was recorded.
        num_bytes: Size of its tensors.
        undo: The undo file that was used.
        undo_bytes: Its size.
        seconds: Wall time.
    """

    output: Path
    base: str
    num_bytes: int
    undo: Path
    undo_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "output": str(self.output), "undo": str(self.undo)}

    def __str__(self) -> str:
        return (
            f"wrote {self.output}: {size_text(self.num_bytes)} in {self.seconds:.1f} s, {self.base}, which is the "
            f"fingerprint recorded of the base; used {self.undo}, {self.undo_bytes:,} bytes"
        )


def revert(
    edited: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    undo: str | os.PathLike[str] | None = None,
    vectors: Mapping[str, str | os.PathLike[str]] | None = None,
    max_memory: str | None = None,
    max_shard_size: str = "5GB",
    resume: bool = False,
) -> RevertReport:
    """Restore the base of an edited checkpoint, bit for bit, from it and its undo file.

    Args:
        edited: An output of ``tva compose`` or ``tva edit`` with ``keep_undo``; it is not changed.
        output: A ``.safetensors`` file, or a new folder. It gets this name when it is complete and has the recorded
            fingerprint of the base.
        undo: The undo file, if it is no longer next to ``edited``.
        vectors: For an undo file that was written ``with_vectors``: mapping from names to new paths of vectors that
            have moved.
        max_memory: Limit on the anonymous memory of this process, such as ``512MiB``; by default 1 GiB more than it
            already uses.
        max_shard_size: Maximum size of a shard in a folder.
        resume: Continue where an interrupted run of the same command stopped.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: There is no undo file, or a vector is not there.
        ValueError: The undo file is of another edit or damaged, or the edited checkpoint or a vector has changed since.
        OSError: A file cannot be read, or there is no room for the output.
    """
    started = time.monotonic()
    edited, output, undo = os.fspath(edited), os.fspath(output), undo and os.fspath(undo)
    moved = {name: os.fspath(path) for name, path in (vectors or {}).items()}
    weights = open_edited(edited)
    opened = _open_undo(edited, weights, undo)
    named = {**opened.record.vectors, **moved} if opened.with_vectors else {}
    paths = {f"vectors.{name}": path for name, path in named.items()}
    protect([output], {"the edited checkpoint": edited, "undo": opened.path, **paths})
    size, base = opened.path.stat().st_size, opened.record.base_fingerprint
    done = _bytes_of(Path(output), base) if resume else None
    if done is not None:  # by the run that was interrupted, at its very end
        Path(output).with_name(f".{Path(output).name}.journal").unlink(missing_ok=True)
        return RevertReport(Path(output), base, done, opened.path, size, time.monotonic() - started)
    check_own(output, "weights")
    composer = _way_back(edited, weights, opened, moved)
    composer.fit_into(max_memory)
    if composer.chunk < opened.block and not composer.recipe.needs_whole_tensors:
        raise ValueError(f"{opened.path} was written in blocks for which max_memory={max_memory!r} is too little.")
    folder = _folder(edited, weights)
    beside = side_files(folder)[0] if folder else {}
    if folder and (folder / EDIT_JSON).exists():  # of an edit, whose card and options are not the base's
        beside = {name: file for name, file in beside.items() if name not in (CARD, CONFIG)}
    if (config := opened.metadata.get("tva.undo_config")) and "config.json" in beside:
        beside["config.json"] = config.encode()
    metadata = {"format": "pt", **opened.base_metadata, **opened.ties}
    shard_bytes = parse_bytes(max_shard_size, "max_shard_size")
    job = {**opened.record.metadata(), "max_shard_size": shard_bytes}
    stem = weights_stem(folder) if folder else "model"
    parts = part_of_names(folder) if folder else {}
    with Output(Path(output), composer.layout(), metadata, job, shard_bytes, resume, stem, parts) as out:
        restoring = Restoring(opened, out)
        composer.run(restoring)
        found = {**restoring.digests, **{name: restoring.digests[kept] for name, kept in opened.ties.items()}}
        _check(edited, weights, opened, composer, Fingerprint.from_tensors(found).digest)
        out.commit({}, beside)
    return RevertReport(Path(output), base, out.size, opened.path, size, time.monotonic() - started)


def _folder(edited: str, weights: HashedWeights) -> Path | None:
    path = find(edited)
    return path if path.is_dir() and weights.path.name != EDITED else None


def _open_undo(edited: str, weights: HashedWeights, undo: str | None) -> OpenedUndo:
    path = Path(undo) if undo else undo_path(_folder(edited, weights) or weights.path)
    stated = weights.metadata.get("tva.edited_fingerprint")
    hidden = path.with_name(f".{path.name}.partial")  # of a run that was killed when it had named the weights
    if undo is None and hidden.exists() and _is_of(hidden, stated):
        path = hidden
    if not path.exists():
        raise FileNotFoundError(_without_undo(edited, weights, path))
    opened = OpenedUndo(path)
    stated = stated or opened.record.edited_fingerprint
    if stated != opened.record.edited_fingerprint:
        raise ValueError(
            f"{path} undoes another edit: it is for the edited weights {opened.record.edited_fingerprint}, and those "
            f"in {edited} are {stated} by their record. Give the undo file of this edit by --undo."
        )
    return opened


def _is_of(path: Path, edited: str | None) -> bool:
    try:
        return OpenedUndo(path).record.edited_fingerprint == edited
    except (OSError, ValueError):
        return False


def _bytes_of(path: Path, digest: str) -> int | None:
    try:
        weights = open_weights(path)
        same = fingerprint(weights).digest == digest
    except (OSError, ValueError):
        return None
    return sum(weights.spec(name).num_bytes for name in weights) if same else None


def _without_undo(edited: str, weights: HashedWeights, path: Path) -> str:
    record = Record.read(weights)
    text = f"An undo file was expected at {path}, and nothing is there. "
    try:
        found = fingerprint(open_weights(record.base)).digest if record.base else None
    except FileNotFoundError:
        found = None
    if found == record.base_fingerprint:
        return f"{text}But the base itself is still at {record.base}, with the recorded fingerprint {found}: copy it."
    where = "it was a model in memory"
    if record.base:
        where = f"at {record.base}, where it was, " + ("is nothing" if found is None else f"is another one, {found}")
    return (
        f"{text}Give it by --undo if it has moved. Without it the base {record.base_fingerprint} cannot be restored "
        f"from {edited}; {where}. tva compose and tva edit write one with --keep_undo."
    )


def _way_back(edited: str, weights: HashedWeights, undo: OpenedUndo, vectors: Mapping[str, str]) -> Composer:
    """Make the composer that predicts the base as it was predicted when the undo file was written."""
    undo.check_names(weights)
    record, sources, recipe = undo.record, {}, Recipe("nothing", ["nothing"])
    if undo.with_vectors:
        given = {f"--vectors.{name}": path for name, path in vectors.items()}
        check_inputs(edited, {f"--vectors.{name}": path for name, path in record.vectors.items()}, given)
        paths = {**record.vectors, **vectors}
        recipe = open_recipe(edited, record, paths)
        recipe.bind(weights.keys())
        only = NameFilter(record.options.get("include"), record.options.get("exclude"))
        options = {"allow_other_base": True, "only": only}
        sources = {name: LazyTaskVector(paths[name], weights, name=name, **options) for name in recipe.vectors}
    load_torch()  # which undo files take, and so the memory that is left
    composer = Composer(weights, sources, recipe, -record.scaling_coef, undo.dtypes, undo.ties)
    composer.chunk = undo.block
    composer.beside = BYTES_HELD * max((Spec(dtype, ()).itemsize for dtype in undo.dtypes.values()), default=0)
    return composer


def _check(edited: str, weights: HashedWeights, undo: OpenedUndo, composer: Composer, restored: str) -> None:
    """Check, when everything is restored, that it is the base.

    Raises:
        ValueError: It is not the base; the message says why.
    """
    record, found = undo.record, weights.fingerprint().digest
    if found != record.edited_fingerprint:
        raise ValueError(
            f"{edited} was changed after the edit: its weights are {found}, and {record.edited_fingerprint} was "
            f"recorded. The base cannot be restored from it, and nothing was written. Take the file as it was edited."
        )
    recorded = {**record.vector_fingerprints, **record.file_fingerprints}
    inputs = {name: source.weights for name, source in composer.sources.items()} | composer.recipe.files
    now = {name: opened.fingerprint().digest for name, opened in inputs.items()}
    changed = [
        f"{name} is {now[name]}, and {recorded[name]} was recorded" for name in now if now[name] != recorded[name]
    ]
    if changed:
        raise ValueError(f"The base cannot be restored with other vectors: {'; '.join(changed)}. Nothing was written.")
    if restored != record.base_fingerprint:
        raise ValueError(
            f"What was restored is {restored}, and the base was {record.base_fingerprint}: nothing was written. Either "
            f"{undo.path} is damaged, or this program computes otherwise than tva {record.version} with torch "
            f"{record.torch}, which wrote it: use that."
        )
