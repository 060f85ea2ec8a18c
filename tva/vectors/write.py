"""Write a task vector in one pass over the weights: each chunk is hashed, subtracted and written while cached."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy

from tva._torch import Tensor, torch
from tva.arithmetic import BATCH_NORM_STATISTICS, add_scaled, real_parts, subtract, sum_dtype
from tva.checkpoints import Fingerprint, LazyWeights, Spec, TensorHash, atomic_path
from tva.checkpoints.fingerprint import sealed
from tva.checkpoints.lazy import Entry, as_real
from tva.checkpoints.stream_writer import AHEAD, LateHeaderFile
from tva.console import progress
from tva.errors import NoEffectError, some
from tva.vectors.header import Origin, vector_header

CHUNK = 2**18  # elements; a float32 chunk with its base and delta fits the cache of one core
ZEROS = numpy.zeros(2**16, numpy.uint8)


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be read once.

    Attributes:
        spec: Its dtype and shape.
        parts: Returns its flattened elements, part by part and in order, on the CPU.
        delta: Returns the flattened change where it is kept apart, as by LoRA; ``parts`` has the weights without it.
        whole: Of complex numbers whose parts these are, the tensor's dtype and shape; else None.
        held_bytes: Memory that reading it takes beside a chunk.
    """

    spec: Spec
    parts: Callable[[], Iterable[Tensor]]
    delta: Callable[[], Tensor] | None = None
    whole: Spec | None = None
    held_bytes: int = 0

    def real(self) -> TensorSource:
        """Return the real and imaginary parts of complex numbers; real ones as they are."""
        if not self.spec.is_complex():
            return self
        read = self.parts
        return TensorSource(
            self.spec.real_parts(), lambda: (real_parts(part).reshape(-1) for part in read()), whole=self.spec
        )

    @classmethod
    def stored(cls, entry: Entry) -> TensorSource:
        """Wrap a tensor in a file, which is read part by part where it can be."""
        length = entry.shape.numel()
        starts = range(0, length, CHUNK)
        spec, whole = entry.spec, entry.whole if entry.whole.is_complex() else None
        if not entry.in_parts:
            held = entry.held_bytes + spec.num_bytes
            return cls(spec, lambda: [entry.read().reshape(-1)], whole=whole, held_bytes=held)
        return cls(spec, lambda: (entry.slice(start, min(start + CHUNK, length)) for start in starts), whole=whole)

    @classmethod
    def of(cls, tensor: Tensor, delta: Callable[[], Tensor] | None = None) -> TensorSource:
        """Wrap a tensor on any device."""
        spec = Spec(tensor.dtype, tensor.shape)
        return cls(spec, lambda: [tensor.detach().cpu().contiguous().reshape(-1)], delta)


@dataclass
class Emitted:
    """What a vector file holds.

    Attributes:
        origin: Where the vector comes from, with both fingerprints.
        finetuned: Fingerprint of the weights, with each tensor's.
        norm: Euclidean norm over all deltas of parameters.
        cosine: To the vector compared with; None if there was none, NaN if one of the two is zero.
        untouched: Names of the tensors that the vector does not move, each with the reason.
    """

    origin: Origin
    finetuned: Fingerprint
    norm: float
    cosine: float | None = None
    untouched: Mapping[str, str] = field(default_factory=dict)


