"""What is in a model's folder: the file of its weights, and its configuration."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tva.checkpoints.foreign import read_json


def weights_file(folder: Path) -> Path | None:
    """Return the file that is a folder's whole model, or the index of its shards, by the names that libraries use."""
    name = weights_name(path.name for path in folder.iterdir())
    return None if name is None else folder / name


def weights_name(names: Iterable[str]) -> str | None:
    """Return which of a folder's names is the whole model, or the index of its shards."""
    names = sorted(names)
    for known, ending in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        for candidates in (
            [known + ending],
            [f"{known}{ending}.index.json"],
            [name for name in names if name.endswith(f"{ending}.index.json")],
        ):
            found = [name for name in candidates if name in names]
            if len(found) == 1:
                return found[0]
    return None


def model_config(path: Path) -> dict[str, Any]:
    """Return the ``config.json`` in a model's folder, or beside its file; empty if there is none.

    Raises:
        ValueError: It is not a JSON object.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    return read_json(file) if file.exists() else {}


def is_undo(name: str) -> bool:
    """Return whether a name is that of an undo file, which `tva compose` writes beside the weights."""
    return name == "undo.safetensors" or name.endswith(".undo.safetensors")
