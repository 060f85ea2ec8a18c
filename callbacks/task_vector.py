"""A callback that writes task vectors from an existing Trainer: next to checkpoints, during training, or on request."""

import os
import uuid
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch.nn.parameter import UninitializedTensorMixin
from tva.callbacks.averaging import Weights, check_averaging, choose_weights
from tva.callbacks.base_weights import BaseWeights, check_model, digest_of, remove_snapshots_of_dead, snapshot_name
from tva.callbacks.lora import LoraView
from tva.callbacks.names import parameter_names
from tva.callbacks.remote_files import exists, local_copy, open_anywhere, plain, remove
from tva.callbacks.sharding import Shards, check_package, check_strategy, is_sharded, live_state
from tva.callbacks.writer import ADAPTER, LoraMode, SavedVector, VectorJob, VectorWriter, vector_path

from tva.checkpoints import LazyWeights, canonical_state_dict
from tva.checkpoints.hub import push
from tva.errors import some
from tva.vectors.encoding import Encoding
from tva.vectors.header import SUFFIX

Against = Literal["base", "previous"]
TRAJECTORY = "trajectory"  # folder of the vectors along the way


class TaskVectorCallback(L.Callback):
    """Write the task vector ``NAME.tv.safetensors`` next to every checkpoint ``NAME.ckpt``.

    Works in any Trainer with any LightningModule, on one device, with DDP, FSDP, FSDP2 or DeepSpeed ZeRO 1-3. The base
    is written once, as ``base-FINGERPRINT.safetensors`` in the checkpoint folder, when fitting starts; its path is
    stored in the checkpoint, so that vectors are still relative to the original base after resuming (if the folder has
    moved, the base is found next to the checkpoint). When ModelCheckpoint drops a checkpoint, its vector is removed
    too. Training continues after a full disk or weights that became NaN: a warning and the attribute ``failures`` say
    what was not written (`tva fit` then ends with status 1), and no partial file is left. Any callback with a method
    ``on_vector_saved(trainer, pl_module, saved)`` is called with every saved vector, on every rank.

    Args:
        base: Checkpoint of the base model, in any format that `tva.open_weights` reads, with the keys of the
            LightningModule's state dict. By default the weights from which fitting starts.
        include: Regular expressions; only parameters whose whole name matches one are in the vector.
        exclude: Regular expressions; parameters whose whole name matches one are left out, even if included.
        dtype: Dtype of the stored deltas: ``"float32"``, ``"bfloat16"`` or ``"float16"``; by default exact.
        encoding: Write compressed vectors, as ``"int8"`` or another encoding of ``tva compress``; not with ``dtype``.
        task: The task's name in the file; by default the ``name`` of the data module, if it has one.
        dirpath: Folder of the base and of vectors that belong to no checkpoint; by default that of the first
            ModelCheckpoint. It may be remote, such as ``s3://bucket/run``.
        weights: If a WeightAveraging callback keeps two sets of weights: ``"raw"``, ``"averaged"``, or
            (``"checkpoint"``) those in the ``state_dict`` of a checkpoint.
        lora: For a peft model: ``"merge"`` writes the dense deltas under the base model's names, ``"adapter"`` writes
            the adapter itself into a folder ``NAME.adapter`` that opens like a fine-tuned checkpoint.
        every_n_steps: Also write ``trajectory/step=NNNNNNNN.tv.safetensors`` every N optimizer steps.
        against: What trajectory vectors are relative to: the ``"base"``, or the weights of the ``"previous"`` vector.
        with_checkpoints: Write vectors next to checkpoints.
        at_train_end: Also write ``final.tv.safetensors`` when training ends.
        log_geometry: Log ``task_vector/norm`` and ``task_vector/cosine_to_previous`` through the Trainer's loggers.
        push_to: Repository on the Hugging Face hub for the base and the vectors that exist when fitting ends. If the
            repository does not exist, it is created as private.

    Raises:
        MismatchError: ``base`` is of another architecture than the model, or the model's keys changed before the first
            step.
        ValueError: A run resumes from a checkpoint that this callback did not take part in and ``base`` is not given,
            the strategy is not supported, the Trainer is one of ``pytorch_lightning``, parameters have no values yet,
            or an option is invalid.
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
        weights: Weights = "checkpoint",
        lora: LoraMode = "merge",
        every_n_steps: int | None = None,
        against: Against = "base",
        with_checkpoints: bool = True,
        at_train_end: bool = False,
        log_geometry: bool = True,
        push_to: str | None = None,
        encoding: str | None = None,
    ) -> None:
        super().__init__()
        dtypes = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in dtypes:
            raise ValueError(f"dtype must be one of float32, bfloat16, float16, or left out; found {dtype!r}.")
        if encoding is not None and (dtype is not None or lora == "adapter"):
            raise ValueError(f"encoding={encoding!r} is for dense vectors, without dtype; leave out dtype and lora.")
        encoding = None if encoding is None else str(Encoding.parse(encoding))
        for name, value, kind in (
            ("weights", weights, Weights),
            ("lora", lora, LoraMode),
            ("against", against, Against),
        ):
            if value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; found {value!r}.")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, or left out; found {every_n_steps}.")
        if against == "previous" and (every_n_steps is None or lora == "adapter"):
            raise ValueError("against='previous' needs every_n_steps, and dense vectors (lora='merge').")
        self.base = base
        self.dirpath = dirpath
        self.weights = weights
        self.lora = lora
        self.every_n_steps = every_n_steps
        self.against = against
        self.with_checkpoints = with_checkpoints
        self.at_train_end = at_train_end
        self.push_to = push_to
        self._base = BaseWeights(base)
        self._writer = VectorWriter(include, exclude, dtypes[dtype], task, weights, lora, log_geometry, encoding)
        self.failures: list[str] = []
        self._step = 0  # of the last trajectory vector
        self._previous: tuple[BaseWeights, int] | None = None  # the weights at that step
        self._unwrap: Callable[[], None] | None = None
        self._used = False  # in a fit before this one
        self._end: str | None = None  # fingerprint of the weights at the end of that fit
        self._checked = False  # that the model still is as the base, before the first step
        self._model: weakref.ref[L.LightningModule] | None = None  # that the base is of

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # a weak reference cannot be copied

    # --- the base: captured once, before the first step

    def state_dict(self) -> dict[str, Any]:
        if self._base.digest is None:
            return {}
        state = {**self._base.state(), "run": self._writer.run}
        if self._previous is not None:
            state["previous"] = {**self._previous[0].state(), "step": self._previous[1]}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "base" not in state_dict:
            return
        self._base = BaseWeights(self.base, state_dict["base"], state_dict["base_fingerprint"])
        self._writer.run = state_dict.get("run")
        previous = state_dict.get("previous")
        if previous is not None:
            same = previous["base_fingerprint"] == self._base.digest
            weights = self._base if same else BaseWeights(None, previous["base"], previous["base_fingerprint"])
            self._previous = weights, previous["step"]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # trainer.ckpt_path is no sign of a resumed run: the learning-rate finder leaves it set on a fresh one.
        self._base.resumed_from_step = checkpoint.get("global_step", 0)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Some strategies restore a checkpoint after this hook: there only on_train_start knows what to do.
        if not trainer.fast_dev_run and not trainer.strategy.restore_checkpoint_after_setup:
            self._settle(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        self._settle(trainer, pl_module)
        self._step = trainer.global_step
        if self.against == "previous":
            self._settle_previous(trainer, pl_module)

    def _settle(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find, check or write the base, unless that is done."""
        self._writer.run = trainer.strategy.broadcast(self._writer.run or uuid.uuid4().hex[:12])
        if is_sharded(trainer.strategy) and LoraView(pl_module):
            raise ValueError(
                f"LoRA modules cannot be read under {type(trainer.strategy).__name__}. Use DDP; or train without the "
                f"callback, save the adapter with peft, and use its folder as a task vector."
            )
        if self.lora == "adapter" and (view := LoraView(pl_module)):
            view.check_adapter()
        self._settle_again(trainer, pl_module)
        self._writer.parameters = self._writer.parameters or parameter_names(pl_module)
        if not self._base.settled:
            starts_here = self._base.digest is None and self.base is None
            self._settle_one(trainer, pl_module, self._base)
            if starts_here and self.against == "previous":
                self._previous = self._base, 0

    def _settle_again(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """In a later fit of one model, keep the base only where that fit goes on from it."""
        again, self._used = self._used, False
        if not (again and self._base.settled) or self.base is not None:
            return
        resumed = self._base.resumed_from_step
        now = None if resumed else digest_of(trainer.strategy, pl_module)
        if now in (self._base.digest, self._end) and not resumed:
            return
        if not resumed and trainer.is_global_zero:
            warnings.warn(
                "This fit starts neither from the base of the fit before nor from the weights that it ended with: its "
                "vectors are taken against the weights that it starts from. Pass TaskVectorCallback(base=PATH) for "
                "others.",
                stacklevel=2,
            )
        self._base = BaseWeights(None)
        self._base.resumed_from_step = resumed

    def _settle_one(self, trainer: L.Trainer, pl_module: L.LightningModule, base: BaseWeights) -> None:
        lazy = [name for name, p in pl_module.named_parameters() if isinstance(p, UninitializedTensorMixin)]
        if lazy:
            raise ValueError(
                f"{some(lazy)} get their values from the first batch (lazy modules), so that there is no base yet. Run "
                f"one batch through the model before fit, or at the end of its configure_model."
            )
        state = canonical_state_dict(live_state(trainer.strategy, pl_module))
        folder = self.folder(trainer)
        beside = [folder] if trainer.ckpt_path is None else [os.path.dirname(plain(trainer.ckpt_path)), folder]
        base.settle(Shards(trainer.strategy, state), state, LoraView(pl_module), folder, beside)

    def _settle_previous(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the weights of the last trajectory vector; after resuming without them, those resumed from."""
        step = trainer.global_step
        found = False
        if self._previous is not None:
            names = LoraView(pl_module).plain_names(canonical_state_dict(live_state(trainer.strategy, pl_module)))
            found = self._previous[0].try_to_settle(trainer.strategy, names)
        folder = self.folder(trainer)
        if trainer.is_global_zero:
            for each in (folder, f"{folder}/{TRAJECTORY}"):
                remove_snapshots_of_dead(each, self._previous[0].path if found else None)
        if found:
            return
        previous = BaseWeights(None, name=snapshot_name(self._writer.run, step))
        self._settle_one(trainer, pl_module, previous)
        self._previous = previous, step

    def folder(self, trainer: L.Trainer) -> str:
        """Return the folder of the base and of vectors that belong to no checkpoint; every rank must call it."""
        folder = self.dirpath or getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
        return plain(trainer.strategy.broadcast(os.fspath(folder)))

    def open_base(self, trainer: L.Trainer) -> LazyWeights:
        """Open the base that vectors are taken against, on any rank that can read its file."""
        return self._base.weights if trainer.is_global_zero else open_anywhere(self._base.path)

    # --- when: with checkpoints, as the strategy saves and removes every one, whoever asked for it

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        check_package(trainer, self)
        check_strategy(strategy)
        along_the_way = self.every_n_steps is not None
        asked = along_the_way or self.at_train_end or trainer.checkpoint_callbacks or trainer.fast_dev_run
        if self.with_checkpoints and not asked and trainer.is_global_zero:
            warnings.warn(
                "This Trainer keeps no checkpoints, so that TaskVectorCallback writes no vector by itself. Let it keep "
                "them, pass every_n_steps or at_train_end=True, or with_checkpoints=False and call save_vector.",
                stacklevel=2,
            )
        if self._model is not None and self._model() is not pl_module:  # a callback that is used again
            self._base = BaseWeights(self.base)
        self._base.resumed_from_step = 0
        self._used, self._checked = self._base.settled, False
        self._model = weakref.ref(pl_module)
        check_averaging(trainer, self, self.weights, along_the_way, self.at_train_end)
        if self._unwrap is not None:  # a fit that ended by an exception
            self._unwrap()
        self._writer.run = self._previous = None
        self._writer.reset()
        if trainer.fast_dev_run:
            return
        save, remove_checkpoint = strategy.save_checkpoint, strategy.remove_checkpoint

        def save_with_vector(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
            filepath = strategy.broadcast(filepath)
            kept = dict(checkpoint)  # strategies that shard take the weights out
            save(checkpoint, filepath, storage_options=storage_options)
            # Hidden names are the tuner's own temporary checkpoints.
            if self.with_checkpoints and self._base.settled and not os.path.basename(filepath).startswith("."):
                job = VectorJob(
                    vector_path(filepath),
                    *choose_weights(trainer, pl_module, self.weights, kept),
                    self._base,
                    checkpoint=kept,
                )
                self._writer.emit(trainer, pl_module, job)

        def remove_with_vector(filepath: Any) -> None:
            remove_checkpoint(filepath)
            if trainer.is_global_zero and self.with_checkpoints:
                for path in (vector_path(filepath), vector_path(filepath, ADAPTER)):
                    remove(path)
                    self._writer.written.pop(path, None)

        def unwrap() -> None:
            strategy.save_checkpoint, strategy.remove_checkpoint = save, remove_checkpoint

        strategy.save_checkpoint, strategy.remove_checkpoint = save_with_vector, remove_with_vector
        self._unwrap = unwrap

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._unwrap is None:
            return
        self._unwrap()
        self._unwrap = None
        self._follow_links(trainer)
        if self._previous is not None and trainer.is_global_zero:
            self._previous[0].remove_snapshot()
        self._previous = None
        if self.push_to is not None and trainer.is_global_zero and not trainer.fast_dev_run:
            self._push()
        if self._writer.written and trainer.is_global_zero:
            count, last = len(self._writer.written), list(self._writer.written)[-1]
            many = f", the last of {count}" if count > 1 else ""
            rank_zero_info(f"Task vector: {last}{many}, against the base {self._base.path}")
        self.failures, self._writer.failures = self._writer.failures, []
        if self.failures and trainer.is_global_zero:
            warnings.warn(f"{len(self.failures)} operations failed during fit: {some(self.failures)}", stacklevel=2)

    # --- when: along the way, at the end, on request

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if not self._checked and not trainer.fast_dev_run:
            check_model(trainer.strategy, pl_module, self._base)
            self._checked = True
        self._follow_links(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step, every = trainer.global_step, self.every_n_steps
        if every is None or trainer.fast_dev_run or step // every <= self._step // every:
            return
        path = f"{self.folder(trainer)}/{TRAJECTORY}/step={step:08d}{SUFFIX}"
        base, since = (self._base, None) if self._previous is None else self._previous
        self._emit_now(trainer, pl_module, path, base, since)
        self._step = step
        if self._writer.snapshot is not None and trainer.is_global_zero:
            base.remove_snapshot()
            self._previous, self._writer.snapshot = (self._writer.snapshot, step), None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        if self.at_train_end:
            self._emit_now(trainer, pl_module, f"{self.folder(trainer)}/final{SUFFIX}", self._base)
        if self.every_n_steps is not None and trainer.global_step == 0 and trainer.fit_loop.total_batch_idx >= 0:
            self._writer.failures.append(
                "every_n_steps counts the Trainer's steps, and it has counted none (optimizers that step outside of "
                "Lightning, as with optimizers(use_pl_optimizer=False), are not counted): no trajectory vector"
            )
        self._end = digest_of(trainer.strategy, pl_module) if is_sharded(trainer.strategy) else None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        gone = is_sharded(trainer.strategy) or isinstance(trainer.strategy, DeepSpeedStrategy)
        if self._base.settled and not gone and not trainer.fast_dev_run:
            self._end = digest_of(trainer.strategy, pl_module)

    def save_vector(self, trainer: L.Trainer, path: str | os.PathLike[str]) -> SavedVector | None:
        """Write the task vector of the weights as they are now; every rank must call it.

        Args:
            trainer: The Trainer that is fitting; or that has fitted, where the strategy does not shard the model.
            path: Conventionally ends in ``.tv.safetensors``; may be remote. A file of this name is replaced.

        Returns:
            What was written; None in a ``fast_dev_run``, which writes nothing.

        Raises:
            RuntimeError: The Trainer has not fitted with this callback, so that there is no base yet.
            OSError: It cannot be written; unlike for the vectors that the callback writes by itself, this is an error.
            ValueError: The weights are not finite, or do not fit the base.
        """
        if trainer.fast_dev_run:
            return None
        over = self._unwrap is None and (is_sharded(trainer.strategy) or self not in trainer.callbacks)
        if not self._base.settled or over:
            raise RuntimeError(
                "save_vector needs a Trainer that fits with this callback, or has fitted without sharding the model; "
                "call it from a hook."
            )
        return self._emit_now(trainer, trainer.lightning_module, plain(path), self._base, requested=True)

    def on_vector_saved(self, trainer: L.Trainer, pl_module: L.LightningModule, saved: SavedVector) -> None:
        """Called on every rank after a vector is written; for subclasses and other callbacks to override."""

    # --- writing

    def _emit_now(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        path: str,
        base: BaseWeights,
        since_step: int | None = None,
        requested: bool = False,
    ) -> SavedVector | None:
        chosen = choose_weights(trainer, pl_module, self.weights)
        return self._writer.emit(trainer, pl_module, VectorJob(path, *chosen, base, since_step, requested=requested))

    # --- what follows a vector

    def _follow_links(self, trainer: L.Trainer) -> None:
        """Link ``last.tv.safetensors`` where ModelCheckpoint(save_last="link") has linked ``last.ckpt``."""
        for callback in trainer.checkpoint_callbacks if trainer.is_global_zero and self.with_checkpoints else ():
            last = callback.last_model_path if isinstance(callback, ModelCheckpoint) else ""
            if not last or callback.save_last != "link" or not os.path.islink(last):
                continue
            for suffix in (SUFFIX, ADAPTER):
                link, target = vector_path(last, suffix), vector_path(os.readlink(last), suffix)
                if os.path.islink(link) and os.readlink(link) == target:
                    continue
                if os.path.exists(os.path.join(os.path.dirname(link), target)):
                    remove(link)
                    os.symlink(target, link)

    def _push(self) -> None:
        for path in (self._base.path, *self._writer.written):
            try:
                if exists(path):
                    with local_copy(path) as local:
                        push(local, self.push_to)
            except OSError as error:
                self._writer.failures.append(f"{path} was not pushed to {self.push_to}: {error}")