@dataclass
class VectorPlan:
    """What to write of which tensor.

    Attributes:
        base: The weights to subtract, lazily read.
        base_tree: Their fingerprint; None where it is to be taken in the same pass, and then ``sources`` names all.
        sources: The weights by the base's names; those not named are the base's.
        buffers: Names of floating-point buffers, kept apart from parameters; by default BatchNorm's statistics.
        exclude: Names to leave out.
        dtype: Of the stored deltas; by default float32, float64 where a tensor is.
        compare: A vector to take the cosine to, lazily read.
        aliases: Further names of tensors that another name stands for (tied weights): written, and left out of the
            norm and the cosine.
        must_move: Whether a vector that moves nothing is an error.
    """

    base: LazyWeights
    base_tree: Fingerprint | None
    sources: Mapping[str, TensorSource]
    buffers: Collection[str] | None = None
    exclude: Collection[str] = ()
    dtype: torch.dtype | None = None
    compare: LazyWeights | None = None
    aliases: Collection[str] = ()
    must_move: bool = False
    specs: dict[str, Spec] = field(init=False)
    order: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.base, self.specs = as_real(self.base), {}
        self.sources = {name: source.real() for name, source in self.sources.items()}
        for name in self.base:
            spec = self.base.spec(name)
            if self.whole(name).is_complex():
                self.specs[name] = self.whole(name)
                continue
            new = self.sources[name].spec.dtype if name in self.sources else spec.dtype
            wide = torch.float64 if torch.float64 in (spec.dtype, new) else torch.float32
            self.specs[name] = Spec(self.dtype or wide, spec.shape)
        # Wide elements first, so that every tensor is aligned in the file.
        self.order = sorted(self.specs, key=lambda name: -self.specs[name].dtype.itemsize)

    def whole(self, name: str) -> Spec:
        """Return what the base's file says of a tensor, of which ``base`` has the parts where it is complex."""
        return self.base.entry(name).whole

    def held_bytes(self, name: str) -> int:
        """Return the memory that one pass over a tensor takes: chunks, and what is not read by chunks."""
        base, source = self.base.entry(name), self.sources.get(name)
        chunks = (AHEAD + 4) * min(CHUNK, base.spec.numel()) * self.specs[name].dtype.itemsize
        held = 0 if base.in_parts else base.held_bytes + base.spec.num_bytes
        return chunks + held + (0 if source is None else source.held_bytes)

    def is_buffer(self, name: str) -> bool:
        return name in self.buffers if self.buffers is not None else name.rpartition(".")[2] in BATCH_NORM_STATISTICS

    def counts(self, name: str) -> bool:
        """Whether a tensor is in the norm and the cosine."""
        return not self.is_buffer(name) and name not in self.aliases


def emit(
    plan: VectorPlan, path: Path, origin: Origin, snapshot: Path | None = None, doing: str | None = None
) -> Emitted:
    """Write a task vector file, whole or not at all, reading every tensor once.

    Args:
        plan: What to write.
        path: Where.
        origin: What is known of the run.
        snapshot: Where to write the weights themselves as well, in the same pass.
        doing: What a progress bar says; without it there is none.

    Raises:
        OSError: The disk is full, or the like; nothing is left under either name.
        NoEffectError: Nothing moved, and ``plan.must_move``.
        ValueError: A delta is NaN or infinite, or does not fit ``plan.dtype``.
    """
    names = list(plan.base)
    unknown = Fingerprint("0" * 32, dict.fromkeys(names, "0" * 32))
    longest = replace(origin, base=plan.base_tree or unknown, finetuned=unknown.digest)
    with ExitStack() as stack:
        out = LateHeaderFile(
            stack.enter_context(atomic_path(path)),
            plan.specs,
            sealed(vector_header(longest, names, dict.fromkeys(names, "excluded")), unknown.digest),
        )
        stack.callback(out.close)
        copy = None
        if snapshot is not None:
            copy = LateHeaderFile(
                stack.enter_context(atomic_path(snapshot)), {name: plan.whole(name) for name in names}, {}
            )
            stack.callback(copy.close)
        pass_ = _Pass(plan, out, copy)
        for name in plan.order if doing is None else progress(plan.order, doing):
            pass_.tensor(name)
        pass_.check()
        tree = Fingerprint.from_tensors(pass_.digests)
        base_tree = plan.base_tree or Fingerprint.from_tensors({name: pass_.base_digests[name] for name in names})
        origin = replace(origin, base=base_tree, finetuned=tree.digest)
        untouched = {name: pass_.untouched[name] for name in names if name in pass_.untouched}
        norm = math.sqrt(math.fsum(pass_.squares))
        header = vector_header(origin, [name for name in names if name in pass_.statistics], untouched, norm)
        out.close(sealed(header, Fingerprint.from_tensors(pass_.content).digest))
        if copy is not None:
            copy.close({})
    return Emitted(origin, tree, norm, pass_.cosine(), untouched)


