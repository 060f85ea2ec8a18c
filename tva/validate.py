"""Evaluate one model, or many edits of it at once, on a task through the Trainer, with the scores of every example."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import xxhash
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from tva.batches import BatchCache, shallow_copy, through_cache
from tva.console import counting
from tva.ranks import check_strategy, gather, in_turn
from tva.state_dict import some
from tva.statistics import (
    Comparison,
    compare,
    compare_means,
    mean_interval,
    quick_interval,
    resamples,
    wilson_interval,
)
from tva.weights import tensor_digest

Split = Literal["val", "test"]
Part = tuple[tuple[int, int], int | None]  # (first, last + 1) examples of an order, and the order's seed

NUM_METRIC_RESAMPLES = 200  # of metrics that are no mean over examples, each of which is computed anew
_LOWER_IS_BETTER = ("loss", "perplexity", "error", "nll", "wer", "cer", "mae", "mse", "rmse", "ece")


@dataclass(frozen=True)
class Evaluation:
    """What a model scored on examples of one task.

    Attributes:
        metrics: Metric name to value; accuracies lie in [0, 1].
        num_examples: Examples evaluated.
        scores: Metric name to one score an example, shape (examples,), in the order of the examples; the metric is
            their mean. ``accuracy`` has boolean scores where the model's step returns ``correct``.
        higher_is_better: Metric name to its direction, where the metric says.
        preds: What the model's step returned as ``preds``, where a metric was asked for that it does not log.
        target: Likewise.
        extra: Metrics computed from ``preds`` and ``target``.
        shareable: Whether several edits can be evaluated in one pass: all that the model logs is logged in its step.
        predicted: The predicted class of each example, where the model's step returns ``preds`` (batch, classes).
        data_digest: Hash of all batches as the model's step got them, where one model was evaluated as it is.
    """

    metrics: Mapping[str, float]
    num_examples: int
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    preds: Tensor | None = None
    target: Tensor | None = None
    extra: Mapping[str, Metric] = field(default_factory=dict)
    shareable: bool = False
    predicted: np.ndarray | None = None
    data_digest: str | None = None

    def higher(self, metric: str) -> bool:
        """Whether larger values of a metric are better: as the metric says, else by its name."""
        return self.higher_is_better.get(metric, not metric.endswith(_LOWER_IS_BETTER))

    def interval(self, metric: str) -> tuple[float, float] | None:
        """Give a metric's 95 % interval, where it can be known.

        Wilson's of an accuracy, a bootstrap of another mean over examples or of a metric of predictions; None for a
        metric whose examples are not known.
        """
        if metric in self.scores:
            return mean_interval(self.scores[metric])
        if metric in self.extra:
            low, high = np.percentile(self._resampled(metric), [2.5, 97.5])
            return min(self.metrics[metric], float(low)), max(self.metrics[metric], float(high))
        return wilson_interval(self.metrics[metric], self.num_examples) if metric == "accuracy" else None

    def quick_interval(self, metric: str) -> tuple[float, float] | None:
        """Give a 95 % interval that costs nothing, for the many points of a curve; None where that cannot be."""
        return quick_interval(self.scores[metric]) if metric in self.scores else None

    def compare(self, base: Evaluation, metric: str) -> Comparison | None:
        """Compare a metric with the base's on the same examples; None where examples are not known."""
        if metric in self.scores and metric in base.scores:
            return compare(self.scores[metric], base.scores[metric])
        if metric in self.extra and metric in base.extra:
            both = np.stack([self._resampled(metric), base._resampled(metric)], axis=1)
            return compare_means(self.metrics[metric], base.metrics[metric], both)
        return None

    def _resampled(self, metric: str) -> np.ndarray:
        assert self.preds is not None
        assert self.target is not None
        values = []
        for row in (row for rows in resamples(len(self.target), NUM_METRIC_RESAMPLES) for row in rows):
            rows = torch.from_numpy(row)
            values.append(float(_compute(self.extra[metric], self.preds[rows], self.target[rows])))
        return np.array(values)

    def same_as(self, other: Evaluation) -> bool:
        """Whether two evaluations agree in every number, bit for bit."""
        return (
            dict(self.metrics) == dict(other.metrics)
            and self.scores.keys() == other.scores.keys()
            and all(np.array_equal(scores, other.scores[name], equal_nan=True) for name, scores in self.scores.items())
        )


def _compute(metric: Metric, preds: Tensor, target: Tensor) -> Tensor:
    metric.reset()
    metric.update(preds, target)
    return metric.compute()


