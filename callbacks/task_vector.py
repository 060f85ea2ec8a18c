"""A callback that writes a task vector beside every checkpoint of an existing Trainer."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from tva.state_dict import check_same
from tva.task_vector import SUFFIX, Origin, TaskVector
from tva.weights import (
    Fingerprint,
    canonical_names,
    canonical_state_dict,
    fingerprint,
    open_weights,
    save_weights,
)


class TaskVectorCallback(L.Callback):
    """Write the task vector ``NAME.tv.safetensors`` beside every checkpoint ``NAME.ckpt``.

    Works in any Trainer with any LightningModule, on one device or with DDP. The weights are those that go into the
    checkpoint, averaged ones included. The base is written once, as ``base-FINGERPRINT.safetensors`` in the checkpoint
    folder, when fitting starts; its place is kept in the checkpoint, so that after resuming vectors are still taken
    against the original base. When ModelCheckpoint drops a checkpoint its vector goes too.

    Args:
        base: Checkpoint of the base model, in any format that `tva.open_weights` reads, with the keys of the
            LightningModule's state dict. By default the weights that fitting starts from.
        include: Regular expressions; only parameters whose whole name matches one are in the vector.
        exclude: Regular expressions; parameters whose whole name matches one are left out, even if included.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``: how deltas are stored. By default exactly.
        task: The task's name in the file; by default the ``name`` of the data module, if it has one.
        dirpath: Folder of the base; by default that of the first ModelCheckpoint.

    Raises:
        MismatchError: ``base`` is of another architecture than the model.
        ValueError: A run resumes from a checkpoint that this callback did not take part in and ``base`` is not given,
            or an option cannot be understood.
        FileNotFoundError: The base is no longer where it was.

    Example:
        >>> trainer = L.Trainer(callbacks=[TaskVectorCallback()], logger=False)
    """

    def __init__(
        self,
        base: str | os.PathLike[str] | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        dtype: str | None = None,
        task: str | None = None,
        dirpath: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("include", include), ("exclude", exclude)):
            if isinstance(value, str):
                raise ValueError(f"{name} must be a list of regular expressions, not one string: [{value!r}].")
            for pattern in value or ():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{name} holds {pattern!r}, which is no regular expression: {error}.") from error
        dtypes = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in dtypes:
            raise ValueError(f"dtype must be one of float32, bfloat16, float16, or left out; found {dtype!r}.")
        self.base = base
        self.include = include
        self.exclude = tuple(exclude)
        self.dtype = dtypes[dtype]
        self.task = task
        self.dirpath = dirpath
        self._captured: tuple[Path, Fingerprint] | None = None
        self._resumed_from_step = 0
        self._unwrap: Callable[[], None] | None = None

    # --- the base: captured once, before the first step

    def state_dict(self) -> dict[str, Any]:
        if self._captured is None:
            return {}
        path, tree = self._captured
        return {"base": str(path), "base_fingerprint": tree.digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "base" in state_dict:
            self._captured = self._find_base(Path(state_dict["base"]), state_dict["base_fingerprint"])

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # trainer.ckpt_path is no sign of a resumed run: the learning-rate finder leaves it set on a fresh one.
        self._resumed_from_step = checkpoint.get("global_step", 0)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._captured is not None or trainer.fast_dev_run:  # resumed, or fit() called again on the same objects
            return
        if self.base is not None:
            weights = open_weights(self.base)
            check_same(
                canonical_state_dict(pl_module.state_dict()), weights, "the model", f"the base {os.fspath(self.base)}"
            )
            self._captured = Path(self.base).absolute(), fingerprint(weights)
            return
        if self._resumed_from_step > 0:
            raise ValueError(
                f"This run resumes at step {self._resumed_from_step} from a checkpoint that names no base, and the "
                f"resumed weights are not the base. Pass the original base: TaskVectorCallback(base=PATH)."
            )
        state = canonical_state_dict(pl_module.state_dict())
        tree = fingerprint(state)
        path = self._folder(trainer) / f"base-{tree.digest}.safetensors"
        self._on_rank_zero(trainer, lambda: None if path.exists() else save_weights(state, path))
        self._captured = path, tree

    def _folder(self, trainer: L.Trainer) -> Path:
        folder = self.dirpath or getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
        return Path(trainer.strategy.broadcast(os.fspath(folder))).absolute()

    def _find_base(self, path: Path, digest: str) -> tuple[Path, Fingerprint]:
        if self.base is not None:
            path = Path(self.base).absolute()
        if not path.exists():
            raise FileNotFoundError(
                f"The base that this run started from was expected at {path}, but nothing is there. Put it back, or "
                f"pass its new place: TaskVectorCallback(base=PATH)."
            )
        tree = fingerprint(open_weights(path))
        if tree.digest != digest:
            raise ValueError(
                f"The checkpoint was trained from the base {digest}, but {path} is {tree.digest}. Put the original "
                f"base back, or pass its place: TaskVectorCallback(base=PATH)."
            )
        return path, tree

    # --- the vectors: the strategy saves and removes every checkpoint, whoever asked for it

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        save, remove = strategy.save_checkpoint, strategy.remove_checkpoint

        def save_with_vector(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
            save(checkpoint, filepath, storage_options=storage_options)
            # Hidden names are the tuner's own temporary checkpoints.
            if not Path(filepath).name.startswith("."):
                self._on_rank_zero(trainer, lambda: self._write(trainer, pl_module, checkpoint, Path(filepath)))

        def remove_with_vector(filepath: Any) -> None:
            remove(filepath)
            if trainer.is_global_zero:
                vector_path(filepath).unlink(missing_ok=True)

        def unwrap() -> None:
            strategy.save_checkpoint, strategy.remove_checkpoint = save, remove

        strategy.save_checkpoint, strategy.remove_checkpoint = save_with_vector, remove_with_vector
        self._unwrap = unwrap

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._unwrap is not None:
            self._unwrap()
            self._unwrap = None

    def _write(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: Mapping[str, Any], filepath: Path
    ) -> None:
        path, tree = self._captured
        base = open_weights(path)
        # A module may leave parts it did not train out of its checkpoint: those are the base's.
        finetuned: dict[str, Tensor] = {**base, **canonical_state_dict(checkpoint["state_dict"])}
        buffers = set(canonical_names([name for name, _ in pl_module.named_buffers(remove_duplicate=False)]))
        datamodule = getattr(trainer, "datamodule", None)
        vector = TaskVector.between(
            base,
            {name: tensor.detach().cpu() for name, tensor in finetuned.items()},
            buffers=buffers,
            exclude=[name for name in base if name not in buffers and not self._selects(name)],
            origin=Origin(
                base=tree,
                task=self.task or getattr(datamodule, "name", None),
                step=checkpoint.get("global_step"),
                epoch=checkpoint.get("epoch"),
                averaged="averaging_state" in checkpoint,
                metrics={name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1},
                hyperparameters=_json_only(checkpoint.get("hyper_parameters", pl_module.hparams)),
            ),
        )
        vector.save(vector_path(filepath), dtype=self.dtype)

    def _selects(self, name: str) -> bool:
        included = self.include is None or any(re.fullmatch(pattern, name) for pattern in self.include)
        return included and not any(re.fullmatch(pattern, name) for pattern in self.exclude)

    @staticmethod
    def _on_rank_zero(trainer: L.Trainer, action: Callable[[], object]) -> None:
        """Run ``action`` on rank 0; if it fails there, fail everywhere rather than leave the others waiting."""
        error: Exception | None = None
        if trainer.is_global_zero:
            try:
                action()
            except Exception as caught:  # re-raised below on every rank
                error = caught
        message = trainer.strategy.broadcast(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if message is not None:
            raise RuntimeError(f"Rank 0 could not write a task vector: {message}")


def vector_path(checkpoint: str | os.PathLike[str]) -> Path:
    """Give the name of the task vector that belongs to a checkpoint.

    Example:
        >>> vector_path("runs/mnist/last.ckpt").as_posix()
        'runs/mnist/last.tv.safetensors'
    """
    return Path(str(checkpoint).removesuffix(".ckpt") + SUFFIX)


def _json_only(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what JSON can hold; the file must not need a class of the run to be read."""
    kept = {}
    for name, value in hyperparameters.items():
        try:
            json.dumps(value)
        except TypeError:
            value = str(value)
        kept[str(name)] = value
    return kept
