"""Files that may be on a remote file system (``s3://``, ``gs://``, ``memory://`` …), through fsspec as Lightning does.

A remote file is made on this machine first and uploaded whole: object stores show a file when it is complete.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec

from tva.checkpoints import LazyWeights, open_weights


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is on another file system than this machine's."""
    return "://" in os.fspath(path) and not os.fspath(path).startswith(("file://", "local://"))


def plain(path: str | os.PathLike[str]) -> str:
    """Return a local path absolute and without its protocol; leave a remote one as it is.

    Example:
        >>> plain("file:///runs/last.ckpt"), plain("s3://bucket/last.ckpt")
        ('/runs/last.ckpt', 's3://bucket/last.ckpt')
    """
    path = os.fspath(path)
    return path if is_remote(path) else os.path.abspath(path.removeprefix("file://").removeprefix("local://"))


def exists(path: str) -> bool:
    """Whether there is a file."""
    if not is_remote(path):
        return os.path.exists(path)
    system, inner = fsspec.core.url_to_fs(path)
    return system.exists(inner)


def remove(path: str) -> None:
    """Remove a file or folder if it is there."""
    if is_remote(path):
        if exists(path):
            system, inner = fsspec.core.url_to_fs(path)
            system.rm(inner, recursive=True)
    elif Path(path).is_dir() and not Path(path).is_symlink():
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def workplace(folder: str) -> Iterator[Path]:
    """Yield a local folder to write in: the folder itself, or a temporary one if it is remote."""
    if is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="tva-") as temporary:
            yield Path(temporary)
    else:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder)


def deliver(local: Path, path: str) -> None:
    """Move a finished file or folder to its path: by renaming it, or by uploading it."""
    if is_remote(path):
        system, inner = fsspec.core.url_to_fs(path)
        system.makedirs(os.path.dirname(inner), exist_ok=True)
        system.put(os.fspath(local), inner, recursive=local.is_dir())
    elif local != Path(path):
        if local.is_dir():
            remove(path)  # a folder cannot take the name of one that holds files
        os.replace(local, path)


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[Path]:
    """Yield a file of this machine: the file itself, or a copy that is removed again if it is remote.

    Raises:
        FileNotFoundError: The path does not exist.
    """
    if not is_remote(path):
        yield Path(path)
        return
    if not exists(path):
        raise FileNotFoundError(f"A file was expected at {path}, but nothing is there. Check the path.")
    with tempfile.TemporaryDirectory(prefix="tva-") as folder:
        local = Path(folder) / os.path.basename(path)
        system, inner = fsspec.core.url_to_fs(path)
        system.get(inner, os.fspath(local), recursive=system.isdir(inner))
        yield local


def open_anywhere(path: str) -> LazyWeights:
    """Open weights; of a remote file, a copy that has no name on this machine and goes when it is closed."""
    with local_copy(path) as local:
        return open_weights(local)
