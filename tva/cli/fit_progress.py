"""How far a fit is: a bar that counts its steps, or a line every 30 s where there is no terminal."""

from __future__ import annotations

import shutil
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from tva.console import begin_pace, say_where


def with_progress(callbacks: list[Any], draws: bool) -> list[Any]:
    """Return callbacks with one that shows progress, unless one of them does.

    Args:
        callbacks: Those of the Trainer.
        draws: Whether there is a terminal to draw a bar in.
    """
    if any(isinstance(callback, ProgressBar) for callback in callbacks):
        return callbacks
    return [*callbacks, StepBar() if draws else StepLines()]


def counts_steps(trainer: L.Trainer) -> bool:
    """Whether the fit ends after a number of steps only, so that its epochs say nothing."""
    return trainer.max_steps > 0 and trainer.max_epochs in (None, -1)


class StepBar(RichProgressBar):
    """Lightning's bar, which counts the steps of a fit that ends after ``max_steps``, and not those of each epoch."""

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.max_steps if counts_steps(self.trainer) else super().total_train_batches

    def _get_train_description(self, current_epoch: int) -> str:
        if counts_steps(self.trainer):
            return f"{'Step':<{len(self.validation_description)}}"
        return super()._get_train_description(current_epoch)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return what there is room for beside the bar: the loss only in a terminal of less than 120 columns."""
        found = super().get_metrics(trainer, pl_module)
        found.pop("v_num", None)
        if shutil.get_terminal_size().columns >= 120:
            return found
        losses = [value for name, value in found.items() if "loss" in name and "val" not in name]
        return {"loss": losses[0]} if losses else {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not counts_steps(trainer) or self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = trainer.global_step - 1 if counts_steps(trainer) else batch_idx
        super().on_train_batch_end(trainer, pl_module, outputs, batch, done)


class StepLines(L.Callback):
    """Print the step that a fit is at, every 30 s."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        begin_pace()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.is_global_zero:
            say_where(_where, trainer)


def _where(trainer: L.Trainer) -> str:
    last = trainer.estimated_stepping_batches
    epoch = "" if counts_steps(trainer) else f", epoch {trainer.current_epoch + 1}"
    losses = [f"{name} {value:.4g}" for name, value in trainer.logged_metrics.items() if "loss" in name][:1]
    return ", ".join([f"step {trainer.global_step:,} of {last:,.0f}{epoch}", *losses])
