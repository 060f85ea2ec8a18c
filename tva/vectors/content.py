"""Check that a task vector file holds what was written: every tensor's hash, and with them one of its header."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tva.checkpoints import HashedWeights, LazyWeights, find, open_weights
from tva.checkpoints.fingerprint import CONTENT
from tva.checkpoints.formats import safetensors
from tva.console import size_text
from tva.vectors.header import read_origin


def content_digest(weights: HashedWeights) -> str:
    """Return the digest of a file's tensors as they are stored.

    Args:
        weights: The whole file; what has been read of it is hashed already. A compressed file's parts are read again.
    """
    return as_written(weights).fingerprint().digest


def as_written(weights: LazyWeights) -> HashedWeights:
    """Return a task vector file's tensors as they are stored, of which its header has the fingerprint."""
    if "tva.encoded" in weights.metadata:
        return HashedWeights(safetensors.open(weights.path, as_stored=True))
    return HashedWeights(weights)


def check_content(weights: HashedWeights) -> bool:
    """Check that a task vector file holds the tensors that were written; what was not read yet is read for it.

    Args:
        weights: The whole file.

    Returns:
        Whether its header has a fingerprint to compare with: files of earlier versions of tva have none.

    Raises:
        ValueError: It holds other tensors.
    """
    if CONTENT not in weights.metadata:
        return False
    compare_content(weights, content_digest(weights))
    return True


def compare_content(weights: LazyWeights, found: str) -> None:
    """Compare the fingerprint that a task vector file's tensors have with that of its header.

    Raises:
        ValueError: They differ.
    """
    recorded = weights.metadata[CONTENT]
    if found != recorded:
        raise ValueError(
            f"{weights.path} is damaged: its tensors have the fingerprint {found}, and {recorded} was written. Take an "
            f"undamaged copy, or write it again from its source."
        )


@dataclass
class VectorReport:
    """What `verify_vector` found.

    Attributes:
        path: The task vector file.
        num_tensors: Tensors that it moves.
        num_bytes: Size of the file.
        recorded: The fingerprint of its tensors that its header holds; None if it holds none.
        found: The fingerprint that they have.
        seconds: Wall time.
    """

    path: Path
    num_tensors: int
    num_bytes: int
    recorded: str | None
    found: str
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether the file is as it was written."""
        return self.recorded == self.found

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"holds": self.holds, **vars(self), "path": str(self.path)}

    def __str__(self) -> str:
        compared = f"{self.num_tensors} tensors, {size_text(self.num_bytes)}, in {self.seconds:.1f} s"
        if self.holds:
            return f"verified: the task vector {self.path} has the fingerprint {self.found} of its header ({compared})"
        if self.recorded is None:
            return (
                f"NOT verified: the task vector {self.path} was written without a fingerprint of its tensors, by an "
                f"earlier version of tva; they have {self.found} now ({compared})"
            )
        return (
            f"NOT verified: the task vector {self.path} has {self.found}, and {self.recorded} was written ({compared})"
        )


def verify_vector(path: str | os.PathLike[str]) -> VectorReport:
    """Read a task vector file through, and compare its tensors with the fingerprint in its header.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: It is not a task vector file, or its header is damaged.
    """
    started = time.monotonic()
    weights = open_weights(path)
    read_origin(weights)
    found = content_digest(HashedWeights(weights))
    size = find(path).stat().st_size
    recorded = weights.metadata.get(CONTENT)
    return VectorReport(Path(path), len(weights), size, recorded, found, time.monotonic() - started)
