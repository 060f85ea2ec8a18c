"""Computes the tensors of an edit chunk by chunk, several at once, within a stated memory, and keeps account of it.

Every element is computed as the in-memory path computes it, so the bytes do not depend on chunks, memory or threads.
Where they go is for a `Sink` to say: `tva.compose.apply` writes them, `verify` compares them, `revert` undoes them.
"""

from __future__ import annotations

import gc
import math
import re
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from tva._torch import Tensor, load_torch, num_threads, torch, torch_is_loaded
from tva.arithmetic import add_scaled, is_edited
from tva.checkpoints import Elements, Entry, Fingerprint, LazyWeights, NameFilter, Spec, TensorHash, dequantized_entries
from tva.checkpoints.lazy import as_real
from tva.compose.chunks import FUSED_DTYPES, Deltas, NewSpace, OpenedTensor, Space, is_fusible
from tva.compose.inputs import Slices, open_inputs
from tva.compose.recipe import ChunkDeltas, Chunks, Recipe, States
from tva.compose.syntax import BASE
from tva.console import progress
from tva.errors import NoEffectError
from tva.merge import Chunk, kernels
from tva.merge.matrix import EMBEDDINGS
from tva.merge.program import Program
from tva.sizes import SLACK, anonymous_memory, parse_bytes
from tva.vectors.lazy import LazyTaskVector, untie
from tva.vectors.new_rows import MoreRows, NewRows

