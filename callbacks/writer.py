"""Writes one task vector of a model in training: on rank 0, with what the file and the loggers say about it."""

from __future__ import annotations

import json
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
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tva.callbacks.averaging import Weights
from tva.callbacks.base_weights import SNAPSHOT, Base, buffer_names, names_of
from tva.callbacks.lora import LoraView
from tva.callbacks.remote_files import deliver, exists, local_copy, workplace
from tva.callbacks.sharding import Shards, is_shard

from tva.checkpoints import LazyWeights, canonical_state_dict, open_weights
from tva.errors import MismatchError, some
from tva.vectors.compress import suited, write_encoded
from tva.vectors.encoding import Encoding
from tva.vectors.header import SUFFIX, Origin, vector_header
from tva.vectors.kind import kind_of
from tva.vectors.write import Emitted, TensorSource, VectorPlan, emit

Lora = Literal["merge", "adapter"]
ADAPTER = ".adapter"  # how the name of an adapter's folder ends


@dataclass(frozen=True)
class SavedVector:
    """What `TaskVectorCallback` tells about a vector that it has written.

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
class Job:
    """One vector to write.

    Attributes:
        path: Where; an adapter's folder gets another ending.
        module: The module that the weights are of, the model or its averaged copy.
        state: Its state dict, each rank's shards.
        averaged: Whether the weights are averaged.
        base: What to subtract.
        since_step: The step of ``base`` if it is the vector before rather than the base.
        checkpoint: The checkpoint that the vector belongs to, or nothing.
        requested: Whether somebody waits for it, so that a full disk is an error.
    """

    path: str
    module: nn.Module
    state: Mapping[str, Any]
    averaged: bool
    base: Base
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
        lora: Lora,
        log_geometry: bool,
        encoding: str | None = None,
    ) -> None:
        self.include, self.exclude, self.dtype, self.task = include, exclude, dtype, task
        self.weights, self.lora, self.log_geometry, self.encoding = weights, lora, log_geometry, encoding
        self.run: str | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the last run's vectors."""
        self.written: dict[str, None] = {}
        self.failures: list[str] = []
        self.snapshot: Base | None = None
        self._compare: dict[str, tuple[int, LazyWeights]] = {}

    def emit(self, trainer: L.Trainer, pl_module: L.LightningModule, job: Job) -> SavedVector | None:
        """Write one vector on rank 0, and tell everybody; None if the disk did not take it."""
        state = canonical_state_dict(job.state)
        shards = Shards(trainer.strategy, state)

        def prepare() -> tuple[list[str], Callable[[], SavedVector | str]]:
            view, mine = LoraView(job.module), job
            if not job.requested and not job.checkpoint:
                mine = replace(job, path=self._unused(job.path))
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
    def _guarded(job: Job, write: Callable[[], SavedVector]) -> SavedVector | str:
        """Turn what befalls a disk into a message: training is worth more than one vector."""
        try:
            return write()
        except OSError as error:
            if job.requested:
                raise
            return f"The task vector {job.path} was not written, and nothing is left of it; training goes on: {error}"

    def _unused(self, path: str) -> str:
        """Leave files of other runs alone, as ModelCheckpoint does: ``-v1``, ``-v2`` … is added to the name."""
        start, version = path.removesuffix(SUFFIX), 0
        while not all(_is_of_run(vector_path(path, suffix), self.run) for suffix in (SUFFIX, ADAPTER)):
            version += 1
            path = f"{start}-v{version}{SUFFIX}"
        return path

    def _plan(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        view: LoraView,
        state: Mapping[str, Tensor],
        shards: Shards,
        job: Job,
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
        _check_keys(sources, base.weights, set(view.plain_names(names_of(pl_module))))
        buffers = set(view.plain_names(buffer_names(pl_module)))
        known = self._compare.get(job.against)
        compares = self.log_geometry and trainer.loggers and known and known[0] != trainer.global_step
        return VectorPlan(
            base.weights,
            base.tree,
            sources,
            buffers=buffers,
            exclude=[name for name in base.weights if name not in buffers and not self._selects(name)],
            dtype=self.dtype,
            compare=known[1] if compares else None,
        )

    def _selects(self, name: str) -> bool:
        included = self.include is None or any(re.fullmatch(pattern, name) for pattern in self.include)
        return included and not any(re.fullmatch(pattern, name) for pattern in self.exclude)

    def _origin(self, trainer: L.Trainer, pl_module: L.LightningModule, job: Job) -> Origin:
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
            metrics={name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1},
            hyperparameters=_json_only(job.checkpoint.get("hyper_parameters", pl_module.hparams)),
        )

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, plan: VectorPlan, job: Job) -> SavedVector:
        origin, step = self._origin(trainer, pl_module, job), trainer.global_step
        with workplace(os.path.dirname(job.path)) as folder:
            local = folder / os.path.basename(job.path)
            snapshot = None if job.since_step is None else folder / f"{SNAPSHOT}{self.run}-{step}.safetensors"
            write = emit if self.encoding is None else self._emit_encoded
            emitted = write(plan, local, origin, snapshot)
            first = self.log_geometry and trainer.loggers and self._compare.get(job.against, (None,))[0] != step
            if first:  # once a step; kept open: a file that is removed meanwhile can still be read
                self._compare[job.against] = step, open_weights(local)
            if snapshot is not None:
                self.snapshot = Base.opened(snapshot, emitted.finetuned)
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

    def _write_adapter(self, trainer: L.Trainer, pl_module: L.LightningModule, view: LoraView, job: Job) -> SavedVector:
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
    """Give the name of the task vector that belongs to a checkpoint.

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


def _check_keys(sources: Mapping[str, TensorSource], base: LazyWeights, module_names: set[str]) -> None:
    """Check that the model still has the base's keys; a module may leave parts out of its checkpoint."""
    extra = [name for name in sources if name not in base]
    missing = [name for name in base if name not in sources and name not in module_names]
    shapes = [
        f"{name!r} is {list(sources[name].spec.shape)} now and {list(base.spec(name).shape)} in the base"
        for name in sources
        if name in base and sources[name].spec.shape != base.spec(name).shape
    ]
    problems = [f"the model now has {some(extra)}"] if extra else []
    problems += [f"it no longer has {some(missing)}"] if missing else []
    problems += ["; ".join(shapes[:3])] if shapes else []
    if problems:
        raise MismatchError(
            f"The model's keys changed since the base {base.path} was captured: {'; '.join(problems)}. Change the "
            f"model before fitting starts (in its constructor or configure_model), so that the base has all its parts."
        )


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
