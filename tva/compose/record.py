"""The record of an edit: what the header of an edited checkpoint says of how it was made."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tva._torch import torch_version
from tva.checkpoints import HashedWeights, LazyWeights, find, open_weights
from tva.checkpoints.fingerprint import header_digest
from tva.checkpoints.foreign import parse_json, shown
from tva.checkpoints.hub import is_hub
from tva.checkpoints.with_adapter import parts_of
from tva.compose.recipe import Recipe
from tva.errors import RecipeError
from tva.layers import Coefficient
from tva.report.run_files import EDITED
from tva.version import __version__

RECORD = "tva.record_fingerprint"  # of the record's own fields
ADAPTER = "adapter_model.safetensors"
UNKNOWN = "0" * 32  # in place of a fingerprint until all has been read


FORMS: dict[str, Any] = {  # of the attributes that are JSON in the header
    "coefs": {str: (float, dict, list)},
    "scaling_coef": float,
    "vectors": {str: str},
    "options": {"key_map": {str: str}, "which": {str: str}},
    "vector_fingerprints": {str: str},
    "file_fingerprints": {str: str},
}


@dataclass(frozen=True)
class Record:
    """How an edited checkpoint was made; the attributes are keys of its header, with ``tva.`` before them.

    Attributes:
        recipe: Expression of the vectors.
        coefs: Values of its coefficients.
        scaling_coef: Coefficient of the whole recipe.
        dtype: Of the floating tensors; empty where it is the base's.
        base: Path of the base as it was given; empty where the base was a model in memory.
        vectors: Name to path of each vector.
        options: Other options that the bytes depend on.
        vector_fingerprints: Name to fingerprint of each vector's file, by its base's names.
        file_fingerprints: Path to fingerprint of other files that methods read.
        base_fingerprint: Fingerprint of the base.
        edited_fingerprint: Fingerprint of the edited weights.
        version: Of tva.
        torch: Version of torch.
    """

    recipe: str
    coefs: Mapping[str, Coefficient]
    scaling_coef: float
    dtype: str
    base: str
    vectors: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    vector_fingerprints: Mapping[str, str] = field(default_factory=dict)
    file_fingerprints: Mapping[str, str] = field(default_factory=dict)
    base_fingerprint: str = UNKNOWN
    edited_fingerprint: str = UNKNOWN
    version: str = __version__
    torch: str = field(default_factory=torch_version)

    def metadata(self) -> dict[str, str]:
        """Return the text for a header."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        texts = {f"tva.{name}": v if isinstance(v, str) else json.dumps(v) for name, v in values.items()}
        return {**texts, RECORD: header_digest(texts)}

    @classmethod
    def read(cls, weights: LazyWeights) -> Record:
        """Read the record of an edited checkpoint.

        Raises:
            ValueError: Its header holds none, or a changed one.
        """
        found = {f.name: weights.metadata[f"tva.{f.name}"] for f in fields(cls) if f"tva.{f.name}" in weights.metadata}
        fingerprint = weights.metadata.get(RECORD)
        if fingerprint is not None and fingerprint != header_digest(
            {f"tva.{name}": text for name, text in found.items()}
        ):
            raise ValueError(
                f"{weights.path} holds a record of an edit that is not as it was written: its fields do not have the "
                f"recorded fingerprint {fingerprint}. Take an undamaged copy."
            )
        found.setdefault("torch", "unknown")  # not recorded at first; nor were the fingerprints of vectors
        needed = {f.name for f in fields(cls)} - {"vector_fingerprints", "file_fingerprints"}
        lacking = sorted(needed - found.keys())
        if lacking:
            raise ValueError(
                f"{weights.path} holds no record of an edit: its header must have tva.recipe and what goes with it, "
                f"and lacks {', '.join(f'tva.{name}' for name in lacking[:3])}. Only what `tva compose` or `tva edit` "
                f"wrote has one, and other programs that write the weights again leave it out."
            )
        texts = {"recipe", "dtype", "base", "version", "torch", "base_fingerprint", "edited_fingerprint"}
        values = {
            name: parse_json(text, f"{weights.path}: tva.{name}", FORMS[name])
            for name, text in found.items()
            if name not in texts
        }
        return cls(**{**found, **values})


def check_recorded(path: str) -> None:
    """Check that a file is of a kind into which tva writes records.

    Raises:
        ValueError: It is a LoRA adapter or a GGUF file.
    """
    inside = Path(path) / EDITED
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    if (folder / ADAPTER).is_file() and not inside.exists():
        raise ValueError(
            f"{path} is a LoRA adapter, in which tva records no inputs: it cannot be verified or reverted. Make it "
            f"again from the same inputs in another folder; {ADAPTER} is then the same, byte for byte, on the same "
            f"machine with the same versions."
        )
    if Path(path).suffix == ".gguf":
        raise ValueError(
            f"{path} is a GGUF file, in which tva records no inputs: it cannot be verified or reverted. Compose it "
            f"again from the same inputs into another file, which is then the same, byte for byte, on the same machine "
            f"with the same versions."
        )


def open_edited(path: str) -> HashedWeights:
    """Open an edited checkpoint: what `tva compose` wrote, or the folder of `tva edit`.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: It is not a checkpoint.
    """
    check_recorded(path)
    inside = Path(path) / EDITED
    return HashedWeights(open_weights(inside if inside.exists() else path))


def check_inputs(output: str, paths: Mapping[str, str], others: Mapping[str, str]) -> None:
    """Check that the inputs of an edit are there.

    Args:
        output: The edited checkpoint.
        paths: Flag, such as ``--base``, to path.
        others: Flag to path of what was given in place of what the record says.

    Raises:
        FileNotFoundError: An input is missing.
        ValueError: A flag is of no input.
    """
    unknown = sorted(others.keys() - paths.keys())
    if unknown:
        raise ValueError(f"{unknown[0]} is not an input of {output}; its inputs are {', '.join(sorted(paths))}.")
    for flag, path in paths.items():
        if path and flag not in others and any(map(is_hub, parts_of(path))):
            raise ValueError(
                f"{output} says that it was made from {path}, and tva goes to a hub only where you name it. Give "
                f"{flag} {path}, if you know it, or {flag} with the path of a local copy."
            )
    for flag, path in {**paths, **others}.items():
        if not path:
            raise ValueError(
                f"{output} does not say where its base is, which was a model in memory. Give its checkpoint by --base."
            )
        try:
            for part in parts_of(path):
                find(part)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{output} was made from {path}, and nothing is there. If it has moved, give {flag} PATH; relative "
                f"paths are from the folder that the edit was made in."
            ) from error


def open_recipe(output: str, record: Record, vectors: Collection[str]) -> Recipe:
    """Read the recipe of an edit, and open the files of statistics that it names.

    Raises:
        FileNotFoundError: One is not there.
        RecipeError: This version of tva cannot read it, or a merge method of another package cannot be imported.
    """
    if "hf:/" in record.recipe:
        raise ValueError(
            f"The recipe of {output} reads files of a hub, and tva goes to one only where you name it: "
            f"{shown(record.recipe)}. Compose it again from local copies."
        )
    try:
        return Recipe(record.recipe, vectors, record.coefs, with_base=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} The recipe of {output} reads it; relative paths are from the folder that the edit was made in."
        ) from error
    except RecipeError as error:
        raise RecipeError(f"The recipe of {output} cannot be computed here. {error}") from error
