"""Inspect task vectors and checkpoints on disk without loading them whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tva.arithmetic import is_edited
from tva.checkpoints import HashedWeights, open_weights
from tva.checkpoints.lazy import as_real
from tva.console import counted
from tva.errors import some
from tva.layers import block_of, in_layer_order
from tva.vectors.geometry import Sums, measure, total
from tva.vectors.lazy import header_facts, open_vector, size_of, stored

By = Literal["group", "layer", "tensor"]


GROUPINGS: dict[str, Callable[[str], str]] = {
    "group": lambda name: ".".join(name.split(".")[:2]),
    "layer": block_of,
    "tensor": lambda name: name,
}


def grouping(by: str) -> Callable[[str], str]:
    if by not in GROUPINGS:
        raise ValueError(f"by must be one of {', '.join(GROUPINGS)}; found {by!r}.")
    return GROUPINGS[by]


@dataclass
class GroupSummary:
    """A group of tensors of one vector or checkpoint.

    Attributes:
        tensors: How many.
        elements: In all of them.
        norm: Euclidean norm.
        zeros: Share of the elements that are exactly zero, in [0, 1].
        largest: Largest magnitude.
        not_finite: Elements that are NaN or infinite.
    """

    tensors: int
    elements: int
    norm: float
    zeros: float
    largest: float
    not_finite: int

    @classmethod
    def of(cls, sums: Sums) -> GroupSummary:
        """Return the summary of one vector's sums."""
        zeros = sums.elements - int(sums.both[0, 0]) - int(sums.not_finite[0])
        return cls(
            sums.tensors,
            sums.elements,
            sums.norms()[0],
            zeros / sums.elements if sums.elements else 0.0,
            float(sums.largest[0]),
            int(sums.not_finite[0]),
        )


@dataclass
class Inspection:
    """What `inspect` found.

    Attributes:
        path: The file or folder.
        kind: ``"task vector"``, or the checkpoint's format.
        facts: What the header says; of a checkpoint also its fingerprint.
        num_bytes: Size on disk.
        whole: All parameters (of a checkpoint all floating tensors) together.
        by: What the groups are.
        groups: Each group.
        buffers: Running statistics that a task vector moves, kept apart from the above; None if there are none.
        untouched: For each reason the names of the tensors that a task vector does not move.
        notes: What was decided in reading it.
    """

    path: str
    kind: str
    facts: dict[str, Any]
    num_bytes: int
    whole: GroupSummary
    by: str
    groups: dict[str, GroupSummary]
    buffers: GroupSummary | None = None
    untouched: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Inspection({self.path}: {self.kind}, {self.whole.tensors} tensors, norm {self.whole.norm:.4g})"

    def _repr_html_(self) -> str:
        """Show it in a notebook: the header, and norms by group."""
        from tva.report.notebook import inspected_cell

        sums = [("all", self.whole)] + ([("running statistics, apart", self.buffers)] if self.buffers else [])
        return inspected_cell(self.path, self.kind, self.fact_texts(), self.by, self.groups, sums, self.notes)

    def fact_texts(self) -> dict[str, str]:
        """Return the facts as text, with the tensors that a task vector does not move by their reason."""
        facts = {key: text for key, value in self.facts.items() if (text := _fact_text(value))}
        for reason, names in self.untouched.items():
            facts[reason] = f"{counted(len(names), 'tensor')}: {some(names)}"
        return facts


def _fact_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {text}" for key, part in value.items() if (text := _fact_text(part)))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def inspect(path: str | os.PathLike[str], by: By = "group") -> Inspection:
    """Inspect a task vector file, or any checkpoint, without loading it whole.

    Args:
        path: A task vector file, or a checkpoint in any format that `tva.open_weights` reads.
        by: What the norms are listed by: ``group`` (the first two parts of the tensors' names), ``layer`` or
            ``tensor``.

    Returns:
        Its header, and norm, share of zeros and largest magnitude of every group.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: It is neither a task vector file nor a checkpoint, or ``by`` is none of these.
    """
    group_of = grouping(by)
    path = os.fspath(path)
    weights, vector = open_weights(path), None
    if "tva.format" in weights.metadata:
        vector = open_vector(path)
        kind, facts, parts = "task vector", header_facts(vector), vector.deltas
        if lacking := sorted(vector.buffers - vector.weights.keys()):
            raise ValueError(
                f"{path} is damaged: its header lists the buffers {some(lacking)}, which it does not hold. Take an "
                f"undamaged copy, or write it again from its source."
            )
        buffers = {name: stored(vector.weights.entry(name)) for name in vector.buffers}
        reasons: dict[str, list[str]] = {}
        for name, reason in vector.untouched.items():
            reasons.setdefault(reason, []).append(name)
    else:
        kind, buffers = weights.info.format, {}
        facts = {"fingerprint": HashedWeights(weights).fingerprint().digest, **_parsed(weights.metadata)}
        numbers = as_real(weights)
        parts = {name: stored(numbers.entry(name)) for name in numbers if is_edited(numbers.spec(name))}
        reasons = {"integer": [name for name in weights if name not in parts]} if len(parts) < len(weights) else {}
    groups = measure([parts], group_of)
    if vector is not None:
        vector.check_content()
    groups = {name: groups[name] for name in in_layer_order(groups)}
    return Inspection(
        path,
        kind,
        facts,
        size_of(weights.path),
        GroupSummary.of(total(groups.values(), 1)),
        by,
        {name: GroupSummary.of(sums) for name, sums in groups.items()},
        GroupSummary.of(total(measure([buffers]).values(), 1)) if buffers else None,
        reasons,
        list(weights.info.notes),
    )


def _parsed(metadata: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for key, text in metadata.items():
        if key.startswith("tva.") and text:
            try:
                found[key.removeprefix("tva.")] = json.loads(text)
            except (ValueError, RecursionError):
                found[key.removeprefix("tva.")] = text
    return found
