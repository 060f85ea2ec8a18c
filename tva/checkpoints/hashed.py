"""Tensors that are hashed as they are read, so that a fingerprint of what was read costs no second read."""

from __future__ import annotations

import threading

import numpy

from tva._torch import Tensor, torch
from tva.checkpoints.fingerprint import Fingerprint, TensorHash
from tva.checkpoints.lazy import Entry, LazyWeights
from tva.checkpoints.spec import Elements, Spec

PIECE = 2**18  # elements that are read at a time where nobody has read them


class Hashed(Entry):
    """An entry that hashes each element when it is first read in order; any reader and any thread may."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._hash, self._read, self._lock = TensorHash(entry.spec), 0, threading.Lock()

    @property
    def spec(self) -> Spec:
        return self.entry.spec

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.dtype

    @property
    def shape(self) -> torch.Size:
        return self.entry.shape

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
        part = self.entry.slice(start, stop)
        self._take(Elements.of(part).data, start)
        return part

    def read_into(self, out: numpy.ndarray, start: int) -> None:
        self.entry.read_into(out, start)
        self._take(out, start)

    def read(self) -> Tensor:
        whole = self.entry.read()
        self._take(Elements.of(whole).data, 0)
        return whole

    def _take(self, data: numpy.ndarray, start: int) -> None:
        """Hash what of these elements is the next."""
        width = self.entry.spec.itemsize
        with self._lock:
            if start <= self._read < start + len(data) // width:
                self._hash.update(data[(self._read - start) * width :])
                self._read = start + len(data) // width

    def hexdigest(self) -> str:
        """Give the tensor's digest; what nobody has read yet is read for it."""
        count = self.entry.spec.numel()
        if not self.in_parts and self._read < count:
            self.read()
        while self._read < count:
            left = min(PIECE, count - self._read)
            self.read_into(numpy.empty(left * self.entry.spec.itemsize, numpy.uint8), self._read)
        return self._hash.hexdigest()


class HashedWeights(LazyWeights):
    """Weights whose fingerprint is taken while they are read.

    Example:
        >>> import torch
        >>> from pathlib import Path
        >>> from tva.checkpoints import Info, fingerprint
        >>> from tva.checkpoints.lazy import InMemory
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
