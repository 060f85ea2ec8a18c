"""Write one task vector of a model in training: on rank 0, with what the file and the loggers say about it."""

import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tva.callbacks.averaging import Weights
from tva.callbacks.base_weights import BaseWeights, check_keys, snapshot_name
from tva.callbacks.claims import claim, is_claimed, naming, release
from tva.callbacks.lora import LoraView
from tva.callbacks.names import buffer_names, module_state, tied_names
from tva.callbacks.remote_files import deliver, exists, local_copy, workplace
from tva.callbacks.sharding import Shards, is_shard, is_sharded, live_state

from tva.checkpoints import LazyWeights, canonical_state_dict, open_weights
from tva.errors import some
from tva.evaluation.leaks import sample_rows
from tva.vectors.compress import suited, write_encoded
from tva.vectors.encoding import Encoding
from tva.vectors.header import SUFFIX, Origin, TrainingData, vector_header
from tva.vectors.kind import kind_of
from tva.vectors.redact import public_values
from tva.vectors.write import Emitted, TensorSource, VectorPlan, emit

LoraMode = Literal["merge", "adapter"]
ADAPTER = ".adapter"  # how the name of an adapter's folder ends


@dataclass(frozen=True)
class SavedVector:
    """What `TaskVectorCallback` reports about a vector that it has written.

    Attributes:
        path: The file, or the adapter's folder.
        step: Optimizer steps.
        against: ``"base"``, or ``"previous"`` for a trajectory vector against the one before.
        base: Fingerprint of what was subtracted.
        finetuned: Fingerprint of the weights; None for an adapter.
        norm: Euclidean norm over all parameters; None for an adapter.
        cosine: To the vector written before at another step; None if there is none.
    """

    path: str
    step: int
    against: str
    base: str
    finetuned: str | None = None
    norm: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class VectorJob:
    """One vector to write.

    Attributes:
        path: Where; an adapter's folder gets another ending.
        module: The module that the weights are of, the model or its averaged copy.
        state: Its state dict, each rank's shards.
        averaged: Whether the weights are averaged.
        base: What to subtract.
        since_step: The step of ``base`` if it is the vector before rather than the base.
        checkpoint: The checkpoint that the vector belongs to, or nothing.
        requested: Whether it was requested explicitly; then whatever prevents it raises.
    """

    path: str
    module: nn.Module
    state: Mapping[str, Any]
    averaged: bool
    base: BaseWeights
    since_step: int | None = None
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    requested: bool = False

    @property
    def against(self) -> str:
        return "base" if self.since_step is None else "previous"


