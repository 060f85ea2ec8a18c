"""Put an edited model on the Hugging Face hub: weights, task vectors and model card in one commit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tva.checkpoints import find, fingerprint, open_weights
from tva.checkpoints.hub import upload
from tva.edit.runs import changed_inputs
from tva.report.edit_report import read_report
from tva.report.model_card import model_card, with_base_model
from tva.report.run_files import CARD, EDIT_JSON, EDITED, PAGE
from tva.vectors.header import is_vector_file


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be.

    Attributes:
        repository: ``owner/name``.
        url: Of the commit; None where nothing was sent.
        files: Name in the repository to bytes.
        notes: What was left out, and why.
    """

    repository: str
    url: str | None
    files: Mapping[str, int]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def push(
    run: str | os.PathLike[str],
    repository: str,
    *,
    base_model: str | None = None,
    vectors: bool = True,
    public: bool = False,
    dry_run: bool = False,
) -> Pushed:
    """Upload a run's edited weights, task vectors, report and model card in one commit.

    Args:
        run: Folder of a finished edit, with its ``edit.json``.
        repository: ``owner/name`` on the hub; made, private, if there is none.
        base_model: ``owner/name`` of the base on the hub, for the card.
        vectors: Upload the recipe's task vectors too, as ``vectors/NAME.tv.safetensors``.
        public: Make a new repository public.
        dry_run: Send nothing; return what would be uploaded.

    Returns:
        What went up.

    Raises:
        ValueError: There are no weights to push, or they or a vector are not those that the card describes.
        OSError: The hub cannot be reached, or refuses.
    """
    folder = Path(run)
    content = read_report(folder)
    folder = folder if folder.is_dir() else folder.parent
    if not content["holds"]:
        raise ValueError(f"{run} has no edited weights to push, for its constraints do not hold: {content['verdict']}")
    weights = folder / EDITED
    if not weights.exists():
        raise FileNotFoundError(f"{weights} is missing: the edit wrote it there. Make the edit again.")
    expected = (content.get("edited") or {}).get("fingerprint")
    found = fingerprint(open_weights(weights)).digest
    if expected is not None and found != expected:
        raise ValueError(
            f"{weights} is not what the edit wrote: its fingerprint is {found}, and {EDIT_JSON} says {expected}. Make "
            f"the edit again, so that the card describes what is pushed."
        )
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).exists() else model_card(content, base_model)
    if base_model is not None:
        card = with_base_model(card, base_model)
    files: dict[str, Path | bytes] = {CARD: card.encode(), EDITED: weights}
    files |= {name: folder / name for name in (EDIT_JSON, PAGE) if (folder / name).exists()}
    notes = []
    for name, vector in content["vectors"].items() if vectors else ():
        path = find(vector["path"])
        if not is_vector_file(path):
            notes.append(f"{name} is the checkpoint {path}, and only task vector files are pushed")
            continue
        files[f"vectors/{name}.tv.safetensors"] = path
    changed = changed_inputs(content) if vectors else []
    if changed:
        raise ValueError(f"{' '.join(changed)} Make the edit again, or push without vectors (--vectors=false).")
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    url = None if dry_run else upload(files, repository, f"tva edit: {content['recipe']}", private=not public)
    return Pushed(repository, url, sizes, notes)
