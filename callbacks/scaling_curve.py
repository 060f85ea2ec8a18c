"""A callback that plots, when training ends, a metric on validation data at several scaling coefficients."""

import csv
import tempfile
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader
from tva.callbacks.evaluate_in_fit import evaluate_within_fit
from tva.callbacks.lora import LoraView
from tva.callbacks.remote_files import deliver, workplace
from tva.callbacks.sharding import is_sharded
from tva.callbacks.task_vector import TaskVectorCallback

from tva.arithmetic import add_scaled, subtract
from tva.checkpoints import canonical_names, open_weights, save_weights


class ScalingCurve(L.Callback):
    r"""At the end of fit, evaluate :math:`\theta_0 + \lambda\tau` for several :math:`\lambda` on the validation set.

    Logs ``scaling/METRIC`` (one value per coefficient, with the coefficient in percent as step), and writes
    ``scaling_curve.png`` and ``scaling_curve.csv`` into the folder of the vectors. The weights are restored bit for
    bit. Needs a `TaskVectorCallback` in the same Trainer, for the base, and holds no copy of the model in memory: both
    ends of the line are read from disk. Integer buffers and running statistics stay those of the fine-tuned model.

    Args:
        coefs: Scaling coefficients; 0 is the base, 1 the fine-tuned model.
        metric: What to plot; by default ``accuracy``, or else the first that the model logs.
        limit_batches: Evaluate on at most this many batches.

    Raises:
        ValueError: There is no TaskVectorCallback or no validation data, the strategy shards the model, or the model
            does not log ``metric``.

    Source: Ilharco et al., "Editing models with task arithmetic", ICLR 2023, choose the coefficient on validation data.
    """

    def __init__(
        self,
        coefs: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2),
        metric: str | None = None,
        limit_batches: int | None = None,
    ) -> None:
        super().__init__()
        if not coefs:
            raise ValueError("coefs must hold at least one scaling coefficient, such as [0, 0.5, 1].")
        self.coefs = tuple(float(coef) for coef in coefs)
        self.metric = metric
        self.limit_batches = limit_batches
        self.values: list[dict[str, float]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if is_sharded(trainer.strategy):
            raise ValueError(
                f"ScalingCurve needs the whole model on every rank, and {type(trainer.strategy).__name__} shards it. "
                f"Draw the curve afterwards: tva edit with its vector and a list of coefficients."
            )
        if not any(isinstance(callback, TaskVectorCallback) for callback in trainer.callbacks):
            raise ValueError("ScalingCurve needs a TaskVectorCallback in the same Trainer, which knows the base.")

        if LoraView(pl_module):
            raise ValueError("ScalingCurve cannot move a model with LoRA modules between base and fine-tuned weights.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.enable_validation:
            raise ValueError("ScalingCurve needs one validation loader in fit, and a validation_step; found none.")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        ours = next(callback for callback in trainer.callbacks if isinstance(callback, TaskVectorCallback))
        loaders = trainer.val_dataloaders
        if not isinstance(loaders, DataLoader):
            raise ValueError(f"ScalingCurve needs one validation loader in fit; found {type(loaders).__name__}.")
        with tempfile.TemporaryDirectory(prefix="tva-") as temporary:
            self.values = self._walk(trainer, pl_module, ours, loaders, Path(temporary) / "finetuned.safetensors")
        metric = self._choose(pl_module)
        for logger in trainer.loggers:
            for coef, values in zip(self.coefs, self.values, strict=True):
                logged = {f"scaling/{name}": value for name, value in values.items()}
                logger.log_metrics({"scaling/coef": coef, **logged}, step=round(100 * coef))
        folder = ours.folder(trainer)
        if trainer.is_global_zero:
            self._write(folder, metric)

    @torch.no_grad()
    def _walk(
        self, trainer: L.Trainer, pl_module: L.LightningModule, ours: TaskVectorCallback, loader: DataLoader, file: Path
    ) -> list[dict[str, float]]:
        state = pl_module.state_dict()
        parameters = dict(pl_module.named_parameters(remove_duplicate=False))
        canonical = {new: old for new, old in canonical_names(list(state)).items() if old in parameters}
        names = {own: canonical[new] for own, new in LoraView(pl_module).plain_names(canonical).items()}
        save_weights({new: state[old] for new, old in names.items()}, file)
        base, finetuned = ours.open_base(trainer), open_weights(file)

        def move(coef: float) -> None:
            for name, stored in names.items():
                start, end = base[name], finetuned[name]
                moved = end if coef == 1 else add_scaled(start, subtract(end, start), coef)
                state[stored].copy_(moved)

        values = []
        try:
            for coef in self.coefs:
                move(coef)
                values.append(evaluate_within_fit(trainer, pl_module, loader, limit_batches=self.limit_batches))
        finally:
            move(1.0)
        return values

    def _choose(self, pl_module: L.LightningModule) -> str:
        known = list(self.values[0])
        metric = self.metric or ("accuracy" if "accuracy" in known else known[0])
        if metric not in known:
            raise ValueError(f"{type(pl_module).__name__} logs {known} in validation, and not {metric!r}.")
        return metric

    def _write(self, folder: str, metric: str) -> None:
        from matplotlib.figure import Figure

        with workplace(folder) as local:
            table = local / ".scaling_curve.csv"
            with table.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["coef", *self.values[0]])
                writer.writeheader()
                writer.writerows({"coef": c, **values} for c, values in zip(self.coefs, self.values, strict=True))
            figure = Figure(figsize=(5, 3.5), layout="constrained")
            axes = figure.add_subplot()
            axes.plot(self.coefs, [values[metric] for values in self.values], marker="o")
            axes.set(xlabel="scaling coefficient λ", ylabel=metric, title="base + λ · task vector, validation")
            axes.grid(alpha=0.3)
            picture = local / ".scaling_curve.png"
            figure.savefig(picture, dpi=120)
            for made in (table, picture):
                deliver(made, f"{folder}/{made.name.removeprefix('.')}")
                made.unlink(missing_ok=True)
