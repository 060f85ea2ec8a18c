"""Put an edited model on the Hugging Face hub: weights, task vectors and model card in one commit."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tva.checkpoints import find, fingerprint, open_weights
from tva.checkpoints.hub import upload
from tva.compose.record import Record
from tva.edit.card_facts import card_facts
from tva.edit.folder import own_files
from tva.edit.form import format_of
from tva.edit.runs import changed_inputs
from tva.report.edit_report import read_report
from tva.report.model_card import composed_card, model_card, with_base_model
from tva.report.run_files import CARD, EDIT_JSON, EDITED, PAGE
from tva.vectors.header import is_vector_file

Files = dict[str, Path | bytes]


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, or would be.

    Attributes:
        repository: ``owner/name``.
        url: Of the commit; None where nothing was sent.
        files: Name in the repository to bytes.
        notes: What was left out and why, or what to do first.
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
    """Upload edited weights, their task vectors and a model card in one commit.

    Args:
        run: Folder of a finished edit, with its ``edit.json``; or what ``tva compose`` wrote, a folder or a file.
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
    path = find(run)
    content = None if _is_composed(path) else read_report(path)
    if content is None:
        files, recipe, inputs = _composed(path, base_model)
        changed: list[str] = []
    else:
        files, recipe, inputs = _edited(path if path.is_dir() else path.parent, content, base_model)
        changed = changed_inputs(content) if vectors else []
    notes = []
    for name, vector in inputs.items() if vectors else ():
        try:
            found = find(vector)
        except FileNotFoundError:
            notes.append(f"left out: {name} is no longer at {vector}")
            continue
        if not is_vector_file(found):
            notes.append(f"left out: {name} is the checkpoint {found}, and only task vector files are pushed")
            continue
        files[f"vectors/{name}.tv.safetensors"] = found
    if changed:
        raise ValueError(f"{' '.join(changed)} Make the edit again, or push without vectors (--vectors=false).")
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    url = None if dry_run else upload(files, repository, f"tva edit: {recipe}", private=not public)
    return Pushed(repository, url, sizes, notes)


def check_edited(folder: Path) -> None:
    """Check that an edit holds, and that its weights are those that its report describes.

    Raises:
        ValueError: They are not, or its constraints do not hold.
        FileNotFoundError: There are none.
    """
    _edited(folder, read_report(folder), None)


def push_space(folder: Path, repository: str, public: bool = False, dry_run: bool = False) -> Pushed:
    """Upload a demo as a Space, in one commit.

    Args:
        folder: What `tva.edit.space.write_space` wrote.
        repository: ``owner/name`` on the hub; made, private, if there is none.
        public: Make a new repository public.
        dry_run: Send nothing; return what would be uploaded.

    Raises:
        OSError: The hub cannot be reached, or refuses.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    files: Files = {file.relative_to(folder).as_posix(): file for file in found}
    sizes = {name: file.stat().st_size for name, file in zip(files, found, strict=True)}
    message = "tva push --space: base beside edited"
    url = None if dry_run else upload(files, repository, message, private=not public, space="gradio")
    return Pushed(repository, url, sizes, [f"try it first: python {folder / 'app.py'}"] if dry_run else [])


def _is_composed(path: Path) -> bool:
    if path.name == EDIT_JSON or (path / EDIT_JSON).exists():
        return False
    try:
        return "tva.recipe" in open_weights(path).metadata
    except ValueError:
        return False


def _edited(folder: Path, content: Mapping[str, Any], base_model: str | None) -> tuple[Files, str, dict[str, str]]:
    if not content["holds"]:
        verdict = content["verdict"]
        raise ValueError(f"{folder} has no edited weights to push, for its constraints do not hold: {verdict}")
    edited = content.get("edited") or {}
    weights = folder / edited.get("path", EDITED)
    lacking = [folder / name for name in edited.get("files", [EDITED]) if not (folder / name).exists()]
    if lacking:
        raise FileNotFoundError(f"{lacking[0]} is missing: the edit wrote it there. Make the edit again.")
    expected, found = edited.get("fingerprint"), fingerprint(open_weights(weights)).digest
    if expected is not None and found != expected:
        raise ValueError(
            f"{weights} is not what the edit wrote: its fingerprint is {found}, and {EDIT_JSON} says {expected}. Make "
            f"the edit again, so that the card describes what is pushed."
        )
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).exists() else model_card(content, base_model)
    if base_model is not None:
        card = with_base_model(card, base_model)
    files: Files = {CARD: card.encode()}
    kept = [name for name in own_files(folder) if name in edited.get("files", [EDITED]) or name in (EDIT_JSON, PAGE)]
    present = [name for name in kept if (folder / name).exists() and ".undo." not in f".{name}"]
    files |= {name: _inside(folder, folder / name) for name in present}
    return files, content["recipe"], {name: vector["path"] for name, vector in content["vectors"].items()}


def _inside(folder: Path, file: Path) -> Path:
    """Return a file of a folder, which somebody else may have made, if it is in there.

    Raises:
        ValueError: It is a link to something else, which is not to be published.
    """
    if folder.resolve() not in file.resolve().parents:
        raise ValueError(f"{file} is a link to a file outside of {folder}. Copy the file there, or remove the link.")
    return file


def _composed(path: Path, base_model: str | None) -> tuple[Files, str, dict[str, str]]:
    weights = open_weights(path)
    record = Record.read(weights)
    found = fingerprint(weights).digest
    if found != record.edited_fingerprint:
        raise ValueError(
            f"{path} is not what tva compose wrote: its fingerprint is {found}, and its record says "
            f"{record.edited_fingerprint}. Compose it again, so that the card describes what is pushed."
        )
    folder = path if path.is_dir() else None
    facts = card_facts(format_of(path), folder, record.base)
    if base_model is not None:
        facts["base_model"] = base_model
    files: Files = {CARD: composed_card(vars(record), facts).encode()}
    for file in sorted(path.rglob("*")) if folder else [path]:
        name = file.relative_to(path).as_posix() if folder else file.name
        if file.is_file() and name != CARD and not file.name.startswith(".") and ".undo." not in f".{name}":
            files[name] = _inside(path, file) if folder else file
    return files, record.recipe, dict(record.vectors)
