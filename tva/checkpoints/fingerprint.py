"""Fingerprints: one short name for the contents of a state dict, the same whatever file format holds it.

A fingerprint is a tree of XXH3-128 hashes: one over each tensor's dtype, shape and bytes, and one over the sorted names
with their hashes. It guards against accidents (another base, a changed file), not against an adversary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy
import xxhash

from tva._torch import Tensor, torch
from tva.checkpoints.lazy import Entry, LazyWeights, Wrapped
from tva.checkpoints.names import CopyOf
from tva.checkpoints.spec import Elements, Spec, dtype_name

CHUNK = 2**18  # elements that are read at a time where nobody has read them
FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Fingerprint:
    """The hash of a state dict and of each of its tensors.

    Attributes:
        digest: 32 hexadecimal digits over all names and tensor hashes.
        tensors: For each name the 32 hexadecimal digits of its tensor.
    """

    digest: str
    tensors: Mapping[str, str]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, str]) -> Fingerprint:
        """Build the tree from the hash of each tensor, given in any order."""
        tree = "".join(f"{name}\0{tensors[name]}\n" for name in sorted(tensors))
        return cls(xxhash.xxh3_128_hexdigest(tree.encode()), dict(tensors))

    def num_different(self, other: Mapping[str, str]) -> int:
        """Count the names whose tensors differ, or that only one side has.

        Args:
            other: The ``tensors`` of another fingerprint.
        """
        names = self.tensors.keys() | other.keys()
        return sum(self.tensors.get(name) != other.get(name) for name in names)


class TensorHash:
    """Hash one tensor's dtype, shape and bytes as its chunks stream past.

    Args:
        like: The tensor, or its `Spec`.
        dtype: Dtype of the chunks; by default that of ``like``.
    """

    def __init__(self, like: Tensor | Spec, dtype: torch.dtype | str | None = None) -> None:
        spec = like if isinstance(like, Spec) else Spec(like.dtype, like.shape)
        name = spec.dtype_name if dtype is None else dtype_name(dtype)
        self._digest = xxhash.xxh3_128(f"torch.{name}{list(spec.sizes)}".encode())

    def update(self, chunk: Tensor | numpy.ndarray) -> None:
        """Hash the next elements, in the order of the flattened tensor, as a tensor or as bytes."""
        self._digest.update(Elements.of(chunk).data if isinstance(chunk, Tensor) else chunk)

    def hexdigest(self) -> str:
        """Return the hash as 32 hexadecimal digits."""
        return self._digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Return the hash, 32 hexadecimal digits, of a tensor's dtype, shape and bytes on any device and in any layout."""
    digest = TensorHash(tensor)
    digest.update(tensor.detach().cpu())
    return digest.hexdigest()


def fingerprint(weights: Mapping[str, Tensor]) -> Fingerprint:
    """Fingerprint a state dict.

    Args:
        weights: Names to tensors, any dtypes; read one tensor at a time and left unchanged.

    Returns:
        The same fingerprint for the same names, dtypes, shapes and bytes, in any order and from any format.

    Example:
        >>> a, b = torch.zeros(2), torch.ones(3)
        >>> fingerprint({"a": a, "b": b}) == fingerprint({"b": b, "a": a})
        True
        >>> fingerprint({"a": a}).num_different(fingerprint({"a": a + 1}).tensors)
        1
    """
    known = {name: weights.entry(name).digest for name in weights} if isinstance(weights, LazyWeights) else {}
    return Fingerprint.from_tensors({name: known.get(name) or tensor_digest(weights[name]) for name in weights})


def copies_in(weights: Mapping[str, Tensor]) -> CopyOf:
    """Return how copies are found among weights: of one dtype and shape first, then of equal bits."""

    def copy_of(name: str, others: Iterable[str]) -> str | None:
        mine = weights[name]
        alike = (other for other in others if form_of(weights, other) == (mine.dtype, mine.shape))
        digest = tensor_digest(mine)
        return next((other for other in alike if tensor_digest(weights[other]) == digest), None)

    return copy_of


def form_of(weights: Mapping[str, Tensor], name: str) -> tuple[torch.dtype, torch.Size]:
    """Return a tensor's dtype and shape, without reading it where that can be."""
    like = weights.entry(name) if isinstance(weights, LazyWeights) else weights[name]
    return like.dtype, like.shape


