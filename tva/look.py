"""Look at task vectors on disk: what one holds, and how several lie to each other. Nothing is held whole."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tva.geometry import Sums, measure, total
from tva.groups import block_of, in_layer_order
from tva.state_dict import MismatchError, is_edited, some
from tva.vectors import Base, Vector, header_facts, labels, open_vector, size_of, stored
from tva.weights import fingerprint, open_weights
from tva.weights.torch_files import Which

MOST_PAIRS = 6  # that are named in one line
By = Literal["group", "layer", "tensor"]
GROUPINGS: dict[str, Callable[[str], str]] = {
    "group": lambda name: ".".join(name.split(".")[:2]),
    "layer": block_of,
    "tensor": lambda name: name,
}


def _grouping(by: str) -> Callable[[str], str]:
    if by not in GROUPINGS:
        raise ValueError(f"by must be one of {', '.join(GROUPINGS)}; found {by!r}.")
    return GROUPINGS[by]


# --- one vector


@dataclass
class Row:
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
    def of(cls, sums: Sums) -> Row:
        """Take it from the sums of one vector."""
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
    whole: Row
    by: str
    groups: dict[str, Row]
    buffers: Row | None = None
    untouched: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def inspect(path: str, by: By = "group") -> Inspection:
    """Tell what a task vector file, or any checkpoint, holds.

    Args:
        path: A task vector file, or a checkpoint in any format that `tva.open_weights` reads.
        by: What the norms are listed by: ``group`` (the first two parts of the tensors' names), ``layer`` or
            ``tensor``.

    Returns:
        Its header, and norm, share of zeros and largest magnitude of every group.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is neither a task vector file nor a checkpoint, or ``by`` is none of these.
    """
    grouping = _grouping(by)
    weights = open_weights(path)
    if "tva.format" in weights.metadata:
        vector = open_vector(path)
        kind, facts, parts = "task vector", header_facts(vector), vector.parts
        buffers = {name: stored(weights.entry(name)) for name in vector.buffers}
        reasons: dict[str, list[str]] = {}
        for name, reason in vector.untouched.items():
            reasons.setdefault(reason, []).append(name)
    else:
        kind, buffers = weights.info.format, {}
        facts = {"fingerprint": fingerprint(weights).digest, **_parsed(weights.metadata)}
        parts = {name: stored(weights.entry(name)) for name in weights if is_edited(weights.spec(name))}
        reasons = {"integer": [name for name in weights if name not in parts]} if len(parts) < len(weights) else {}
    groups = measure([parts], grouping)
    groups = {name: groups[name] for name in in_layer_order(groups)}
    return Inspection(
        path,
        kind,
        facts,
        size_of(weights.path),
        Row.of(total(groups.values(), 1)),
        by,
        {name: Row.of(sums) for name, sums in groups.items()},
        Row.of(total(measure([buffers]).values(), 1)) if buffers else None,
        reasons,
        list(weights.info.notes),
    )


def _parsed(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Give what tva has written into a checkpoint's header."""
    found = {}
    for key, text in metadata.items():
        if key.startswith("tva.") and text:
            try:
                found[key.removeprefix("tva.")] = json.loads(text)
            except ValueError:
                found[key.removeprefix("tva.")] = text
    return found


# --- several


@dataclass
class Pairs:
    """How vectors lie to each other over some tensors; rows and columns are in the order of the vectors.

    Attributes:
        norms: Of each.
        cosines: Of every pair, in [-1, 1]; NaN where one is zero.
        conflicts: For every pair the share of opposite signs, among the elements that are not zero in either.
    """

    norms: list[float]
    cosines: list[list[float]]
    conflicts: list[list[float]]

    @classmethod
    def of(cls, sums: Sums) -> Pairs:
        """Take it from sums."""
        return cls(sums.norms(), sums.cosines(), sums.conflicts())


@dataclass(repr=False)
class Compared:
    """What `compare` found.

    Attributes:
        names: Short name to path, of each vector.
        base: Digest of the base that they share; None if it is unknown or they do not.
        elements: Elements of the tensors that one of them moves.
        whole: Over all parameters.
        by: What the groups are; None if none were asked for.
        groups: Over the tensors of each group.
        not_finite: Names of vectors that hold NaN or infinity; all their numbers are NaN.
        notes: What was decided in reading them.
    """

    names: dict[str, str]
    base: str | None
    elements: int
    whole: Pairs
    by: str | None
    groups: dict[str, Pairs]
    not_finite: list[str]
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        pairs = itertools.combinations(enumerate(self.names), 2)
        found = [f"{a}, {b} {self.whole.cosines[i][j]:.3g}" for (i, a), (j, b) in itertools.islice(pairs, MOST_PAIRS)]
        return f"Compared({len(self.names)} vectors; cosines {'; '.join(found)}{' …' if next(pairs, None) else ''})"

    def _repr_html_(self) -> str:
        """Show it in a notebook: norms, and the matrices of cosines and of sign conflicts."""
        from tva.page.cells import compared_cell

        return compared_cell(list(self.names), self.whole.norms, self.whole.cosines, self.whole.conflicts, self.base)


def compare(
    vectors: list[str],
    base: str | None = None,
    by: By | None = None,
    allow_other_base: bool = False,
    key_map: dict[str, str] | None = None,
    which: Which = "checkpoint",
) -> Compared:
    """Compare task vectors: norms, the cosine of every pair and the share of signs on which two disagree.

    Args:
        vectors: Task vector files of one base; with ``base`` also its fine-tuned checkpoints.
        base: Checkpoint of the base model.
        by: Compare within each ``layer``, ``group`` (the first two parts of the tensors' names) or ``tensor`` too.
        allow_other_base: Compare vectors of different bases too; their names and shapes must be alike.
        key_map: Regular expressions to replacements, for checkpoints whose names differ from the base's by more than
            one prefix.
        which: Of Lightning checkpoints that a weight-averaging callback has written, the ``raw`` or ``averaged``
            weights; ``checkpoint`` is what Lightning loads.

    Returns:
        The matrices. Running statistics do not count.

    Raises:
        MismatchError: Vectors are of different bases or architectures.
        ValueError: There are fewer than two, one is neither vector nor checkpoint, or a checkpoint comes without base.
    """
    grouping = _grouping(by) if by is not None else lambda name: ""
    if len(vectors) < 2:
        raise ValueError(f"Two vectors or more can be compared; {len(vectors)} given.")
    twice = [path for path in dict.fromkeys(vectors) if vectors.count(path) > 1]
    if twice:
        raise ValueError(f"Vectors must differ to be compared; {some(twice)} was given more than once. Leave it out.")
    opened_base = None if base is None else Base(base)
    options = {"allow_other_base": allow_other_base, "key_map": key_map, "which": which}
    opened = [open_vector(path, opened_base, **options) for path in vectors]
    bases = _check_alike(opened, allow_other_base)
    groups = measure([vector.parts for vector in opened], grouping)
    whole = total(groups.values(), len(opened))
    names = labels(vectors, [vector.origin.task for vector in opened])
    return Compared(
        dict(zip(names, vectors, strict=True)),
        bases.pop() if len(bases) == 1 else None,
        whole.elements,
        Pairs.of(whole),
        by,
        {name: Pairs.of(groups[name]) for name in in_layer_order(groups)} if by is not None else {},
        [name for name, count in zip(names, whole.not_finite.tolist(), strict=True) if count],
        [str(vector.weights.info) for vector in opened if vector.weights.info.notes],
    )


def _check_alike(vectors: Sequence[Vector], allow_other_base: bool) -> set[str]:
    """Check that vectors are of one base and have the same names; gives the digests of their bases."""
    first = vectors[0]
    for other in vectors[1:]:
        mine, theirs = first.origin.base, other.origin.base
        if mine and theirs and mine.digest != theirs.digest and not allow_other_base:
            raise MismatchError(
                f"Vectors must be taken from one base to be compared, but {first.path} comes from base {mine.digest} "
                f"and {other.path} from base {theirs.digest}: {mine.num_different(theirs.tensors)} of "
                f"{len(mine.tensors)} tensors differ. Leave one out, or give --allow_other_base."
            )
        missing, extra = first.names - other.names, other.names - first.names
        if missing or extra:
            which = [f"{other.path} lacks {some(sorted(missing))}"] if missing else []
            which += [f"{first.path} lacks {some(sorted(extra))}"] if extra else []
            raise MismatchError(
                f"Vectors must be of one architecture to be compared, but {'; '.join(which)}. Compare vectors of one "
                f"model."
            )
    return {vector.origin.base.digest for vector in vectors if vector.origin.base}
