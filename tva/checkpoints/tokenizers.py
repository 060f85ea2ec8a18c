"""The tokenizer beside a model's weights: its files, and which id each token has."""

import json
from pathlib import Path
from typing import Any

from tva.checkpoints.foreign import read_json
from tva.checkpoints.hub import fetch_beside, is_hub
from tva.errors import MismatchError, some

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "added_tokens.json")


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return a folder's files of a tokenizer, by name."""
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def fetch_tokenizer(path: str) -> None:
    """Download the tokenizer and configuration beside weights on the hub; nothing is done for another path."""
    if is_hub(path):
        fetch_beside(path, lambda names: [name for name in names if name in (*TOKENIZER_FILES, "config.json")])


def token_ids(folder: Path) -> dict[str, int] | None:
    """Return the id of every token, from the files in which it can be read; None if there is none of them.

    Raises:
        ValueError: A file has another form.
    """
    if (folder / "tokenizer.json").is_file():
        return _ids_of_json(folder / "tokenizer.json")
    found: dict[str, Any] = {}
    if (folder / "vocab.json").is_file():
        found = dict(read_json(folder / "vocab.json", dict))
    elif (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        found = {token: at for at, token in enumerate(lines) if token or at < len(lines) - 1}
    if (folder / "added_tokens.json").is_file():
        found |= read_json(folder / "added_tokens.json", dict)
    return found or None


def _ids_of_json(path: Path) -> dict[str, int]:
    content = read_json(path, dict)
    model, added = content.get("model"), content.get("added_tokens", [])
    vocabulary = model.get("vocab", {}) if isinstance(model, dict) else None
    if isinstance(vocabulary, list) and all(isinstance(entry, list) and entry for entry in vocabulary):
        vocabulary = {str(entry[0]): at for at, entry in enumerate(vocabulary)}  # of a unigram model, with a score each
    if not isinstance(vocabulary, dict):
        raise ValueError(
            f"{path}: model.vocab must map tokens to ids, or list tokens; found {type(vocabulary).__name__}."
        )
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError(f"{path}: added_tokens must be a list of objects with 'content' and 'id'.")
    ids = vocabulary | {str(token.get("content")): token.get("id") for token in added}
    odd = next((token for token, at in ids.items() if not isinstance(at, int)), None)
    if odd is not None:
        raise ValueError(f"{path}: the id of {odd!r:.60} must be an integer; found {ids[odd]!r:.60}.")
    return ids


def check_same_ids(base: Path, other: Path, advice: str) -> None:
    """Check that two tokenizers map the ids that both models know to the same tokens, where both are there.

    Args:
        base: The base's folder.
        other: The fine-tuned model's.
        advice: What to do otherwise.

    Raises:
        MismatchError: An id stands for different tokens.
    """
    if _same_files(base, other):
        return
    mine, theirs = token_ids(base), token_ids(other)
    if mine is None or theirs is None:
        return
    tokens, others = ({at: token for token, at in ids.items()} for ids in (mine, theirs))
    both = sorted(tokens.keys() & others.keys())
    differing = [at for at in both if tokens[at] != others[at]]
    if differing:
        shown = some(f"{at}: {json.dumps(tokens[at])} and {json.dumps(others[at])}" for at in differing)
        raise MismatchError(
            f"The tokenizers of {base} and {other} must give the same ids to the same tokens, since rows of embeddings "
            f"are added up by id; {len(differing)} of {len(both)} ids in both are other tokens: {shown}. {advice}"
        )


def _same_files(base: Path, other: Path) -> bool:
    for name in VOCABULARIES:
        files = base / name, other / name
        there = [file.is_file() for file in files]
        if any(there) and not (all(there) and _equal(*files)):
            return False
    return True


def _equal(left: Path, right: Path) -> bool:
    if left.stat().st_size != right.stat().st_size:
        return False
    return left.samefile(right) or left.read_bytes() == right.read_bytes()
