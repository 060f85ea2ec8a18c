"""Tensors that are hashed as they are read, so that a fingerprint of what was read costs no second read."""

from __future__ import annotations

import threading

from torch import Tensor

from tva.weights.fingerprint import Fingerprint, TensorHash
from tva.weights.lazy import Entry, LazyWeights, Spec

PIECE = 2**18  # elements that are read at a time where nobody has read them


class Hashed(Entry):
    """An entry that hashes each element when it is first read in order; any reader and any thread may."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.dtype, self.shape = entry, entry.dtype, entry.shape
        self._hash, self._read, self._lock = TensorHash(Spec(entry.dtype, entry.shape)), 0, threading.Lock()

    @property
    def in_parts(self) -> bool:
        return self.entry.in_parts

    @property
    def stored_bytes(self) -> int:
        return self.entry.stored_bytes

    @property
    def held_bytes(self) -> int:
        return self.entry.held_bytes

    @property
    def location(self) -> object:
        return self.entry.location

    def will_need(self, start: int, stop: int) -> None:
        self.entry.will_need(start, stop)

    def slice(self, start: int, stop: int) -> Tensor:
        return self._take(self.entry.slice(start, stop), start)

    def slice_into(self, out: Tensor, start: int) -> Tensor:
        return self._take(self.entry.slice_into(out, start), start)

    def read(self) -> Tensor:
        return self._take(self.entry.read(), 0)

    def _take(self, part: Tensor, start: int) -> Tensor:
        with self._lock:
            if start <= self._read < start + part.numel():
                self._hash.update(part.reshape(-1)[self._read - start :])
                self._read = start + part.numel()
        return part

    def hexdigest(self) -> str:
        """Give the tensor's digest; what nobody has read yet is read for it."""
        if not self.in_parts and self._read < self.shape.numel():
            self.read()
        while self._read < self.shape.numel():
            self.slice(self._read, min(self._read + PIECE, self.shape.numel()))
        return self._hash.hexdigest()


class HashedWeights(LazyWeights):
    """Weights whose fingerprint is taken while they are read.

    Example:
        >>> import torch
        >>> from pathlib import Path
        >>> from tva.weights import Info, fingerprint
        >>> from tva.weights.lazy import InMemory
        >>> weights = {"w": torch.arange(4.0)}
        >>> hashed = HashedWeights(LazyWeights(Info(Path("w"), "memory"), {"w": InMemory(weights["w"])}))
        >>> _ = hashed.slice("w", 0, 3)
        >>> hashed.fingerprint() == fingerprint(weights)
        True
    """

    def __init__(self, weights: LazyWeights) -> None:
        entries = {name: Hashed(weights.entry(name)) for name in weights}
        super().__init__(weights.info, entries, weights.metadata)

    def digest(self, name: str) -> str:
        """Give one tensor's digest."""
        entry = self.entry(name)
        assert isinstance(entry, Hashed)
        return entry.hexdigest()

    def fingerprint(self) -> Fingerprint:
        """Give the fingerprint of all tensors."""
        return Fingerprint.from_tensors({name: self.digest(name) for name in self})