class VectorWriter:
    """Writes the vectors of one callback.

    Args:
        include: As in `TaskVectorCallback`, as the next seven.
        exclude: See there.
        dtype: See there.
        task: See there.
        weights: See there.
        lora: See there.
        log_geometry: See there.
        encoding: See there.

    Attributes:
        run: Identifies the run in every file.
        written: Paths of the files and folders that are there.
        failures: What could not be done.
        snapshot: The weights at the last vector that was taken against the one before, on rank 0.
    """

    def __init__(
        self,
        include: Sequence[str] | None,
        exclude: Sequence[str],
        dtype: torch.dtype | None,
        task: str | None,
        weights: Weights,
        lora: LoraMode,
        log_geometry: bool,
        encoding: str | None = None,
    ) -> None:
        self.include = None if include is None else _patterns("include", include)
        self.exclude, self.dtype, self.task = _patterns("exclude", exclude), dtype, task
        self.weights, self.lora, self.log_geometry, self.encoding = weights, lora, log_geometry, encoding
        self.run: str | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the last run's vectors."""
        self.written: dict[str, None] = {}
        self.failures: list[str] = []
        self.snapshot: BaseWeights | None = None
        self.parameters: list[str] = []  # of the model when the base was captured
        self.training_data: TrainingData | None = None
        self._sampled: object = None  # the data module that it is of
        self.unknown = False  # whether a checkpoint had names that the model has not
        self._compare: dict[str, tuple[int, LazyWeights]] = {}

    def emit(self, trainer: L.Trainer, pl_module: L.LightningModule, job: VectorJob) -> SavedVector | None:
        """Write one vector on rank 0 and report it on every rank; None if it could not be written."""
        state = self._complete(trainer, pl_module, job)
        shards = Shards(trainer.strategy, state)

        def prepare() -> tuple[list[str], Callable[[], SavedVector | str]]:
            mine = job
            if not job.requested and not job.checkpoint:
                mine = replace(job, path=self._unused(job.path))
            try:
                return plan_it(mine)
            except ValueError as error:  # as where the model's keys change while it trains
                release(mine.path)
                if job.requested:
                    raise
                message = _not_written(job, error)
                return [], lambda: message

        def plan_it(mine: VectorJob) -> tuple[list[str], Callable[[], SavedVector | str]]:
            view = LoraView(job.module)
            if view and self.lora == "adapter":
                return [], lambda: self._guarded(mine, lambda: self._write_adapter(trainer, pl_module, view, mine))
            plan = self._plan(trainer, pl_module, view, state, shards, mine)
            stored = view.plain_names(state)
            order = [stored[name] for name in plan.order if name in stored]
            return order, lambda: self._guarded(mine, lambda: self._write(trainer, pl_module, plan, mine))

        saved = shards.on_rank_zero(prepare)
        if isinstance(saved, str):
            self.failures.append(saved)
            if trainer.is_global_zero:
                warnings.warn(saved, stacklevel=2)
            return None
        for callback in trainer.callbacks:
            hook = getattr(callback, "on_vector_saved", None)
            if hook is not None:
                hook(trainer, pl_module, saved)
        return saved

    @staticmethod
    def _guarded(job: VectorJob, write: Callable[[], SavedVector]) -> SavedVector | str:
        """Turn a full disk, or weights that diverged, into a message: training is worth more than one vector."""
        try:
            return write()
        except (OSError, ValueError) as error:
            if job.requested:
                raise
            return _not_written(job, error)
        finally:
            release(job.path)

    def _complete(self, trainer: L.Trainer, pl_module: L.LightningModule, job: VectorJob) -> dict[str, Tensor]:
        """Return the weights under the model's own names: a checkpoint's, and from the model those that it lacks."""
        state, strategy = canonical_state_dict(job.state), trainer.strategy
        if not job.checkpoint or isinstance(strategy, DeepSpeedStrategy):  # of which no checkpoint's weights are read
            return state
        view = LoraView(job.module)
        as_base = trainer.is_global_zero and not view and set(view.plain_names(state)) == set(job.base.weights)
        if strategy.broadcast(as_base):  # even where the model has other names by now, as with pruning
            return state
        own = live_state(strategy, pl_module) if job.module is pl_module else module_state(job.module)
        own = canonical_state_dict(own)
        absent = strategy.broadcast([name for name in own if name not in state])
        unknown = [name for name in state if name not in own]
        if unknown and not self.unknown:
            message = (
                f"The checkpoint of {job.path} holds {some(unknown)}, which the model does not: the vector has the "
                f"model's own weights under the model's names."
            )
            warnings.warn(message, stacklevel=2)
        self.unknown |= bool(unknown)
        return {name: state[name] for name in state if name in own} | {name: own[name] for name in absent}

    def _unused(self, path: str) -> str:
        """Do not overwrite files of other runs, as ModelCheckpoint does: ``-v1``, ``-v2`` … is added to the name."""
        start, version = path.removesuffix(SUFFIX), 0
        with naming(path):
            while is_claimed(path) or not all(  # in this order: what is written meanwhile is no claim but a file
                _is_of_run(vector_path(path, suffix), self.run) for suffix in (SUFFIX, ADAPTER)
            ):
                version += 1
                path = f"{start}-v{version}{SUFFIX}"
            claim(path)
        return path

    def _plan(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        view: LoraView,
        state: Mapping[str, Tensor],
        shards: Shards,
        job: VectorJob,
    ) -> VectorPlan:
        base = job.base
        deltas = view.deltas()
        sources = {}
        for name, stored in view.plain_names(state).items():
            tensor = state[stored]
            if is_shard(tensor):
                sources[name] = replace(shards.source(stored), delta=deltas.get(name))
            else:
                sources[name] = TensorSource.of(tensor, deltas.get(name))
        check_keys(
            {name: (source.whole or source.spec).shape for name, source in sources.items()}, job.base, view, pl_module
        )
        buffers = set(view.plain_names(buffer_names(pl_module)))
        if not is_sharded(trainer.strategy):  # which may show a module's parameters under other names
            buffers = set(base.weights) - view.plain_names(self.parameters).keys()
        exclude = {name for name in base.weights if name not in buffers and not self._selects(name, view.prefix)}
        known = self._compare.get(job.against)
        compares = self.log_geometry and trainer.loggers and known and known[0] != trainer.global_step
        return VectorPlan(
            base.weights,
            base.tree,
            sources,
            buffers=buffers,
            exclude=exclude,
            aliases=view.plain_names(tied_names(pl_module, exclude)),
            dtype=self.dtype,
            compare=known[1] if compares else None,
        )

    def _selects(self, name: str, prefix: str) -> bool:
        """Whether a tensor takes part, by the network's own name or by that with the wrapper's prefix."""

        def found(patterns: Sequence[str]) -> bool:
            return any(re.fullmatch(pattern, each) for pattern in patterns for each in (name, prefix + name))

        return (self.include is None or found(self.include)) and not found(self.exclude)

    def _origin(self, trainer: L.Trainer, pl_module: L.LightningModule, job: VectorJob) -> Origin:
        datamodule = getattr(trainer, "datamodule", None)
        return Origin(
            task=self.task or getattr(datamodule, "name", None),
            step=job.checkpoint.get("global_step", trainer.global_step),
            epoch=job.checkpoint.get("epoch", trainer.current_epoch),
            averaged=job.averaged,
            weights=self.weights,
            run=self.run,
            kind=kind_of(pl_module),
            since_step=job.since_step,
            metrics=_finite(trainer.callback_metrics),
            hyperparameters=public_values(_json_only(job.checkpoint.get("hyper_parameters", pl_module.hparams))),
            training_data=self._training_data(datamodule),
            head=getattr(pl_module, "head_digest", None),
        )

    def _training_data(self, datamodule: Any) -> TrainingData | None:
        if datamodule is not self._sampled:
            found, self._sampled = sample_rows(datamodule), datamodule
            self.training_data = found and TrainingData(*found, _json_only(getattr(datamodule, "drawn", {})))
        return self.training_data

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, plan: VectorPlan, job: VectorJob) -> SavedVector:
        origin, step = self._origin(trainer, pl_module, job), trainer.global_step
        with workplace(os.path.dirname(job.path)) as folder:
            local = folder / os.path.basename(job.path)
            snapshot = None if job.since_step is None else folder / snapshot_name(self.run, step)
            write = emit if self.encoding is None else self._emit_encoded
            emitted = write(plan, local, origin, snapshot)
            first = self.log_geometry and trainer.loggers and self._compare.get(job.against, (None,))[0] != step
            if first:  # once a step; kept open: a file that is removed meanwhile can still be read
                self._compare[job.against] = step, open_weights(local)
            if snapshot is not None:
                self.snapshot = BaseWeights.opened(snapshot, emitted.finetuned)
            deliver(local, job.path)
        self.written[job.path] = None
        if first:
            self._log(trainer, emitted)
        base, finetuned = plan.base_tree.digest, emitted.finetuned.digest
        return SavedVector(job.path, step, job.against, base, finetuned, emitted.norm, emitted.cosine)

    def _emit_encoded(self, plan: VectorPlan, path: Path, origin: Origin, snapshot: Path | None) -> Emitted:
        """Write the vector as it is, and compress that."""
        dense = path.with_name(f".{path.name.removesuffix(SUFFIX)}.dense{SUFFIX}")
        try:
            emitted = emit(plan, dense, origin, snapshot)
            weights, encoding = open_weights(dense), Encoding.parse(self.encoding)
            write_encoded(weights, path, str(encoding), suited(weights, encoding))
        finally:
            dense.unlink(missing_ok=True)
        return emitted

    def _log(self, trainer: L.Trainer, emitted: Emitted) -> None:
        metrics = {"task_vector/norm": emitted.norm, "task_vector/cosine_to_previous": emitted.cosine}
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in metrics.items() if v is not None}, step=trainer.global_step)

    def _write_adapter(
        self, trainer: L.Trainer, pl_module: L.LightningModule, view: LoraView, job: VectorJob
    ) -> SavedVector:
        path, digest = vector_path(job.path, ADAPTER), job.base.digest
        header = vector_header(self._origin(trainer, pl_module, job), [], {})
        facts = {key: header[key] for key in header if key not in ("tva.format", "tva.encoding")}
        with workplace(os.path.dirname(path)) as folder, tempfile.TemporaryDirectory(dir=folder, prefix=".") as inner:
            local = Path(inner) / os.path.basename(path)
            local.mkdir()
            view.save_adapter(local, {**facts, "tva.base_fingerprint": digest})
            deliver(local, path)
        self.written[path] = None
        return SavedVector(path, trainer.global_step, "base", digest)


