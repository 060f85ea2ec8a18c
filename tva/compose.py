"""Apply a recipe to a base checkpoint on disk, a piece at a time, within a stated memory.

No Trainer, no data and no knowledge of the architecture: names and shapes are all there is. Every element of the output
is computed as the in-memory path computes it, so the bytes do not depend on pieces, memory or threads.
"""

from __future__ import annotations

import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from tva.console import progress
from tva.merge import Place
from tva.recipe import Piece, Recipe
from tva.state_dict import MismatchError, NoEffectError, add_scaled, is_edited, some, subtract
from tva.task_vector import BATCH_NORM_STATISTICS, Origin, is_vector_file, read_origin
from tva.weights import (
    Fingerprint,
    LazyWeights,
    TensorHash,
    atomic_path,
    fingerprint,
    open_finetuned,
    open_weights,
)

PIECE = 2**18  # elements; a piece of a few vectors in float32 fits the cache of one core
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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
        """Norm of the change divided by that of the base."""
        return (self.squared_change / self.squared_base) ** 0.5 if self.squared_base else float("inf")


@dataclass
class ComposeReport:
    """What `compose` did.

    Attributes:
        output: The file written.
        base: Fingerprint of the base.
        edited: Fingerprint of the output.
        effects: Effect by group of tensors.
        num_bytes: Size of the output's tensors.
        seconds: Wall time.
        notes: What was decided in reading the inputs: prefixes stripped, parts left out.
    """

    output: Path
    base: Fingerprint
    edited: Fingerprint
    num_bytes: int
    seconds: float
    effects: dict[str, GroupEffect] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class _Source:
    """One vector: a task vector file, or a fine-tuned checkpoint whose delta is taken piece by piece."""

    def __init__(
        self, name: str, path: str, base: LazyWeights, allow_other_base: bool, key_map: Mapping[str, str]
    ) -> None:
        self.name = name
        self.origin: Origin | None = None
        if is_vector_file(path):
            self.weights = open_weights(path)
            self.origin, self.buffers, untouched = read_origin(self.weights)
            names = self.weights.keys() | untouched.keys()
        else:
            self.weights = open_finetuned(path, base, key_map=key_map)
            names = self.weights.keys()
            self.buffers = {name for name in names if name.rpartition(".")[2] in BATCH_NORM_STATISTICS}
        missing, extra = base.keys() - names, names - base.keys()
        shapes = [n for n in self.weights if n in base and self.weights.spec(n).shape != base.spec(n).shape]
        if missing or extra or shapes:
            raise MismatchError(
                f"The base and {path} must have the same keys and shapes, but "
                + "; ".join(
                    f"{what} {some(sorted(names))}"
                    for what, names in (
                        (f"{path} lacks", missing),
                        ("the base lacks", extra),
                        ("shapes differ in", shapes),
                    )
                    if names
                )
                + "."
            )
        self.check_base = self.origin is not None and self.origin.base is not None and not allow_other_base

    def identity(self) -> str:
        """Identify the vector for methods that draw random numbers; a checkpoint is read through once for it."""
        if self.origin is None:
            return fingerprint(self.weights).digest
        return self.origin.finetuned or self.name

    def flat(self, name: str, base: Tensor) -> Tensor | None:
        """Give the flattened tensor as stored, memory-mapped; None if this vector does not move it."""
        if name not in self.weights:
            return None
        stored = self.weights[name].reshape(-1)
        return None if self.origin is None and torch.equal(stored, base) else stored  # equal stops at a difference

    def delta(self, stored: Tensor, base: Tensor) -> Tensor:
        """Give the delta of one piece."""
        if self.origin is None:
            return subtract(stored, base)
        return stored.to(torch.float64 if stored.dtype == torch.float64 else torch.float32)


