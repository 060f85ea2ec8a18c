"""Task vectors: what fine-tuning changed in a network's weights, as a value with operators and as a file.

Source: Ilharco et al., "Editing models with task arithmetic", ICLR 2023, https://arxiv.org/abs/2212.04089
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from numbers import Real
from typing import Literal

import xxhash

from tva._torch import Tensor, torch
from tva.arithmetic import (
    BATCH_NORM_STATISTICS,
    StateDict,
    add_scaled,
    check_same,
    from_real_parts,
    is_edited,
    real_parts,
    subtract,
)
from tva.checkpoints import (
    Fingerprint,
    HashedWeights,
    check_not_quantized,
    fingerprint,
    open_weights,
    save_weights,
    tensor_digest,
)
from tva.checkpoints.fingerprint import copies_in, has_values, sealed
from tva.checkpoints.names import KeyMap, match_state
from tva.errors import MismatchError, NoEffectError, some
from tva.layers import block_of, in_layer_order
from tva.vectors.content import check_content
from tva.vectors.header import SUFFIX, Origin, read_origin, vector_header
from tva.vectors.kind import check_kinds
from tva.vectors.matching import match_vector, renamed_origin

Buffers = Literal["keep", "delta"]


class TaskVector:
    r"""A task vector :math:`\tau = \theta_{finetuned} - \theta_{base}`, one delta per tensor.

    Supports ``+``, ``-``, unary ``-``, ``*`` and ``/`` with a number, and ``sum()``. Every operation gives a new task
    vector and leaves its operands unchanged. Make one with `between` or `load` rather than by the constructor.

    Args:
        deltas: Names to deltas of the tensors that fine-tuning moved; 16-bit floats become float32, so that sums are
            rounded once.
        buffers: Names to deltas of running statistics (BatchNorm), kept apart from the parameters.
        untouched: Names that this vector does not move, each with the reason: ``"frozen"`` (the delta is zero),
            ``"integer"`` (never edited) or ``"excluded"`` (left out on request).
        origin: Where it comes from.

    Example:
        >>> base = {"w": torch.tensor([1.0, 2.0])}
        >>> mnist = TaskVector.between(base, {"w": torch.tensor([1.5, 2.0])})
        >>> svhn = TaskVector.between(base, {"w": torch.tensor([1.0, 3.0])})
        >>> (mnist + svhn).apply_to(base, scaling_coef=0.5)
        {'w': tensor([1.2500, 2.5000])}
        >>> (-mnist).apply_to(base)
        {'w': tensor([0.5000, 2.0000])}

    Source: Ilharco et al., "Editing models with task arithmetic", ICLR 2023.
    """

    def __init__(
        self,
        deltas: StateDict,
        buffers: StateDict | None = None,
        untouched: Mapping[str, str] | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.deltas = {name: _widened(delta) for name, delta in deltas.items()}
        self.buffers = {name: _widened(delta) for name, delta in (buffers or {}).items()}
        self.untouched = dict(untouched or {})
        self.origin = origin or Origin()

    @classmethod
    def between(
        cls,
        base: StateDict,
        finetuned: StateDict,
        *,
        buffers: Collection[str] | None = None,
        exclude: Collection[str] = (),
        origin: Origin | None = None,
    ) -> TaskVector:
        """Take the task vector from a base model to its fine-tuned model.

        Args:
            base: State dict of the base model, in memory or from `tva.open_weights`; left unchanged.
            finetuned: State dict of the fine-tuned model, with the same shapes and, but for one prefix, the same keys.
            buffers: Names of floating-point buffers, kept apart from the parameters. By default the names that end in
                ``running_mean`` or ``running_var``.
            exclude: Names to leave out; they are listed in ``untouched``.
            origin: What is known of the run; the fingerprints are filled in here where they are missing.

        Returns:
            Deltas in float32 (float64 where a tensor is float64), under the base's names. Tensors that did not move are
            listed as frozen; integer and boolean tensors are never edited and are listed as such.

        Raises:
            MismatchError: A key is on one side only, or shapes differ.
            ValueError: A delta is NaN or infinite.

        Example:
            >>> base = {"w": torch.zeros(2), "frozen": torch.ones(1), "steps": torch.tensor(0)}
            >>> tuned = {"w": torch.ones(2), "frozen": torch.ones(1), "steps": torch.tensor(9)}
            >>> TaskVector.between(base, tuned).untouched
            {'frozen': 'frozen', 'steps': 'integer'}
        """
        check_not_quantized(base, "the base")
        check_not_quantized(finetuned, "the fine-tuned model")
        finetuned = match_state(finetuned, base)
        check_same(base, finetuned, "the base", "the fine-tuned model")
        deltas: dict[str, Tensor] = {}
        statistics: dict[str, Tensor] = {}
        untouched: dict[str, str] = {}
        not_finite, complex_once = [], []
        digests: dict[str, tuple[str, str]] = {}
        for name in base:
            old, new = base[name], finetuned[name]
            digests[name] = tensor_digest(old), tensor_digest(new)
            if name in exclude:
                untouched[name] = "excluded"
            elif old.is_complex() != new.is_complex():
                complex_once.append(name)
            elif not is_edited(old) or not is_edited(new):
                untouched[name] = "integer"
            elif not bool(torch.isfinite(delta := subtract(new, old)).all()):
                not_finite.append(name)
            elif not bool(delta.any()):
                untouched[name] = "frozen"
            elif name in buffers if buffers is not None else name.rpartition(".")[2] in BATCH_NORM_STATISTICS:
                statistics[name] = delta
            else:
                deltas[name] = delta
        if complex_once:
            raise MismatchError(
                f"A tensor must be complex in both models or in none, but {some(complex_once)} is complex in one only. "
                f"Save both in one dtype."
            )
        if not_finite:
            raise ValueError(
                f"A task vector must be finite, but the deltas of {some(not_finite)} hold NaN or infinity. "
                f"Check that both models are sound (a diverged fine-tuning?)."
            )
        origin = origin or Origin()
        old_tree, new_tree = (Fingerprint.from_tensors({n: d[side] for n, d in digests.items()}) for side in (0, 1))
        origin = replace(origin, base=origin.base or old_tree, finetuned=origin.finetuned or new_tree.digest)
        return cls(deltas, statistics, untouched, origin)

    @staticmethod
    def analogy(a: TaskVector, b: TaskVector, c: TaskVector) -> TaskVector:
        r"""Infer a task from three others: "A is to B as C is to the result", :math:`\tau_C + (\tau_B - \tau_A)`.

        Args:
            a: Task vector of A, such as photos of cats.
            b: Task vector of B, such as photos of dogs.
            c: Task vector of C, such as sketches of cats.

        Returns:
            An estimate of the fourth task vector, such as sketches of dogs, from none of its data.

        Source: Ilharco et al., "Editing models with task arithmetic", ICLR 2023, section 5.
        """
        return c + (b - a)

    # --- what it holds

    @property
    def names(self) -> set[str]:
        """All names of the base model's state dict, whether this vector moves them or not."""
        return self.deltas.keys() | self.buffers.keys() | self.untouched.keys()

    def __iter__(self) -> Iterator[str]:
        raise TypeError("A TaskVector cannot be iterated; use .deltas for its tensors by name.")

    def __repr__(self) -> str:
        task = f"task={self.origin.task!r}, " if self.origin.task else ""
        size = sum(delta.numel() for delta in self.deltas.values())
        return f"TaskVector({task}{len(self.deltas)} deltas of {size:,} elements, norm {self.norm():.4g})"

    def _repr_html_(self) -> str:
        """Show it in a notebook: where it comes from, and its norm by block of layers."""
        from tva.report.notebook import vector_cell

        elements: dict[str, int] = {}
        squares: dict[str, float] = {}
        for name, delta in self.deltas.items():
            block = block_of(name)
            elements[block] = elements.get(block, 0) + delta.numel()
            squares[block] = squares.get(block, 0.0) + float(real_parts(delta).double().square().sum())
        return vector_cell(
            {
                "task": self.origin.task,
                "base": self.origin.base.digest if self.origin.base else None,
                "step": self.origin.step,
                "kind": self.origin.kind,
                "metrics": dict(self.origin.metrics),
                "tensors": len(self.deltas),
                "buffers": len(self.buffers),
                "untouched": dict(Counter(self.untouched.values())),
                "num_bytes": sum(tensor.nbytes for tensor in self._tensors().values()),
            },
            {block: (elements[block], squares[block]) for block in in_layer_order(elements)},
        )

    # --- names

    def named_for(self, names: Collection[str], key_map: KeyMap = ()) -> TaskVector:
        """Return this vector under a base's names, by the one rule of `tva.checkpoints.match_names`.

        Args:
            names: The base's names, or its state dict, by which tied tensors that it holds once are known too.
            key_map: Regular expressions and replacements that are applied to this vector's names first.

        Returns:
            The same deltas, without the prefix that a wrapper has put before every name, or with the one that it wants.

        Raises:
            MismatchError: No one mapping makes the names match.

        Example:
            >>> TaskVector({"network.w": torch.ones(1)}).named_for(["w"]).deltas
            {'w': tensor([1.])}
        """
        copies = copies_in(names) if isinstance(names, Mapping) else None
        found = match_vector(self.names, names, self.origin, self._tensors().get, key_map, copies)
        if found is None:
            return self
        new, _ = found
        return TaskVector(
            {name: self.deltas[old] for name, old in new.items() if old in self.deltas},
            {name: self.buffers[old] for name, old in new.items() if old in self.buffers},
            {name: self.untouched[old] for name, old in new.items() if old in self.untouched},
            renamed_origin(self.origin, new),
        )

    def _matched(self, names: Collection[str]) -> TaskVector:
        """Return this vector under other names, if one mapping fits; else as it is, for a check to refuse."""
        with contextlib.suppress(MismatchError):
            return self if self.names == set(names) else self.named_for(names)
        return self

    # --- operators

    def _combine(self, other: TaskVector, sign: float) -> TaskVector:
        other = other._matched(self.names)
        if self.names != other.names:
            missing, extra = self.names - other.names, other.names - self.names
            raise MismatchError(
                "Task vectors must come from one architecture to be combined, but "
                + "; ".join(
                    f"the {side} has {some(sorted(names))}, which the {rest} lacks"
                    for side, rest, names in (("left", "right", missing), ("right", "left", extra))
                    if names
                )
                + "."
            )
        mine, theirs = self.origin.base, other.origin.base
        if mine and theirs and mine.digest != theirs.digest:
            raise MismatchError(
                f"Task vectors must be taken from one base to be combined, but the left comes from base {mine.digest} "
                f"and the right from base {theirs.digest}: {mine.num_different(theirs.tensors)} of "
                f"{len(mine.tensors.keys() | theirs.tensors.keys())} tensors differ. Fine-tune both from the same base."
            )
        kind = check_kinds(
            {"the left": self.origin.kind, "the right": other.origin.kind}, "declare a kind: vector.as_kind('tangent')"
        )
        deltas = _merge(self.deltas, other.deltas, sign)
        buffers = _merge(self.buffers, other.buffers, sign)
        moved = deltas.keys() | buffers.keys()
        reasons = {**other.untouched, **self.untouched}
        return TaskVector(
            deltas,
            buffers,
            {name: reason for name, reason in reasons.items() if name not in moved},
            Origin(base=mine or theirs, kind=kind),
        )

    def __add__(self, other: object) -> TaskVector:
        return self._combine(other, 1.0) if isinstance(other, TaskVector) else NotImplemented

    def __radd__(self, other: object) -> TaskVector:
        # sum() starts from the integer 0; any other number plus a vector is a mistake.
        return self if isinstance(other, int) and not isinstance(other, bool) and other == 0 else NotImplemented

    def __sub__(self, other: object) -> TaskVector:
        return self._combine(other, -1.0) if isinstance(other, TaskVector) else NotImplemented

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __mul__(self, coef: object) -> TaskVector:
        if not isinstance(coef, Real) or isinstance(coef, bool):
            return NotImplemented
        coef = float(coef)
        if not math.isfinite(coef):
            raise ValueError(f"A task vector can be multiplied by a finite number only, not by {coef}.")
        return self._map(lambda delta: delta * coef)

    __rmul__ = __mul__

    def __truediv__(self, coef: object) -> TaskVector:
        if not isinstance(coef, Real) or isinstance(coef, bool):
            return NotImplemented
        if coef == 0:
            raise ZeroDivisionError("A task vector was divided by 0.")
        return self._map(lambda delta: delta / float(coef))

    def _map(self, function: Callable[[Tensor], Tensor]) -> TaskVector:
        return TaskVector(
            {name: _in_parts(function, delta) for name, delta in self.deltas.items()},
            {name: _in_parts(function, delta) for name, delta in self.buffers.items()},
            self.untouched,
            Origin(base=self.origin.base, kind=self.origin.kind),
        )

    def as_kind(self, kind: str | None) -> TaskVector:
        """Declare this vector to be of a kind, so that it may be combined with vectors of that kind.

        Args:
            kind: ``"tangent"``, or None for an ordinary network's.

        Returns:
            The same deltas under another name. What they do in the other network is not what they were trained to do.
        """
        return TaskVector(self.deltas, self.buffers, self.untouched, replace(self.origin, kind=kind))

    # --- geometry, over the one flattened vector of all deltas; buffers do not count

    def dot(self, other: TaskVector) -> float:
        """Inner product of two flattened task vectors, summed in float64.

        Raises:
            MismatchError: The vectors come from different architectures.
        """
        other = other._matched(self.names)
        if self.names != other.names:
            self._combine(other, 1.0)  # raises, naming what differs
        shared = [name for name in self.deltas if name in other.deltas]
        return math.fsum(
            float(torch.dot(_flat(self.deltas[name]).double(), _flat(other.deltas[name]).double())) for name in shared
        )

    def norm(self) -> float:
        """Euclidean norm of the flattened task vector, summed in float64."""
        return math.sqrt(self.dot(self))

    def cosine(self, other: TaskVector) -> float:
        """Cosine of the angle between two flattened task vectors, in [-1, 1]; NaN if either is zero."""
        norms = self.norm() * other.norm()
        return max(-1.0, min(1.0, self.dot(other) / norms)) if norms else math.nan

    def random_like(self, seed: int) -> TaskVector:
        """Draw a random task vector whose every delta has the norm of this one's: the baseline of an edit.

        Args:
            seed: Each tensor's values depend on this seed and the tensor's name only.

        Returns:
            Gaussian deltas scaled to this vector's norms, tensor by tensor; the buffers do not move.

        Source: the "random vector" rows of Ilharco et al., ICLR 2023, table 1.
        """
        deltas = {name: random_delta(name, delta, seed) for name, delta in self.deltas.items()}
        untouched = {**dict.fromkeys(self.buffers, "excluded"), **self.untouched}
        origin = Origin(base=self.origin.base, task=f"random, seed {seed}", kind=self.origin.kind)
        return TaskVector(deltas, {}, untouched, origin)

    # --- editing

    def check_base(self, base: StateDict, *, allow_other_base: bool = False) -> None:
        """Check that this vector may be applied to a base.

        Args:
            base: State dict of the base model.
            allow_other_base: Check only keys and shapes.

        Raises:
            MismatchError: Keys or shapes differ, or it is not the base that this vector was taken from.
        """
        moved = {**self.deltas, **self.buffers}
        check_same(
            {name: base[name] for name in base if name in moved or name not in self.untouched},
            moved,
            "the base",
            "the task vector",
        )
        missing = [name for name in self.untouched if name not in base]
        if missing:
            raise MismatchError(f"The base lacks {some(missing)}, which the base of this task vector has.")
        mine = self.origin.base
        if mine is None or allow_other_base:
            return
        theirs = fingerprint(base)
        different = [
            name
            for name, digest in theirs.tensors.items()
            if mine.tensors.get(name) != digest
            and not (name in mine.tensors and has_values(base, name, mine.tensors[name]))
        ]
        if different or (not mine.tensors and theirs.digest != mine.digest):
            raise MismatchError(
                f"This task vector was taken from the base {mine.digest}, but is applied to {theirs.digest}: "
                f"{len(different)} of {len(mine.tensors)} tensors differ. Apply it to its base, or pass "
                f"allow_other_base if the other base is meant."
            )

    def apply_to(
        self, base: StateDict, scaling_coef: float = 1.0, *, buffers: Buffers = "keep", allow_other_base: bool = False
    ) -> dict[str, Tensor]:
        r"""Move ``base`` along this task vector: :math:`\theta = \theta_0 + \lambda \tau`.

        Args:
            base: State dict of the base model, left unchanged. Must have this task vector's shapes and, but for one
                prefix, its keys; any floating dtype.
            scaling_coef: Scaling coefficient :math:`\lambda`, unitless. 0 gives back ``base`` bit for bit; a negative
                value forgets the task. Choose it on validation data.
            buffers: What becomes of running statistics: ``"keep"`` those of the base, or add their ``"delta"`` scaled
                by :math:`\lambda` too, where variances stop at 0.
            allow_other_base: Apply it even to a base that it was not taken from.

        Returns:
            A new state dict with the keys, shapes and dtypes of ``base``. The sum is taken in float32 and rounded once.

        Raises:
            MismatchError: ``base`` lacks a key, has one too many, differs in a shape, or is another base.
            NoEffectError: ``scaling_coef`` is not 0 and yet no element changed.
            ValueError: ``scaling_coef`` is not finite.

        Source: Ilharco et al., "Editing models with task arithmetic", ICLR 2023.

        Example:
            >>> base = {"w": torch.tensor([1.0, 2.0])}
            >>> mnist = TaskVector.between(base, {"w": torch.tensor([1.5, 2.0])})
            >>> (-mnist).apply_to(base)
            {'w': tensor([0.5000, 2.0000])}
        """
        mine = self._matched(base)
        mine.check_base(base, allow_other_base=allow_other_base)
        edited = {name: base[name].clone() for name in base}
        mine.write_into(edited, base, scaling_coef, buffers=buffers)
        mine.check_effect(edited, base, scaling_coef)
        return edited

    def write_into(
        self, out: Mapping[str, Tensor], base: StateDict, scaling_coef: float, *, buffers: Buffers = "keep"
    ) -> None:
        """Write ``base`` moved along this vector into tensors that exist, such as a module's own.

        Every call starts from ``base``, so that a pass over many coefficients accumulates no rounding. Bases are not
        compared here: call `check_base` once before such a pass.

        Args:
            out: Names to tensors to overwrite, with the shapes of ``base``; only what this vector moves is written.
            base: State dict of the base model, left unchanged; shares no memory with ``out``.
            scaling_coef: As in `apply_to`.
            buffers: As in `apply_to`; with ``"keep"`` the base's are written.
        """
        if not math.isfinite(scaling_coef):
            raise ValueError(f"scaling_coef must be a finite number, not {scaling_coef}.")
        with torch.no_grad():
            for name, delta in self._tensors().items():
                coef = scaling_coef if name in self.deltas or buffers == "delta" else 0.0
                device = out[name].device
                add_scaled(base[name].to(device), delta.to(device), coef, out=out[name])
                if name in self.buffers and name.endswith("running_var"):
                    out[name].clamp_(min=0)

    def check_effect(self, edited: StateDict, base: StateDict, scaling_coef: float) -> None:
        """Check that an edit changed something.

        Raises:
            NoEffectError: ``scaling_coef`` is not 0 and yet ``edited`` equals ``base`` in all that this vector moves.
        """
        if scaling_coef == 0 or not all(torch.equal(edited[name], base[name]) for name in self._tensors()):
            return
        reason = "its deltas vanish in rounding to the base's dtype" if self.deltas else "it moves no tensor"
        raise NoEffectError(
            f"The edit changed no element: {reason} ({self}, scaling_coef {scaling_coef:g}). Use a larger coefficient, "
            f"or a base in float32."
        )

    # --- files

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None, encoding: str | None = None) -> None:
        """Write this vector as a safetensors file that any safetensors reader opens.

        Args:
            path: Conventionally ends in ``.tv.safetensors``; must end in ``.safetensors``.
            dtype: Round the deltas to this dtype in the file, such as ``torch.bfloat16`` (relative error 2⁻⁹) to halve
                its size. By default they are stored exactly, as complex ones always are.
            encoding: Store them in fewer bytes, as ``"int8"``, ``"top_k(density=0.1)"`` or another one of
                `tva.vectors.encoding`; `tva.vectors.compress` does this to files, and to an error or size that is
                given.

        Raises:
            ValueError: The name ends otherwise, a delta does not fit ``dtype`` or ``encoding``, both are given, or
                there is no such encoding.
        """
        path = os.fspath(path)
        if not path.endswith(".safetensors"):
            raise ValueError(f"A task vector file's name must end in .safetensors, best in {SUFFIX}; found {path!r}.")
        header = vector_header(self.origin, self.buffers, self.untouched, self.norm())
        if encoding is not None:
            if dtype is not None:
                raise ValueError(f"Give dtype or encoding, not both; found {dtype} and {encoding!r}.")
            from tva.vectors.encoder import encode_all  # the merge methods' selection and decompositions

            tensors, more = encode_all(self._tensors(), encoding, self.buffers)
            save_weights(tensors, path, sealed({**header, **more}, fingerprint(tensors).digest))
            return
        tensors = {
            name: value if dtype is None or value.is_complex() else value.to(dtype)
            for name, value in self._tensors().items()
        }
        overflown = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
        if overflown:
            raise ValueError(f"The deltas of {some(overflown)} do not fit {dtype}; choose a dtype of wider range.")
        save_weights(tensors, path, sealed(header, fingerprint(tensors).digest))

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.deltas, **self.buffers}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TaskVector:
        """Read a task vector file.

        Args:
            path: Written by `save`, `tva.callbacks.TaskVectorCallback` or ``tva compress``.

        Returns:
            Deltas in float32, or float64 where stored so.

        Raises:
            FileNotFoundError: The path does not exist.
            ValueError: It is not a task vector file, or one of a later format.
        """
        weights = HashedWeights(open_weights(path))
        origin, buffers, untouched = read_origin(weights)
        exact = (torch.float64, torch.complex64, torch.complex128)
        tensors = {name: value if value.dtype in exact else value.float() for name, value in weights.items()}
        check_content(weights)
        return cls(
            {name: value for name, value in tensors.items() if name not in buffers},
            {name: value for name, value in tensors.items() if name in buffers},
            untouched,
            origin,
        )


