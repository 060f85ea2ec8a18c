"""Angles, sign conflicts and norms of task vectors, in memory or read from files in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tva._torch import Tensor, torch
from tva.errors import MismatchError, some
from tva.layers import block_of
from tva.vectors.task_vector import TaskVector

CHUNK = 2**18  # elements of all vectors together that are measured at once; as float64 they stay in the cache
LEAST_CHUNK = 2**12  # of one vector, however many there are


def blocks(names: Iterable[str]) -> dict[str, list[str]]:
    """Group tensor names by block, in order of appearance."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(block_of(name), []).append(name)
    return found


@dataclass(frozen=True)
class TensorReader:
    """One tensor of a vector, read in chunks.

    Attributes:
        length: Its elements.
        read: Returns the flattened elements from the first number to the second.
    """

    length: int
    read: Callable[[int, int], Tensor]


def readers_of(vector: TaskVector) -> dict[str, TensorReader]:
    """Return the parameters that a vector in memory moves."""

    def part(delta: Tensor) -> TensorReader:
        flat = delta.detach().cpu().reshape(-1)
        return TensorReader(len(flat), lambda start, stop: flat[start:stop])

    return {name: part(delta) for name, delta in vector.deltas.items()}


@dataclass
class Sums:
    """Sums over some tensors of k vectors; a tensor that a vector does not move is zero in it.

    Attributes:
        dots: Inner products, float64 [k, k].
        both: Elements that are not zero in either of two, int64 [k, k]; on the diagonal those of one vector.
        opposite: Of these, those whose signs differ, int64 [k, k].
        largest: Largest magnitude, float64 [k].
        not_finite: Elements that are NaN or infinite, int64 [k].
        tensors: Tensors that one of the vectors moves.
        elements: Their elements.
    """

    dots: Tensor
    both: Tensor
    opposite: Tensor
    largest: Tensor
    not_finite: Tensor
    tensors: int = 0
    elements: int = 0

    @classmethod
    def of(cls, count: int) -> Sums:
        """Start with nothing for some number of vectors."""
        square, line = (count, count), (count,)
        return cls(
            torch.zeros(square, dtype=torch.float64),
            torch.zeros(square, dtype=torch.int64),
            torch.zeros(square, dtype=torch.int64),
            torch.zeros(line, dtype=torch.float64),
            torch.zeros(line, dtype=torch.int64),
        )

    def add(self, rows: Tensor, which: Tensor) -> None:
        """Count one chunk of some of the vectors in, float64 [len(which), elements]."""
        if not rows.numel():
            return
        square = which[:, None], which[None, :]
        dots = rows @ rows.T
        self.dots[square] += dots
        low, high = torch.aminmax(rows, dim=1)
        self.largest[which] = torch.maximum(self.largest[which], torch.maximum(-low, high))
        signs = rows.sign().float()  # counts below 2**24 are exact in float32
        if not bool(dots.isfinite().all()):
            strange = ~rows.isfinite()
            signs.masked_fill_(strange, 0.0)
            self.not_finite[which] += strange.sum(1)
        agree = signs @ signs.T
        both = signs.abs_() @ signs.T
        self.both[square] += both.long()
        self.opposite[square] += ((both - agree) / 2).long()

    def norms(self) -> list[float]:
        """Return the Euclidean norms."""
        return self.dots.diagonal().sqrt().tolist()

    def cosines(self) -> list[list[float]]:
        """Return the cosine of every pair, in [-1, 1]; NaN where a vector is zero."""
        squares = self.dots.diagonal()
        norms = squares.sqrt()
        cosines = (self.dots / torch.outer(norms, norms)).clamp(-1.0, 1.0)
        cosines.diagonal().copy_(squares / squares)  # 1, where rounding of the roots may give 0.9999999999999998
        return cosines.tolist()

    def conflicts(self) -> list[list[float]]:
        """Return for every pair the share of opposite signs among the elements that both move, or NaN."""
        return (self.opposite.double() / self.both).tolist()