def find_metric(name: str, num_classes: int) -> Metric:
    """Find the torchmetrics metric of a multi-class task by its name.

    Args:
        name: Such as ``f1_score``, ``F1Score`` or ``MulticlassF1Score``.
        num_classes: Classes of the task.

    Raises:
        ValueError: torchmetrics has none of that name.

    Example:
        >>> find_metric("f1_score", 3)
        MulticlassF1Score()
    """
    from torchmetrics import classification

    known = {
        re.sub(r"[_-]", "", kind.removeprefix("Multiclass")).lower(): kind
        for kind in dir(classification)
        if kind.startswith("Multiclass")
    }
    found = known.get(re.sub(r"[_-]", "", name.removeprefix("Multiclass")).lower())
    if found is None:
        raise ValueError(
            f"torchmetrics has no multi-class metric {name!r}; it has {some(sorted(known), 40)}. Name one of these, or "
            f"a metric that the model logs."
        )
    return getattr(classification, found)(num_classes=num_classes)


@dataclass
class _Batch:
    """What one batch left.

    Attributes:
        num_examples: Its size.
        logged: (name, value, weight) of each number that was logged.
        returned: By key what the step returned.
        hashes: Digests of its tensors.
    """

    num_examples: int = 0
    logged: list[tuple[str, float, float]] = field(default_factory=list)
    returned: dict[str, Tensor] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)


class _Recorder:
    """What one edit logged and returned in a pass, batch by batch."""

    def __init__(self, hashed: bool = False, whole: bool = False) -> None:
        self.whole = whole  # whether predictions must be kept as they are, for metrics that the model does not log
        self.hashed = hashed
        self.batches: list[_Batch] = []
        self.metrics: dict[str, Metric] = {}
        self.batch: Any = None

    def begin(self, batch: Any) -> None:
        self.batch = batch
        self.batches.append(_Batch())

    def log(self, name: str, value: Any, batch_size: int | None = None, **_: Any) -> None:
        if isinstance(value, Metric):
            self.metrics[name] = value
            return
        weight = float(extract_batch_size(self.batch) if batch_size is None else batch_size)
        self.batches[-1].logged.append((name, float(value), weight))

    def take(self, outputs: Any) -> None:
        here, first = self.batches[-1], self.batch
        if isinstance(first, Mapping):
            first = next(iter(first.values()))
        while isinstance(first, (list, tuple)):
            first = first[0]
        here.num_examples = len(first)
        if self.hashed:
            apply_to_collection(self.batch, Tensor, lambda tensor: here.hashes.append(tensor_digest(tensor)))
        if not isinstance(outputs, Mapping):
            return
        for key in ("correct", "preds", "target") if self.whole else ("correct",):
            if outputs.get(key) is not None:
                here.returned[key] = outputs[key].detach().cpu()
        preds = outputs.get("preds")
        if preds is not None and preds.ndim == 2:
            here.returned["predicted"] = preds.argmax(dim=-1).int().cpu()
        for metric, scores in (outputs.get("scores") or {}).items():
            here.returned[f"scores/{metric}"] = scores.detach().cpu()

    @property
    def num_examples(self) -> int:
        return sum(batch.num_examples for batch in self.batches)

    def returned(self) -> dict[str, Tensor]:
        keys = dict.fromkeys(key for batch in self.batches for key in batch.returned)
        return {key: torch.cat([b.returned[key] for b in self.batches if key in b.returned]) for key in keys}

    def data_digest(self) -> str | None:
        if not self.hashed:
            return None
        return xxhash.xxh3_128(
            "".join(digest for batch in self.batches for digest in batch.hashes).encode()
        ).hexdigest()

    def means(self) -> dict[str, float]:
        sums: dict[str, list[float]] = {}
        for batch in self.batches:
            for name, value, weight in batch.logged:
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += value * weight
                total[1] += weight
        return {name: total / weight for name, (total, weight) in sums.items()}

    def logged(self) -> dict[str, float]:
        return self.means() | {name: float(metric.compute()) for name, metric in self.metrics.items()}

    def evaluation(
        self, model: Any, split: str, logged: Mapping[str, float], shareable: bool, extra: Sequence[str]
    ) -> Evaluation:
        metrics: dict[str, float] = {}
        directions: dict[str, bool] = {}
        for key, value in logged.items():
            name = _last_name(key)
            if name in metrics:
                raise ValueError(f"{type(model).__name__} logs two metrics called {name!r}: {some(logged, 8)}.")
            metrics[name] = value
            direction = getattr(self.metrics.get(key), "higher_is_better", None)
            if direction is not None:
                directions[name] = direction
        if not metrics:
            raise ValueError(
                f"{type(model).__name__} logged no metric on the {split} split; its "
                f"{'validation' if split == 'val' else 'test'}_step must call self.log."
            )
        returned = self.returned()
        scores = {key.removeprefix("scores/"): v.numpy() for key, v in returned.items() if key.startswith("scores/")}
        if "correct" in returned:
            scores["accuracy"] = returned["correct"].bool().numpy()
        _check_scores(model, scores, metrics, self.num_examples)
        # 950 of 1,000 is 0.95 and meets a bound of 0.95; the 0.94999999 that is logged in float32 does not
        metrics |= {name: float(values.mean(dtype=np.float64)) for name, values in scores.items() if name in metrics}
        missing = [name for name in extra if name not in metrics]
        preds, target, found = returned.get("preds"), returned.get("target"), {}
        for name in missing if preds is not None and target is not None else ():
            found[name] = find_metric(name, preds.shape[-1])
            metrics[name] = float(_compute(found[name], preds, target))
            if found[name].higher_is_better is not None:
                directions[name] = bool(found[name].higher_is_better)
        return Evaluation(
            metrics,
            self.num_examples,
            scores,
            directions,
            preds if found else None,
            target if found else None,
            found,
            shareable,
            returned["predicted"].numpy() if "predicted" in returned else None,
            self.data_digest(),
        )


