"""Write the edit of a quantized base in the base's own scheme: each tensor is computed exactly, then quantized once."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

from tva._torch import Tensor, torch
from tva.checkpoints import Dequantized, Elements, Entry, Spec, tensor_digest
from tva.compose.engine import Composer, Sink
from tva.errors import some

BYTES_HELD = 5 * 8  # of each element of a tensor that is quantized: its values, scaled ones, and where they round to


def requantizer(composer: Composer) -> Requantized:
    """Let a composer compute quantized tensors exactly, and return what quantizes them again.

    Raises:
        ValueError: The base is not quantized, a dtype is given too, or tva only reads its scheme.
    """
    path, found = composer.base.path, composer.quantized
    if not found:
        raise ValueError(f"requantize needs a quantized base; {path} is not. Leave requantize out.")
    if composer.dtype is not None:
        raise ValueError(f"requantize writes the base's own scheme, and dtype={composer.dtype!r} is another. Give one.")
    changed = [name for name in composer.base if name not in found and _is_dequantized(composer.base.entry(name))]
    if changed:
        raise ValueError(
            f"requantize needs the tensors of the base as they are stored, and {some(changed)} are not: {path} has an "
            f"adapter on top, or layers of several models. Leave requantize out."
        )
    moved = [name for name in found if any(name in source.weights for source in composer.sources.values())]
    only_read = {found[name].scheme: name for name in moved if not found[name].requantizes}
    if only_read:
        raise ValueError(
            f"requantize cannot write {some(sorted(only_read))}, in which {path} has "
            f"{some(sorted(only_read.values()))} and others, and which is only read. Leave them out by exclude; "
            f"or leave requantize out, which writes bfloat16, and quantize that with the tool that quantized the base."
        )
    composer.requantize, composer.beside_whole = True, BYTES_HELD
    return Requantized(composer)


def _is_dequantized(entry: Entry) -> bool:
    return entry.written_dtype != entry.spec.dtype_name


class Requantized:
    """Between a `Composer` and its sink: collects each quantized tensor, and hands on its codes and scales.

    A tensor that the edit does not move keeps the base's.

    Args:
        composer: Computes quantized tensors in float64.

    Attributes:
        errors: Name of each tensor that was quantized to the squared norms of the rounding error and of the values.
        unchanged: Names of tensors that the edit moves, and that have the base's codes and scales again.
    """

    def __init__(self, composer: Composer) -> None:
        self.quantized, self._layout = composer.quantized, composer.layout()
        self.errors: dict[str, tuple[float, float]] = {}
        self.unchanged: list[str] = []
        self.done: Mapping[str, Any] = {}
        self._values: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def layout(self) -> dict[str, Spec]:
        """Return the dtype and shape of every tensor in the file."""
        found: dict[str, Spec] = {}
        for name, spec in self._layout.items():
            entry = self.quantized.get(name)
            found |= {name: spec} if entry is None else {part: stored.spec for part, stored in entry.stored.items()}
        return found

    def into(self, sink: Sink) -> Requantized:
        """Return this, handing on to a sink; what an interrupted run has finished there is done."""
        self._sink = sink
        done = {name: sink.done[name] for name in self._layout if name in sink.done and name not in self.quantized}
        for name, entry in self.quantized.items():
            first, *others = (sink.done.get(part) for part in entry.stored)
            if first and "of" in first and all(others):
                done[name] = first["of"]
                self._count(name, first["quantized"])
        self.done = done
        return self

    def write(self, name: str, start: int, chunk: Elements) -> None:
        """Take elements; see `Sink`."""
        if name not in self.quantized:
            self._sink.write(name, start, chunk)
            return
        if start == 0:
            self._values[name] = torch.empty(self.quantized[name].spec.numel(), dtype=torch.float64)
        part = chunk.tensor()
        self._values[name][start : start + len(part)] = part

    def finish(self, name: str, record: dict[str, Any]) -> None:
        """Quantize a tensor that is whole; its record then has the digest of what the codes and scales stand for."""
        entry = self.quantized.get(name)
        if entry is None:
            self._sink.finish(name, record)
            return
        values, new, account = self._values.pop(name).reshape(entry.shape), entry, None
        if record["effect"]["elements"]:
            new = entry.quantized(values)
            written = new.read()
            error, size = float((written - values).square().sum()), float(values.square().sum())
            same = all(torch.equal(_bits(part), _bits(old)) for part, old in zip(*_parts(new, entry), strict=True))
            account = [error, size, same]
            if not math.isfinite(error):
                raise ValueError(
                    f"{name!r} cannot be quantized in {entry.scheme} without overflow. Leave requantize out."
                )
            record["edited"] = tensor_digest(written)
        self._count(name, account)
        for index, (part, stored) in enumerate(new.stored.items()):
            tensor = stored.read()
            self._sink.write(part, 0, Elements.of(tensor))
            digest = {"edited": tensor_digest(tensor)}
            self._sink.finish(part, digest if index else {**digest, "of": dict(record), "quantized": account})

    def _count(self, name: str, account: list[Any] | None) -> None:
        with self._lock:
            if account is not None:
                error, size, same = account
                self.errors[name] = (error, size)
                self.unchanged += [name] if same else []

    def note(self) -> str:
        """Return one line: how many tensors were quantized again, and what that changed."""
        error, size = (math.fsum(values) for values in zip((0.0, 0.0), *self.errors.values(), strict=True))
        schemes = sorted({self.quantized[name].scheme for name in self.errors})
        lost = (
            f"; in {len(self.unchanged)} of them the edit is smaller than a step of the codes, and they are the base's "
            f"again: {some(sorted(self.unchanged))}"
        )
        return (
            f"requantized {len(self.errors)} of {len(self.quantized)} tensors to {some(schemes)}, with a relative "
            f"error of {math.sqrt(error / size) if size else 0:.2%} to the exact edit{lost * bool(self.unchanged)}"
        )


def _parts(new: Dequantized, old: Dequantized) -> tuple[list[Tensor], list[Tensor]]:
    return [part.read() for part in new.parts.values()], [part.read() for part in old.parts.values()]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
