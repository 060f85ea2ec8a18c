"""Any network as a LightningModule that an edit can evaluate: predictions are what the network returns for a batch."""

import os
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tva.errors import some
from tva.evaluation.measures import LoaderTask, measures_of
from tva.models.huggingface import import_transformers, load_sentence_transformer, quiet
from tva.models.trained import open_model

POOLER = "pooler."  # of the names of what encoders of transformers have, and few folders
TARGETS = ("labels", "label", "targets", "target")  # keys of a batch that holds them


class Network(L.LightningModule):
    """Evaluate a network on tasks that bring a metric of predictions and targets.

    Its state dict is the network's own, name for name. A batch is ``(inputs, target)``, with more inputs before the
    target if the network takes them; or a mapping whose ``labels`` (``label``, ``target``, ``targets``) are the target
    and whose other entries are the network's arguments. Predictions are the network's output, or its ``logits``.

    Args:
        network: The network; also a LightningModule, whose ``forward`` is used.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_state_dict_post_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    @property
    def wrapped(self) -> nn.Module:
        """The network that is evaluated."""
        return self.network

    bare_network = wrapped

    def forward(self, batch: Any) -> tuple[Any, Any]:
        """Return predictions and targets of a batch."""
        return predict(self.network, batch)

    def _step(self, batch: Any) -> dict[str, Any]:
        preds, target = self(batch)
        if target is None and measures_of(self.trainer.datamodule):
            raise ValueError(_without_target(batch))
        return {"preds": preds} if target is None else {"preds": preds, "target": target}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return self._step(batch)

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return self._step(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise ValueError(
            f"{type(self.network).__name__} is a plain network, which knows no loss to train by. Give a "
            f"LightningModule with a training_step, or leave out what trains (the baseline gradient_ascent, the "
            f"search Learned)."
        )


def _drop_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    start = f"{prefix}network."
    for name in [name for name in state if name.startswith(start)]:
        state[prefix + name[len(start) :]] = state.pop(name)


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}network.{name[len(prefix) :]}"] = state.pop(name)


def predict(network: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Return a network's predictions for a batch, and the batch's targets, or None where it has none.

    Args:
        network: Any network.
        batch: As `Network` says.

    Raises:
        ValueError: The network returns no predictions.
    """
    inputs, target = _split(batch)
    if isinstance(inputs, Mapping):
        if getattr(getattr(network, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
            inputs = {**inputs, "labels": target}  # which the decoder is given, shifted
        preds = _logits(network, network(**inputs))
    else:
        preds = _logits(network, network(*inputs))
    if isinstance(target, Tensor) and preds.ndim == target.ndim + 1 and preds.shape[-1] == 1:
        preds = preds.squeeze(-1)  # a network with one output
    return preds, target


def own_state(model: nn.Module, path: str) -> dict[str, Tensor] | None:
    """Load a folder by the library that a network is of, and return its state dict; None where it is of none.

    Some networks of transformers have other names in memory than in their folders, such as ViT's. A pooler, which
    folders of other classes lack, is left out there.

    Args:
        model: A network of transformers, or a module that holds one.
        path: A folder or hub name.
    """
    network = next((part for part in model.modules() if hasattr(part, "save_pretrained")), None)
    if network is not None and type(network).__name__ == "SentenceTransformer":
        return {name: tensor.detach() for name, tensor in load_sentence_transformer(path)[0].state_dict().items()}
    if network is None or not hasattr(type(network), "from_pretrained") or not hasattr(network, "config"):
        return None
    try:
        with quiet(import_transformers()):
            loaded, info = type(network).from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError):
        return None
    missing = set(info["missing_keys"])  # which would be random
    if any(not name.startswith(POOLER) for name in missing):
        return None
    return {name: tensor.detach() for name, tensor in loaded.state_dict().items() if name not in missing}


def _split(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        rest = dict(batch)
        key = next((key for key in TARGETS if key in rest), None)
        return rest, None if key is None else rest.pop(key)
    if isinstance(batch, (list, tuple)) and batch:
        inputs, target = (list(batch), None) if len(batch) == 1 else (list(batch[:-1]), batch[-1])
        return (inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Mapping) else inputs), target
    return [batch], None


def _without_target(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return (
            f"A batch that is a mapping must have its targets under one of {some(TARGETS, 4)}; its keys are "
            f"{some(map(str, batch), 8)}. Rename them in the data set or in collate_fn."
        )
    return (
        f"A batch must be (inputs, target), or a mapping with its targets under one of {some(TARGETS, 4)}; found a "
        f"{type(batch).__name__} without. Let the DataLoader's collate_fn return such batches."
    )


def _logits(network: nn.Module, output: Any) -> Tensor:
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("preds"))
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (list, tuple)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ValueError(
            f"{type(network).__name__} must return its predictions: a tensor, or an output with logits; found a "
            f"{type(output).__name__}. Measure it by a function evaluate(model, split) instead."
        )
    return output


def as_module(model: Any) -> L.LightningModule:
    """Return a model as a LightningModule.

    Args:
        model: A LightningModule, which is returned as it is; any network; or what `open_model` opens by folder or name.

    Raises:
        TypeError: It is none of these.
    """
    if isinstance(model, (str, os.PathLike)):
        return open_model(os.fspath(model))
    if isinstance(model, L.LightningModule):
        return model
    if isinstance(model, nn.Module):
        return Network(model)
    found = f"the class {model.__name__}: make an instance of it" if isinstance(model, type) else repr(model)[:80]
    raise TypeError(f"The model must be an nn.Module, a LightningModule, or a model's folder or name; found {found}.")


def measured_module(model: L.LightningModule, datamodule: L.LightningDataModule) -> L.LightningModule:
    """Return the module that evaluates a model on a task: the model itself, unless a metric is of its predictions.

    Args:
        model: The model that is edited.
        datamodule: The task. Where it brings metrics, predictions are what the model returns for a batch, and the
            weights are shared; tva's own models return predictions from their steps.

    Raises:
        ValueError: The model makes predictions only for its own kind of data module.
    """
    own = getattr(model, "returns_predictions", False)
    if isinstance(model, Network) or not measures_of(datamodule) or (own and not isinstance(datamodule, LoaderTask)):
        return model
    network = getattr(model, "bare_network", None if own else model)
    if network is None:
        raise ValueError(
            f"{type(model).__name__} makes its head from a data module with class_names, which two DataLoaders do not "
            f"have. Give the task as (datamodule, metric), such as (tva.data.ImageTask(…), 'f1_score')."
        )
    return Network(network)
