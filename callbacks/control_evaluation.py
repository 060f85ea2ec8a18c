"""A callback that shows forgetting while it happens: other tasks, evaluated during fit."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch.utils.data import DataLoader
from tva.callbacks.evaluate_in_fit import evaluate_within_fit, log_now, prepare
from tva.callbacks.sharding import check_package


class ControlEvaluation(L.Callback):
    """Evaluate control tasks during any fit, and log ``control/NAME/METRIC``.

    The model's own ``validation_step`` is run on each control's validation split: before the first step, at the end of
    every epoch, and every N steps. Training is bit for bit the same as without this callback. The values can be
    monitored by ModelCheckpoint and EarlyStopping at the end of an epoch. With a WeightAveraging callback the raw
    weights are evaluated.

    With several ranks each one evaluates all of a control, so that no metric depends on their number.

    Args:
        controls: Mapping from names to data modules whose ``val_dataloader`` yields batches that the model accepts.
        every_n_epochs: At the end of every N epochs; 0 for never.
        every_n_steps: Also every N optimizer steps.
        limit_batches: Evaluate on at most this many batches of each control.

    Raises:
        ValueError: An option is invalid, the model logs nothing in its ``validation_step``, or a data module
            gives several loaders.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringDataModule
        >>> trainer = L.Trainer(callbacks=[ControlEvaluation({"boring": BoringDataModule()})], logger=False)
    """

    def __init__(
        self,
        controls: Mapping[str, L.LightningDataModule],
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        limit_batches: int | None = None,
    ) -> None:
        super().__init__()
        if not controls:
            raise ValueError("controls must name at least one data module: {'objects': ImageTask('builtin:objects')}.")
        for name, value, least in (
            ("every_n_epochs", every_n_epochs, 0),
            ("every_n_steps", every_n_steps, 1),
            ("limit_batches", limit_batches, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}; found {value}.")
        self.controls = dict(controls)
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.limit_batches = limit_batches
        self._loaders: dict[str, DataLoader] = {}
        self._step = 0
        self._last: tuple[int, dict[str, float]] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_package(trainer, self)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._loaders, self._last = {}, None
        for name, datamodule in self.controls.items():
            loader = prepare(trainer, datamodule)
            if not isinstance(loader, DataLoader):
                raise ValueError(
                    f"The control {name!r} must have one validation loader; {type(datamodule).__name__} gives "
                    f"{type(loader).__name__}. Give each loader's data a data module of its own."
                )
            self._loaders[name] = loader
        self._evaluate(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step, every = trainer.global_step, self.every_n_steps
        if every is not None and step // every > self._step // every:
            self._evaluate(trainer, pl_module)
            self._step = step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            for name, value in self._evaluate(trainer, pl_module).items():
                self.log(name, value, logger=False, sync_dist=True)  # for ModelCheckpoint and EarlyStopping

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._loaders = {}

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        if self._last is not None and self._last[0] == trainer.global_step:  # an epoch's end is also a step's
            return self._last[1]
        metrics = {}
        for name, loader in self._loaders.items():
            values = evaluate_within_fit(trainer, pl_module, loader, self.controls[name], self.limit_batches)
            metrics |= {f"control/{name}/{metric}": value for metric, value in values.items()}
        log_now(trainer, metrics)
        self._last = trainer.global_step, metrics
        return metrics
