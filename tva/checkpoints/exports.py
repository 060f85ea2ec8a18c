"""Pages, tables and charts under names that a user gave: they replace only what tva wrote there before."""

import os
import re
import struct
import zlib
from pathlib import Path

from tva.checkpoints.atomic import atomic_path
from tva.checkpoints.protect import refuse

_SAID = b"Software\0tva"
_PNG_MARK = struct.pack(">I", len(_SAID)) + b"tEXt" + _SAID + struct.pack(">I", zlib.crc32(b"tEXt" + _SAID))
_PNG_END = 12  # bytes of the last part of a PNG, which the mark comes before
MARKS = {".svg": b"<!-- tva -->\n", ".pdf": b"\n% tva\n", ".html": b"<!-- tva -->\n"}
MARKS[".htm"] = MARKS[".html"]


def write_export(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file whole or not at all, over an earlier one of the same kind only.

    Raises:
        FileExistsError: See `check_export`.
    """
    path = Path(path)
    content = content.encode() if isinstance(content, str) else content
    check_export(path, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(_marked(content, path.suffix.lower()))
    return path


def check_export(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Check that a file is not there, or is an earlier one of the same kind.

    Pages and charts have a mark of tva at their end. A table is one that tva wrote if it has the same heading.

    Args:
        path: What will be written.
        content: What it will hold; of a table the heading is enough.

    Raises:
        FileExistsError: The file is another.
    """
    path = Path(path)
    if not path.exists():
        return
    content, suffix = content.encode() if isinstance(content, str) else content, path.suffix.lower()
    if not path.is_file():
        refuse(path)
    with path.open("rb") as file:
        start = file.read(4096)
        file.seek(max(0, path.stat().st_size - 64))
        end = file.read(64)
    marked = MARKS.get(suffix, _PNG_MARK) in end and suffix in (*MARKS, ".png")
    if not marked and _heading(start, suffix) != _heading(content[:4096], suffix):
        refuse(path)


def _marked(content: bytes, suffix: str) -> bytes:
    if suffix == ".png":
        return content[:-_PNG_END] + _PNG_MARK + content[-_PNG_END:]
    mark = MARKS.get(suffix, b"")
    return content if mark in content[-64:] else content + mark


def _heading(content: bytes, suffix: str) -> object:
    """Return what tables of one kind begin with alike; of other files, something that equals nothing."""
    if suffix == ".json":
        return re.findall(rb'(?m)^ *"(\w+)":|^([\[{])', content)[:3]
    first = content.split(b"\n", 1)[0].strip()
    if suffix == ".csv":
        return first.split(b",")[:2]
    return first if suffix in (".tex", ".md") else object()
