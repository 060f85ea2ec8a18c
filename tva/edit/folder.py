"""The folder of an edit: whose files may be replaced, and how a new edit takes the place of an earlier one."""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tva.checkpoints import LazyWeights, open_weights
from tva.checkpoints.atomic import can_write, hidden_folder, locked, remove_left, temporary_prefix
from tva.compose.undo import undo_path
from tva.report.edit_report import read_report
from tva.report.model_card import check_card
from tva.report.run_files import CARD, CONFIG, EDIT_JSON, EDITED, PAGE

UNDO = undo_path(Path(EDITED)).name
FILES = (EDIT_JSON, PAGE, CONFIG, CARD, EDITED, UNDO)
MADE_BY = "# written by tva edit"  # the first line of its config.yaml
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


def own_files(folder: Path) -> list[str]:
    """Return the paths, in the folder of an edit, of the files that are part of it, whether they are there or not."""
    try:
        edited = read_report(folder, whole=False).get("edited") or {}
    except (ValueError, FileNotFoundError):
        edited = {}
    files = edited.get("files", []) if isinstance(edited, dict) else []
    plain = [name for name in files if isinstance(name, str) and not Path(name).is_absolute() and ".." not in name]
    return list(dict.fromkeys([*FILES, *plain]))


def check_output(folder: Path, inputs: Iterable[str | os.PathLike[str]], files: Iterable[str] = FILES) -> None:
    """Check that no input and no file that tva did not write would be replaced.

    Args:
        folder: Output folder of an edit.
        inputs: Files and folders that the edit reads.
        files: Paths in the folder that the edit may write.

    Raises:
        ValueError: One would be.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output of an edit must be a folder, and {folder} is a file. Choose another output.")
    inputs = list(inputs)
    same = [path for path in inputs if folder.exists() and os.path.exists(path) and os.path.samefile(path, folder)]
    if same:
        raise ValueError(f"{same[0]} is an input of the edit, which would replace it. Choose another output.")
    check_card(folder)
    own = own_files(folder)
    for name in dict.fromkeys([*FILES, *files]):
        file = folder / name
        if not file.exists():
            continue
        same = [path for path in inputs if os.path.exists(path) and os.path.samefile(path, file)]
        if same:
            raise ValueError(f"{same[0]} is an input of the edit, which would replace it. Choose another output.")
        if (name in FILES and not _is_own(file)) or name not in own:
            raise ValueError(
                f"The edit writes {file}, where a file is that tva did not write. Move it, or choose another output."
            )


def check_writable(folder: Path) -> None:
    """Check that an edit can write its folder, before anything is evaluated.

    Raises:
        OSError: It cannot; the message names the folder.
    """
    folder = folder.resolve()
    there = next(parent for parent in folder.parents if parent.exists())
    prefix = temporary_prefix(folder)
    made = there / f"{prefix}{os.getpid()}.tmp"
    with can_write(folder):
        remove_left(there, prefix)
        made.mkdir()
        made.rmdir()


def _is_own(file: Path) -> bool:
    if file.name == CONFIG:
        with file.open("rb") as opened:
            return opened.readline().strip() == MADE_BY.encode()
    try:
        read_report(file.parent, whole=False)
    except (ValueError, FileNotFoundError):
        return file.name == CARD or (file.name in (EDITED, UNDO) and _has_record(file))
    return True


def _has_record(file: Path) -> bool:
    try:
        weights: LazyWeights = open_weights(file)
    except ValueError:
        return False
    return any(key.startswith("tva.") for key in weights.metadata)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a folder in which to write an edit, which then takes the place of an earlier edit, whole or not at all.

    Files in ``folder`` that are no part of an edit stay. On Linux the two folders change places in one step; elsewhere
    in two. A folder that cannot be moved, such as the working directory, gets the new files one after another.
    """
    folder = folder.resolve()
    with hidden_folder(folder) as staging:
        yield staging
        for file in filter(Path.is_file, staging.iterdir()):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        with locked(folder.parent):
            _put(staging, folder)


def _put(staging: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(staging, folder)
        return
    kept = f"accepted-{_created(folder)}" if has_weights(folder) and not has_weights(staging) else None
    own = own_files(folder)
    if Path.cwd().is_relative_to(folder) or folder.is_mount():
        _put_files(staging, folder, kept)
        return
    if kept is not None:
        _link(folder, staging / kept, [name for name in own if (folder / name).exists()])
    gone = _superseded(folder) if has_weights(staging) else []
    _link_rest(folder, staging, {*own, *gone})
    shutil.copymode(folder, staging)
    _exchange(staging, folder)
    if kept is not None:
        _tell(folder / kept)


def _put_files(staging: Path, folder: Path, kept: str | None) -> None:
    """Replace the files of an earlier edit one after another; ``edit.json`` comes last."""
    own = own_files(folder)
    names = [name for name in dict.fromkeys([*own, *own_files(staging)]) if name != EDIT_JSON]
    if kept is not None:
        _link(folder, folder / kept, [name for name in own if (folder / name).exists()])
    for name in [*names, EDIT_JSON]:
        if (staging / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    for name in _superseded(folder) if has_weights(folder) and kept is None else []:
        shutil.rmtree(folder / name)
    if kept is not None:
        _tell(folder / kept)


def has_weights(folder: Path) -> bool:
    """Whether an edit has written weights into a folder."""
    return any((folder / name).exists() for name in own_files(folder) if Path(name).suffix in (".safetensors", ".ckpt"))


def _superseded(folder: Path) -> list[str]:
    """Return folders of earlier accepted edits that hold nothing but their files: a new accepted edit replaces them."""
    found = [
        path for path in folder.glob("accepted-*") if path.is_dir() and not path.is_symlink() and has_weights(path)
    ]
    return [path.name for path in found if _files_in(path) <= set(own_files(path))]


def _files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _created(folder: Path) -> str:
    """Return when the edit in a folder was made, as part of a file name."""
    try:
        return "".join(filter(str.isalnum, str(read_report(folder, whole=False).get("created"))))
    except (ValueError, FileNotFoundError):
        return str(folder.stat().st_mtime_ns)


def _tell(kept: Path) -> None:
    print(f"tva: this edit was refused; the accepted edit that was in its folder is now in {kept}", file=sys.stderr)


def _link_rest(source: Path, target: Path, own: set[str], inside: str = "") -> None:
    """Link what is in a folder and is no part of the edit there, and empty no folder that has such files."""
    for name in os.listdir(source / inside):
        path = f"{inside}/{name}" if inside else name
        if any(each.startswith(f"{path}/") for each in own) and not (source / path).is_symlink():
            _link_rest(source, target, own, path)
        elif path not in own:
            _link(source, target, [path])


def _link(source: Path, target: Path, names: Iterable[str]) -> None:
    """Hard-link files and folders into another folder; where the file system has no links, a copy."""
    target.mkdir(exist_ok=True)
    for name in names:
        path, copy = source / name, target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            os.symlink(os.readlink(path), copy)
        elif path.is_dir():
            _link(path, copy, os.listdir(path))
            shutil.copystat(path, copy)
        else:
            try:
                os.link(path, copy)
            except OSError:
                shutil.copy2(path, copy)


def _exchange(staging: Path, folder: Path) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        names = os.fsencode(staging), os.fsencode(folder)
        if library.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(number, os.strerror(number), os.fspath(folder))
    aside = staging.with_suffix(".old")
    os.replace(folder, aside)
    try:
        os.replace(staging, folder)
    except OSError:
        os.replace(aside, folder)
        raise
    os.replace(aside, staging)
