"""What goes beside the weights of an edited model: the base's files, made true where layers or vocabulary changed."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tva.checkpoints import find, model_folder, side_files
from tva.checkpoints.folder import model_config
from tva.checkpoints.tokenizers import TOKENIZER_FILES, token_ids, tokenizer_files
from tva.checkpoints.with_adapter import parts_of
from tva.compose.engine import Composer
from tva.compose.inputs import Slices
from tva.compose.slices import layer_config, parse_slices
from tva.compose.syntax import BASE

_TOKENS = re.compile(r"embed_tokens|word_embeddings|tok_embeddings|embed_in\b|\bwte\b|\bshared\b", re.IGNORECASE)


class Beside:
    """What goes beside the weights, checked before anything is computed.

    Args:
        composer: The edit.
        given: Paths of the inputs by name.
        slices: Which layers the output is made of.
        tokenizer: The input whose tokenizer it gets; empty for the one whose vocabulary it has.

    Attributes:
        notes: What was decided.

    Raises:
        ValueError: The configuration does not say what must change, or the tokenizer does not fit.
    """

    def __init__(self, composer: Composer, given: Mapping[str, str], slices: Slices | None, tokenizer: str) -> None:
        self._composer, self._base = composer, find(parts_of(given[BASE])[0])
        self._changed = _changes(composer, given, slices)
        self.notes: list[str] = []
        self._tokenizer: dict[str, Path] = {}
        side = tokenizer or _matching(composer)
        folder = model_folder(find(parts_of(given[side])[0])) if side in given else None
        if side != BASE:
            self._tokenizer = tokenizer_files(folder) if folder else {}
        if tokenizer and side != BASE and not self._tokenizer:
            raise ValueError(f"tokenizer={tokenizer!r}: there is no tokenizer in {folder or given[side]}.")
        if side != BASE and not self._tokenizer:
            self.notes = [f"{side} has new rows and no tokenizer beside it: the base's is carried along"]
        if tokenizer and folder is not None:
            _check_fits(composer, folder)

    def files(self) -> tuple[dict[str, bytes | Path], list[str]]:
        """Return, when all is computed, path in the folder to the file or its contents; and what is left out."""
        composer = self._composer
        untied, dequantized = bool(composer.untied()), composer.dequantizes
        beside, left_out = side_files(self._base, composer.dtype, untied, dequantized, self._changed)
        if self._tokenizer:
            beside = {name: file for name, file in beside.items() if name not in TOKENIZER_FILES} | self._tokenizer
        return beside, left_out


def _changes(composer: Composer, given: Mapping[str, str], slices: Slices | None) -> dict[str, Any]:
    config = model_config(find(parts_of(given[BASE])[0]))
    parts = parse_slices(slices or {}, given).get(BASE)
    changes: dict[str, Any] = {}
    if config and parts:
        folders = {part.name: find(parts_of(given[part.name])[0]) for part in parts}
        changes |= layer_config(config, parts, folders)
    for name, more in list(composer.more_rows.items())[:1]:
        old, new = composer.base.spec(name).sizes[0], more.spec.sizes[0]
        config = config | changes
        nested = {key: part for key, part in config.items() if isinstance(part, dict) and part.get("vocab_size") == old}
        changes |= {key: part | {"vocab_size": new} for key, part in nested.items()}
        changes |= {"vocab_size": new} if "vocab_size" in config else {}
    return changes


def _matching(composer: Composer) -> str:
    """Return the first vector that has all of the output's new rows, or the base where there are none."""
    rows = {name: more.spec.sizes[0] for name, more in composer.more_rows.items()}
    for key, source in composer.sources.items():
        if rows and all(n in source.more_rows and source.more_rows[n].spec.sizes[0] == rows[n] for n in rows):
            return key
    return BASE


def _check_fits(composer: Composer, folder: Path) -> None:
    """Check that a tokenizer gives no id beyond the rows of the embedding of tokens."""
    rows = [spec.sizes[0] for name, spec in composer.layout().items() if _TOKENS.search(name) and len(spec.sizes) == 2]
    ids = token_ids(folder)
    if rows and ids and max(ids.values()) >= min(rows):
        raise ValueError(
            f"The tokenizer of {folder} gives ids up to {max(ids.values())}, and the output has {min(rows)} rows of "
            f"embeddings. Keep the new rows (new_rows='keep'), or take another input's tokenizer."
        )