def _last_name(key: str) -> str:
    return re.sub(r"^(val|valid|validation|test)[_/]", "", key).rpartition("/")[2]


def _check_scores(model: Any, scores: Mapping[str, np.ndarray], metrics: Mapping[str, float], count: int) -> None:
    for name, values in scores.items():
        if len(values) != count or values.ndim != 1:
            raise ValueError(
                f"{type(model).__name__} must return one score an example for {name!r}: {count} examples were "
                f"evaluated and the scores have shape {list(values.shape)}."
            )
        mean = float(values.mean())
        if name in metrics and not np.isclose(mean, metrics[name], rtol=1e-4, atol=1e-5, equal_nan=True):
            raise ValueError(
                f"{type(model).__name__} logs {name} {metrics[name]:.6g}, but its scores by example average "
                f"{mean:.6g}: intervals would be those of another number. Log their mean, or name the scores otherwise."
            )


def evaluate(
    trainer: L.Trainer,
    model: L.LightningModule,
    datamodule: L.LightningDataModule,
    split: Split,
    *,
    edits: Sequence[Callable[[], None]] | None = None,
    share: bool = True,
    cache: BatchCache | None = None,
    part: Part | None = None,
    extra: Sequence[str] = (),
    progress: str | None = None,
) -> Any:
    """Evaluate a model, or several edits of it, on one split of a task.

    With several edits every batch is read once, and evaluated under each edit before the next is read, where the model
    logs all its metrics in its step; else the edits are evaluated one after the other. The processes of a Trainer with
    several devices share the batches out, and all return the same evaluation of all examples, each counted once.

    Args:
        trainer: Any Trainer; its callbacks take part.
        model: Any LightningModule with a ``validation_step`` (or ``test_step``) that logs its metrics. The step may
            return ``correct`` (batch,) or ``scores``, a mapping from metric names to (batch,) scores; and ``preds``
            (batch, classes) with ``target`` (batch,) for metrics that it does not log.
        datamodule: The task.
        split: ``"val"`` to choose on, ``"test"`` to report on.
        edits: Functions that put the model into one state each; by default it is evaluated as it is. It is left in
            the last state.
        share: Whether the model allows the shared pass, as `Evaluation.shareable` of its base says.
        cache: Keeps batches for later passes.
        part: Evaluate a part of the examples.
        extra: Names of torchmetrics metrics to compute from ``preds`` and ``target``, where the model does not log
            them.
        progress: What is written before a progress bar on a terminal; None draws none.

    Returns:
        An `Evaluation`, or a list with one for each edit. Metrics have their last name: ``val/mnist/accuracy`` and
        ``val_accuracy`` are both ``accuracy``.

    Raises:
        ValueError: The step logged nothing, or two metrics of one name; or scores by example contradict a metric; or
            several processes cannot share the task.
    """
    check_strategy(trainer)
    if edits is not None and not share:
        options = {"cache": cache, "part": part, "extra": extra, "progress": progress}
        results = []
        for edit in edits:
            edit()
            results.append(evaluate(trainer, model, datamodule, split, **options))
        return results
    recorders = [_Recorder(hashed=edits is None, whole=bool(extra)) for _ in edits or [None]]
    device = trainer.strategy.root_device
    with (
        quiet(),
        counting(progress if trainer.is_global_zero else None) as count,
        _recording(model, split, recorders, edits, count),
        through_cache(datamodule, split, cache, device, part, trainer.global_rank, trainer.world_size),
    ):
        run = trainer.validate if split == "val" else trainer.test
        results = run(model, datamodule=datamodule, verbose=False)
        own = recorders[0].means()
        for recorder, shares in zip(
            recorders, zip(*gather(trainer, [r.batches for r in recorders]), strict=True), strict=True
        ):
            recorder.batches = in_turn(list(shares))
        logged = [recorder.logged() for recorder in recorders] if edits is not None else []
    if edits is not None:
        return [
            recorder.evaluation(model, split, values, True, extra)
            for recorder, values in zip(recorders, logged, strict=True)
        ]
    by_lightning = dict(results[0]) if results else {}
    recorder = recorders[0]
    ours = recorder.means()
    ours |= {name: by_lightning[name] for name in recorder.metrics if name in by_lightning}
    late = sorted(by_lightning.keys() - ours.keys())
    if late and trainer.world_size > 1:
        raise ValueError(
            f"{type(model).__name__} logs {some(late)} outside its {_step_name(split)}, where {trainer.world_size} "
            f"processes know their own examples alone. Log in the step, or use a Trainer with devices=1."
        )
    agree = ours.keys() == by_lightning.keys() and all(
        # of several processes Lightning gives the mean of all, or this one's, as the model says
        np.isclose([ours[name], own.get(name, ours[name])], by_lightning[name], rtol=1e-4, equal_nan=True).any()
        for name in ours
    )
    hooks = ("start", "end", "batch_start", "batch_end")
    stage = "validation" if split == "val" else "test"
    names = [f"on_{stage}_{'epoch_' if 'batch' not in hook else ''}{hook}" for hook in hooks]
    shareable = all(gather(trainer, agree)) and not any(is_overridden(name, model) for name in names)
    values = ours if shareable or trainer.world_size > 1 else by_lightning
    return recorder.evaluation(model, split, values, shareable, extra)


