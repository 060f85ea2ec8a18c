"""Where a task vector comes from, as a value and as the header of its file."""

import json
import os
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tva.checkpoints import Fingerprint, LazyWeights, read_metadata
from tva.checkpoints.foreign import parse_json
from tva.version import __version__

FORMAT = "task_vector/1"
SUFFIX = ".tv.safetensors"
FORMS: dict[str, Any] = {  # of the fields that are JSON; see `tva.checkpoints.foreign.check_form`
    "base_tensors": {str: str},
    "step": (int, None),
    "epoch": (int, None),
    "averaged": (bool, None),
    "since_step": (int, None),
    "metrics": {str: (float, None)},
    "hyperparameters": dict,
    "training_data": {"num_examples": int, "rows": str, "drawn": dict},
    "untouched": {str: [str]},
    "buffers": [str],
}


@dataclass(frozen=True)
class TrainingData:
    """Which examples a model was fine-tuned on, so that an edit notices where it is proved on the same.

    Attributes:
        num_examples: How many.
        rows: Of a random sample of them, the hashes of their inputs as evaluation reads them, 16 hexadecimal digits
            each; see `tva.evaluation.leaks`.
        drawn: How they were drawn: splits, ``val_size``, ``seed``, ``limit_train``.
    """

    num_examples: int
    rows: str
    drawn: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """Where a task vector comes from; every part is optional, and sums keep only what their terms share.

    Attributes:
        base: Fingerprint of the base model's whole state dict.
        finetuned: Digest of the fine-tuned state dict's fingerprint.
        task: Name of the task.
        step: Optimizer steps at the checkpoint.
        epoch: Epochs at the checkpoint.
        averaged: Whether the weights were averaged (EMA, SWA) rather than raw.
        weights: Which weights the run was asked for: ``"checkpoint"``, ``"raw"`` or ``"averaged"``.
        run: Identifies the run, through interruptions and resumptions.
        kind: ``"tangent"`` for a vector of a linearized network; None for an ordinary network's.
        since_step: Optimizer steps at the weights that take the base's place, in a vector against the previous one.
        metrics: Metrics monitored when the checkpoint was written.
        hyperparameters: Hyperparameters of the run, JSON values only.
        training_data: What it was trained on, where the data module can tell.
        head: Digest of what determines the head that it was trained under, where the model can tell.
    """

    base: Fingerprint | None = None
    finetuned: str | None = None
    task: str | None = None
    step: int | None = None
    epoch: int | None = None
    averaged: bool | None = None
    weights: str | None = None
    run: str | None = None
    kind: str | None = None
    since_step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    training_data: TrainingData | None = None
    head: str | None = None


def vector_header(
    origin: Origin, buffers: Collection[str], untouched: Mapping[str, str], norm: float | None = None
) -> dict[str, str]:
    """Return the header of a task vector file.

    Args:
        origin: Where the vector comes from.
        buffers: Names of the running statistics that it moves.
        untouched: Names that it does not move, each with the reason.
        norm: Euclidean norm over all its parameters, so that it can be listed without reading it; six digits are kept.

    Returns:
        Text by key, for the metadata of a safetensors file.
    """
    reasons: dict[str, list[str]] = {}
    for name, reason in untouched.items():
        reasons.setdefault(reason, []).append(name)
    facts: dict[str, Any] = {
        "base_fingerprint": origin.base.digest if origin.base else None,
        "base_tensors": dict(origin.base.tensors) if origin.base else None,
        "finetuned_fingerprint": origin.finetuned,
        "task": origin.task,
        "step": origin.step,
        "epoch": origin.epoch,
        "averaged": origin.averaged,
        "weights": origin.weights,
        "run": origin.run,
        "kind": origin.kind,
        "since_step": origin.since_step,
        "metrics": dict(origin.metrics),
        "hyperparameters": dict(origin.hyperparameters),
        "training_data": asdict(origin.training_data) if origin.training_data else None,
        "head": origin.head,
        "buffers": list(buffers),
        "untouched": reasons,
        "encoding": "dense",
        "norm": None if norm is None else float(f"{norm:.6g}"),
        "version": __version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    header = {
        f"tva.{key}": value if isinstance(value, str) else json.dumps(value)
        for key, value in facts.items()
        if value is not None
    }
    return {"tva.format": FORMAT, **header}


def _training_data(found: Mapping[str, Any], path: Path) -> TrainingData | None:
    if not found:
        return None
    rows, num_examples = found.get("rows", ""), found.get("num_examples", 0)
    if num_examples < 1 or not re.fullmatch("(?:[0-9a-f]{16})+", rows):
        raise ValueError(
            f"{path} is damaged: its tva.training_data must hold how many examples were trained on, and hashes of 16 "
            f"digits each. Take an undamaged copy."
        )
    return TrainingData(num_examples, rows, found.get("drawn", {}))


def is_vector_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a task vector file rather than a checkpoint, by its header."""
    return str(path).endswith(".safetensors") and "tva.format" in read_metadata(path)


def read_origin(weights: LazyWeights) -> tuple[Origin, set[str], dict[str, str]]:
    """Read the header of a task vector file, and none of its tensors.

    Args:
        weights: The opened file.

    Returns:
        Where the vector comes from; the names of its buffers; and the names it does not move, each with the reason.

    Raises:
        ValueError: It is not a task vector file, or one of a later format.
    """
    header = {key.removeprefix("tva."): value for key, value in weights.metadata.items() if key.startswith("tva.")}
    if "format" not in header:
        raise ValueError(
            f"{weights.path} is a checkpoint, not a task vector file: its header has no 'tva.format'. Take the "
            f"difference to its base first: TaskVector.between(base, open_weights({str(weights.path)!r}))."
        )
    if header["format"] != FORMAT or (header.get("encoding") != "dense" and "encoded" not in header):
        raise ValueError(
            f"{weights.path} has format {header['format']!r} with encoding {header.get('encoding')!r}, and this "
            f"version of tva reads {FORMAT!r} with encoding 'dense'. Update tva."
        )

    def fact(key: str, default: Any = None) -> Any:
        return parse_json(header[key], f"{weights.path}: tva.{key}", FORMS[key]) if key in header else default

    digest = header.get("base_fingerprint")
    origin = Origin(
        base=Fingerprint(digest, fact("base_tensors", {})) if digest else None,
        finetuned=header.get("finetuned_fingerprint"),
        task=header.get("task"),
        step=fact("step"),
        epoch=fact("epoch"),
        averaged=fact("averaged"),
        weights=header.get("weights"),
        run=header.get("run"),
        kind=header.get("kind"),
        since_step=fact("since_step"),
        metrics=fact("metrics", {}),
        hyperparameters=fact("hyperparameters", {}),
        training_data=_training_data(fact("training_data", {}), weights.path),
        head=header.get("head"),
    )
    untouched = {name: reason for reason, names in fact("untouched", {}).items() for name in names}
    return origin, set(fact("buffers", [])), untouched