def measure(
    vectors: Sequence[Mapping[str, TensorReader]], group: Callable[[str], str] = lambda name: ""
) -> dict[str, Sums]:
    """Read vectors once, a chunk of all of them at a time, and sum up their inner products and signs.

    Args:
        vectors: Name to tensor, for each vector.
        group: Returns the group that a tensor's sums are added to.

    Returns:
        Sums by group, in order of appearance.

    Raises:
        MismatchError: A tensor has another number of elements in one of the vectors.
    """
    chunk = max(LEAST_CHUNK, CHUNK // max(1, len(vectors)))
    space = torch.empty(len(vectors), chunk, dtype=torch.float64)
    found: dict[str, Sums] = {}
    for name in dict.fromkeys(name for parts in vectors for name in parts):
        moving = [i for i, parts in enumerate(vectors) if name in parts]
        lengths = {vectors[i][name].length for i in moving}
        if len(lengths) > 1:
            raise MismatchError(
                f"Vectors must have the same shapes to be compared, but {name!r} has {some(sorted(lengths))} elements."
            )
        (length,) = lengths
        sums = found.setdefault(group(name), Sums.of(len(vectors)))
        sums.tensors, sums.elements = sums.tensors + 1, sums.elements + length
        which = torch.tensor(moving)
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            rows = space[: len(moving), : stop - start]
            for row, i in zip(rows, moving, strict=True):
                row.copy_(vectors[i][name].read(start, stop))
            sums.add(rows, which)
    return found


def total(sums: Iterable[Sums], count: int) -> Sums:
    """Add up the sums of groups.

    Args:
        sums: Of each group.
        count: Vectors in each.
    """
    whole = Sums.of(count)
    for part in sums:
        for name in ("dots", "both", "opposite", "not_finite", "tensors", "elements"):
            setattr(whole, name, getattr(whole, name) + getattr(part, name))
        whole.largest = torch.maximum(whole.largest, part.largest)
    return whole


def fit(dots: Tensor, along: Tensor) -> tuple[list[float], int]:
    r"""Find the coefficients of the sum of vectors that is nearest to another vector x, from inner products only.

    Args:
        dots: Of the vectors with each other, float64 [k, k].
        along: Of the vectors with x, float64 [k].

    Returns:
        The :math:`c` that minimizes :math:`\lVert x - \sum_i c_i \tau_i \rVert`, the smallest where there are
        several; and how many of the vectors are linearly independent.

    Example:
        >>> fit(torch.tensor([[4.0, 0.0], [0.0, 1.0]]).double(), torch.tensor([2.0, -3.0]).double())
        ([0.5, -3.0], 2)
    """
    norms = dots.diagonal().sqrt()
    norms = torch.where(norms > 0, norms, 1.0)
    scaled = dots / torch.outer(norms, norms)
    found = torch.linalg.lstsq(scaled, (along / norms)[:, None], rcond=1e-12, driver="gelsd")
    return (found.solution[:, 0] / norms).tolist(), int(found.rank)


def cosine_matrix(vectors: Mapping[str, TaskVector]) -> dict[str, dict[str, float]]:
    """Return the cosine of every pair of vectors.

    Example:
        >>> a, b = TaskVector({"w": torch.tensor([1.0, 0.0])}), TaskVector({"w": torch.tensor([0.0, 2.0])})
        >>> cosine_matrix({"a": a, "b": b})
        {'a': {'a': 1.0, 'b': 0.0}, 'b': {'a': 0.0, 'b': 1.0}}
    """
    return _by_pair(vectors, _whole(vectors).cosines())


def sign_conflicts(vectors: Mapping[str, TaskVector]) -> dict[str, dict[str, float]]:
    """Return for every pair the share of elements with opposite signs, among those that both move.

    Example:
        >>> a, b = TaskVector({"w": torch.tensor([1.0, 1.0, 0.0])}), TaskVector({"w": torch.tensor([-1.0, 2.0, 3.0])})
        >>> sign_conflicts({"a": a, "b": b})["a"]
        {'a': 0.0, 'b': 0.5}
    """
    return _by_pair(vectors, _whole(vectors).conflicts())


def _whole(vectors: Mapping[str, TaskVector]) -> Sums:
    return total(measure([readers_of(vector) for vector in vectors.values()]).values(), len(vectors))


def _by_pair(names: Iterable[str], matrix: list[list[float]]) -> dict[str, dict[str, float]]:
    names = list(names)
    return {name: dict(zip(names, row, strict=True)) for name, row in zip(names, matrix, strict=True)}


def norms_by_block(vector: TaskVector) -> dict[str, float]:
    """Return the Euclidean norm of a vector's part in each block."""
    return {block: sums.norms()[0] for block, sums in measure([readers_of(vector)], block_of).items()}


def without(vector: TaskVector, names: Iterable[str]) -> TaskVector:
    """Leave tensors out of a vector.

    Example:
        >>> without(TaskVector({"a": torch.ones(1), "b": torch.ones(1)}), ["a"]).deltas
        {'b': tensor([1.])}
    """
    left_out = set(names)
    kept = {name: delta for name, delta in vector.deltas.items() if name not in left_out}
    untouched = {**vector.untouched, **dict.fromkeys(vector.deltas.keys() & left_out, "excluded")}
    return TaskVector(kept, vector.buffers, untouched, vector.origin)
