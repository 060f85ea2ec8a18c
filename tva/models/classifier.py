"""A classifier whose encoder is trained under a frozen head that belongs to the task, not to the weights."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import xxhash
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from tva.models.adapters import Lora, adapt
from tva.weights import cache_folder, open_weights, save_weights


class FrozenHeadClassifier(L.LightningModule, ABC):
    """Fine-tune and evaluate an image encoder under a frozen head.

    Task vectors need networks without parameters of their own for a task. So the head is made from the data module,
    once for each task, and is no part of the state dict: the state dict is the encoder's, and one model can be
    evaluated on any number of tasks.

    The data module's batches are ``images, labels``; it has ``class_names`` and may have a ``name``. By default the
    paper's recipe is used: AdamW, learning rate 1e-5, weight decay 0.1, 200 steps of linear warm-up, then cosine decay
    to 0. (Batch size 128 and 2,000 steps belong to the data module and the Trainer.)

    Logs ``STAGE/TASK/loss`` and ``STAGE/TASK/accuracy``, with STAGE one of train, val and test; those of training every
    ``log_every_n_steps``, or each step where a progress bar or a callback's ``monitor`` reads them. The steps of
    validation and test return per-example ``correct``, and the logits and labels as ``preds`` and ``target``.

    Args:
        weights: Checkpoint to start from instead of the encoder's own weights, such as the output of ``tva edit``.
        learning_rate: Peak learning rate.
        weight_decay: AdamW's, on every trained parameter.
        warmup_steps: Optimizer steps of linear warm-up.
        train_only: What of the encoder is trained, as the next two; see `tva.models.adapters.adapt`.
        lora: See there.
        tangent: See there.

    Source: the recipe is that of Ilharco et al., "Editing models with task arithmetic", ICLR 2023.
    """

    encoder: nn.Module
    image_transform: Callable[[Any], Tensor]  # from a PIL image to the encoder's input

    def __init__(
        self,
        weights: str | None = None,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.1,
        warmup_steps: int = 200,
        train_only: str | list[str] | None = None,
        lora: Lora | None = None,
        tangent: bool = False,
    ) -> None:
        super().__init__()
        self.weights = weights
        self.adaptation: dict[str, Any] = {"train_only": train_only, "lora": lora, "tangent": tangent}
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.task = "task"
        self._heads: dict[str, Tensor] = {}
        self.accuracy = nn.ModuleDict()
        self.register_buffer("head", None, persistent=False)

    def _load_weights(self) -> None:
        """Load ``weights`` and adapt the encoder once it exists; the last line of a subclass's constructor."""
        adapt(self, self.weights, **self.adaptation)

    # --- the head

    @abstractmethod
    def head_key(self, datamodule: L.LightningDataModule) -> dict[str, Any]:
        """Say in JSON values all that the head of this data module depends on; it names the head's cache file."""

    @abstractmethod
    def build_head(self, datamodule: L.LightningDataModule) -> Tensor:
        """Build the head of a data module, shape (classes, features): logits are ``features @ head.T``.

        Must not depend on the encoder's present weights, which may be edited or fine-tuned.
        """

    def setup(self, stage: str) -> None:
        datamodule = self.trainer.datamodule
        if not hasattr(datamodule, "class_names"):
            raise TypeError(
                f"{type(self).__name__} builds its head from the data module's class_names, but "
                f"{type(datamodule).__name__} has none. Use tva.data.ImageTask, or give it that attribute."
            )
        self.task = getattr(datamodule, "name", "task")
        self.head = self._cached_head(datamodule).to(self.device)
        num_classes = len(self.head)
        self.accuracy = nn.ModuleDict(
            {
                phase: MulticlassAccuracy(num_classes=num_classes, average="micro").to(self.device)
                for phase in ("train_", "val_", "test_")  # a ModuleDict refuses the plain name "train"
            }
        )

    def _cached_head(self, datamodule: L.LightningDataModule) -> Tensor:
        key = xxhash.xxh3_128_hexdigest(json.dumps(self.head_key(datamodule), sort_keys=True).encode())
        if key not in self._heads:
            file = cache_folder() / "heads" / f"{key}.safetensors"
            if file.exists():
                self._heads[key] = open_weights(file)["head"]
            else:
                with torch.no_grad():
                    self._heads[key] = self.build_head(datamodule).detach().float().cpu()
                if self.trainer.is_global_zero:
                    save_weights({"head": self._heads[key]}, file)
        return self._heads[key]

    # --- steps

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: Shape (batch, 3, height, width), as ``image_transform`` makes them.

        Returns:
            Logits, shape (batch, classes).
        """
        return F.normalize(self.encoder(images), dim=-1) @ self.head.T  # (batch, features) @ (features, classes)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> dict[str, Tensor]:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        if stage == "train" and not self._is_read():
            return {"loss": loss}
        accuracy = self.accuracy[f"{stage}_"]
        accuracy(logits, labels)
        options = {"on_step": stage == "train", "on_epoch": stage != "train", "batch_size": len(labels)}
        self.log(f"{stage}/{self.task}/loss", loss, prog_bar=stage == "train", sync_dist=stage != "train", **options)
        self.log(f"{stage}/{self.task}/accuracy", accuracy, prog_bar=True, **options)
        return {"loss": loss, "correct": logits.argmax(dim=-1) == labels, "preds": logits, "target": labels}

    def _is_read(self) -> bool:
        """Say whether anybody reads this training step's metrics; telling Lightning costs milliseconds a step."""
        trainer = self.trainer
        bar = getattr(trainer.progress_bar_callback, "is_enabled", False)
        monitors = [str(getattr(callback, "monitor", None)) for callback in trainer.callbacks]
        due = trainer.global_step == 0 or (trainer.global_step + 1) % max(1, trainer.log_every_n_steps) == 0
        return bar or due or trainer.is_last_batch or any(monitor.startswith("train/") for monitor in monitors)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train")["loss"]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return self._step(batch, "test")

    def configure_optimizers(self) -> dict[str, Any]:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        total = self.trainer.estimated_stepping_batches
        warmup = min(self.warmup_steps, total)

        def scale(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