def compose(
    base: str,
    vectors: dict[str, str],
    recipe: str,
    output: str,
    coefs: dict[str, float] | None = None,
    scaling_coef: float = 1.0,
    dtype: str | None = None,
    max_memory: str = "1GiB",
    allow_other_base: bool = False,
    key_map: dict[str, str] | None = None,
) -> ComposeReport:
    """Write ``base + scaling_coef * recipe`` without loading any model whole.

    Args:
        base: Checkpoint of the base model, in any format that `tva.open_weights` reads.
        vectors: Names to task vector files, or to fine-tuned checkpoints of the same base.
        recipe: Expression of those names, such as ``0.3 * (a + b)`` or ``ties(a, b, density=0.2)``.
        output: The ``.safetensors`` file to write; it appears under this name when it is whole.
        coefs: Values of the coefficients in the recipe.
        scaling_coef: Coefficient of the whole recipe; 0 writes the base.
        dtype: Of the output's floating tensors: float64, float32, bfloat16 or float16; by default the base's.
        max_memory: Anonymous memory that this process may take at most, such as ``512MiB``; the pages of mapped files
            do not count.
        allow_other_base: Apply task vector files to a base that they were not taken from.
        key_map: Regular expressions to replacements, for fine-tuned checkpoints whose names differ from the base's by
            more than one prefix.

    Returns:
        What was written, and what the edit did.

    Raises:
        RecipeError: The recipe cannot be read.
        MismatchError: Keys, shapes or bases differ.
        NoEffectError: Nothing changed.
        ValueError: The output is not finite, or an option cannot be understood.
    """
    started = time.monotonic()
    checked = Recipe(recipe, vectors, coefs)
    if not output.endswith(".safetensors"):
        raise ValueError(f"output must end in .safetensors; found {output!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; found {dtype!r}.")
    weights = open_weights(base)
    sources = {name: _Source(name, vectors[name], weights, allow_other_base, key_map or {}) for name in checked.vectors}
    piece = 2**62 if checked.needs_whole_tensors else _piece_size(parse_bytes(max_memory), len(sources))
    composer = _Composer(weights, sources, checked, scaling_coef, None if dtype is None else DTYPES[dtype], piece)
    metadata = {"format": "pt", "tva.recipe": checked.text, "tva.scaling_coef": repr(scaling_coef)}
    with atomic_path(output) as temporary, temporary.open("wb") as file:
        tensors = composer.layout()
        num_bytes = _write_header(file, tensors, metadata)
        with _behind(file) as write:
            for name in progress(list(tensors), "composing"):
                for part in composer.pieces_of(name):
                    write(part)
        composer.check()
    return ComposeReport(
        Path(output),
        Fingerprint.from_tensors(composer.base_digests),
        Fingerprint.from_tensors(composer.edited_digests),
        num_bytes,
        time.monotonic() - started,
        composer.effects,
        [str(opened.info) for opened in (weights, *(s.weights for s in sources.values())) if opened.info.notes],
    )


