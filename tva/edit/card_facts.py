"""What a model card says of a model beside the numbers of an edit: read from the model's folder and its base's."""

import re
from pathlib import Path
from typing import Any

from tva.checkpoints.foreign import read_json
from tva.report.model_card import hub_repository, metadata_of

LIBRARIES = {
    "transformers": "transformers",
    "sentence_transformers": "sentence-transformers",
    "timm": "timm",
    "open_clip": "open_clip",
}
TASKS = {  # the end of an architecture's name to the hub's name of what it does
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "ForConditionalGeneration": "text2text-generation",
    "CLIPModel": "zero-shot-image-classification",
    "Model": "feature-extraction",
}
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")  # of the base's own card


def card_facts(format: str, folder: Path | None, base: str | None = None) -> dict[str, Any]:
    """Return metadata for a model card.

    Args:
        format: The form of the weights; see `tva.edit.form`.
        folder: Folder with the model's configuration, and the base's README.md if it has one.
        base: Path of the base as it was given.
    """
    config: dict[str, Any] = {}
    if folder is not None and (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
    known = config.get("architectures") if isinstance(config.get("architectures"), list) else []
    tags = [tag for name in known for end, tag in TASKS.items() if str(name).endswith(end)]
    tag = {"sentence_transformers": "sentence-similarity", "open_clip": "zero-shot-image-classification"}.get(format)
    if format == "timm":
        tag = "image-feature-extraction" if config.get("num_classes") == 0 else "image-classification"
    found = {"library_name": LIBRARIES.get(format, "pytorch"), "pipeline_tag": tag or next(iter(tags), None)}
    found |= _of_base(folder)
    found["base_model"] = hub_repository(base) or _named(config.get("_name_or_path"))
    return {key: value for key, value in found.items() if value is not None}


def _of_base(folder: Path | None) -> dict[str, Any]:
    file = None if folder is None else folder / "README.md"
    if file is None or not file.is_file():
        return {}
    said = metadata_of(file.read_text(encoding="utf-8", errors="replace"))
    return {key: said[key] for key in CARRIED if isinstance(said.get(key), (str, list))}


def _named(name: Any) -> str | None:
    plain = isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None
    return name if plain and not Path(name).exists() else None