def random_delta(name: str, delta: Tensor, seed: int) -> Tensor:
    """Draw Gaussian noise with the norm of a delta; the values depend on the seed and the tensor's name only."""
    key = xxhash.xxh3_64_intdigest(name.encode(), seed=seed % 2**64)
    generator, parts = torch.Generator().manual_seed(key - 2**63), real_parts(delta)
    norm = parts.double().norm()
    noise = torch.randn(parts.shape, generator=generator, dtype=torch.float64)
    return from_real_parts(noise.mul_(norm / noise.norm()).to(parts.dtype), delta)


def _widened(delta: Tensor) -> Tensor:
    return delta.float() if delta.dtype in (torch.bfloat16, torch.float16) else delta


def _in_parts(function: Callable[[Tensor], Tensor], delta: Tensor) -> Tensor:
    """Apply a function of real numbers, to the parts of complex ones."""
    return from_real_parts(function(real_parts(delta)), delta)


def _flat(delta: Tensor) -> Tensor:
    return real_parts(delta).reshape(-1)


def _merge(left: StateDict, right: StateDict, sign: float) -> dict[str, Tensor]:
    """``left + sign * right`` by name, where a name on one side only counts as zero on the other."""
    shapes = [name for name in left if name in right and left[name].shape != right[name].shape]
    if shapes:
        raise MismatchError(
            f"Task vectors must have the same shapes to be combined, but {shapes[0]!r} is "
            f"{list(left[shapes[0]].shape)} on the left and {list(right[shapes[0]].shape)} on the right"
            + (f" ({len(shapes) - 1} more differ)." if len(shapes) > 1 else ".")
        )
    merged = {}
    for name in (*left, *(name for name in right if name not in left)):
        if name not in right:
            merged[name] = left[name].clone()
        elif name not in left:
            merged[name] = _in_parts(lambda delta: delta * sign, right[name])
        else:
            merged[name] = left[name] + right[name] if sign > 0 else left[name] - right[name]
    return merged
