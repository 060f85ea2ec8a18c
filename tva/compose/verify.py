"""Check an edited checkpoint against its record: recompute it, chunk by chunk, and compare it bit by bit."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from tva._torch import torch_version
from tva.arithmetic import BATCH_NORM_STATISTICS
from tva.checkpoints import Elements, Fingerprint, HashedWeights, LazyWeights, Spec, as_stored
from tva.checkpoints.lazy import as_real
from tva.compose.engine import Composer
from tva.compose.inputs import input_names, renamed
from tva.compose.recipe import ChunkDeltas
from tva.compose.record import RECORD, Record, check_inputs, check_recorded, open_edited, open_recipe
from tva.compose.requantize import requantizer
from tva.console import size_text
from tva.errors import MismatchError, some
from tva.vectors.content import VectorReport, verify_vector
from tva.vectors.header import is_vector_file
from tva.version import __version__

SAMPLE = 16  # tensors that are computed in two ways
ESTIMATED = (*BATCH_NORM_STATISTICS, "num_batches_tracked")


@dataclass
class VerifyReport:
    """What `verify` found.

    Attributes:
        output: The edited checkpoint.
        formula: What it was compared with.
        num_tensors: Number of tensors that were recomputed.
        num_bytes: Their size.
        different: Mapping from name to largest difference, for each tensor that differs from what was computed. NaN if
            there is no such number: the tensor is missing or superfluous, has another dtype or shape, or holds NaN.
        changed: Mapping from what is not as recorded (``stored weights``, ``base``, a vector or a file) to its recorded
            and its present fingerprint.
        unrecorded: Inputs without a recorded fingerprint, including ``the record`` itself.
        not_recomputed: Running statistics that the edit took from data.
        sampled: Tensors that were also computed in a second way, for methods that observe the deltas before they merge.
        written_by: Versions that wrote it.
        seconds: Wall time.
    """

    output: Path
    formula: str
    num_tensors: int
    num_bytes: int
    different: dict[str, float]
    changed: dict[str, tuple[str, str]]
    unrecorded: list[str] = field(default_factory=list)
    not_recomputed: list[str] = field(default_factory=list)
    sampled: int = 0
    written_by: str = ""
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether everything was recorded, is as recorded, and equals what was computed."""
        return not self.different and not self.changed and not self.unrecorded

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        changed = {name: {"recorded": old, "found": new} for name, (old, new) in self.changed.items()}
        return {"holds": self.holds, **vars(self), "output": str(self.output), "changed": changed}

    def __str__(self) -> str:
        compared = f"{self.num_tensors} tensors, {size_text(self.num_bytes)}, in {self.seconds:.1f} s"
        lines = []
        if self.holds:
            lines.append(
                f"verified: {self.output} is {self.formula}, computed again and equal bit for bit ({compared})"
            )
            lines.append("the base, every other input and the stored weights have the recorded fingerprints")
        else:
            lines.append(f"NOT verified: {self.output} against {self.formula} ({compared})")
            lines.append(self._differences())
        for name, (recorded, found) in self.changed.items():
            when = ": changed after the edit" if name == STORED else ": another one, or changed since"
            lines.append(f"{name}: {found}, and {recorded} was recorded{when}")
        if self.different and not self.changed:
            lines.append(
                f"the stored weights are those recorded{'' if self.unrecorded else ', and so is every input'}: what "
                f"computes is another. It was written by {self.written_by}; this is {_versions()}"
            )
        if self.sampled:
            lines.append(f"{self.sampled} of the tensors were also computed in a second way, method by method in torch")
        if self.unrecorded:
            names = ", ".join(self.unrecorded)
            lines.append(f"no fingerprint was recorded of {names}: nothing shows that it is the same")
        if self.not_recomputed:
            lines.append(f"not computed again: {len(self.not_recomputed)} running statistics, which the edit changed")
        return "\n".join(lines)

    def _differences(self) -> str:
        if not self.different:
            return "no tensor differs from what the inputs give"
        largest = max(
            self.different, key=lambda name: (self.different[name] == self.different[name], self.different[name])
        )
        return (
            f"{len(self.different)} of {self.num_tensors} tensors differ: {some(sorted(self.different))}; "
            f"largest difference {self.different[largest]:.3g}, in {largest!r}"
        )


STORED = "stored weights"


