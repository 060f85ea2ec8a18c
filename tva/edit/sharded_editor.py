"""Sets a sharded model to many states, and checks which edits can be made of one."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor

from tva.callbacks.sharding import Shards
from tva.checkpoints import Fingerprint, LazyWeights
from tva.edit.editor import Editor, Statistics
from tva.edit.options import Goal
from tva.edit.sharded import ShardedModel
from tva.errors import NoEffectError, some
from tva.evaluation.measures import FunctionTask, measures_of
from tva.models.network import Network
from tva.search import Learned
from tva.vectors.kind import kind_of
from tva.vectors.task_vector import TaskVector, random_delta


class ShardedEditor(Editor):
    """Sets the stretches of a sharded model that this process holds; every process must make the same calls.

    Args:
        sharded: The model.
        datamodules: The tasks by name.
        statistics: ``"keep"`` or ``"delta"``; see `tva.edit.options.EditOptions`.
    """

    def __init__(
        self, sharded: ShardedModel, datamodules: Mapping[str, L.LightningDataModule], statistics: Statistics = "keep"
    ) -> None:
        self.sharded = sharded
        super().__init__(sharded.trainer, sharded.model, datamodules, statistics)
        self._streams: Shards | None = None

    def _live(self) -> dict[str, Tensor]:
        self.sharded.reshard()
        return {name: slot.local() for name, slot in self.sharded.slots.items()}

    @functools.cached_property
    def base_tree(self) -> Fingerprint:
        """The fingerprint of the base."""
        return self.fingerprint(self.base)

    def _parts(self, name: str) -> Iterator[Tensor]:
        if self._streams is None:
            raise RuntimeError(f"{name!r} was read when it was not being sent.")
        return self._streams.parts(name)

    def state(self) -> LazyWeights:
        live = self._live()
        return self.sharded.lazy(live, self.fingerprint(live).tensors, self._parts)

    def base_state(self) -> LazyWeights:
        return self.sharded.lazy(self.base, self.base_tree.tensors)

    def unsaved_buffers(self) -> dict[str, Tensor]:
        return {}

    def fingerprint(self, tensors: Mapping[str, Tensor]) -> Fingerprint:
        return self.sharded.fingerprint(tensors)

    def norm(self, vector: TaskVector) -> float:
        own = {name: self.sharded.layouts[name] for name in vector.deltas}
        rank = dist.get_rank()
        parts = [
            float(torch.dot(flat := delta.reshape(-1).double(), flat))
            for name, delta in vector.deltas.items()
            if any(holder == rank for holder, _ in own[name])
        ]
        return math.sqrt(math.fsum(self.sharded.everywhere(math.fsum(parts))))

    def moves(self, vector: TaskVector) -> bool:
        return any(self.sharded.everywhere(super().moves(vector)))

    def random_like(self, vector: TaskVector, seed: int) -> TaskVector:
        deltas = {}
        for name, delta in vector.deltas.items():
            slot = self.sharded.slots[name]
            whole = random_delta(name, self.sharded.whole(name, delta), seed).reshape(-1)
            deltas[name] = whole[slot.start : slot.stop].reshape(delta.shape).clone()
        untouched = {**dict.fromkeys(vector.buffers, "excluded"), **vector.untouched}
        return TaskVector(deltas, {}, untouched, vector.origin)

    def check_effect(self, vector: TaskVector, scaling_coef: float) -> None:
        none: NoEffectError | None = None
        try:
            vector.check_effect(self._live(), self.base, scaling_coef)
        except NoEffectError as error:
            none = error
        if all(self.sharded.everywhere(none is not None)) and none is not None:
            raise none

    def check_base(self, vector: TaskVector, allow_other_base: bool) -> None:
        """Check nothing: each vector has been compared with the base when it was opened, and their sums have its."""

    def on_rank_zero(self, order: Callable[[], list[str]], work: Callable[[], None]) -> None:
        self._streams = shards = self.sharded.shards(self._live())

        def prepare() -> tuple[Sequence[str], Callable[[], None]]:
            return order(), work

        try:
            shards.on_rank_zero(prepare)
        finally:
            self._streams = None


def check_supported(goal: Goal, model: L.LightningModule, strategy: Strategy) -> None:
    """Check, before any work, that an edit can be made of a sharded model.

    Raises:
        ValueError: It cannot; the message names all that stands against it.
    """
    options, search = goal.options, goal.search
    found = {
        "the search Learned, which trains with whole vectors": isinstance(search, Learned),
        f"the recipe {goal.recipe.text!r}, which is not a sum": not goal.recipe.is_linear,
        "vectors in memory rather than files": not all(isinstance(path, str) for path in options.vectors.values()),
        "statistics='reestimate'": options.statistics == "reestimate",
        f"the baselines {some(options.baselines or [])}": bool(options.baselines),
        f"the diagnostics {some(options.diagnostics or [])}": bool(options.diagnostics),
        f"the audits {some(options.audits or [])}": bool(options.audits) or bool(goal.audited),
        f"each={options.each!r}": options.each is not None,
        f"engine={options.engine!r}": options.engine != "local",
        "keep_undo": options.keep_undo,
        "format='lightning'": options.format == "lightning",
        "a linearized model": kind_of(model) is not None,
        "tasks that a function evaluates": any(isinstance(task, FunctionTask) for task in options.tasks.values()),
        "tasks with metrics of a LightningModule's predictions": any(
            not isinstance(model, Network) and measures_of(task) for task in options.tasks.values()
        ),
        "a plain network, which has no configure_model": isinstance(strategy, ModelParallelStrategy)
        and isinstance(model, Network),
    }
    odd = [what for what, is_so in found.items() if is_so]
    if odd:
        raise ValueError(
            f"An edit of a model that {type(strategy).__name__} shards is a sum of vectors in files, by a coefficient "
            f"that is given or found by Grid, Bisect, Race or Optuna, and cannot have {'; '.join(odd)}. Leave that "
            f"out, combine the vectors by `tva compose` first, or use --trainer.devices 1 where a device holds the "
            f"model."
        )
