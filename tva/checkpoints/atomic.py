"""Write files atomically: whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from tva._torch import Tensor


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name on success and is removed on failure.

    Raises:
        OSError: The folder or file cannot be written. A file that was at ``path`` stays as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(f"{folder}/a.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     [file.name for file in Path(folder).iterdir()]
        ['a.txt']
    """
    path = Path(path)
    prefix = temporary_prefix(path)
    temporary = path.with_name(f"{prefix}{os.getpid()}.tmp")
    with can_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left(path.parent, prefix)
        temporary.unlink(missing_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # through no link of somebody else's
    try:
        mode = temporary.stat().st_mode  # by the umask; safetensors would let only their owner read files
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror or error}: it was not written", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``, which is removed at the end, or by the next run of a killed process."""
    prefix = temporary_prefix(path)
    made = path.with_name(f"{prefix}{os.getpid()}.tmp")
    with can_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left(path.parent, prefix)
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def temporary_prefix(path: Path) -> str:
    """Return the start of the names of this machine's temporary files for a path; process number and .tmp follow."""
    return f".{path.name}.{socket.gethostname()}."


def remove_left(folder: Path, prefix: str) -> None:
    """Remove temporary files and folders with a prefix that killed processes of this machine left behind."""
    for left in folder.iterdir():
        number = left.name.removeprefix(prefix).removesuffix(".tmp")
        if left.name == f"{prefix}{number}.tmp" and number.isdecimal() and not is_alive(int(number)):
            with contextlib.suppress(OSError):
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def is_alive(process: int) -> bool:
    """Return whether a process of this machine has not ended."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


@contextlib.contextmanager
def can_write(path: Path) -> Iterator[None]:
    """Turn an error in making a file or its folder into one that names the output and says what to do."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            f"{path} cannot be written: {error.strerror} ({error.filename}). Give an output in a folder that can be "
            f"written to."
        ) from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the exclusive lock on a file or folder and hold it; go on without where the system has no locks."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_room(file: int, size: int) -> None:
    """Set the size in bytes of an open file and reserve its space if possible, which halves the time to write."""
    try:
        os.posix_fallocate(file, 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        os.ftruncate(file, size)


def save_weights(
    weights: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state dict as one safetensors file: whole under its name, or not at all.

    Args:
        weights: Names to tensors on any device, left unchanged. Tied weights are written once per name.
        path: Ends in ``.safetensors``. The folder is made if necessary; an existing file is replaced.
        metadata: Text for the header.

    Raises:
        OSError: The file cannot be written.
    """
    seen: set[int] = set()
    ready = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if pointer in seen else tensor  # safetensors refuses shared memory
        seen.add(pointer)
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            save_file(ready, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(f"{path} was not written: {error}") from error
        if metadata and len(metadata) > 1:
            _order_metadata(temporary)


def _order_metadata(path: Path) -> None:
    """Sort the text in a header, which safetensors writes in another order each time, so that equal files are equal."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        fields = json.loads(file.read(length))
        fields["__metadata__"] = dict(sorted(fields["__metadata__"].items()))
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # as it is: the same characters in another order
            file.seek(8)
            file.write(text.ljust(length))


def cache_folder() -> Path:
    """Return the cache folder: ``TVA_CACHE``, else ``~/.cache/tva``, else a temporary one."""
    given = os.environ.get("TVA_CACHE")
    try:
        return Path(given or Path.home() / ".cache" / "tva")
    except RuntimeError:  # of a user without a home folder, as in a container
        return Path(tempfile.gettempdir()) / f"tva-{os.getuid()}"
