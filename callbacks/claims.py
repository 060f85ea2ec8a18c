"""Reserve the names of vectors about to be written, so that two processes never choose the same one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tva.callbacks.remote_files import is_remote

from tva.checkpoints.atomic import locked, remove_left, temporary_prefix


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Hold a lock under which only this process chooses names in the folder of ``path``."""
    if is_remote(path):
        yield
        return
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        yield


def claim(path: str) -> None:
    """Reserve a name by creating the temporary file that will be renamed to it, until it is written or released."""
    if not is_remote(path):
        _temporary(Path(path)).touch()


def release(path: str) -> None:
    """Remove the reservation of a name, if there is one."""
    if not is_remote(path):
        _temporary(Path(path)).unlink(missing_ok=True)


def is_claimed(path: str) -> bool:
    """Return whether another running process has reserved a name."""
    if is_remote(path):
        return False
    prefix = temporary_prefix(Path(path))
    remove_left(Path(path).parent, prefix)
    others = (name for name in os.listdir(Path(path).parent) if name.startswith(prefix) and name.endswith(".tmp"))
    return any(name != _temporary(Path(path)).name for name in others)


def _temporary(path: Path) -> Path:
    """Return the temporary file that `tva.checkpoints.atomic_path` makes for a path in this process."""
    return path.with_name(f"{temporary_prefix(path)}{os.getpid()}.tmp")