def verify(
    edited: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    vectors: Mapping[str, str | os.PathLike[str]] | None = None,
    max_memory: str | None = None,
) -> VerifyReport | VectorReport:
    """Recompute an edited checkpoint from its recorded recipe and inputs, and compare it bit by bit.

    A task vector file is compared with the fingerprint that was written into its header.

    Args:
        edited: An output of ``tva compose`` or ``tva edit``, or a task vector file; it is not changed.
        base: New path of the base, if it has moved.
        vectors: Mapping from names to new paths of vectors that have moved.
        max_memory: Limit on the anonymous memory of this process, such as ``512MiB``; by default 1 GiB more than it
            already uses.

    Returns:
        Whether it holds; if not, how many tensors differ, and whether the stored weights or the inputs have changed. An
        edit with a fingerprint missing from its record does not hold.

    Raises:
        ValueError: It holds no record, or one that cannot be computed again.
        FileNotFoundError: An input is missing.
        MismatchError: An input has other keys or shapes than the base.
    """
    started = time.monotonic()
    edited, given = os.fspath(edited), None if base is None else os.fspath(base)
    moved = {name: os.fspath(path) for name, path in (vectors or {}).items()}
    check_recorded(edited)
    if Path(edited).is_file() and is_vector_file(edited):
        return verify_vector(edited)
    weights = open_edited(edited)
    record = Record.read(weights)
    if record.recipe.startswith("learned("):
        raise ValueError(
            f"{edited} has coefficients that were learned from data, tensor by tensor, and its record does not hold "
            f"them: it cannot be computed again."
        )
    others = {**({"--base": given} if given else {}), **_flags(moved)}
    check_inputs(edited, {"--base": record.base, **_flags(record.vectors)}, others)
    paths = {**record.vectors, **moved}
    try:
        composer, names = _open_again(edited, record, given or record.base, paths)
    except ValueError as error:
        raise type(error)(f"{edited} cannot be computed again from its record: {error}") from error
    stored = weights
    if names:
        weights = HashedWeights(weights.renamed(renamed(weights, names.get("edited"))))
    skipped = [] if record.options.get("statistics", "keep") == "keep" else list(filter(_is_estimated, composer.names))
    quantizer = requantizer(composer) if record.options.get("requantize") else None
    if given is not None and not record.base:
        _check_same_names(edited, weights, given, composer)
    comparison = _Comparison(HashedWeights(as_stored(weights)) if quantizer else weights, skipped)
    composer.beside = 8
    composer.fit_into(max_memory)
    composer.run(quantizer.into(comparison) if quantizer else comparison)
    comparison.compare_names(quantizer.layout() if quantizer else composer.layout(), composer.tied)
    sampled = _compute_a_sample_again(composer, comparison)
    recorded, found = _fingerprints(record, composer, stored, names.get("edited"))
    return VerifyReport(
        Path(edited),
        formula=f"base + {record.scaling_coef:g} · ({record.recipe.strip()})",
        num_tensors=len(composer.names) - len(skipped),
        num_bytes=sum(spec.num_bytes for name, spec in composer.layout().items() if name not in skipped),
        different=comparison.different,
        changed={name: (recorded[name], found[name]) for name in recorded if recorded[name] != found[name]},
        unrecorded=sorted({*(found.keys() - recorded.keys()), *([] if RECORD in weights.metadata else ["the record"])}),
        not_recomputed=skipped,
        sampled=sampled,
        written_by=_versions(record.version, record.torch),
        seconds=time.monotonic() - started,
    )


def _open_again(edited: str, record: Record, base: str, paths: Mapping[str, str]) -> tuple[Composer, dict[str, Any]]:
    """Open the inputs of an edit as they were opened for it.

    Returns:
        The composer; and how the names of base and output were changed where the edit computed under others.
    """
    recipe = open_recipe(edited, record, input_names(paths, record.options.get("slices")))
    names = record.options.get("names") or {}
    composer = Composer.open(
        base,
        paths,
        recipe,
        record.scaling_coef,
        record.dtype or None,
        allow_other_base=True,  # whether it is the same base, its fingerprint shows
        key_map=record.options.get("key_map", {}),
        include=record.options.get("include"),
        exclude=record.options.get("exclude"),
        slices=record.options.get("slices"),
        new_rows=record.options.get("new_rows", "error"),
        allow_other_tokenizer=True,
        which="raw" if "raw" in record.options.get("which", {}).values() else "checkpoint",
        names=names.get("base"),
    )
    return composer, names


