"""Take a task vector from two checkpoints on disk, a chunk at a time: the file that training would have written."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from tva._torch import load_torch, torch
from tva.checkpoints import NameFilter, check_own, dequantized_entries, open_weights, protect
from tva.checkpoints.lazy import Which
from tva.sizes import check_memory
from tva.vectors.extract_adapter import ExtractedAdapter, extract_adapter
from tva.vectors.header import SUFFIX, Origin, is_vector_file
from tva.vectors.lazy import LazyTaskVector
from tva.vectors.write import TensorSource, VectorPlan, emit


@dataclass
class Extracted:
    """What `extract` wrote.

    Attributes:
        output: The task vector file.
        task: The name in it.
        base: Digest of the base's fingerprint.
        finetuned: Digest of the fine-tuned weights' fingerprint.
        norm: Euclidean norm over all parameters.
        num_bytes: Size of the file.
        moved: Tensors that the vector moves, running statistics among them.
        untouched: For each reason (``frozen``, ``integer``) how many tensors it does not move.
        seconds: Wall time.
        notes: What was decided in reading the inputs: prefixes stripped, parts left out.
    """

    output: Path
    task: str
    base: str
    finetuned: str
    norm: float
    num_bytes: int
    moved: int
    untouched: dict[str, int]
    seconds: float
    notes: list[str] = field(default_factory=list)


def extract(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    task: str | None = None,
    key_map: dict[str, str] | None = None,
    which: Which = "checkpoint",
    include: list[str] | str | None = None,
    exclude: list[str] | str | None = None,
    rank: int | None = None,
    max_memory: str | None = None,
) -> Extracted | ExtractedAdapter:
    """Write the task vector from a base to its fine-tuned checkpoint, without loading either of them whole.

    The tensors in the file are bit for bit those of ``TaskVector.between(base, finetuned).save(output)``; where a side
    is quantized, rounded to float32.

    Args:
        base: Checkpoint of the base model, in any format that `tva.open_weights` reads.
        finetuned: Checkpoint of the fine-tuned model in any such format, or the folder of a PEFT LoRA adapter.
        output: The task vector file; its name ends in ``.safetensors``, preferably in ``.tv.safetensors``.
        task: Name of the task, for the header; by default the output's name without its ending.
        key_map: Regular expressions to replacements, for names of the fine-tuned checkpoint that differ from the
            base's by more than one prefix.
        which: Which weights of a fine-tuned Lightning checkpoint that a weight-averaging callback has written: ``raw``
            or ``averaged``; ``checkpoint`` is what Lightning loads.
        include: Regular expressions that are searched for in the names of tensors; only tensors that match are used.
        exclude: Regular expressions of names to leave out, of the base and of the fine-tuned checkpoint, such as
            ``^classifier[.]``; the vector lists the base's as excluded.
        rank: Write a PEFT LoRA adapter of at most this rank instead, into the folder ``output``, and print its error.
        max_memory: Limit on the anonymous memory of this process, such as ``512MiB``; pages of mapped files do not
            count. If the data that is needed at once does not fit, it is an error.

    Returns:
        What was written.

    Raises:
        MismatchError: Keys or shapes differ.
        NoEffectError: The checkpoints are alike.
        ValueError: The output is not named ``*.safetensors``, or for an adapter not a new folder; an input is not a
            checkpoint or is a task vector already; or a delta is NaN or infinite.
        OSError: A file cannot be read, or there is no room for the output.
    """
    started = time.monotonic()
    base, finetuned, output = os.fspath(base), os.fspath(finetuned), os.fspath(output)
    if rank is None and not output.endswith(".safetensors"):
        raise ValueError(f"A task vector file's name must end in .safetensors, best in {SUFFIX}; found {output!r}.")
    protect([output], {"base": base, "finetuned": finetuned})
    check_own(output, "vector")
    _check_checkpoints(base=base, finetuned=finetuned)
    only = NameFilter(include, exclude)
    if rank is not None:
        others = {"key_map": key_map, "which": which, "only": only, "max_memory": max_memory}
        return extract_adapter(base, finetuned, Path(output), rank, **others)
    weights = open_weights(base)
    source = LazyTaskVector(finetuned, weights, key_map=key_map, which=which, only=only)
    only.check_used()
    moved = source.weights
    if which != "checkpoint" and moved.info.which != which:
        raise ValueError(f"which={which!r}: {finetuned} does not hold both raw and averaged weights. Leave it out.")
    averaged = {"averaged": True, "raw": False}.get(moved.info.which)
    task = task or Path(output).name.removesuffix(".safetensors").removesuffix(".tv")
    entries = {name: (moved if name in moved else weights).entry(name) for name in weights}
    sources = {name: TensorSource.stored(entry) for name, entry in entries.items()}
    # Dequantized weights are float64 for exact sums, which no file needs to keep.
    dtype = torch.float32 if dequantized_entries(weights) or dequantized_entries(moved) else None
    plan = VectorPlan(weights, None, sources, exclude=source.untouched, must_move=True, dtype=dtype)
    origin = Origin(task=task, averaged=averaged, weights=which, kind=source.origin.kind)
    if max_memory is not None:
        load_torch()  # whose memory counts
        most = max(plan.order, key=plan.held_bytes, default="")
        check_memory(plan.held_bytes(most) if most else 0, max_memory, f"the largest tensor, {most!r},")
    try:
        emitted = emit(plan, Path(output), origin, doing="extracting")
    except ValueError as error:
        raise type(error)(f"{finetuned} against the base {base}: {error}") from error
    reasons = sorted(emitted.untouched.values())
    return Extracted(
        Path(output),
        task,
        emitted.origin.base.digest,
        emitted.finetuned.digest,
        emitted.norm,
        Path(output).stat().st_size,
        len(weights) - len(reasons),
        {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
        time.monotonic() - started,
        [str(info) for info in (weights.info, moved.info) if info.notes or info.which != "as stored"],
    )


def _check_checkpoints(**paths: str) -> None:
    for flag, path in paths.items():
        if is_vector_file(path):
            raise ValueError(
                f"{flag} must be a checkpoint, and {path} is a task vector file already. Take two checkpoints; "
                f"'tva inspect {path}' shows what is in it."
            )
