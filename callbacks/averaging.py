"""Which weights a vector is of, where a WeightAveraging callback keeps two sets: the raw and the averaged ones."""

from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn
from tva.callbacks.names import module_state
from tva.callbacks.sharding import live_state

Weights = Literal["checkpoint", "raw", "averaged"]


def check_averaging(
    trainer: L.Trainer, callback: L.Callback, weights: Weights, along_the_way: bool, at_train_end: bool
) -> None:
    """Raise if the wanted weights are not there when a vector is taken, by the order of the callbacks.

    Args:
        trainer: The Trainer.
        callback: The one that takes vectors.
        weights: The wanted ones.
        along_the_way: Whether vectors are taken at steps without a checkpoint.
        at_train_end: Whether one is taken when training ends.

    Raises:
        ValueError: The message says where the callback must stand.
    """
    kinds = [isinstance(other, WeightAveraging) for other in trainer.callbacks]
    if not any(kinds):
        if weights == "averaged":
            raise ValueError("weights='averaged' needs a WeightAveraging callback in the Trainer, as EMA's.")
        return
    averages_at, we_at = kinds.index(True), trainer.callbacks.index(callback)
    name = type(trainer.callbacks[averages_at]).__name__
    if we_at < averages_at and weights != "raw" and (along_the_way or at_train_end):
        raise ValueError(
            f"Averaged weights are up to date only after {name} has run: put TaskVectorCallback after it in the "
            f"Trainer's callbacks, or take weights='raw'."
        )
    if we_at > averages_at and weights == "raw" and at_train_end:
        raise ValueError(
            f"{name} overwrites the raw weights when training ends: put TaskVectorCallback before it in the "
            f"Trainer's callbacks."
        )


def choose_weights(
    trainer: L.Trainer, pl_module: L.LightningModule, weights: Weights, checkpoint: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any], bool]:
    """Choose the weights that a vector is of.

    Args:
        trainer: The Trainer.
        pl_module: Its model.
        weights: The wanted ones.
        checkpoint: The one that the vector belongs to; by default the weights as they are now.

    Returns:
        The module that they are of, its state dict, and whether they are averaged.
    """
    averaging = next((other for other in trainer.callbacks if isinstance(other, WeightAveraging)), None)
    average = getattr(averaging, "_average_model", None)
    if isinstance(trainer.strategy, DeepSpeedStrategy):  # it writes its optimizer's weights, not the checkpoint's own
        checkpoint, weights = None, "averaged" if weights == "averaged" else "raw"
    if checkpoint is None:
        if average is None or weights == "raw":
            return pl_module, live_state(trainer.strategy, pl_module), has_averaged(trainer)
        return average.module, module_state(average.module), True
    both = "averaging_state" in checkpoint  # Lightning stores only the raw weights when it stores weights only
    if weights == "averaged" and not both:
        return average.module, module_state(average.module), True
    if weights == "raw" and both:
        return pl_module, checkpoint["current_model_state"], False
    return average.module if both else pl_module, checkpoint["state_dict"], both or has_averaged(trainer)


def has_averaged(trainer: L.Trainer) -> bool:
    """Return whether StochasticWeightAveraging has put its averages into the model, as it does at its end."""
    older = next((other for other in trainer.callbacks if isinstance(other, StochasticWeightAveraging)), None)
    average = getattr(older, "_average_model", None)
    if average is None or older._max_epochs == -1 or trainer.current_epoch <= older.swa_end:
        return False
    if older._model_contains_batch_norm:  # then one more epoch estimates the statistics, after the averages are put in
        return True
    pairs = zip(trainer.lightning_module.parameters(), average.parameters(), strict=True)
    return all(torch.equal(now, averaged.to(now.device)) for now, averaged in pairs)
