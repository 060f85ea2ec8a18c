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


class _Recorder:
    """What one edit logged and returned in a pass."""

    def __init__(self, hashed: bool = False, whole: bool = False) -> None:
        self.whole = whole  # whether predictions must be kept as they are, for metrics that the model does not log
        self.digest = xxhash.xxh3_128() if hashed else None
        self.sums: dict[str, list[float]] = {}  # name -> [weighted sum, weight]
        self.metrics: dict[str, Metric] = {}
        self.num_examples = 0
        self.returned: dict[str, list[Tensor]] = {}
        self.batch: Any = None

    def log(self, name: str, value: Any, batch_size: int | None = None, **_: Any) -> None:
        if isinstance(value, Metric):
            self.metrics[name] = value
            return
        weight = float(extract_batch_size(self.batch) if batch_size is None else batch_size)
        total = self.sums.setdefault(name, [0.0, 0.0])
        total[0] += float(value) * weight
        total[1] += weight

    def take(self, outputs: Any, batch: Any) -> None:
        first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch
        while isinstance(first, (list, tuple)):
            first = first[0]
        self.num_examples += len(first)
        if self.digest is not None:
            apply_to_collection(batch, Tensor, self._hash)
        if not isinstance(outputs, Mapping):
            return
        for key in ("correct", "preds", "target") if self.whole else ("correct",):
            if outputs.get(key) is not None:
                self.returned.setdefault(key, []).append(outputs[key].detach().cpu())
        preds = outputs.get("preds")
        if preds is not None and preds.ndim == 2:
            self.returned.setdefault("predicted", []).append(preds.argmax(dim=-1).int().cpu())
        for metric, scores in (outputs.get("scores") or {}).items():
            self.returned.setdefault(f"scores/{metric}", []).append(scores.detach().cpu())

    def _hash(self, tensor: Tensor) -> None:
        assert self.digest is not None
        self.digest.update(tensor_digest(tensor).encode())

    def logged(self) -> dict[str, float]:
        values = {name: total / weight for name, (total, weight) in self.sums.items()}
        return values | {name: float(metric.compute()) for name, metric in self.metrics.items()}

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
        returned = {key: torch.cat(values) for key, values in self.returned.items()}
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
            None if self.digest is None else self.digest.hexdigest(),
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
    logs all its metrics in its step, on one device; else the edits are evaluated one after the other.

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
        ValueError: The step logged nothing, or two metrics of one name; or scores by example contradict a metric.
    """
    if edits is not None and (not share or trainer.world_size > 1):
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
        through_cache(datamodule, split, cache, device, part),
    ):
        run = trainer.validate if split == "val" else trainer.test
        results = run(model, datamodule=datamodule, verbose=False)
        logged = [recorder.logged() for recorder in recorders] if edits is not None else []
    if edits is not None:
        return [
            recorder.evaluation(model, split, values, True, extra)
            for recorder, values in zip(recorders, logged, strict=True)
        ]
    by_lightning = dict(results[0]) if results else {}
    recorder = recorders[0]
    if trainer.world_size > 1:
        recorder.returned.clear()
        recorder.num_examples *= trainer.world_size
        return recorder.evaluation(model, split, by_lightning, False, extra)
    ours = {name: total / weight for name, (total, weight) in recorder.sums.items()}
    ours |= {name: by_lightning[name] for name in recorder.metrics if name in by_lightning}
    hooks = ("start", "end", "batch_start", "batch_end")
    stage = "validation" if split == "val" else "test"
    names = [f"on_{stage}_{'epoch_' if 'batch' not in hook else ''}{hook}" for hook in hooks]
    shareable = (
        ours.keys() == by_lightning.keys()
        and all(np.isclose(ours[name], by_lightning[name], rtol=1e-4, equal_nan=True) for name in ours)
        and not any(is_overridden(name, model) for name in names)
    )
    return recorder.evaluation(model, split, ours if shareable else by_lightning, shareable, extra)


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
    name = "validation_step" if split == "val" else "test_step"
    step, log = getattr(model, name), model.log
    before = {key: model.__dict__[key] for key in (name, "log") if key in model.__dict__}
    present: list[_Recorder] = [recorders[0]]
    originals: list[tuple[Any, str, Any]] = []
    copies: list[list[tuple[Any, str, Any]]] = []

    @functools.wraps(log)
    def noted_log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        present[0].log(name, value, **kwargs)
        if edits is None:
            log(name, value, *args, **kwargs)

    @functools.wraps(step)
    def every_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
        batches = model.trainer.num_val_batches if split == "val" else model.trainer.num_test_batches
        total = sum(batches) * len(recorders)
        if edits is None:
            recorders[0].batch = kept = shallow_copy(batch)
            outputs = step(batch, *args, **kwargs)
            recorders[0].take(outputs, kept)
            count(total)
            return outputs
        if not copies:  # only now has the model been set up for the task
            originals.extend(_metric_places(model))
            copies.extend([(parent, child, _fresh(metric)) for parent, child, metric in originals] for _ in edits)
        for edit, recorder, metrics in zip(edits, recorders, copies, strict=True):
            edit()
            for parent, child, metric in metrics:
                parent._modules[child] = metric
            present[0], own = recorder, shallow_copy(batch)
            recorder.batch = batch
            recorder.take(step(own, *args, **kwargs), batch)
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
            # torch 2.15 deprecates a call that lightning 2.6.6 makes at every evaluation
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
            yield
    finally:
        logger.setLevel(level)
