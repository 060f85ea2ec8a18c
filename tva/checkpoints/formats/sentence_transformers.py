"""Folders of sentence-transformers whose weights are in several sub-folders, one for each module that has some.

Source: the format is what `SentenceTransformer.save` writes: ``modules.json`` lists the modules and their folders.
"""

from pathlib import Path
from typing import Any

from tva.checkpoints.folder import weights_file
from tva.checkpoints.foreign import read_json
from tva.checkpoints.lazy import Entry, Info, LazyWeights, Which

MODULES = "modules.json"


def matches(path: Path) -> bool:
    """Return whether weights are elsewhere than in the folder itself only."""
    return path.is_dir() and (path / MODULES).is_file() and any(part != path for part in _parts(path).values())


def open(path: Path, which: Which = "checkpoint") -> LazyWeights:
    """Open the weights of all modules, under the names that the network as a whole gives them."""
    from tva.checkpoints.open import open_any

    parts = _parts(path)
    opened = {prefix: open_any(weights_file(folder) or folder, which) for prefix, folder in parts.items()}
    entries: dict[str, Entry] = {
        prefix + name: weights.entry(name) for prefix, weights in opened.items() for name in weights
    }
    headers = [weights.metadata for weights in opened.values()]
    common = {key: text for key, text in headers[0].items() if all(other.get(key) == text for other in headers)}
    places = ", ".join(folder.relative_to(path).as_posix() for folder in parts.values())
    info = Info(path, f"sentence-transformers folder, weights in {places}")
    return LazyWeights(info, entries, common)


def part_of_names(path: Path) -> dict[str, str]:
    """Return for each prefix of names the sub-folder of its weights, ``""`` for the folder itself; empty of others."""
    if not matches(path):
        return {}
    parts = {prefix: folder.relative_to(path).as_posix() for prefix, folder in _parts(path).items()}
    return {prefix: "" if part == "." else part for prefix, part in parts.items()}


def _parts(path: Path) -> dict[str, Path]:
    listed = read_json(path / MODULES, [dict])
    found: dict[str, Path] = {}
    for module in listed:
        folder = _inside(path, module)
        if weights_file(folder) is not None:
            transformer = "Transformer" in str(module.get("type"))
            found[f"{module.get('idx')}.{'model.' if transformer else ''}"] = folder
    return found


def _inside(path: Path, module: dict[str, Any]) -> Path:
    folder = path / str(module.get("path", ""))
    if not folder.resolve().is_relative_to(path.resolve()) or not folder.is_dir():
        raise ValueError(f"{path / MODULES} names {module.get('path')!r}, which is not a folder inside of {path}.")
    return folder