def has_values(weights: Mapping[str, Tensor], name: str, digest: str) -> bool:
    """Whether a floating tensor has the values of which a digest was taken in another floating dtype.

    A network that is loaded in float32 has the very values of its folder in bfloat16.
    """
    dtype, shape = form_of(weights, name)
    if not dtype.is_floating_point:
        return False
    floats = [getattr(torch, other) for other in FLOATS]
    others = {other: TensorHash(Spec(other, shape)) for other in floats if other != dtype}
    count = shape.numel()
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        lazy = isinstance(weights, LazyWeights)
        part = weights.slice(name, start, stop) if lazy else weights[name].detach().reshape(-1)[start:stop].cpu()
        for other, hashed in list(others.items()):
            cast = part.to(other)
            if torch.equal(cast.to(dtype), part):
                hashed.update(cast)
            else:
                del others[other]
    return any(hashed.hexdigest() == digest for hashed in others.values())


class Hashed(Wrapped):
    """An entry that hashes each element when it is first read in order, by any reader and any thread."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._hash, self._read, self._lock = TensorHash(entry.whole), 0, threading.Lock()
        self.known = ""  # the digest, where another process has read it

    @property
    def spec(self) -> Spec:
        return self.entry.spec

    @property
    def whole(self) -> Spec:
        return self.entry.whole

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.dtype

    @property
    def shape(self) -> torch.Size:
        return self.entry.shape

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
        """Hash those of these elements that come next."""
        width = self.entry.spec.itemsize
        with self._lock:
            if start <= self._read < start + len(data) // width:
                self._hash.update(data[(self._read - start) * width :])
                self._read = start + len(data) // width

    def hexdigest(self) -> str:
        """Return the tensor's digest, reading what has not been read yet."""
        if self.known:
            return self.known
        count = self.entry.spec.numel()
        if not self.in_parts and self._read < count:
            self.read()
        while self._read < count:
            left = min(CHUNK, count - self._read)
            self.read_into(numpy.empty(left * self.entry.spec.itemsize, numpy.uint8), self._read)
        return self._hash.hexdigest()


class HashedWeights(LazyWeights):
    """Weights whose fingerprint is computed while they are read.

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
        found = {name: weights.entry(name) for name in weights}
        entries = {name: entry if isinstance(entry, Hashed) else Hashed(entry) for name, entry in found.items()}
        super().__init__(weights.info, entries, weights.metadata)

    def digest(self, name: str) -> str:
        """Return one tensor's digest."""
        entry = self.entry(name)
        assert isinstance(entry, Hashed)
        return entry.hexdigest()

    def take_digest(self, name: str, digest: str) -> None:
        """Set the digest of a tensor that another process has read."""
        entry = self.entry(name)
        assert isinstance(entry, Hashed)
        entry.known = digest

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of all tensors."""
        return Fingerprint.from_tensors({name: self.digest(name) for name in self})


CONTENT, HEADER = "tva.content_fingerprint", "tva.header_fingerprint"


def header_digest(metadata: Mapping[str, str]) -> str:
    """Hash what tva has written into a header, but for this hash itself."""
    fields = sorted(key for key in metadata if key.startswith("tva.") and key != HEADER)
    return xxhash.xxh3_128_hexdigest("".join(f"{key}\0{metadata[key]}\0" for key in fields).encode())


def sealed(metadata: Mapping[str, str], content: str) -> dict[str, str]:
    """Return the header of a file that notices when it is damaged.

    Args:
        metadata: What else the header says.
        content: Digest of the fingerprint of all tensors in the file, as they are stored.
    """
    metadata = {**metadata, CONTENT: content}
    return {**metadata, HEADER: header_digest(metadata)}


def check_header(path: Path, metadata: Mapping[str, str]) -> None:
    """Check that a sealed header is as it was written; one without a seal passes.

    Raises:
        ValueError: It has changed.
    """
    if (CONTENT in metadata or HEADER in metadata) and metadata.get(HEADER) != header_digest(metadata):
        raise ValueError(
            f"{path} is damaged: its header does not have the fingerprint that was written into it "
            f"({metadata.get(HEADER)}). Take an undamaged copy, or write it again from its source."
        )