class _Reader:
    """A tensor's elements by range, read and not mapped: a file that is cut meanwhile is an error, not the end."""

    def __init__(self, entry: Entry) -> None:
        self._entry, self._whole = entry, None if entry.in_parts else entry.read().reshape(-1)

    def __getitem__(self, place: slice) -> Tensor:
        return self._entry.slice(place.start, place.stop) if self._whole is None else self._whole[place]


class _Pass:
    def __init__(self, plan: VectorPlan, out: LateHeaderFile, copy: LateHeaderFile | None) -> None:
        self.plan, self.out, self.copy = plan, out, copy
        self.digests: dict[str, str] = {}
        self.base_digests: dict[str, str] = {}
        self.content: dict[str, str] = {}  # of the deltas, as they are stored
        self.untouched: dict[str, str] = {}
        self.statistics: set[str] = set()
        self.squares: list[float] = []
        self._dots: list[float] = []
        self._other_squares: list[float] = []
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        self._written = 0  # chunks
        self._bad: dict[str, None] = {}
        self._overflown: dict[str, None] = {}

    def tensor(self, name: str) -> None:
        """Read one tensor and write its delta, if it has one."""
        plan = self.plan
        source = plan.sources.get(name)
        old = plan.base.spec(name)
        new = old if source is None else source.spec
        floating = old.dtype.is_floating_point and new.dtype.is_floating_point
        reason = "excluded" if name in plan.exclude else None if floating else "integer"
        if source is None and self.copy is None:  # nothing to read: it is the base's
            self.digests[name], self.untouched[name] = plan.base_tree.tensors[name], reason or "frozen"
            return
        source = source or TensorSource.stored(plan.base.entry(name))
        whole = source.whole or new
        digest, base_digest = TensorHash(whole), None if plan.base_tree else TensorHash(plan.whole(name))
        base = _Reader(plan.base.entry(name))
        other = None
        if plan.compare is not None and name in plan.compare and reason is None and plan.counts(name):
            other = real_parts(plan.compare[name]).reshape(-1)
        if self.copy is not None:
            self.copy.begin()
        self.out.begin()
        self._content, self._zeros = TensorHash(plan.specs[name]), 0
        moved, start = False, 0
        for chunk, delta in self._chunks(source, base):
            digest.update(chunk)
            stop = start + len(chunk)
            old_chunk = base[start:stop]
            if base_digest is not None:
                base_digest.update(old_chunk)
            if self.copy is not None:
                self.copy.write(chunk.clone())  # it may be a view of a shard, which is to go
            if reason is None:
                delta = self._subtract(chunk, old_chunk) if delta is None else delta
                moved |= self._delta(name, delta, None if other is None else other[start:stop])
            start = stop
        self.digests[name] = digest.hexdigest()
        if base_digest is not None:
            self.base_digests[name] = base_digest.hexdigest()
        if self.copy is not None:
            self.copy.keep(name, whole)
        if reason is None and not moved:
            reason = "frozen"
        if reason is not None:
            self.untouched[name] = reason
            self.out.drop()
            return
        if plan.is_buffer(name):
            self.statistics.add(name)
        self.out.keep(name, plan.specs[name])
        self._hash_zeros()
        self.content[name] = self._content.hexdigest()

    def _subtract(self, chunk: Tensor, base: Tensor) -> Tensor:
        # In buffers that take turns, one for each chunk that may wait to be written and one more; of new ones, the
        # allocator would keep tens of MiB.
        dtype = sum_dtype(chunk, base)
        if dtype not in self._buffers:
            self._buffers[dtype] = [torch.empty(CHUNK, dtype=dtype) for _ in range(AHEAD + 1)]
        return subtract(chunk, base, self._buffers[dtype][self._written % (AHEAD + 1)][: len(chunk)])

    def _chunks(self, source: TensorSource, base: _Reader) -> Iterator[tuple[Tensor, Tensor | None]]:
        change, position = None if source.delta is None else source.delta(), 0
        for part in source.parts():
            for start in range(0, len(part), CHUNK):
                chunk, stop = part[start : start + CHUNK], position + min(CHUNK, len(part) - start)
                if change is None:
                    yield chunk, None
                else:  # exactly, where the weights below are the base's: the sum would round a small change away
                    added, old = change[position:stop], base[position:stop]
                    exact = torch.equal(chunk, old)
                    chunk = add_scaled(chunk, added, 1.0, dtype=source.spec.dtype)
                    yield chunk, added if exact else subtract(chunk, old)
                position = stop

    def _delta(self, name: str, delta: Tensor, other: Tensor | None) -> bool:
        counts = self.plan.counts(name)
        if other is not None:
            other = other.to(delta.dtype)
            self._dots.append(float(torch.dot(delta, other)))
            self._other_squares.append(float(torch.dot(other, other)))
        square = float(torch.dot(delta, delta))
        if not math.isfinite(square):
            if not bool(torch.isfinite(delta).all()):
                self._bad[name] = None
                return True
            square = float(delta.double().square().sum())  # finite, but too large for the square to be
        if counts:
            self.squares.append(square)
        spec = self.plan.specs[name]
        stored = delta.dtype if spec.is_complex() else spec.dtype
        if square == 0 and not bool(delta.any()):
            self.out.skip(len(delta) * stored.itemsize)
            self._zeros += len(delta) * stored.itemsize
            return False
        rounded = delta.to(stored)
        if stored != delta.dtype and not bool(torch.isfinite(rounded).all()):
            self._overflown[name] = None
        self.out.write(rounded)
        self._hash_zeros()
        self._content.update(rounded)
        self._written += 1
        return True

    def _hash_zeros(self) -> None:
        """Hash the zeros that were skipped, once it is known that the tensor moves."""
        while self._zeros:
            count = min(self._zeros, len(ZEROS))
            self._content.update(ZEROS[:count])
            self._zeros -= count

    def check(self) -> None:
        """Raise if the result is not a valid task vector."""
        if self._bad:
            raise ValueError(
                f"A task vector must be finite, but the deltas of {some(self._bad)} hold NaN or infinity. "
                f"Check that both models are sound (a diverged fine-tuning?)."
            )
        if self._overflown:
            raise ValueError(
                f"The deltas of {some(self._overflown)} do not fit {self.plan.dtype}; choose a dtype of wider range."
            )
        if self.plan.must_move and self.untouched.keys() == self.digests.keys():
            raise NoEffectError(
                f"The two checkpoints are equal: none of their {len(self.digests)} tensors moved, so there is no task "
                f"vector. Check which of the two is the fine-tuned one, and that the base is the one it started from."
            )

    def cosine(self) -> float | None:
        if self.plan.compare is None:
            return None
        norms = math.sqrt(math.fsum(self.squares) * self._all_other_squares())
        return max(-1.0, min(1.0, math.fsum(self._dots) / norms)) if norms else math.nan

    def _all_other_squares(self) -> float:
        # What the other vector moves and this one does not has been compared with a delta of zero: it counts already.
        return math.fsum(self._other_squares)


def write_weights(sources: Mapping[str, TensorSource], path: Path) -> Fingerprint:
    """Write weights as a safetensors file, whole or not at all, and fingerprint them in the same pass."""
    order = sorted(sources, key=lambda name: -sources[name].spec.dtype.itemsize)
    digests = {}
    with ExitStack() as stack:
        specs = {name: source.spec for name, source in sources.items()}
        out = LateHeaderFile(stack.enter_context(atomic_path(path)), specs, {})
        stack.callback(out.close)
        for name in order:
            digest = TensorHash(specs[name])
            out.begin()
            for part in sources[name].parts():
                for start in range(0, len(part), CHUNK):
                    digest.update(part[start : start + CHUNK])
                    out.write(part[start : start + CHUNK])
            out.keep(name, specs[name])
            digests[name] = digest.hexdigest()
        out.close({})
    return Fingerprint.from_tensors(digests)
