"""Evaluate a model on other data in the middle of fit, and leave fit as if that had not happened.

Lightning offers no evaluation inside fit: a second Trainer would move the model, and the fit's own validation loop
would log under the fit's names. So the model's validation steps and hooks are called here, with its logging caught.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import Metric


class Means:
    """What a model logs, each name averaged over examples; stands in for ``LightningModule.log``."""

    def __init__(self) -> None:
        self.batch_size = 1
        self._sums: dict[str, float] = {}
        self._weights: dict[str, int] = {}
        self._metrics: dict[str, Metric] = {}

    def log(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        """Record one value; a metric is computed at the end."""
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        weight = batch_size or self.batch_size
        self._sums[name] = self._sums.get(name, 0.0) + float(value) * weight
        self._weights[name] = self._weights.get(name, 0) + weight

    def log_dict(self, values: Any, *args: Any, **options: Any) -> None:
        """Record several values."""
        for name, value in values.items():
            self.log(name, value, *args, **options)

    def values(self, strategy: Strategy | None) -> dict[str, float]:
        """Return the means by the last part of their names: ``val/mnist/accuracy`` and ``val_accuracy`` are accuracy.

        Names that share their last part are kept whole but for ``val``: ``img/acc`` and ``text/acc``.

        Args:
            strategy: Over whose ranks to sum; None if every rank has seen all.
        """
        means = {}
        for name in self._sums:
            sums = torch.tensor([self._sums[name], float(self._weights[name])])
            if strategy is not None:
                sums = strategy.reduce(sums.to(strategy.root_device), reduce_op="sum")
            means[name] = float(sums[0] / sums[1])
        means |= {name: float(metric.compute()) for name, metric in self._metrics.items()}
        whole = {name: re.sub(r"^(val|valid|validation)[_/]", "", name) for name in means}
        count = Counter(name.rpartition("/")[2] for name in whole.values())
        last = {name: end if count[end := long.rpartition("/")[2]] == 1 else long for name, long in whole.items()}
        if len(set(last.values())) < len(last):  # as val/acc and val_acc
            last = {name: name for name in means}
        return {last[name]: value for name, value in means.items()}


def prepare(trainer: L.Trainer, datamodule: L.LightningDataModule) -> DataLoader:
    """Set a data module up under a Trainer that fits another, and return its validation loader; once is enough."""
    datamodule.trainer = trainer
    datamodule.prepare_data()
    datamodule.setup("validate")
    return datamodule.val_dataloader()


def evaluate_within_fit(
    trainer: L.Trainer,
    model: L.LightningModule,
    loader: DataLoader,
    datamodule: L.LightningDataModule | None = None,
    limit_batches: int | None = None,
) -> dict[str, float]:
    """Run a model's validation on a loader; random numbers and modes are afterwards as they were.

    Args:
        trainer: The Trainer that is fitting.
        model: Its model.
        loader: Batches for the model's ``validation_step``.
        datamodule: Whose loader it is, where it is not that of fit: the model's ``setup`` sees it.
        limit_batches: Stop after this many batches.

    Returns:
        What the model logged, averaged over examples.

    Raises:
        ValueError: The model logged nothing, or its ``setup`` makes new parameters.
    """
    means, strategy = Means(), trainer.strategy
    split = isinstance(loader.sampler, DistributedSampler)  # as Lightning makes the fit's own loaders
    with isolate_rng(), torch.no_grad(), _as_it_was(trainer, model, datamodule, split):
        model.log, model.log_dict = means.log, means.log_dict
        model.eval()
        model.on_validation_epoch_start()
        for index, batch in enumerate(loader):
            if index == limit_batches:
                break
            batch = strategy.batch_to_device(batch, dataloader_idx=0)
            means.batch_size = _first_tensor(batch)
            strategy.validation_step(batch, index)
        model.on_validation_epoch_end()
        values = means.values(strategy if split else None)
    if not values:
        raise ValueError(f"{type(model).__name__} logged no metric in its validation_step; it must call self.log.")
    return values


@contextlib.contextmanager
def _as_it_was(
    trainer: L.Trainer, model: L.LightningModule, datamodule: L.LightningDataModule | None, split: bool
) -> Iterator[None]:
    """Lend the model fresh copies of its metrics, and undo what ``setup`` for another data module has set."""
    modes = {module: module.training for module in model.modules()}
    kept = {key: dict(value) if key in ("_modules", "_buffers") else value for key, value in vars(model).items()}
    metrics = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Metric)
    ]
    parameters = [id(parameter) for parameter in model.parameters()]
    own = trainer.datamodule
    try:
        for parent, name, metric in metrics:
            fresh = metric.clone()
            fresh.reset()
            fresh.sync_on_compute = split  # else every rank sees all batches
            parent._modules[name] = fresh
        if datamodule is not None:
            trainer.datamodule = datamodule
            model.setup("validate")
            if [id(parameter) for parameter in model.parameters()] != parameters:
                raise ValueError(
                    f"{type(model).__name__}.setup makes new parameters at every call, so that no control can be "
                    f"evaluated while it is trained. Make them in the constructor, or in configure_model."
                )
        yield
    finally:
        trainer.datamodule = own
        for parent, name, metric in metrics:
            parent._modules[name] = metric
        vars(model).clear()
        vars(model).update(kept)
        for module, training in modes.items():
            module.training = training


def _first_tensor(batch: Any) -> int:
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if hasattr(batch, "values") else batch[0]
    return len(batch) if batch.dim() else 1


def log_now(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """Log through the Trainer's loggers at once."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
