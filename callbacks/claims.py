"""Names of vectors that are about to be written, so that no two processes choose the same one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tva.callbacks.remote_files import is_remote

from tva.checkpoints.atomic import locked, remove_left, temporary_prefix


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Let no other process choose a name in the same folder meanwhile."""
    if is_remote(path):
        yield
        return
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        yield


def claim(path: str) -> None:
    """Claim a name, by the temporary file in which it will be written, until it is written or released."""
    if not is_remote(path):
        _temporary(Path(path)).touch()


def release(path: str) -> None:
    """Remove the claim on a name, if there is one."""
    if not is_remote(path):
        _temporary(Path(path)).unlink(missing_ok=True)


def is_claimed(path: str) -> bool:
    """Return whether another process, which runs, is about to write a file."""
    if is_remote(path):
        return False
    prefix = temporary_prefix(Path(path))
    remove_left(Path(path).parent, prefix)
    others = (name for name in os.listdir(Path(path).parent) if name.startswith(prefix) and name.endswith(".tmp"))
    return any(name != _temporary(Path(path)).name for name in others)


def _temporary(path: Path) -> Path:
    """Return the temporary file that `tva.checkpoints.atomic_path` makes for a path in this process."""
    return path.with_name(f"{temporary_prefix(path)}{os.getpid()}.tmp")
