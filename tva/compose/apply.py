"""Apply a recipe to a base checkpoint on disk, within a stated memory, the public function over `tva.compose.engine`.

No Trainer, no data and no knowledge of the architecture: names and shapes are all there is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tva._torch import load_torch
from tva.checkpoints import (
    Fingerprint,
    LazyWeights,
    NameFilter,
    Output,
    check_own,
    fetch_side_files,
    find,
    protect,
    weights_stem,
)
from tva.checkpoints.dcp_writer import check_format
from tva.checkpoints.formats.gguf import is_gguf
from tva.checkpoints.formats.sentence_transformers import part_of_names
from tva.checkpoints.tokenizers import fetch_tokenizer
from tva.checkpoints.with_adapter import parts_of
from tva.compose.adapter import AdapterReport, compose_adapter
from tva.compose.beside import Beside
from tva.compose.engine import Composer, GroupEffect
from tva.compose.gguf import SUFFIX, GgufOutput
from tva.compose.inputs import Slices, input_names, used_inputs
from tva.compose.plan import Plan, make_plan
from tva.compose.recipe import Recipe
from tva.compose.record import UNKNOWN, Record
from tva.compose.requantize import Requantized, requantizer
from tva.compose.spread import compose_shards, open_workers, spread_plan
from tva.compose.syntax import BASE
from tva.compose.undo import BYTES_HELD, UndoFile, undo_path
from tva.errors import some
from tva.layers import Coefficient
from tva.sizes import parse_bytes
from tva.vectors.kind import KEY, check_kinds
from tva.vectors.lazy import LazyTaskVector
from tva.vectors.new_rows import NewRows


@dataclass(repr=False)
class ComposeReport:
    """What `compose` did.

    Attributes:
        output: The file or folder written.
        base: Fingerprint of the base.
        edited: Fingerprint of the output.
        num_bytes: Size of the output's tensors.
        seconds: Wall time.
        resumed: Tensors that an interrupted run had finished.
        effects: Effect by group of tensors.
        notes: What was decided in reading the inputs: prefixes stripped, parts left out.
        undo: The undo file, if one was asked for.
        undo_bytes: Its size.
    """

    output: Path
    base: Fingerprint
    edited: Fingerprint
    num_bytes: int
    seconds: float
    resumed: int = 0
    effects: dict[str, GroupEffect] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    undo: Path | None = None
    undo_bytes: int = 0

    def __repr__(self) -> str:
        moved = sum(effect.tensors for effect in self.effects.values())
        return f"ComposeReport({self.output}, {self.edited.digest}: {moved} tensors moved, {self.num_bytes:,} bytes)"

    def _repr_html_(self) -> str:
        """Show it in a notebook: what was written, and the change by group of tensors."""
        from tva.report.notebook import composed_cell

        facts = {"base": self.base.digest, "edited": self.edited.digest, "bytes": f"{self.num_bytes:,}"}
        facts |= {"undo file": f"{self.undo}, {self.undo_bytes:,} bytes"} if self.undo else {}
        return composed_cell(str(self.output), facts, self.effects, self.notes)


def compose(
    base: str | os.PathLike[str],
    vectors: Mapping[str, str | os.PathLike[str]],
    recipe: str,
    output: str | os.PathLike[str],
    coefs: dict[str, Coefficient] | None = None,
    scaling_coef: float = 1.0,
    dtype: str | None = None,
    max_memory: str | None = None,
    max_shard_size: str = "5GB",
    allow_other_base: bool = False,
    key_map: dict[str, str] | None = None,
    which: str = "checkpoint",
    include: list[str] | str | None = None,
    exclude: list[str] | str | None = None,
    allow_other_kind: bool = False,
    plan: bool = False,
    resume: bool = False,
    keep_undo: bool | Literal["with_vectors"] = False,
    requantize: bool = False,
    write_as: Literal["checkpoint", "lora"] = "checkpoint",
    rank: int | None = None,
    slices: dict[str, list[str]] | None = None,
    new_rows: NewRows = "error",
    tokenizer: str = "",
    allow_other_tokenizer: bool = False,
    engine: str = "local",
    format: Literal["safetensors", "dcp"] = "safetensors",
) -> ComposeReport | AdapterReport | Plan:
    """Write ``base + scaling_coef * recipe`` without loading any model whole.

    Args:
        base: Checkpoint of the base model, in any format that `tva.open_weights` reads, or ``MODEL+ADAPTER``.
        vectors: Names to task vector files, or to fine-tuned checkpoints of the same base, or ``MODEL+ADAPTER``.
        recipe: Expression of those names, such as ``0.3 * (a + b)`` or ``ties(a, b, density=0.2)``; ``base`` is the
            base's own weights.
        output: A ``.safetensors`` file, or a new folder for shards, their index and the base's configuration and
            tokenizer. It gets this name when it is complete. A ``.gguf`` file if the base is one and with
            ``requantize``.
        coefs: Values of the coefficients in the recipe. Each is a number, or a mapping from groups of tensors to a
            number or to ``[first, …, last]`` over the layers. A group is a regular expression that is searched for in
            the tensors' names; the first match counts, and ``layer`` matches all names with a layer number.
        scaling_coef: Coefficient of the whole recipe; 0 writes the base.
        dtype: Dtype of the output's floating tensors: float64, float32, bfloat16 or float16; by default the base's.
        max_memory: Limit on the anonymous memory of this process, such as ``512MiB``; pages of mapped files do not
            count. By default 1 GiB more than it already uses.
        max_shard_size: Maximum size of a shard in a folder.
        allow_other_base: Apply task vector files to a base that they were not taken from.
        key_map: Regular expressions to replacements, for fine-tuned checkpoints whose names differ from the base's by
            more than one prefix.
        which: Which weights of fine-tuned Lightning checkpoints that a weight-averaging callback has written: ``raw``
            or ``averaged``; ``checkpoint`` is what Lightning loads.
        include: Regular expressions that are searched for in the names of tensors; only tensors that match are used.
        exclude: Regular expressions of names to leave out, of the base and of the vectors, such as ``^criterion[.]``;
            the output has the base's tensors unchanged.
        allow_other_kind: Mix vectors of linearized networks (``tangent``) with ordinary ones; the output is then
            marked as an ordinary network's.
        plan: Write nothing; report from headers only what would be done: coefficients, memory, bytes to move.
        resume: Continue where an interrupted run of the same command stopped; the bytes are the same.
        keep_undo: Write an undo file next to the output, from which ``tva revert`` restores the base bit for bit. With
            ``with_vectors`` it is much smaller, but useless without the same task vector files.
        requantize: Write the tensors of a quantized base in its own scheme; by default they are written in bfloat16.
        write_as: What to write (on the command line also ``--as``): the edited model, or one LoRA adapter (``lora``),
            made from LoRA adapters, that changes the base as the recipe says. Methods other than sums are then computed
            in the core space of the adapters.
        rank: Maximum rank of the adapter that is written; it is recompressed to this rank. By default sums are exact.
        slices: Models made from layers of the inputs, in place of ``base`` or under another name that the recipe can
            use. For example, ``{"base": ["base[0:16]", "a[8:24]"]}`` is layers 0 to 15 of the base, then 8 to 23 of
            ``a``.
        new_rows: What to do if a fine-tuned model has more rows than the base in embeddings and output layer, as for
            new tokens: ``keep`` the new rows (their mean, if several models have them), write rows of ``zero``, or
            ``drop`` them. By default it is an error.
        tokenizer: The input whose tokenizer files the output gets, ``base`` or a vector's name; by default the one
            whose vocabulary it has.
        allow_other_tokenizer: Combine models whose tokenizers assign the same ids to different tokens.
        engine: ``local``: this process. ``local:N``: N processes on this machine. ``ray``: a Ray cluster started on
            this machine. ``ray:ADDRESS``: a running cluster (``ray:auto`` on one of its nodes), whose nodes see inputs
            and output under the same paths. Each process computes one shard of a folder at a time.
        format: Format of the output: ``safetensors``, or a folder of ``torch.distributed.checkpoint`` (``dcp``), from
            which the ranks of FSDP and other sharded models load their parts.

    Returns:
        What was written, and what the edit did; or the plan; or what the adapter is.

    Raises:
        RecipeError: The recipe cannot be read.
        MismatchError: Keys, shapes or bases differ.
        NoEffectError: Nothing changed.
        ValueError: The output is not finite, or an option cannot be understood.
        OSError: A file cannot be read, or there is no room for the output.
    """
    started = time.monotonic()
    base, output = os.fspath(base), os.fspath(output)
    vectors = {name: os.fspath(path) for name, path in vectors.items()}
    given = {**vectors, BASE: base}
    _check_output(output, scaling_coef)
    check_format(Path(output), format, write_as=write_as != "checkpoint", keep_undo=keep_undo, requantize=requantize)
    if Path(output).suffix != ".safetensors":
        fetch_side_files(parts_of(base)[0])
    for path in vectors.values():
        fetch_tokenizer(parts_of(path)[0])
    _check_tokenizer_side(tokenizer, given, new_rows)
    workers = open_workers(engine, Path(output), requantize=requantize, write_as=write_as != "checkpoint")
    checked = Recipe(recipe, input_names(vectors, slices), coefs, with_base=True)
    outputs = [Path(output), *([undo_path(Path(output))] if keep_undo else [])]
    for what, path in {"base": base, **{f"vectors.{name}": path for name, path in vectors.items()}}.items():
        for part in parts_of(path):
            protect(outputs, {what: part})
    protect(outputs, {f"a file of {recipe}": path for path in checked.files})
    for path, kind in zip(outputs, ("gguf" if output.endswith(".gguf") else "weights", "undo"), strict=False):
        check_own(path, kind)
    if write_as == "lora":
        _check_for_adapter(
            dtype=dtype,
            plan=plan,
            resume=resume,
            keep_undo=keep_undo,
            requantize=requantize,
            slices=slices,
            tokenizer=tokenizer,
            new_rows=new_rows != "error",
        )
        only = NameFilter(include, exclude)
        return compose_adapter(
            base, vectors, checked, Path(output), scaling_coef, rank=rank, key_map=key_map, only=only
        )
    if rank is not None:
        raise ValueError(f"rank={rank} is that of an adapter, and --as lora is not given. Add it, or leave rank out.")
    options = {"allow_other_base": allow_other_base, "key_map": key_map or {}} | NameFilter(include, exclude).options
    options |= {"slices": slices} if slices else {}
    options |= {"new_rows": new_rows} if new_rows != "error" else {}
    others = {"which": which, "allow_other_tokenizer": allow_other_tokenizer}
    opening = {"base": base, "vectors": vectors, "scaling_coef": scaling_coef, "dtype": dtype, **others, **options}
    composer = Composer.open(recipe=checked, **opening)
    if requantize and (slices or new_rows != "error"):
        raise ValueError("requantize keeps the base's tensors, which slices and new_rows change. Leave one out.")
    quantizer = requantizer(composer) if requantize else None
    options |= {"requantize": True} if requantize else {}
    layout = quantizer.layout() if quantizer else composer.layout()
    kind = _kind(composer, allow_other_kind)
    beside = Beside(composer, given, slices, tokenizer)
    shard_bytes = parse_bytes(max_shard_size, "max_shard_size")
    if plan:
        kept, need = composer.statistics, composer.need()
        made = make_plan(composer.base, composer.layout(), composer.sources, checked, scaling_coef, kept, need)
        made = dataclasses.replace(made, write_bytes=sum(spec.num_bytes for spec in layout.values()))
        return made if workers is None else spread_plan(made, composer, shard_bytes, workers)

    if keep_undo:
        _prepare_undo(keep_undo, composer, slices)
    composer.fit_into(max_memory)
    if Path(output).suffix == SUFFIX or (quantizer and is_gguf(composer.base)):
        return _write_gguf(composer, quantizer, Path(output), started, resume)
    record = _record(composer, base, vectors, options)
    metadata = {"format": "pt", **record.metadata(), **({KEY: kind} if kind else {}), **composer.tied}
    job = {key: value for key, value in metadata.items() if key != "tva.version"}
    inputs = (base, *record.vectors.values(), *checked.files)
    job |= {"max_shard_size": shard_bytes, "inputs": [_stamp(part) for path in inputs for part in parts_of(path)]}
    job |= {"tokenizer": tokenizer} if tokenizer else {}
    found = find(parts_of(base)[0])
    stem, parts = weights_stem(found), part_of_names(found)
    with Output(Path(output), layout, metadata, job, shard_bytes, resume, stem, parts, format == "dcp") as out:
        sink = quantizer.into(out) if quantizer else out
        resumed = len(sink.done)
        if workers is None:
            composer.run(sink)
        else:
            compose_shards(composer, out, workers, opening)
        for source in composer.sources.values():
            source.check_content()
        composer.check()
        record = _with_fingerprints(record, composer)
        undo = _write_undo(out, composer, record, found, keep_undo) if keep_undo else None
        files, left_out = beside.files()
        out.commit(record.metadata(), files)
    return ComposeReport(
        Path(output),
        composer.fingerprint("base"),
        composer.fingerprint("edited"),
        out.size,
        time.monotonic() - started,
        resumed,
        composer.effects(),
        _notes(composer, left_out if Path(output).is_dir() else [])
        + beside.notes
        + ([quantizer.note()] if quantizer else []),
        undo,
        undo.stat().st_size if undo else 0,
    )


def _write_gguf(
    composer: Composer, quantizer: Requantized | None, output: Path, started: float, resume: bool
) -> ComposeReport:
    if resume:
        raise ValueError(f"{output} is a GGUF file, of which nothing is kept after an interruption. Leave resume out.")
    out = GgufOutput(output, composer.base, quantizer)
    with out.writing():
        composer.run(out.sink)
        for source in composer.sources.values():
            source.check_content()
        composer.check()
    size = output.stat().st_size
    base, edited = composer.fingerprint("base"), composer.fingerprint("edited")
    seconds, notes = time.monotonic() - started, [*_notes(composer, []), out.note()]
    return ComposeReport(output, base, edited, size, seconds, effects=composer.effects(), notes=notes)


def _check_output(output: str, scaling_coef: float) -> None:
    if Path(output).suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise ValueError(f"output must end in .safetensors, or name a folder; found {output!r}.")
    if not math.isfinite(scaling_coef):
        raise ValueError(f"scaling_coef must be a finite number; found {scaling_coef}.")


def _check_for_adapter(**options: object) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise ValueError(f"An adapter is written without {', '.join(given)}: leave {given[0]} out, or --as lora.")


def _check_tokenizer_side(tokenizer: str, given: Mapping[str, str], new_rows: str) -> None:
    if tokenizer and tokenizer not in given:
        raise ValueError(f"tokenizer must name an input, {some(given)}; found {tokenizer!r}.")
    if new_rows not in get_args(NewRows):
        raise ValueError(f"new_rows must be one of {', '.join(get_args(NewRows))}; found {new_rows!r}.")


def _kind(composer: Composer, allow_other_kind: bool) -> str | None:
    """Return the kind that all vectors have; None for ordinary networks, and for a mixture that is meant."""
    kinds = {name: source.origin.kind for name, source in composer.sources.items()}
    if allow_other_kind and len(set(kinds.values())) > 1:
        kinds = {}
    return check_kinds(kinds, "pass allow_other_kind if the mixture is meant")


def _record(composer: Composer, base: str, vectors: Mapping[str, str], options: Mapping[str, Any]) -> Record:
    """Return the record of an edit that is not made yet: its fingerprints are unknown."""
    recipe, sources = composer.recipe, composer.sources
    return Record(
        recipe=recipe.text,
        coefs=recipe.coefs,
        scaling_coef=composer.scaling_coef,
        dtype=composer.dtype or "",
        base=base,
        vectors={name: vectors[name] for name in used_inputs(recipe.vectors, options.get("slices"), vectors)},
        options={**options, "which": {name: source.weights.info.which for name, source in sources.items()}},
        vector_fingerprints=dict.fromkeys(sources, UNKNOWN),
        file_fingerprints=dict.fromkeys(recipe.files, UNKNOWN),
    )


def _with_fingerprints(record: Record, composer: Composer) -> Record:
    return dataclasses.replace(
        record,
        vector_fingerprints=composer.vector_fingerprints(),
        file_fingerprints={path: file.fingerprint().digest for path, file in composer.recipe.files.items()},
        base_fingerprint=composer.fingerprint("base").digest,
        edited_fingerprint=composer.fingerprint("edited").digest,
    )


def _notes(composer: Composer, left_out: list[str]) -> list[str]:
    """Return what was decided in reading, and what was not edited or carried though it is there."""
    infos = [opened.info for opened in (composer.base, *(source.weights for source in composer.sources.values()))]
    notes = [str(info) for info in infos if info.notes or info.which != "as stored"]
    for path, names in composer.differing().items():
        notes.append(
            f"{path}: {len(names)} tensors of integers or booleans differ from the base's, which are kept: "
            f"{some(names)}"
        )
    if left_out:
        notes.append(f"{composer.base.path}: not carried along: {some(left_out)}")
    return notes


def _prepare_undo(keep_undo: bool | str, composer: Composer, slices: Slices | None) -> None:
    if slices or composer.more_rows:
        what = "slices" if slices else "new rows"
        raise ValueError(f"keep_undo restores a base of the output's shapes, which {what} change. Leave one out.")
    load_torch()  # which undo files take, and so the memory that is left
    base = composer.base
    if composer.quantized or composer.dequantizes:
        raise ValueError(
            f"keep_undo cannot restore {base.path}, which is quantized: the undo file would restore its dequantized "
            f"weights. Keep the base, and leave keep_undo out."
        )
    composer.beside = BYTES_HELD * max((base.spec(name).itemsize for name in base), default=0)
    _check_undo(keep_undo, composer.sources)


def _write_undo(out: Output, composer: Composer, record: Record, base: Path, keep_undo: bool | str) -> Path:
    path = undo_path(out.path)
    folder = base if base.is_dir() else None
    config = (folder / "config.json").read_text() if folder and (folder / "config.json").is_file() else ""
    back = composer.back(out.weights(), with_vectors=keep_undo == "with_vectors")
    write_undo(out.beside(path), composer.base, back, record, config)
    return path


def _check_undo(keep_undo: bool | str, sources: Mapping[str, LazyTaskVector]) -> None:
    checkpoints = [name for name, source in sources.items() if source.is_checkpoint]
    if keep_undo == "with_vectors" and checkpoints:
        raise ValueError(
            f"keep_undo='with_vectors' needs task vector files, and {some(checkpoints)} are fine-tuned checkpoints, "
            f"whose deltas are not known without the base. Give task vector files, or keep_undo only."
        )


def write_undo(path: Path, base: LazyWeights, back: Composer, record: Record, config: str = "") -> int:
    """Write the undo file of an edit; base and edited weights are read once more for it.

    Args:
        path: Where to write.
        base: The base.
        back: What predicts the base; see `Composer.back`.
        record: Of the edit.
        config: The base's ``config.json``, if it has one.

    Returns:
        Its size in bytes.
    """
    facts = {"tva.undo_config": config, "tva.undo_with_vectors": json.dumps(bool(back.sources))}
    with UndoFile(path, base, back.chunk, record, facts) as undo:
        back.run(undo)
    return undo.num_bytes


def _stamp(path: str) -> list[tuple[str, int, int]]:
    """Note size and time of an input's files, by which a resumed run knows that they are the same."""
    found = find(path)
    files = sorted(found.rglob("*")) if found.is_dir() else [found]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