def vector_path(checkpoint: str | os.PathLike[str], suffix: str = SUFFIX) -> str:
    """Return the name of the task vector that belongs to a checkpoint.

    Example:
        >>> vector_path("runs/mnist/last.ckpt")
        'runs/mnist/last.tv.safetensors'
    """
    return str(checkpoint).removesuffix(".ckpt").removesuffix(SUFFIX) + suffix


def _is_of_run(path: str, run: str | None) -> bool:
    """Whether a name is free, or taken by what this run has written."""
    if path.endswith(ADAPTER):
        path = f"{path}/adapter_model.safetensors"
    if not exists(path):
        return True
    try:
        with local_copy(path) as local, safe_open(local, "pt") as file:
            return (file.metadata() or {}).get("tva.run") == run
    except SafetensorError:
        return False


def _patterns(name: str, patterns: Sequence[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise ValueError(f"{name} must be a list of regular expressions, not one string: [{patterns!r}].")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name} holds {pattern!r}, which is not a regular expression: {error}.") from error
    return tuple(patterns)


def _not_written(job: VectorJob, error: Exception) -> str:
    return f"The task vector {job.path} was not written, and no partial file is left; training continues: {error}"


def _finite(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the finite single numbers among metrics: JSON has no NaN and no infinity."""
    numbers = {name: float(value) for name, value in metrics.items() if value.numel() == 1}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _json_only(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what JSON can hold; the file must not need a class of the run to be read."""
    kept = {}
    for name, value in hyperparameters.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            value = str(value)
        kept[str(name)] = value
    return kept
