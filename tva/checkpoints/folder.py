"""Which file of a folder holds the model."""

from __future__ import annotations

from pathlib import Path


def weights_file(folder: Path) -> Path | None:
    """Return the file that is a folder's whole model, or the index of its shards, by the names that libraries use."""
    names = sorted(path.name for path in folder.iterdir())
    for known, ending in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        for candidates in (
            [known + ending],
            [f"{known}{ending}.index.json"],
            [name for name in names if name.endswith(f"{ending}.index.json")],
        ):
            found = [name for name in candidates if name in names]
            if len(found) == 1:
                return folder / found[0]
    return None
