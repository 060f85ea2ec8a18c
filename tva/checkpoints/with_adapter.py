"""A model with an adapter on top, written ``MODEL+ADAPTER``, as one checkpoint."""

import os
from pathlib import Path

from tva.checkpoints.lazy import LazyWeights
from tva.checkpoints.open import open_weights
from tva.checkpoints.peft_adapter import open_adapter


def parts_of(path: str | os.PathLike[str]) -> list[str]:
    """Return a path by itself, or of ``MODEL+ADAPTER`` both; what is there under the whole name is one path.

    Example:
        >>> parts_of("hf://owner/model+runs/lora"), parts_of("model")
        (['hf://owner/model', 'runs/lora'], ['model'])
    """
    path = os.fspath(path)
    if "+" not in path or Path(path).expanduser().exists():
        return [path]
    model, _, adapter = path.partition("+")
    return [model, adapter] if model and adapter else [path]


def open_model(path: str | os.PathLike[str]) -> LazyWeights:
    """Open a model, with the adapter on top that ``MODEL+ADAPTER`` names; see `tva.open_weights`.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: It is not a model, or the adapter is not of this model.
    """
    model, *adapter = parts_of(path)
    weights = open_weights(model)
    return open_adapter(adapter[0], weights) if adapter else weights