def _compute_a_sample_again(composer: Composer, comparison: _Comparison) -> int:
    """Compare a sample of tensors with what a second way of computing gives, and return how many they are.

    In the second way each method observes the whole model by itself, inner ones first, and torch computes every step:
    what the engine does at once for many methods and tensors, and its kernels, have no part in it. Recipes of which no
    method observes are the same arithmetic in either way, and are not computed twice.
    """
    if not composer.recipe.observing or not composer.scaling_coef:
        return 0
    moved = [name for name in composer.names if composer.plain(name).moved and name not in comparison.skipped]
    compared = [name for name in moved if not (composer.requantize and name in composer.quantized)]
    sample = set(random.Random(0).sample(compared, min(SAMPLE, len(compared))))
    over_model = any(method.over_model for method in composer.recipe.observing)

    def chunks() -> Iterator[ChunkDeltas]:
        for name in moved:
            if over_model or name in sample:
                yield from composer.deltas_of(composer.plain(name))

    states = composer.recipe.observe(chunks, composer.identities)
    for name in sorted(sample):
        opened = composer.plain(name)
        for start in opened.starts():
            edited = composer.edit_plainly(opened, start, states)
            comparison.write(name, start, Elements.of(edited))
    return len(sample)


def _check_same_names(edited: str, weights: LazyWeights, base: str, composer: Composer) -> None:
    """Check that an edit of a model in memory and its base, given as a file, have the same names.

    Raises:
        MismatchError: Each has names of its own.
    """
    known = composer.base.keys()
    extra, missing = sorted(weights.keys() - known), sorted(known - weights.keys())
    if extra and missing:
        raise MismatchError(
            f"{edited} has the names of the model in memory, such as {some(extra, 1)}, and {base} has others, such as "
            f"{some(missing, 1)}: neither can be computed from the other. Give --base a file with the names in memory "
            f"(save_weights(base.state_dict(), PATH)), and --vectors.NAME task vectors of such files; or edit without "
            f"format='state_dict', which keeps the names of the base's folder."
        )


class _Comparison:
    def __init__(self, edited: HashedWeights, skipped: list[str]) -> None:
        self.edited, self.skipped = edited, set(skipped)
        self._parts = as_real(edited)
        self.done: Mapping[str, Any] = {}
        self.different: dict[str, float] = {}
        self._lock = threading.Lock()

    def write(self, name: str, start: int, chunk: Elements) -> None:
        """Compare some elements."""
        entry = self._parts.entry(name) if name in self.edited else None
        if (
            entry is None
            or entry.spec.dtype_name != chunk.dtype_name
            or start * entry.spec.itemsize + len(chunk.data) > entry.spec.num_bytes
        ):
            self.different[name] = float("nan")
            return
        stored = Elements(numpy.empty_like(chunk.data), chunk.dtype_name)
        entry.read_into(stored.data, start)
        if name in self.skipped or numpy.array_equal(stored.data, chunk.data):
            return
        with self._lock:  # one at a time, for the memory it takes
            mine, theirs = chunk.tensor(), stored.tensor()
            largest = float(theirs.double().sub_(mine).abs().max())
            self.different[name] = max(largest, self.different.get(name, 0.0))

    def finish(self, name: str, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def compare_names(self, layout: Mapping[str, Spec], tied: Mapping[str, str]) -> None:
        """Compare, when all is computed, names and shapes, and the other names of tied tensors."""
        for name in self.edited.keys() | layout.keys():
            kept = tied.get(name)
            if name not in self.edited or (kept is None and name not in layout):
                same = False
            elif kept is None:
                same = self.edited.spec(name) == layout[name]
            else:
                same = self.edited.digest(name) == self.edited.digest(kept)
            if not same:
                self.different[name] = float("nan")


def _flags(vectors: Mapping[str, str]) -> dict[str, str]:
    return {f"--vectors.{name}": path for name, path in vectors.items()}


def _is_estimated(name: str) -> bool:
    return name.rpartition(".")[2] in ESTIMATED


def _versions(version: str = __version__, of_torch: str = "") -> str:
    return f"tva {version} with torch {of_torch or torch_version()}"


def _fingerprints(
    record: Record, composer: Composer, edited: HashedWeights, names: Sequence[str] | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the recorded and the present fingerprints of the stored weights and of every input."""
    recorded = {STORED: record.edited_fingerprint, "base": record.base_fingerprint}
    recorded |= {f"vector {name}": digest for name, digest in record.vector_fingerprints.items()}
    recorded |= {f"file {path}": digest for path, digest in record.file_fingerprints.items()}
    base = composer.fingerprint("base").tensors
    back = renamed(edited, names)  # from the names in which it was computed
    digest = Fingerprint.from_tensors({back.get(name, name): found for name, found in base.items()}).digest
    found = {STORED: edited.fingerprint().digest, "base": digest}
    found |= {f"vector {name}": digest for name, digest in composer.vector_fingerprints().items()}
    found |= {f"file {path}": file.fingerprint().digest for path, file in composer.recipe.files.items()}
    return recorded, found
