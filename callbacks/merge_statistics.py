"""A callback that measures, when fitting ends, what Fisher and RegMean merging need to know of the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader, IterableDataset
from tva.callbacks.sharding import check_package

from tva.checkpoints import save_weights
from tva.checkpoints.wrappers import network_of
from tva.merge.model_statistics import measure_information

KINDS = ("fisher", "gram")


class MergeStatistics(L.Callback):
    """When fitting ends, write ``fisher.safetensors`` and ``gram.safetensors`` for the recipe's `fisher` and `regmean`.

    The model's own ``training_step`` is called with one training example at a time, in evaluation mode: what it
    returns for one example must be that example's negative log-likelihood, as a cross entropy is. For a model that is
    fine-tuned already, fit for no epochs: ``tva fit … --trainer.max_epochs 0``. Under DDP each rank sees its share of
    the same examples that one device would see; rank 0 writes.

    Args:
        kinds: Which files to write.
        num_examples: Use at most this many training examples; 256 to 2,048 in the papers.
        seed: Which examples, where there are more.
        conv: Also write Gram matrices of convolutions, as ``regmean(…, conv="matrix")`` needs.
        dirpath: Local folder; by default that of the first ModelCheckpoint.

    Raises:
        ValueError: The strategy does not keep the whole model on every rank, an option is invalid, the
            training data is not a single DataLoader, or the training step returns no loss.

    Example:
        >>> trainer = L.Trainer(callbacks=[MergeStatistics()], logger=False)
    """

    def __init__(
        self,
        kinds: Sequence[str] = KINDS,
        num_examples: int = 256,
        seed: int = 0,
        conv: bool = False,
        dirpath: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(kinds, str) or not kinds or set(kinds) - set(KINDS):
            raise ValueError(f"kinds lists one or both of {', '.join(KINDS)}; found {kinds!r}.")
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1; found {num_examples}.")
        self.kinds, self.num_examples, self.seed, self.conv, self.dirpath = kinds, num_examples, seed, conv, dirpath

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_package(trainer, self)
        strategy = trainer.strategy
        whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(
            strategy, DeepSpeedStrategy
        )
        if stage == "fit" and not whole:
            raise ValueError(
                f"MergeStatistics needs the whole model on every rank, on one device or with DDP; this Trainer uses "
                f"{type(strategy).__name__}. Fit without it; then load the weights that were reached into the model, "
                f"and fit once more with strategy='ddp' or devices=1, max_epochs=0 and this callback."
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        folder = self.dirpath or getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
        strategy, device = trainer.strategy, pl_module.device
        mine = islice(self._examples(trainer), trainer.global_rank, self.num_examples, trainer.world_size)
        with _silent(pl_module):
            pl_module.to(strategy.root_device)  # when fitting has ended, the strategy moves it to the CPU
            found = measure_information(
                pl_module,
                (strategy.batch_to_device(batch) for batch in mine),
                lambda batch: _loss(pl_module.training_step(batch, 0)),
                self.num_examples,
                self.conv,
                lambda tensor: strategy.reduce(tensor.to(strategy.root_device), reduce_op="sum").to(tensor.device),
            )
            pl_module.to(device)
        facts = {"tva.num_examples": str(found.num_examples), "tva.seed": str(self.seed)}
        for kind, tensors in (("fisher", found.fisher), ("gram", found.grams)):
            if kind in self.kinds and trainer.is_global_zero:
                own = {name.removeprefix(network_of(pl_module)[0]): tensor for name, tensor in tensors.items()}
                save_weights(own, Path(folder) / f"{kind}.safetensors", {**facts, "tva.statistics": kind})
        strategy.barrier()

    def _examples(self, trainer: L.Trainer) -> DataLoader:
        loader = trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            raise ValueError(
                f"MergeStatistics draws single examples from one DataLoader of training data; found "
                f"{type(loader).__name__}."
            )
        streamed = isinstance(loader.dataset, IterableDataset)
        generator = torch.Generator().manual_seed(self.seed)
        order = {} if streamed else {"shuffle": True, "generator": generator}
        return DataLoader(loader.dataset, batch_size=1, collate_fn=loader.collate_fn, **order)


def _loss(output: Any) -> torch.Tensor:
    """Return the loss from what a training step returned: itself, or its ``loss``."""
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError(
            f"MergeStatistics needs a training_step that returns its loss, or a dict with it as 'loss'; found "
            f"{type(output).__name__}."
        )
    return loss


@contextmanager
def _silent(pl_module: L.LightningModule) -> Iterator[None]:
    """Make ``self.log`` a no-op: Lightning accepts no logs once fitting has ended."""
    before = {name: vars(pl_module)[name] for name in ("log", "log_dict") if name in vars(pl_module)}
    pl_module.log = pl_module.log_dict = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            delattr(pl_module, name)
        vars(pl_module).update(before)