class _Composer:
    """Computes the output piece by piece and keeps account of what changed."""

    def __init__(
        self,
        base: LazyWeights,
        sources: Mapping[str, _Source],
        recipe: Recipe,
        scaling_coef: float,
        dtype: torch.dtype | None,
        piece: int,
    ) -> None:
        self.base, self.sources, self.recipe = base, sources, recipe
        self.scaling_coef, self.dtype, self.piece = scaling_coef, dtype, piece
        self.identities = {name: source.identity() if recipe.is_random else name for name, source in sources.items()}
        self.statistics = set().union(*(source.buffers for source in sources.values()))
        self.base_digests: dict[str, str] = {}
        self.edited_digests: dict[str, str] = {}
        self.effects: dict[str, GroupEffect] = {}
        self._opened: tuple[str, Tensor, dict[str, Tensor | None]] | None = None
        over_model = any(method.over_model for method in recipe.observing)
        self.model_states = recipe.observe(self._all_pieces, self.identities, over_model=True) if over_model else {}

    def layout(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Give the dtype and shape of every output tensor, in the order written."""
        return {name: (self._output_dtype(name), self.base.spec(name).shape) for name in self.base}

    def _output_dtype(self, name: str) -> torch.dtype:
        stored = self.base.spec(name).dtype
        return self.dtype if self.dtype is not None and stored.is_floating_point else stored

    def _open(self, name: str) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Give the base's flattened tensor, and each vector's stored one if the recipe moves this tensor, else nothing.

        Kept until another tensor is asked for: formats that cannot be mapped into memory assemble it anew each time.
        """
        if self._opened is None or self._opened[0] != name:
            flat = self.base[name].reshape(-1)
            stored: dict[str, Tensor | None] = {}
            # Running statistics are kept: their deltas mean something at coefficient 1 alone.
            if name not in self.statistics and is_edited(flat):
                stored = {source: vector.flat(name, flat) for source, vector in self.sources.items()}
            self._opened = name, flat, stored if any(t is not None for t in stored.values()) else {}
        return self._opened[1:]

    def _deltas(self, name: str, stored: Mapping[str, Tensor | None], base: Tensor, start: int) -> dict[str, Tensor]:
        stop = start + len(base)
        return {
            source: torch.zeros(len(base)) if tensor is None else self.sources[source].delta(tensor[start:stop], base)
            for source, tensor in stored.items()
        }

    def _place(self, name: str, start: int) -> Place:
        return Place(name, start, shape=tuple(self.base.spec(name).shape))

    def _pieces(self, name: str) -> Iterator[Piece]:
        flat, stored = self._open(name)
        if stored:
            for start in range(0, max(1, len(flat)), self.piece):
                yield self._place(name, start), self._deltas(name, stored, flat[start : start + self.piece], start)

    def _all_pieces(self) -> Iterator[Piece]:
        for name in self.base:
            yield from self._pieces(name)

    def pieces_of(self, name: str) -> Iterator[Tensor]:
        """Compute one output tensor, flattened, piece by piece."""
        flat, stored = self._open(name)
        dtype = self._output_dtype(name)
        states = self.model_states
        if stored and len(self.recipe.observing) > 0:
            inner = self.recipe.observe(lambda: self._pieces(name), self.identities, over_model=False, known=states)
            states = {**states, **inner}
        effect = self.effects.setdefault(".".join(name.split(".")[:2]), GroupEffect()) if stored else GroupEffect()
        spec = self.base.spec(name)
        before, after = TensorHash(spec), TensorHash(spec, dtype)
        changed = False
        for start in range(0, len(flat), self.piece):
            base = flat[start : start + self.piece]
            before.update(base)
            part = base.to(dtype)
            if stored and self.scaling_coef != 0:
                deltas = self._deltas(name, stored, base, start)
                delta = self.recipe.merge(self._place(name, start), deltas, states, self.identities)
                part = add_scaled(base, delta, self.scaling_coef, dtype=dtype)
                changed |= self._account(effect, base, delta, part, name)
            after.update(part)
            yield part
        effect.tensors += bool(stored)
        effect.changed += changed
        self.base_digests[name], self.edited_digests[name] = before.hexdigest(), after.hexdigest()
        for source in self.sources.values():
            if source.check_base and source.origin.base.tensors.get(name) != self.base_digests[name]:
                raise MismatchError(
                    f"The task vector {source.name} was taken from the base {source.origin.base.digest}, and in the "
                    f"base given {name!r} is another (the first that differs). Give it its own base, or pass "
                    f"allow_other_base if the other base is meant."
                )

    def _account(self, effect: GroupEffect, base: Tensor, delta: Tensor, part: Tensor, name: str) -> bool:
        if not bool(torch.isfinite(part).all()):
            raise ValueError(
                f"The edited {name!r} holds NaN or infinity: the coefficient is too large for {part.dtype}, or an "
                f"input is damaged. Nothing was written."
            )
        wide = base.to(delta.dtype)
        change = part.to(delta.dtype) - wide
        moved = int(torch.count_nonzero(delta))
        effect.elements += moved
        effect.vanished += moved - int(torch.count_nonzero(change))
        effect.squared_change += float(change.square_().sum(dtype=torch.float64))
        effect.squared_base += float(wide.square().sum(dtype=torch.float64))
        return bool(change.any())

    def check(self) -> None:
        """Check, when all is written, that the edit did something."""
        if self.scaling_coef != 0 and not any(effect.changed for effect in self.effects.values()):
            raise NoEffectError(
                f"The edit changed no element: every delta of {self.recipe.text} is zero, or vanishes in rounding to "
                f"the output's dtype. Use a larger coefficient, or dtype='float32'."
            )


def parse_bytes(text: str) -> int:
    """Read a size such as ``512MiB`` or ``2 GB``.

    Example:
        >>> parse_bytes("512MiB"), parse_bytes("2 GB"), parse_bytes("1000")
        (536870912, 2000000000, 1000)
    """
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", start=1):
        units |= {f"{letter}B": 1000**power, f"{letter}IB": 1024**power}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in units:
        raise ValueError(f"A size must read like '512MiB' or '2 GB'; found {text!r}.")
    return int(float(found[1]) * units[found[2].upper()])


def _piece_size(max_memory: int, num_vectors: int) -> int:
    """Choose how many elements to hold at once, from what is left of the memory after the interpreter's own."""
    per_element = 8 * (num_vectors + 8)  # float32 operands and results, twice for what the allocator keeps
    free = max_memory - _anonymous_memory()
    piece = min(PIECE, free // (2 * per_element))
    if piece < 1024:
        raise ValueError(
            f"max_memory must leave {2 * 1024 * per_element / 2**20:.1f} MiB or more above what the process takes, "
            f"{_anonymous_memory() / 2**20:.0f} MiB; found {max_memory / 2**20:.0f} MiB."
        )
    return piece


def _anonymous_memory() -> int:
    """Bytes of anonymous memory of this process; 0 where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def _write_header(
    file: IO[bytes], tensors: Mapping[str, tuple[torch.dtype, torch.Size]], metadata: Mapping[str, str]
) -> int:
    """Write the header of a safetensors file, whose tensors then follow in order; give their size in bytes.

    Source: the format is described at https://github.com/huggingface/safetensors#format
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        if dtype not in _SAFETENSORS_NAMES:
            raise ValueError(f"{name!r} is {dtype}, which cannot be written to safetensors here.")
        end = offset + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return offset


@contextmanager
def _behind(file: IO[bytes], depth: int = 8) -> Iterator[Callable[[Tensor], None]]:
    """Write tensors behind the arithmetic, in a thread of its own; at most ``depth`` pieces wait."""
    waiting: queue.Queue[Tensor | None] = queue.Queue(depth)
    failed: list[OSError] = []

    def work() -> None:
        while (part := waiting.get()) is not None:
            if not failed:
                try:
                    file.write(part.contiguous().view(torch.uint8).numpy())
                except OSError as error:  # a full disk; raised below, in the caller's thread
                    failed.append(error)

    def write(part: Tensor) -> None:
        if failed:
            raise failed[0]
        waiting.put(part)

    thread = threading.Thread(target=work, name="tva-writer")
    thread.start()
    try:
        yield write
    finally:
        waiting.put(None)
        thread.join()
    if failed:
        raise failed[0]
    os.fsync(file.fileno())
