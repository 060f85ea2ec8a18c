"""Find whether a checkpoint is its base plus a number times a task vector, or a sum of several."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tva._torch import Tensor, torch
from tva.checkpoints import HashedWeights, NameFilter, open_weights
from tva.checkpoints.lazy import Entry, Which
from tva.errors import MismatchError, NoEffectError, some
from tva.vectors.geometry import TensorReader, fit, measure, total
from tva.vectors.lazy import LazyTaskVector, open_vector, stored
from tva.vectors.listing import list_vectors


@dataclass
class Match:
    """A checkpoint as its base plus a number times a vector.

    Attributes:
        path: The vector.
        task: Name of its task.
        norm: Euclidean norm of the vector.
        coef: The number, by projection: ⟨x − b, τ⟩ / ⟨τ, τ⟩.
        residual: What is left, ‖x − b − coef · τ‖ / ‖x − b‖: 0 is exact, 1 unrelated.
        exact: Whether it is no more than rounding explains.
    """

    path: str
    task: str | None
    norm: float
    coef: float
    residual: float
    exact: bool


@dataclass
class Matched:
    """What `match` found.

    Attributes:
        checkpoint: The checkpoint x.
        base: Digest of the base b.
        distance: ‖x − b‖ over the parameters.
        rounding: The residual that rounding of x to its dtype leaves at most; about 0.6 of it is to be expected.
        dtypes: The dtypes of x.
        fits: Each vector by itself, the best first.
        joint: Each vector's path to its number in the sum of all that is nearest to x − b.
        joint_residual: What that sum leaves.
        joint_exact: Whether that is no more than rounding explains.
        independent: How many of the vectors are linearly independent; with fewer than all, other numbers fit as well.
        left_out: Path to reason, of vectors that are not of this base.
        notes: What was decided in reading the checkpoint.
    """

    checkpoint: str
    base: str
    distance: float
    rounding: float
    dtypes: list[str]
    fits: list[Match]
    joint: dict[str, float]
    joint_residual: float
    joint_exact: bool
    independent: int
    left_out: dict[str, str]
    notes: list[str] = field(default_factory=list)


def match(
    checkpoint: str | os.PathLike[str],
    vectors: Sequence[str | os.PathLike[str]],
    base: str | os.PathLike[str],
    allow_other_base: bool = False,
    key_map: dict[str, str] | None = None,
    which: Which = "checkpoint",
    include: list[str] | str | None = None,
    exclude: list[str] | str | None = None,
) -> Matched:
    r"""Find whether a checkpoint is its base plus a number times a task vector, and which number.

    Over all parameters, :math:`k = \langle x - b, \tau \rangle / \langle \tau, \tau \rangle`, and what is left over is
    :math:`\lVert x - b - k \tau \rVert / \lVert x - b \rVert`; then the same for the sum of all vectors, each times
    its own number. Running statistics do not count.

    Args:
        checkpoint: The checkpoint, in any format that `tva.open_weights` reads.
        vectors: Task vector files, fine-tuned checkpoints, or folders with task vector files.
        base: Checkpoint of the base model.
        allow_other_base: Also try vectors of other bases, if their names and shapes are equal.
        key_map: Regular expressions to replacements, for names of checkpoints that differ from the base's by more than
            one prefix.
        which: Which weights of Lightning checkpoints that a weight-averaging callback has written: ``raw`` or
            ``averaged``; ``checkpoint`` is what Lightning loads.
        include: Regular expressions that are searched for in the names of tensors; only tensors that match are used.
        exclude: Regular expressions of names to leave out, of the base and of vectors and checkpoints.

    Returns:
        Every vector's number and residual, the best first, and the joint fit.

    Raises:
        FileNotFoundError: A folder holds no task vector.
        MismatchError: The checkpoint is of another architecture, or no vector is of this base.
        NoEffectError: The checkpoint has the base's parameters.
        ValueError: Something is neither vector nor checkpoint, or holds NaN or infinity.
    """
    checkpoint, base = os.fspath(checkpoint), os.fspath(base)
    opened = HashedWeights(open_weights(base))
    only = NameFilter(include, exclude)
    options = {"key_map": key_map, "which": which, "only": only}
    x = open_vector(checkpoint, opened, **options)
    if not x.is_checkpoint:
        raise ValueError(f"{checkpoint} is a task vector file; give the checkpoint that may have been made with it.")
    candidates: list[LazyTaskVector] = []
    left_out: dict[str, str] = {}
    for path in _files(map(os.fspath, vectors)):
        try:
            candidates.append(open_vector(path, opened, allow_other_base=allow_other_base, **options))
        except MismatchError as error:
            left_out[path] = str(error)
    only.check_used()
    if not candidates and not left_out:
        raise ValueError(f"Give at least one vector, or a folder with vectors, to match {checkpoint} with; got none.")
    if not candidates:
        first = next(iter(left_out.values()))
        raise MismatchError(f"None of {len(left_out)} vectors is of this base. The first: {first}")
    statistics = {*x.buffers}.union(*(vector.buffers for vector in candidates))
    delta = {name: part for name, part in x.deltas.items() if name not in statistics}
    paths = [x.path, x.path, *(vector.path for vector in candidates)]
    parts = [delta, {name: _last_places(x.weights.entry(name)) for name in delta}, *(v.deltas for v in candidates)]
    by_tensor = measure(parts, lambda name: name)
    for vector in candidates:
        vector.check_content()
    sums = total(by_tensor.values(), len(parts))
    bad = dict.fromkeys(path for path, count in zip(paths, sums.not_finite.tolist(), strict=True) if count)
    if bad:
        raise ValueError(f"A fit needs finite numbers, but {some(bad)} hold NaN or infinity.")
    square = float(sums.dots[0, 0])
    if square == 0:
        raise NoEffectError(f"{checkpoint} has the parameters of {base}, every one: it is base + 0 · anything.")
    # A rounding moves an element by at most half a unit in its last place. What is rounded to float32 on the way, and
    # the sums here, add a little.
    moved = [name for name, part in by_tensor.items() if part.dots[0, 0] > 0]
    rounding = math.sqrt(math.fsum(float(by_tensor[name].dots[1, 1]) / 4 for name in moved) / square) + 2.0**-22
    dots, along = sums.dots[2:, 2:], sums.dots[2:, 0]
    fits = []
    for i, vector in enumerate(candidates):
        alone = slice(i, i + 1)
        (coef,), left, _ = _nearest(dots[alone, alone], along[alone], square)
        fits.append(Match(vector.path, vector.origin.task, sums.norms()[2 + i], coef, left, left <= rounding))
    coefs, left, independent = _nearest(dots, along, square)
    return Matched(
        checkpoint,
        opened.fingerprint().digest,
        math.sqrt(square),
        rounding,
        sorted({str(x.weights.spec(name).dtype).removeprefix("torch.") for name in moved}),
        sorted(fits, key=lambda found: found.residual),
        {vector.path: coef for vector, coef in zip(candidates, coefs, strict=True)},
        left,
        left <= rounding,
        independent,
        left_out,
        list(x.weights.info.notes),
    )


def _last_places(entry: Entry) -> TensorReader:
    part, eps = stored(entry), torch.finfo(entry.dtype).eps

    def read(start: int, stop: int) -> Tensor:
        x = part.read(start, stop).double()
        return torch.where(x == 0, 0.0, torch.ldexp(torch.full_like(x, eps / 2), torch.frexp(x).exponent))

    return TensorReader(part.length, read)


def _nearest(dots: Tensor, along: Tensor, square: float) -> tuple[list[float], float, int]:
    """Return the numbers of the nearest sum, its relative residual, and how many vectors are independent."""
    coefs, independent = fit(dots, along)
    c = torch.tensor(coefs, dtype=torch.float64)
    left = square - 2 * float(c @ along) + float(c @ dots @ c)
    return coefs, math.sqrt(max(0.0, left) / square), independent


def _files(paths: Iterable[str]) -> list[str]:
    found: list[str] = []
    for path in paths:
        listed: list[str] = []
        if Path(path).is_dir() and not (Path(path) / "adapter_config.json").exists():
            with contextlib.suppress(FileNotFoundError):  # a checkpoint's folder
                listed = [vector.path for vectors in list_vectors(path).bases.values() for vector in vectors]
        found += listed or [path]
    return list(dict.fromkeys(found))
