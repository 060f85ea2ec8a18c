"""Read files of unknown origin: regular files only, within limits, and JSON only in a stated form.

Whatever is wrong with such a file is a ValueError that names the file and the field.
"""

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

TEXT_BYTES = 2**27  # of a file that is read whole: an index of a million tensors takes less
MAX_DEPTH = 100  # of JSON: lists and objects in one another
SHOWN = 80  # characters of a foreign value in a message

Form = Any  # see `check_form`


class ForeignFileError(ValueError):
    """A file of unknown origin is refused; the message is complete and names it."""


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor; a pipe or device is refused without waiting for it.

    Raises:
        ForeignFileError: It is a folder, a pipe, a socket or a device.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or a socket"
        raise ForeignFileError(f"{path} must be a regular file, and is {found}. Give the file itself.")
    return descriptor


def read_bytes(path: Path, limit: int = TEXT_BYTES) -> bytes:
    """Read a whole regular file of at most ``limit`` bytes.

    Raises:
        ForeignFileError: It is larger, or not a regular file.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    if data is None or len(data) > limit:
        raise ForeignFileError(f"{path} is larger than the {limit} bytes that such a file may have. Is it damaged?")
    return data


def read_start(path: Path, count: int) -> bytes:
    """Read at most the first ``count`` bytes of a regular file."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(count)


def read_json(path: Path, form: Form = dict) -> Any:
    """Read a JSON file of a stated form; see `check_form`.

    Raises:
        ForeignFileError: It is too large, is not JSON, or has another form.
    """
    return parse_json(read_bytes(path), str(path), form)


def parse_json(text: str | bytes, where: str, form: Form = dict) -> Any:
    """Parse JSON of a stated form.

    Args:
        text: The JSON.
        where: File and field, for errors.
        form: What it must be; see `check_form`.

    Raises:
        ForeignFileError: It is not JSON, is nested too deeply, or has another form.

    Example:
        >>> parse_json('{"a": [1, 2]}', "x.json", {str: [int]})
        {'a': [1, 2]}
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ForeignFileError(f"{where} is nested too deeply. Is it damaged?") from error
    except UnicodeDecodeError as error:
        raise ForeignFileError(f"{where} is not valid JSON, for it is not text. Is another file meant?") from error
    except ValueError as error:
        raise ForeignFileError(f"{where} is not valid JSON ({error}). Write it again from its source.") from error
    level, depth = [value], 0
    while level:
        depth += 1
        children = [
            item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)
        ]
        level = [child for group in children for child in group]
    if depth > MAX_DEPTH:
        raise ForeignFileError(f"{where} is nested {depth} deep; at most {MAX_DEPTH} is read. Is it damaged?")
    check_form(value, form, where)
    return value


def check_form(value: Any, form: Form, where: str) -> None:
    """Check the form of a parsed value.

    Args:
        value: Of JSON.
        form: A type (``float`` includes integers, ``int`` excludes booleans), None, ``[form]`` for a list,
            ``{str: form}`` for a mapping whose values all have a form, ``{"key": form}`` for a mapping in which ``key``
            has a form where it is present, or a tuple of forms any of which will do.
        where: File and field, for errors.

    Raises:
        ForeignFileError: It has another form.

    Example:
        >>> check_form({"r": "8"}, {"r": int}, "adapter_config.json")
        Traceback (most recent call last):
        tva.checkpoints.foreign.ForeignFileError: adapter_config.json: 'r' must be an integer; it is '8'.
    """
    problem = _problem(value, form)
    if problem is not None:
        keys, wanted, found = problem
        place = "".join(f": {shown(key)}" for key in keys)
        raise ForeignFileError(f"{where}{place} must be {wanted}; it is {found}.")


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**64:
        raise ValueError(f"an integer of {len(text):,} digits, where at most 64 bits are read")
    return number


_WORDS = {str: "text", int: "an integer", float: "a number", bool: "true or false", dict: "an object", list: "a list"}


def _problem(value: Any, form: Form) -> tuple[tuple[Any, ...], str, str] | None:
    """Return the path to the first part of another form, what it must be, and what it is."""
    if isinstance(form, tuple):
        problems = [_problem(value, one) for one in form]
        if None in problems:
            return None
        inner = max(problems, key=lambda problem: len(problem[0]))
        return inner if inner[0] else ((), " or ".join(dict.fromkeys(problem[1] for problem in problems)), inner[2])
    if form is None:
        return None if value is None else ((), "null", shown(value))
    if isinstance(form, type):
        fits = isinstance(value, (int, float) if form is float else form) and (
            form is bool or not isinstance(value, bool)
        )
        return None if fits else ((), _WORDS[form], shown(value))
    if isinstance(form, list):
        if not isinstance(value, list):
            return (), "a list", shown(value)
        return _first((index, item, form[0]) for index, item in enumerate(value))
    if not isinstance(value, dict):
        return (), "an object", shown(value)
    if str in form:
        return _first((key, item, form[str]) for key, item in value.items())
    return _first((key, value[key], wanted) for key, wanted in form.items() if key in value)


def _first(items: Iterable[tuple[Any, Any, Form]]) -> tuple[tuple[Any, ...], str, str] | None:
    for key, item, form in items:
        if (problem := _problem(item, form)) is not None:
            return (key, *problem[0]), *problem[1:]
    return None


def shown(value: Any) -> str:
    """Return a foreign value for a message: text and numbers cut short, of anything else the kind only.

    Example:
        >>> shown([1, 2]), shown("x" * 200)[-8:]
        ('a list', "xxxxxx…'")
    """
    if isinstance(value, str):
        return repr(value if len(value) <= SHOWN else value[: SHOWN - 1] + "…")
    if value is None:
        return "null"
    if isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 10**SHOWN else "an integer of more than 80 digits"
    return _WORDS.get(type(value), f"an object of type {type(value).__name__[:SHOWN]}")


def is_plain_name(name: str) -> bool:
    """Return whether a name that a file gives for another file is one in the same folder.

    Example:
        >>> is_plain_name("model-1.safetensors"), is_plain_name(".."), is_plain_name("a/b"), is_plain_name("")
        (True, False, False, False)
    """
    return name not in ("", ".", "..") and "\0" not in name and "\\" not in name and Path(name).name == name


_KINDS = {
    b"GGUF": "a GGUF file: take the checkpoint that it was made from",
    b"\x89HDF": "an HDF5 file (Keras): save its weights with safetensors",
    b"\x93NUMPY": "a NumPy array: save a mapping of names to tensors with safetensors",
    b"PK\x03\x04": "a zip file",
    b"\x80": "a pickle",
    b"\x1f\x8b": "a gzip file: unpack it",
    b"\xfd7zXZ": "an xz file: unpack it",
    b"BZh": "a bzip2 file: unpack it",
    b"\x28\xb5\x2f\xfd": "a Zstandard file: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
}


def content_of(path: Path) -> str:
    """Return in words what a file's content is, for an error, with what to do about it; empty if it is not known."""
    start = read_start(path, 265)
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, which 'git lfs pull' replaces by the file"
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it"
    for magic, kind in _KINDS.items():
        if start.startswith(magic):
            return kind
    text = start[:60].isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in start[:60])
    return f"text that begins with {start[:30].decode()!r}" if text else ""
