"""A classifier whose encoder is trained under a head that belongs to the task, not to the weights."""

import json
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import xxhash
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from tva.checkpoints import cache_folder, fingerprint, open_weights, save_weights
from tva.errors import some
from tva.models.heads import HeldHead, TrainedHead, class_means, examples_digest, fit_probe
from tva.models.optim import FineTuned
from tva.models.sharding import shard_later

START = "start"  # in heads: the head that a learned one would start from


class FrozenHeadClassifier(FineTuned, ABC):
    """Fine-tune and evaluate an encoder under a head that is not part of the state dict.

    Task vectors need networks without task-specific parameters. Therefore the head is computed from the data module,
    once for each task, and is not part of the state dict: the state dict is the encoder's, and one model can be
    evaluated on any number of tasks.

    The data module's batches are ``inputs, labels``; it has ``class_names`` and may have a ``name``. By default the
    paper's recipe is used: AdamW, learning rate 1e-5, weight decay 0.1, 200 steps of linear warm-up, then cosine decay
    to 0. (Batch size 128 and 2,000 steps belong to the data module and the Trainer.)

    Logs ``STAGE/TASK/loss`` and ``STAGE/TASK/accuracy``, with STAGE one of train, val and test; those of training every
    ``log_every_n_steps``, or each step where a progress bar or a callback's ``monitor`` reads them. The steps of
    validation and test return per-example ``correct``, and the logits and labels as ``preds`` and ``target``.

    Args:
        head: The model's own kind; or ``"means"``: class means of the base's features; ``"probe"``: a linear head that
            is trained on the base's features before anything else; or ``"learned"``: the model's own kind, trained
            further together with the encoder. All but the last stay frozen. Means and probes are made of the data
            module's ``prototype_dataloader``, else of its ``train_dataloader``, and kept in ``~/.cache/tva``
            (``TVA_CACHE``); a learned head is kept in the fit's checkpoints, beside the weights.
        heads: With ``head="learned"``, for evaluation: task to the checkpoint of the fit that learned its head, or
            ``start`` for the head that learning would start from.
        channels_last: Use the channels-last memory format, which is often faster; for image encoders.
        **options: Options of `tva.models.optim.FineTuned`.

    Source: the recipe is that of Ilharco et al., "Editing models with task arithmetic", ICLR 2023.
    """

    returns_predictions = True
    encoder: nn.Module
    own_head: str = "means"
    logit_scale: float = 20.0  # what the cosines of class means are multiplied by

    def __init__(
        self, head: str | None = None, heads: dict[str, str] | None = None, channels_last: bool = False, **options: Any
    ) -> None:
        super().__init__(**options)
        kinds = dict.fromkeys([self.own_head, "means", "probe", "learned"])
        head = self.own_head if head is None else head
        if head not in kinds:
            raise ValueError(f"{type(self).__name__}'s head must be one of {some(kinds, 4)}; found {head!r}.")
        if heads and head != "learned":
            raise ValueError(
                f"heads are those of fits with head='learned', but head is {head!r}. Set it, or drop them."
            )
        self.learns_head = head == "learned"
        self.head_kind = self.own_head if self.learns_head else head
        self.heads = dict(heads or {})
        self._channels_last = channels_last
        self._heads: dict[str, Tensor] = {}
        self._learned: dict[str, Tensor] = {}  # task -> head, as fits in this process left it
        self._base_digest: str | None = None
        self._head_digest: str | None = None
        self._data_digests: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self.trained_head: TrainedHead | None = None
        self.accuracy = nn.ModuleDict()

    def _finish(self) -> None:
        """Compute the base's fingerprint, load ``weights``, set options; the last line of a subclass's constructor."""
        if self.head_kind != "zero_shot":  # which is not made of the encoder's features
            self._base_digest = fingerprint(self.encoder.state_dict()).digest
        self._held = HeldHead()  # after the encoder
        if self._channels_last:
            self.encoder.to(memory_format=torch.channels_last)
        self._adapt("encoder")

    # --- the head

    @property
    def head(self) -> Tensor:
        """The head that is not trained, shape (classes, features); None before setup."""
        return self._held.weight

    @head.setter
    def head(self, weight: Tensor) -> None:
        self._held.weight = weight

    @abstractmethod
    def load_base(self) -> nn.Module:
        """Load the encoder once more, as it was before ``weights``, in evaluation mode on the CPU."""

    def embed(self, encoder: nn.Module, inputs: Tensor) -> Tensor:
        """Return the features of a batch of inputs, shape (batch, features), not yet normalized."""
        return encoder(inputs)

    def head_key(self, datamodule: L.LightningDataModule) -> dict[str, Any]:
        """Return in JSON values all that the head of this data module depends on; it names the head's cache file."""
        return {
            "head": self.head_kind,
            "base": self._base_digest,
            "examples": self._examples_digest(datamodule),
            "class_names": list(datamodule.class_names),
            "logit_scale": self.logit_scale,
        }

    @property
    def head_digest(self) -> str | None:
        """Tells the present head from others: a digest of all that it depends on, of a learned one of itself."""
        if self.trained_head is not None:
            return fingerprint({"head": self.trained_head.weight.detach().cpu().float()}).digest
        return self._head_digest

    def build_head(self, datamodule: L.LightningDataModule) -> Tensor:
        """Build the head of a data module, shape (classes, features): logits are ``features @ head.T``.

        Must not depend on the encoder's present weights, which may be edited or fine-tuned.
        """
        encode = self._base_features()
        if self.head_kind == "probe":
            return fit_probe(encode, datamodule)
        return class_means(encode, datamodule) * self.logit_scale

    def _base_features(self) -> Callable[[Tensor], Tensor]:
        """Return the function from a batch of inputs to the base's normalized features."""
        device = self.trainer.strategy.root_device
        with torch.random.fork_rng(devices=[]):
            encoder = self.load_base()
        found = fingerprint(encoder.state_dict()).digest
        if found != self._base_digest:
            raise ValueError(
                f"The head needs the base {self._base_digest} that this model was made from, but what it was loaded "
                f"from now holds {found}. Put the base back, or make the model again."
            )
        encoder.to(device)

        def encode(inputs: Tensor) -> Tensor:
            with torch.no_grad():
                return F.normalize(self.embed(encoder, inputs.to(device)), dim=-1)

        return encode

    def _examples_digest(self, datamodule: L.LightningDataModule) -> str:
        if datamodule not in self._data_digests:
            self._data_digests[datamodule] = examples_digest(datamodule)
        return self._data_digests[datamodule]

    def _learned_head(self, datamodule: L.LightningDataModule) -> Tensor:
        where = self.heads.get(self.task)
        if where is None and self.task in self._learned:
            return self._learned[self.task]
        if where == START:
            return self._cached_head(datamodule)
        if where is None:
            raise ValueError(
                f"{self.task}: with head='learned' its head comes from a fit. Give heads: {{{self.task}: CHECKPOINT}}, "
                f"the .ckpt of its fit, or {{{self.task}: {START}}} for the head that learning would start from."
            )
        if not Path(where).is_file():
            raise FileNotFoundError(
                f"The head of {self.task} was expected in the checkpoint {where}; nothing is there."
            )
        checkpoint = torch.load(where, map_location="cpu", weights_only=True, mmap=True)
        found = checkpoint.get("head")
        if found is None or found["class_names"] != list(datamodule.class_names):
            raise ValueError(
                f"{where} must hold a head of the classes {some(datamodule.class_names)} of {self.task}; it holds "
                + ("none" if found is None else f"one of {some(found['class_names'])}")
                + ". Give the checkpoint of a fit on this task with head='learned'."
            )
        return found["weight"].float().clone()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trained_head is not None:
            names = list(self.trainer.datamodule.class_names)
            weight = self.trained_head.weight.detach().cpu().clone()
            checkpoint["head"] = {"task": self.task, "class_names": names, "weight": weight}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trained_head is not None and "head" in checkpoint:
            with torch.no_grad():
                self.trained_head.weight.copy_(checkpoint["head"]["weight"])

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self.trained_head is not None:
            self._learned[self.task] = self.trained_head.weight.detach().cpu().clone()
            self._head_digest = self.head_digest
            self.head, self.trained_head = self._learned[self.task].to(self.device), None

    def setup(self, stage: str) -> None:
        shard_later(self, "encoder")
        datamodule = self.trainer.datamodule
        if not hasattr(datamodule, "class_names"):
            raise TypeError(
                f"{type(self).__name__} builds its head from the data module's class_names, but "
                f"{type(datamodule).__name__} has none. Use tva.data.ImageTask, or give it that attribute."
            )
        self.task = getattr(datamodule, "name", "task")
        if self.learns_head and stage == "fit":
            self._check_no_averaging()
        known = self.learns_head and (stage != "fit" or self.task in self.heads or self.task in self._learned)
        head = self._learned_head(datamodule) if known else self._cached_head(datamodule)
        made = not known or self.heads.get(self.task) == START
        self._head_digest = self._head_key(datamodule) if made else fingerprint({"head": head.float()}).digest
        self.head = head.to(self.device)
        if self.learns_head and stage == "fit":
            self.trained_head = TrainedHead(self.head)
        num_classes = len(self.head)
        self.accuracy = nn.ModuleDict(
            {
                phase: MulticlassAccuracy(num_classes=num_classes, average="micro").to(self.device)
                for phase in ("train_", "val_", "test_")  # a ModuleDict refuses the plain name "train"
            }
        )

    def _check_no_averaging(self) -> None:
        averaging = [c for c in getattr(self.trainer, "callbacks", ()) if isinstance(c, WeightAveraging)]
        if averaging:
            raise ValueError(
                f"{type(averaging[0]).__name__} averages only the encoder, and a learned head would not fit its "
                f"averages. Use head='probe', or leave the callback out."
            )

    def _head_key(self, datamodule: L.LightningDataModule) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(self.head_key(datamodule), sort_keys=True).encode())

    def _cached_head(self, datamodule: L.LightningDataModule) -> Tensor:
        key = self._head_key(datamodule)
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

    def forward(self, inputs: Tensor) -> Tensor:
        """Classify a batch.

        Args:
            inputs: As the data module's batches hold them: images of shape (batch, 3, height, width), or token ids of
                shape (batch, length).

        Returns:
            Logits, shape (batch, classes).
        """
        head = self.head if self.trained_head is None else self.trained_head.weight
        features = F.normalize(self.embed(self.encoder, inputs), dim=-1)
        if features.shape[-1] != head.shape[-1]:
            raise ValueError(
                f"{self.task}: the encoder has {features.shape[-1]} features, but the head takes {head.shape[-1]}. "
                f"Use a head of this encoder: head='means' or 'probe' are made of its own features."
            )
        return features @ head.T  # (batch, features) @ (features, classes)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> dict[str, Tensor]:
        inputs, labels = batch
        logits = self(inputs)
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
        """Return whether this training step's metrics are read; logging them costs milliseconds a step."""
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
