"""A callback that measures, when fitting ends, the statistics for Fisher and RegMean merging and for a curvature
penalty."""

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
from torchmetrics import Metric
from tva.callbacks.sharding import check_package

from tva.checkpoints import canonical_state_dict, fingerprint, save_weights
from tva.checkpoints.wrappers import network_of
from tva.merge.curvature import Probe, measure_curvature
from tva.merge.model_statistics import measure_information
from tva.vectors.kind import kind_of

KINDS = ("fisher", "gram")
CURVATURE = "curvature"


class MergeStatistics(L.Callback):
    """When fitting ends, write ``fisher.safetensors`` and ``gram.safetensors`` for the recipe's `fisher` and `regmean`.

    On request also ``curvature.safetensors``, for `CurvaturePenalty`.

    The model's own ``training_step`` is called with one training example at a time, in evaluation mode: what it returns
    for one example must be that example's negative log-likelihood, as a cross entropy is. For a model that is already
    fine-tuned, fit for zero epochs: ``tva fit … --trainer.max_epochs 0``. Under DDP each rank sees its share of the
    same examples that one device would see; rank 0 writes.

    Args:
        kinds: Which files to write: ``fisher``, ``gram``, and ``curvature``, the factors A and G of every layer that
            `CurvaturePenalty` takes. For these the model's ``validation_step`` must return ``preds`` (batch, outputs),
            or ``logits`` with ``mask``.
        num_examples: Use at most this many training examples; 256 to 2,048 in the papers.
        seed: Seed of the choice of examples, if there are more.
        conv: Also write Gram matrices of convolutions, as ``regmean(…, conv="matrix")`` needs.
        dirpath: Local folder; by default that of the first ModelCheckpoint.
        probe: For ``curvature``: ``"outputs"``, the squared change of the outputs (logits), or ``"labels"``, their
            divergence, by labels drawn from the model; see `tva.merge.curvature.measure_curvature`.
        num_samples: For ``curvature``: probes for each example.

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
        probe: Probe = "outputs",
        num_samples: int = 1,
    ) -> None:
        super().__init__()
        known = (*KINDS, CURVATURE)
        if isinstance(kinds, str) or not kinds or set(kinds) - set(known):
            raise ValueError(f"kinds lists one or more of {', '.join(known)}; found {kinds!r}.")
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1; found {num_examples}.")
        self.kinds, self.num_examples, self.seed, self.conv, self.dirpath = kinds, num_examples, seed, conv, dirpath
        self.probe, self.num_samples = probe, num_samples

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_whole(
            trainer,
            self,
            "Fit without it; then load the weights that were reached into the model, and fit once more with "
            "strategy='ddp' or devices=1, max_epochs=0 and this callback.",
        )
        if CURVATURE in self.kinds and trainer.world_size > 1:
            raise ValueError(
                f"MergeStatistics measures {CURVATURE!r} on one device; this Trainer has {trainer.world_size}. Set "
                f"devices=1."
            )
        if CURVATURE in self.kinds and kind_of(pl_module) is not None:
            raise ValueError(
                f"MergeStatistics measures {CURVATURE!r} of an ordinary model, and this one is linearized. Set "
                f"tangent to false: at the base both have the same."
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        folder = Path(self.dirpath or getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir)
        strategy, device = trainer.strategy, pl_module.device
        with _silent(pl_module):
            pl_module.to(strategy.root_device)  # when fitting has ended, the strategy moves it to the CPU
            if set(self.kinds) & set(KINDS):
                self._write_information(trainer, pl_module, folder)
            if CURVATURE in self.kinds:
                self._write_curvature(trainer, pl_module, folder)
            pl_module.to(device)
        strategy.barrier()

    def _write_information(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> None:
        strategy = trainer.strategy
        mine = islice(self._examples(trainer), trainer.global_rank, self.num_examples, trainer.world_size)
        found = measure_information(
            pl_module,
            (strategy.batch_to_device(batch) for batch in mine),
            lambda batch: _loss(pl_module.training_step(batch, 0)),
            self.num_examples,
            self.conv,
            lambda tensor: strategy.reduce(tensor.to(strategy.root_device), reduce_op="sum").to(tensor.device),
        )
        facts = {"tva.num_examples": str(found.num_examples), "tva.seed": str(self.seed)}
        for kind, tensors in (("fisher", found.fisher), ("gram", found.grams)):
            if kind in self.kinds and trainer.is_global_zero:
                own = {name.removeprefix(network_of(pl_module)[0]): tensor for name, tensor in tensors.items()}
                save_weights(own, folder / f"{kind}.safetensors", {**facts, "tva.statistics": kind})

    def _write_curvature(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> None:
        prefix, network = network_of(pl_module)
        metrics = [part for part in pl_module.modules() if isinstance(part, Metric)]
        found = measure_curvature(
            network,
            (trainer.strategy.batch_to_device(batch) for batch in self._examples(trainer)),
            lambda batch: _outputs(pl_module.validation_step(batch, 0)),
            self.num_examples,
            self.probe,
            self.num_samples,
            self.seed,
        )
        for metric in metrics:
            metric.reset()  # which the validation step updated
        state = canonical_state_dict(pl_module.state_dict())
        base = fingerprint({name.removeprefix(prefix): tensor for name, tensor in state.items()}).digest
        facts = {"tva.seed": str(self.seed), "tva.probe": self.probe, "tva.base": base}
        task = getattr(getattr(trainer, "datamodule", None), "name", None)
        facts |= {} if task is None else {"tva.task": str(task)}
        save_weights(found.tensors(), folder / "curvature.safetensors", {**found.metadata(), **facts})

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


def check_whole(trainer: L.Trainer, callback: L.Callback, advice: str = "Use one device or DDP.") -> None:
    """Raise if the strategy does not keep the whole model on every rank.

    Raises:
        ValueError: It does not.
    """
    check_package(trainer, callback)
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"{type(callback).__name__} needs the whole model on every rank, on one device or with DDP; this Trainer "
            f"uses {type(strategy).__name__}. {advice}"
        )


def _outputs(output: Any) -> torch.Tensor:
    found = output if isinstance(output, dict) else {}
    if isinstance(found.get("logits"), torch.Tensor) and isinstance(found.get("mask"), torch.Tensor):
        return found["logits"][found["mask"]]
    preds = found.get("preds")
    if not isinstance(preds, torch.Tensor):
        raise ValueError(
            f"The kind {CURVATURE!r} needs a validation_step that returns 'preds' (batch, outputs), or 'logits' with "
            f"'mask'; found {', '.join(found) or type(output).__name__}."
        )
    return preds if preds.ndim > 1 else preds[:, None]


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
