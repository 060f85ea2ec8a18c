"""Refuse outputs that would replace an input or a file that tva did not write, or change how an input is read."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NoReturn

from tva.checkpoints.folder import weights_file, weights_name
from tva.checkpoints.foreign import read_json
from tva.checkpoints.formats import safetensors
from tva.checkpoints.hub import is_hub
from tva.checkpoints.open import read_metadata

WRITTEN = ("tva.recipe", "tva.format")  # in the header of what tva writes, and may write once more
_OWN: dict[str, Callable[[Mapping[str, str]], bool]] = {  # by what a file is, how its header tells
    "weights": lambda header: "tva.recipe" in header and "tva.format" not in header,
    "vector": lambda header: "tva.format" in header and "tva.recipe" not in header,
    "undo": lambda header: "tva.undo_block" in header,
}


def protect(outputs: Iterable[str | os.PathLike[str]], inputs: Mapping[str, str | os.PathLike[str]]) -> None:
    """Check that outputs replace no input and do not change how an input is read.

    Args:
        outputs: Every file or folder that will be written.
        inputs: What an input is called, to its path: a file, or a folder of any checkpoint format.

    Raises:
        ValueError: An output is an input by its path, a link or a hard link; is a file of an input folder that tva did
            not write; is in an input folder in which a file more would change which weights are read; or has no name.
    """
    outputs = [Path(output) for output in outputs]
    for output in outputs:
        if not output.name or "\0" in str(output):
            found = "has a NUL character" if output.name else "is the working directory or the root"
            raise ValueError(f"output must be the name of a file or of a folder; {str(output)!r} {found}.")
    for what, path in inputs.items():
        if not is_hub(path) and Path(path).exists():
            for output in outputs:
                _check(output, what, Path(path))


def is_own(path: Path, kind: str) -> bool:
    """Return whether a file is one that tva wrote, of a kind: ``weights`` of an edit, ``vector`` or ``undo``."""
    try:
        return _OWN[kind](safetensors.open(path).metadata)
    except (KeyError, OSError, ValueError):
        return False


def check_own(path: str | os.PathLike[str], kind: str) -> None:
    """Check that writing a file replaces nothing but an earlier one of the same kind.

    Args:
        path: What will be written; a folder that is there is checked by what writes it.
        kind: ``weights`` of an edit, ``vector``, ``undo``; of any other, no file is replaced.

    Raises:
        FileExistsError: Another file is there.
    """
    if (path := Path(path)).exists() and not path.is_dir() and not is_own(path, kind):
        refuse(path)


def refuse(path: Path) -> NoReturn:
    """Raise because a file is there that may not be replaced."""
    raise FileExistsError(
        f"output {path} is there already, and is not an earlier output of this kind that tva wrote. Move it, or give "
        f"another output."
    )


def _check(output: Path, what: str, path: Path) -> None:
    given = f"what is given as {what}, {path}"
    hidden = (output.with_name(f".{output.name}.{ending}") for ending in ("partial", "journal"))
    there = {_identity(each) for each in (output, *hidden) if each.exists()}
    if there & {_identity(path), *map(_identity, _files_read(path))}:
        part = ", or a file of it" if path.is_dir() else ""
        raise ValueError(f"output {output} is {given}{part}, and would replace it. Give another output.")
    if not path.is_dir() or path.resolve() not in output.resolve().parents:
        return
    if output.is_file() and not any(key in read_metadata(output) for key in WRITTEN):
        raise ValueError(f"output {output} is in {given}, and would replace a file of it. Give another output.")
    names = {each.name for each in path.iterdir()}
    added = {output.name} if output.parent.resolve() == path.resolve() else set()
    known = weights_name(names)
    if known is None or known != weights_name(names | added):
        raise ValueError(
            f"output {output} is in {given}, in which a file more would change which weights are read. Give an output "
            f"outside of that folder."
        )


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _files_read(path: Path) -> list[Path]:
    """Return the files that are read of an input; of a folder without a known name of weights, all that are in it."""
    known = weights_file(path) if path.is_dir() else path
    if known is None:
        return [each for each in path.rglob("*") if each.is_file()]
    if not known.name.endswith(".index.json"):
        return [known]
    weight_map: dict[str, str] = read_json(known, {"weight_map": {str: str}}).get("weight_map") or {}
    shards = {known.parent / name for name in weight_map.values()}
    return [known, *(shard for shard in shards if shard.is_file())]