CHUNK = 2**18  # elements; shorter ones leave the cores waiting for Python, longer ones for memory
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass
class GroupEffect:
    """What an edit did to one group of tensors (those that share the first two parts of their names).

    Attributes:
        tensors: Tensors in the group that the recipe moves.
        changed: Tensors of which at least one element changed.
        elements: Elements whose delta is not zero.
        vanished: Of these, those that rounding to the output dtype left as they were.
        squared_change: Sum of squares of the change, after rounding.
        squared_base: Sum of squares of the base.
    """

    tensors: int = 0
    changed: int = 0
    elements: int = 0
    vanished: int = 0
    squared_change: float = 0.0
    squared_base: float = 0.0

    @property
    def relative_change(self) -> float:
        """Norm of the change divided by that of the base; 0 where nothing changed, infinite where the base is 0."""
        if not self.squared_change:
            return 0.0
        return (self.squared_change / self.squared_base) ** 0.5 if self.squared_base else float("inf")

    def count(self, moving: int, changed: int, change_square: float, base_square: float) -> None:
        """Count one chunk in."""
        self.elements += moving
        self.vanished += max(0, moving - changed)  # another dtype may change elements that do not move
        self.squared_change += change_square
        self.squared_base += base_square

    def add(self, other: GroupEffect) -> None:
        """Count another's in."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Sink(Protocol):
    """What takes the tensors that a `Composer` computes, from any of its threads; `Output` is one."""

    done: Mapping[str, Any]  # by name the records of tensors that need not be computed

    def write(self, name: str, start: int, chunk: Elements) -> None:
        """Take elements of a tensor, flattened, from ``start`` on; the chunks of one tensor come in order."""

    def finish(self, name: str, record: dict[str, Any]) -> None:
        """Take the digests of a tensor that is whole; a sink that writes it otherwise puts its own under ``edited``."""


class Composer:
    """Computes the output tensor by tensor, several at once, and keeps account of what changed."""

    def __init__(
        self,
        base: LazyWeights,
        sources: Mapping[str, LazyTaskVector],
        recipe: Recipe,
        scaling_coef: float,
        dtype: str | Mapping[str, str] | None,
        tied: Mapping[str, str],
    ) -> None:
        self.base, self.sources, self.recipe, self.tied = as_real(base), sources, recipe, tied
        self.scaling_coef, self.dtype = scaling_coef, dtype
        self.names = [name for name in base if name not in tied]
        self.quantized = dequantized_entries(base)
        self.requantize = False  # whether a sink quantizes what is computed, which is then not rounded
        # Running statistics are kept: their deltas mean something only at coefficient 1.
        self.statistics = set().union(*(source.buffers for source in sources.values()))
        if not self._is_fusible():
            load_torch()  # now, so that the memory that it takes is known
        # Decompositions use all cores themselves; all else is done by one thread a tensor.
        self.chunk, self.workers = CHUNK, 1 if recipe.needs_whole_tensors else num_threads()
        self.identities: dict[str, str] = {}
        self.model_states: States = {}
        self.records: dict[str, Mapping[str, Any]] = {}
        self.more_rows: dict[str, MoreRows] = {}
        self._space = NewSpace() if recipe.needs_whole_tensors else Space()
        self.beside = 0  # bytes that a sink holds of each element of a chunk
        self.beside_whole = 0  # bytes that a sink holds of each element of a quantized tensor
        self._stop = False

    def layout(self) -> dict[str, Spec]:
        """Return the dtype and shape of every output tensor, in the order written."""
        return {name: self._output_spec(name) for name in self.names}

    def _output_spec(self, name: str) -> Spec:
        if name in self.more_rows:
            return self.more_rows[name].spec
        entry = self.base.entry(name)
        return entry.whole if entry.whole.is_complex() else Spec(self._output_dtype(name), entry.spec.sizes)

    def _output_dtype(self, name: str) -> str:
        """Return the dtype of the numbers that are written: of complex ones that of their parts, as it is stored."""
        stored = self.base.spec(name)
        if self.base.entry(name).whole.is_complex():
            return stored.dtype_name
        if isinstance(self.dtype, Mapping):
            return self.dtype[name]
        if self.requantize and name in self.quantized:
            return stored.dtype_name
        if self.dtype is not None and stored.is_floating_point():
            return self.dtype
        return self.base.entry(name).written_dtype

    @property
    def dequantizes(self) -> bool:
        """Whether the base is quantized and the output is not."""
        entries = map(self.base.entry, self.base)
        return not self.requantize and any(entry.written_dtype != entry.spec.dtype_name for entry in entries)

    def _is_fusible(self) -> bool:
        """Whether all can be computed without torch."""
        if not self.recipe.is_fusible:
            return False
        for name in self.names:
            entries = [weights.entry(name) for weights in self._inputs() if name in weights]
            kept = len(entries) == 1 or not is_edited(entries[0].spec) or name in self.statistics
            if not (entries[0].in_parts if kept else all(map(is_fusible, entries))):
                return False
            if self._output_dtype(name) != entries[0].spec.dtype_name:
                return False
        return True

    def _inputs(self) -> list[LazyWeights]:
        return [self.base, *(source.weights for source in self.sources.values())]

    @classmethod
    def open(
        cls,
        base: str,
        vectors: Mapping[str, str],
        recipe: Recipe,
        scaling_coef: float,
        dtype: str | None = None,
        *,
        allow_other_base: bool = False,
        key_map: Mapping[str, str] | None = None,
        which: str = "checkpoint",
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str | None = None,
        slices: Slices | None = None,
        new_rows: NewRows = "error",
        allow_other_tokenizer: bool = False,
        names: Sequence[str] | None = None,
    ) -> Composer:
        """Open the files of an edit; the arguments are those of `compose`."""
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; found {dtype!r}.")
        only = NameFilter(include, exclude)
        options = {"allow_other_base": allow_other_base, "key_map": key_map, "which": which, "only": only}
        options |= {"new_rows": new_rows, "allow_other_tokenizer": allow_other_tokenizer}
        weights, sources = open_inputs(base, vectors, recipe.vectors, slices, change=names, **options)
        only.check_used()
        chosen = {source.weights.info.which for source in sources.values()}
        if which != "checkpoint" and which not in chosen:
            raise ValueError(f"which={which!r}: no vector holds both raw and averaged weights. Leave it out.")
        recipe.bind(weights.keys())
        composer = cls(weights, sources, recipe, scaling_coef, dtype, untie(weights, sources.values()))
        composer.add_rows(zero=new_rows == "zero", drop=new_rows == "drop")
        return composer

    def add_rows(self, zero: bool, drop: bool) -> None:
        """Let the output have the rows that vectors have and the base has not, unless they are dropped."""
        found: dict[str, list[Entry]] = {}
        for source in self.sources.values() if not drop else ():
            for name, entry in source.more_rows.items():
                found.setdefault(name, []).append(entry)
        for name, entries in found.items():
            self.more_rows[name] = MoreRows(self.base.spec(name), entries, self._output_dtype(name), zero)

    def back(self, edited: LazyWeights, with_vectors: bool) -> Composer:
        """Return the composer that predicts this one's base from what this one has computed.

        Its output is the edited weights in the base's dtypes, with vectors minus ``scaling_coef * recipe``.
        """
        sources = {name: source.unchecked() for name, source in self.sources.items()} if with_vectors else {}
        recipe = self.recipe if with_vectors else Recipe("nothing", ["nothing"])
        dtypes = {name: self.base.spec(name).dtype_name for name in self.base}
        back = Composer(edited, sources, recipe, -self.scaling_coef, dtypes, self.base.ties())
        back.chunk, back.workers = self.chunk, self.workers
        return back

    def stored_bytes(self, name: str) -> int:
        """Return the bytes of a tensor in all inputs."""
        return sum(weights.entry(name).stored_bytes for weights in self._inputs() if name in weights)

    # --- memory

    def need(self) -> int:
        """Predict the anonymous memory in bytes, at the chunk size and number of workers chosen."""
        width = 8 if self.recipe.uses_base else 4
        held, unparted, largest = width * (2 * len(self.sources) + 8) + self.beside, 0, 0
        quantized = 0
        for name in self.names:
            entries = [weights.entry(name) for weights in self._inputs() if name in weights]
            unparted = max(unparted, sum(entry.held_bytes for entry in entries))
            moved = len(entries) > 1 or self.recipe.uses_base
            largest = max(largest, entries[0].spec.numel() if moved else 0)
            quantized = max(quantized, entries[0].spec.numel() * self.beside_whole if name in self.quantized else 0)
        chunk = largest if self.recipe.needs_whole_tensors else self.chunk
        each = chunk * held + unparted + quantized + self.recipe.observing_bytes
        kernels_bytes = 0 if kernels.load.cache_info().currsize else kernels.LOADED_BYTES
        return anonymous_memory() + kernels_bytes + SLACK + self.workers * each

    def fit_into(self, max_memory: str | None) -> None:
        """Choose how much to hold at once, fewer workers before smaller chunks.

        Args:
            max_memory: That this process may take, or None for 1 GiB more than it takes already.

        Raises:
            ValueError: It does not fit however little is held.
        """
        kernels.load()
        limit = anonymous_memory() + 2**30 if max_memory is None else parse_bytes(max_memory, "max_memory")
        while self.need() > limit:
            if self.workers > 1:
                self.workers -= 1
            elif self.chunk > 1024 and not self.recipe.needs_whole_tensors:
                self.chunk //= 2
            else:
                raise ValueError(
                    f"max_memory must be {self.need() / 2**20 + 1:.0f}MiB or more for this recipe and these formats, "
                    f"of which the process takes {anonymous_memory() / 2**20:.0f} MiB by itself; found "
                    f"{max_memory or f'{limit / 2**20:.0f} MiB'}."
                )

    # --- computing

    def run(self, out: Sink) -> None:
        """Compute and write every tensor that is not done."""
        self.records = dict(out.done)
        todo = [name for name in self.names if name not in out.done]
        if todo:
            self.observe()
        self.compute(todo, out)

    def observe(self) -> None:
        """Collect, with its own passes, what the recipe must know of the whole model."""
        self.identities = {name: s.identity() if self.recipe.is_random else name for name, s in self.sources.items()}
        self.identities[BASE] = BASE
        if not self.recipe.observing:
            return
        with _threads(self.workers) as pool:
            by_size = sorted(self.names, key=self._size, reverse=True)

            def spread(observe: Callable[[str, Chunks], None]) -> None:
                def observe_one(name: str) -> None:
                    opened = self._open(name)
                    if opened.moved:
                        observe(name, lambda: self.deltas_of(opened))

                list(pool.map(observe_one, by_size))

            self.model_states = self.recipe.observe_model(spread, self.identities)

    def compute(self, names: Sequence[str], out: Sink) -> None:
        """Compute and write tensors, once `observe` has run."""
        with _threads(self.workers) as pool:
            todo = sorted(names, key=self._size, reverse=True)
            futures = [pool.submit(self._compose, name, out) for name in todo]
            try:
                for future in progress(futures, "composing"):
                    future.result()
            except BaseException:
                self._stop = True
                raise

    def _size(self, name: str) -> int:
        return self.base.spec(name).numel()

    def _open(self, name: str, space: Space | None = None) -> OpenedTensor:
        chunk = max(1, self._size(name)) if self.recipe.needs_whole_tensors else self.chunk
        edited, with_base = name not in self.statistics, self.recipe.uses_base
        return OpenedTensor(name, self.base, self.sources, chunk, edited, space or self._space, with_base)

    def plain(self, name: str) -> OpenedTensor:
        """Open a tensor for torch, whatever its dtypes."""
        return self._open(name, NewSpace())

    def deltas_of(self, opened: OpenedTensor) -> Iterator[ChunkDeltas]:
        """Yield the deltas of one tensor that the recipe moves."""
        for start in opened.starts():
            base = opened.base_elements(start) if opened.fused else opened.base_chunk(start)
            yield self._chunk(opened, start), Deltas(opened, start, None if opened.fused else base)

    def _chunk(self, opened: OpenedTensor, start: int) -> Chunk:
        shape = (opened.length,) if opened.whole.is_complex() else opened.spec.sizes  # which is not a matrix
        return Chunk(opened.name, start, shape=shape)

    def _compose(self, name: str, out: Sink) -> None:
        opened = self._open(name)
        dtype = self._output_dtype(name)
        states = self.model_states
        moved = opened.moved and self.scaling_coef != 0
        if moved and self.recipe.observing:
            own = self.recipe.observe_tensor(name, lambda: self.deltas_of(opened), self.identities, states)
            states = ChainMap(own, states)
        program = self._program(opened, states) if moved else None
        effect = GroupEffect(tensors=int(opened.moved))
        before, after = TensorHash(opened.whole), TensorHash(self._output_spec(name))
        copied = not moved and dtype == opened.spec.dtype_name and self.base.entry(name).in_parts
        for start in opened.starts():
            if self._stop:
                return
            if program is not None or copied:
                base = opened.base_elements(start)
                before.update(base.data)
                part = base if copied else self._run(opened, program, base, start, effect)
            else:
                tensor = opened.base_chunk(start)
                before.update(tensor)
                wanted = getattr(torch, dtype)
                part = Elements.of(self._edit(opened, tensor, start, states, effect) if moved else tensor.to(wanted))
            after.update(part.data)
            out.write(name, start, part)
        for start, part in self.more_rows[name].chunks(self.chunk) if name in self.more_rows else ():
            after.update(part.data)
            out.write(name, start, part)
        effect.changed = int(effect.elements > effect.vanished)
        record = {"base": before.hexdigest(), "edited": after.hexdigest(), "vectors": {}, "effect": asdict(effect)}
        for key, source in self.sources.items():
            source.check(name, record["base"])
            if name in source.weights:
                record["vectors"][key] = source.weights.digest(name)
        out.finish(name, record)
        self.records[name] = record

    def _program(self, opened: OpenedTensor, states: States) -> Program | None:
        """Return the program that computes the whole recipe in one tensor, if methods and dtypes allow."""
        if not opened.fused or self._output_dtype(opened.name) not in FUSED_DTYPES:
            return None
        steps = self.recipe.steps(self._chunk(opened, 0), states, self.identities)
        return None if steps is None else opened.program(steps)

    def _run(self, opened: OpenedTensor, program: Program, base: Elements, start: int, effect: GroupEffect) -> Elements:
        dtype, count = self._output_dtype(opened.name), len(base.data) // opened.spec.itemsize
        size = count * Spec(dtype, ()).itemsize
        part = Elements(opened.space.bytes("edited", size)[0, :size], dtype)
        moving, changed, change_square, base_square = opened.edit(program, start, self.scaling_coef, part)
        effect.count(moving, changed, change_square, base_square)
        return part

    def _edit(self, opened: OpenedTensor, base: Tensor, start: int, states: States, effect: GroupEffect) -> Tensor:
        space, dtype = opened.space, self._output_dtype(opened.name)
        part = space.take(getattr(torch, dtype), len(base))
        deltas, chunk, base = Deltas(opened, start, base), self._chunk(opened, start), opened.widened(base)
        delta = self.recipe.merge(chunk, deltas, states, self.identities, fresh=opened.vectors, free=space.give_back)
        moving, base_square = int(torch.count_nonzero(delta)), float(torch.dot(base, base))
        kept = None  # what is not finite in the base, such as the -inf of a mask
        if not math.isfinite(base_square):
            kept = ~base.isfinite()
            base_square = float(base.masked_fill(kept, 0).square().sum())
        add_scaled(base, delta, self.scaling_coef, out=part, overwrite=True)
        change = delta.copy_(part).sub_(base)
        if kept is not None:
            change.masked_fill_(kept, 0)
            part = torch.where(kept, opened.read(0, start).to(part.dtype), part)
        changed, change_square = int(torch.count_nonzero(change)), float(torch.dot(change, change))
        if not math.isfinite(change_square):
            sound = part.isfinite() if kept is None else part.isfinite() | kept
            if not bool(sound.all()):
                raise opened.not_finite(dtype)
        effect.count(moving, changed, change_square, base_square)
        return part

    def edit_plainly(self, opened: OpenedTensor, start: int, states: States) -> Tensor:
        """Compute one chunk of the output in torch, over no memory that is used again."""
        base = opened.base_chunk(start)
        delta = self.recipe.merge(self._chunk(opened, start), Deltas(opened, start, base), states, self.identities)
        return add_scaled(base, delta, self.scaling_coef, dtype=getattr(torch, self._output_dtype(opened.name)))

    # --- the account

    def effects(self) -> dict[str, GroupEffect]:
        """Sum up what changed, by group of tensors that the recipe moves."""
        groups: dict[str, GroupEffect] = {}
        for name in self.names:
            effect = GroupEffect(**self.records[name]["effect"])
            if effect.tensors:
                groups.setdefault(".".join(name.split(".")[:2]), GroupEffect()).add(effect)
        return groups

    def fingerprint(self, which: str) -> Fingerprint:
        """Return the fingerprint of the ``"base"`` or the ``"edited"`` weights."""
        found = {name: self.records[name][which] for name in self.names}
        return Fingerprint.from_tensors({**found, **{alias: found[kept] for alias, kept in self.tied.items()}})

    def vector_fingerprints(self) -> dict[str, str]:
        """Return the fingerprint of each vector's file, by its name in the recipe."""
        digests = {}
        for key, source in self.sources.items():
            found = {name: self.records[self.tied.get(name, name)]["vectors"][key] for name in source.weights}
            digests[key] = Fingerprint.from_tensors(found).digest
        return digests

    def differing(self) -> dict[str, list[str]]:
        """Return, by fine-tuned checkpoint, tensors that are never edited and yet differ: of integers, for instance."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            record, spec = self.records[name], self.base.spec(name)
            for key, digest in record["vectors"].items() if not is_edited(spec) and spec.numel() > 1 else ():
                if self.sources[key].is_checkpoint and digest != record["base"]:
                    found.setdefault(str(self.sources[key].weights.path), []).append(name)
        return found

    def untied(self) -> list[str]:
        """Return embeddings that equal another tensor in the base, as tied ones do, and no longer do in the output."""
        twins: dict[str, list[str]] = {}
        for name in self.names:
            if len(self.base.spec(name).sizes) > 1 and re.search(EMBEDDINGS, name):
                twins.setdefault(self.records[name]["base"], []).append(name)
        return [
            name
            for names in twins.values()
            for name in names[1:]
            if self.records[name]["edited"] != self.records[names[0]]["edited"]
        ]

    def check(self) -> None:
        """Check, when all is written, that the edit did something."""
        effects = self.effects().values()
        if self.scaling_coef == 0 or any(effect.changed for effect in effects):
            return
        if any(effect.elements for effect in effects):
            why = "each delta vanishes in rounding to the output's dtype. Use a larger coefficient, or dtype='float32'"
        else:
            why = (
                "every delta is zero. Check that the vectors are of fine-tuned models rather than of the base, and "
                "that the recipe does not cancel them"
            )
        read = "; ".join(f"{name} is {source.weights.info}" for name, source in self.sources.items())
        raise NoEffectError(
            f"The edit {self.recipe.text} changed no element of {self.base.info.path}: {why}. What was read: {read}."
        )


@contextmanager
def _threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Return threads for tensors, each with one core to itself if there are several.

    Python's garbage collector rests meanwhile: chunks leave no cycles, but their number would make it walk over all
    that torch has loaded, again and again (measured: more than half of the time).
    """
    alone, collecting = workers > 1 and torch_is_loaded(), gc.isenabled()
    before = torch.get_num_threads() if alone else 0
    gc.disable()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tva-compose")
    try:
        if alone:
            torch.set_num_threads(1)
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if alone:
            torch.set_num_threads(before)
        if collecting:
            gc.enable()
