"""Compare task vectors on disk without loading them whole: angles, sign conflicts and norms."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from tva.checkpoints import HashedWeights, NameFilter, open_weights
from tva.checkpoints.lazy import Which
from tva.errors import MismatchError, some
from tva.layers import in_layer_order
from tva.vectors.geometry import Sums, measure, total
from tva.vectors.inspect import By, grouping
from tva.vectors.lazy import LazyTaskVector, labels, open_vector

MOST_PAIRS = 6  # that are named in one line


@dataclass
class PairwiseStatistics:
    """Angles, sign conflicts and norms of vectors over some tensors; rows and columns are in the order of the vectors.

    Attributes:
        norms: Of each.
        cosines: Of every pair, in [-1, 1]; NaN where one is zero.
        conflicts: For every pair the share of opposite signs, among the elements that are not zero in either.
    """

    norms: list[float]
    cosines: list[list[float]]
    conflicts: list[list[float]]

    @classmethod
    def of(cls, sums: Sums) -> PairwiseStatistics:
        """Return the statistics of sums."""
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
    whole: PairwiseStatistics
    by: str | None
    groups: dict[str, PairwiseStatistics]
    not_finite: list[str]
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        pairs = itertools.combinations(enumerate(self.names), 2)
        found = [f"{a}, {b} {self.whole.cosines[i][j]:.3g}" for (i, a), (j, b) in itertools.islice(pairs, MOST_PAIRS)]
        return f"Compared({len(self.names)} vectors; cosines {'; '.join(found)}{' …' if next(pairs, None) else ''})"

    def _repr_html_(self) -> str:
        """Show it in a notebook: norms, and the matrices of cosines and of sign conflicts."""
        from tva.report.notebook import compared_cell

        return compared_cell(list(self.names), self.whole.norms, self.whole.cosines, self.whole.conflicts, self.base)


def compare(
    vectors: Sequence[str | os.PathLike[str]],
    base: str | os.PathLike[str] | None = None,
    by: By | None = None,
    allow_other_base: bool = False,
    key_map: dict[str, str] | None = None,
    which: Which = "checkpoint",
    include: list[str] | str | None = None,
    exclude: list[str] | str | None = None,
) -> Compared:
    """Compare task vectors: norms, the cosine of every pair and the share of signs on which two disagree.

    Args:
        vectors: Task vector files of one base; with ``base``, also fine-tuned checkpoints of it.
        base: Checkpoint of the base model.
        by: Compare within each ``layer``, ``group`` (the first two parts of the tensors' names) or ``tensor`` too.
        allow_other_base: Also compare vectors of different bases; their names and shapes must be equal.
        key_map: Regular expressions to replacements, for checkpoints whose names differ from the base's by more than
            one prefix.
        which: Which weights of Lightning checkpoints that a weight-averaging callback has written: ``raw`` or
            ``averaged``; ``checkpoint`` is what Lightning loads.
        include: Regular expressions that are searched for in the names of tensors; only tensors that match are used.
        exclude: Regular expressions of names to leave out, of the base and of vectors and checkpoints.

    Returns:
        The matrices. Running statistics do not count.

    Raises:
        MismatchError: Vectors are of different bases or architectures.
        ValueError: There are fewer than two, one is neither vector nor checkpoint, or a checkpoint comes without base.
    """
    group_of = grouping(by) if by is not None else lambda name: ""
    paths = [os.fspath(path) for path in vectors]
    if len(paths) < 2:
        raise ValueError(f"Give at least two vectors to compare; got {len(paths)}.")
    twice = [path for path in dict.fromkeys(paths) if paths.count(path) > 1]
    if twice:
        raise ValueError(f"Vectors must differ to be compared; {some(twice)} was given more than once. Leave it out.")
    opened_base = None if base is None else HashedWeights(open_weights(base))
    only = NameFilter(include, exclude)
    options = {"allow_other_base": allow_other_base, "key_map": key_map, "which": which, "only": only}
    opened = [open_vector(path, opened_base, **options) for path in paths]
    only.check_used()
    opened = [opened[0], *(vector.matched_to(opened[0]) for vector in opened[1:])]
    bases = _check_alike(opened, allow_other_base)
    groups = measure([vector.deltas for vector in opened], group_of)
    for vector in opened:
        vector.check_content()
    whole = total(groups.values(), len(opened))
    names = labels(paths, [vector.origin.task for vector in opened])
    return Compared(
        dict(zip(names, paths, strict=True)),
        bases.pop() if len(bases) == 1 else None,
        whole.elements,
        PairwiseStatistics.of(whole),
        by,
        {name: PairwiseStatistics.of(groups[name]) for name in in_layer_order(groups)} if by is not None else {},
        [name for name, count in zip(names, whole.not_finite.tolist(), strict=True) if count],
        [str(vector.weights.info) for vector in opened if vector.weights.info.notes],
    )


def _check_alike(vectors: Sequence[LazyTaskVector], allow_other_base: bool) -> set[str]:
    """Check that vectors are of one base and have the same names; gives the digests of their bases."""
    first = vectors[0]
    for other in vectors[1:]:
        mine, theirs = first.origin.base, other.origin.base
        if mine and theirs and mine.digest != theirs.digest and not allow_other_base:
            raise MismatchError(
                f"Vectors must be taken from one base to be compared, but {first.path} comes from base {mine.digest} "
                f"and {other.path} from base {theirs.digest}: {mine.num_different(theirs.tensors)} of "
                f"{len(mine.tensors.keys() | theirs.tensors.keys())} tensors differ. Leave one out, or give "
                f"--allow_other_base."
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