def _step_name(split: str) -> str:
    return "validation_step" if split == "val" else "test_step"


@contextlib.contextmanager
def _recording(
    model: L.LightningModule,
    split: str,
    recorders: Sequence[_Recorder],
    edits: Sequence[Callable[[], None]] | None,
    count: Callable[[float], None],
) -> Iterator[None]:
    """Let the model's step run under every edit in turn, and note what each logs and returns.

    With edits, what the step logs does not reach the Trainer, and torchmetrics objects in the model stand aside for a
    copy of each edit's own.
    """
    name = _step_name(split)
    step, log = getattr(model, name), model.log
    before = {key: model.__dict__[key] for key in (name, "log") if key in model.__dict__}
    present: list[_Recorder] = []  # the one whose step runs, if one does
    originals: list[tuple[Any, str, Any]] = []
    copies: list[list[tuple[Any, str, Any]]] = []

    @functools.wraps(log)
    def noted_log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        for recorder in present:
            recorder.log(name, value, **kwargs)
        if edits is None:
            log(name, value, *args, **kwargs)

    def noted_step(recorder: _Recorder, kept: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.begin(kept)
        present.append(recorder)
        try:
            outputs = step(*args, **kwargs)
        finally:
            present.clear()
        recorder.take(outputs)
        return outputs

    @functools.wraps(step)
    def every_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
        batches = model.trainer.num_val_batches if split == "val" else model.trainer.num_test_batches
        total = sum(batches) * len(recorders)
        if edits is None:
            outputs = noted_step(recorders[0], shallow_copy(batch), batch, *args, **kwargs)
            count(total)
            return outputs
        if not copies:  # only now has the model been set up for the task
            originals.extend(_metric_places(model))
            copies.extend([(parent, child, _fresh(metric)) for parent, child, metric in originals] for _ in edits)
        for edit, recorder, metrics in zip(edits, recorders, copies, strict=True):
            edit()
            for parent, child, metric in metrics:
                parent._modules[child] = metric
            noted_step(recorder, batch, shallow_copy(batch), *args, **kwargs)
            count(total)
        return None

    setattr(model, name, every_step)
    model.log = noted_log
    try:
        yield
    finally:
        for key in (name, "log"):
            if key in before:
                setattr(model, key, before[key])
            else:
                delattr(model, key)
        for parent, child, metric in originals:
            parent._modules[child] = metric


def _fresh(metric: Metric | MetricCollection) -> Any:
    copied = metric.clone()
    copied.reset()
    return copied


def _metric_places(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, Any]]:
    """Find the outermost metrics below a module, each with its parent and its name there."""
    found = []
    for name, child in model._modules.items():
        if isinstance(child, (Metric, MetricCollection)):
            found.append((model, name, child))
        elif child is not None:
            found += _metric_places(child)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning says about each of many short evaluations."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
            # what several processes log is put together here
            warnings.filterwarnings("ignore", message=r".*It is recommended to use `self.log\(.*sync_dist=True\)`.*")
            warnings.filterwarnings("ignore", message=r".*recommended to use .*devices=1.* to ensure each sample.*")
            # torch 2.15 deprecates a call that lightning 2.6.6 makes at every evaluation
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
            yield
    finally:
        logger.setLevel(level)
