"""Write a network as a folder of its library, where there is no folder to take the form of."""

from pathlib import Path
from typing import Any

from torch import nn

from tva.checkpoints import save_weights
from tva.checkpoints.wrappers import network_of

HOW = {
    "transformers": "a network of transformers, with save_pretrained and a config",
    "sentence_transformers": "a SentenceTransformer",
    "timm": "a network of timm, with a pretrained_cfg",
    "open_clip": "a model of open_clip from a folder (local-dir:FOLDER or hf-hub:OWNER/NAME)",
}


def save_folder(format: str, model: nn.Module, folder: Path) -> None:
    """Write the network that a module wraps as its library does.

    Args:
        format: Library; see `HOW`.
        model: The module.
        folder: Empty.

    Raises:
        ValueError: It is not a network of that library.
    """
    network: Any = network_of(model)[1]
    library = type(network).__mro__
    of = {kind.__module__.partition(".")[0] for kind in library}
    if format == "transformers" and "transformers" in of:
        network.save_pretrained(folder)
        for part in ("tokenizer", "processor", "image_processor"):
            if hasattr(getattr(model, part, None), "save_pretrained"):
                getattr(model, part).save_pretrained(folder)
    elif format == "sentence_transformers" and "sentence_transformers" in of:
        network.save(str(folder))
    elif format == "timm" and hasattr(network, "pretrained_cfg"):
        from timm.models._hub import save_config_for_hf

        save_config_for_hf(network, str(folder / "config.json"))
        save_weights(network.state_dict(), folder / "model.safetensors")
    else:
        raise ValueError(
            f"format={format!r} needs {HOW[format]}; found {type(network).__name__}. Give base= a folder of this form, "
            f"or another format."
        )
