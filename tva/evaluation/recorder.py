"""Record what a LightningModule's own steps log, example by example."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import torch
import xxhash
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_sum

from tva.checkpoints import tensor_digest
from tva.errors import some
from tva.evaluation.batch_cache import Turns, shallow_copy
from tva.evaluation.leaks import row_digests
from tva.evaluation.measures import Measure
from tva.evaluation.metric_places import fresh, metric_places, standing_in
from tva.evaluation.metrics import KL, divergence
from tva.evaluation.ranks import in_turn
from tva.evaluation.result import Evaluation
from tva.evaluation.text_metrics import find_text_metric


@dataclass
class _Batch:
    """The record of one batch.

    Attributes:
        num_examples: Its size.
        logged: (name, value, weight) of each number that was logged.
        returned: By key what the step returned.
        hashes: Digests of its tensors.
        rows: Digests of its examples' inputs.
    """

    num_examples: int = 0
    logged: list[tuple[str, float, float]] = field(default_factory=list)
    returned: dict[str, Any] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


Share = tuple[list[_Batch], dict[str, Metric]]


class Recorder:
    """Records what one edit logged and returned in a pass, batch by batch."""

    def __init__(
        self,
        hashed: bool = False,
        extra: Sequence[str] = (),
        measures: Mapping[str, Measure] | None = None,
        keep_preds: bool = False,
    ) -> None:
        self.keep_preds = keep_preds
        self.measures = measures or {}  # what the task is measured by, where the model does not log it
        self.whole = keep_preds or any(name != KL for name in extra)  # whether predictions are kept
        self.divergent = KL in extra
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

    def take(self, outputs: Any, reference: Any = None) -> None:
        """Keep what the step returned for a batch; ``reference`` is what it returns at the base, if that is not it."""
        here, first = self.batches[-1], self.batch
        if isinstance(first, Mapping):
            first = next(iter(first.values()))
        while isinstance(first, (list, tuple)):
            first = first[0]
        here.num_examples = len(first)
        if self.hashed:
            apply_to_collection(self.batch, Tensor, lambda tensor: here.hashes.append(tensor_digest(tensor)))
            here.rows = row_digests(self.batch)
        if not isinstance(outputs, Mapping):
            return
        preds = outputs.get("preds")
        whole = self.whole
        if preds is not None and outputs.get("target") is not None:
            for measure in self._unlogged():
                scores = measure.scores(preds, outputs["target"])
                whole |= scores is None
                if scores is not None:
                    here.returned[f"scores/{measure.name}"] = scores
        for key in ("correct", "preds", "target") if whole else ("correct",):
            if outputs.get(key) is not None:
                value = outputs[key]
                here.returned[key] = value.detach().cpu() if isinstance(value, Tensor) else list(value)
        if isinstance(preds, Tensor) and preds.ndim == 2:
            here.returned["predicted"] = preds.argmax(dim=-1).int().cpu()
            labels = outputs.get("target")
            if (
                self.hashed
                and labels is not None
                and labels.shape == preds.shape[:1]
                and not labels.is_floating_point()
            ):
                here.returned["labels"] = labels.detach().int().cpu()
        for metric, scores in (outputs.get("scores") or {}).items():
            here.returned[f"scores/{metric}"] = scores.detach().cpu()
        if self.divergent and KL not in (outputs.get("scores") or {}):
            found = divergence(outputs if reference is None else reference, outputs)
            if found is not None:
                here.returned[f"scores/{KL}"] = found.cpu()

    def share(self) -> Share:
        """Return what was recorded of some of the batches, for `put_together` in another process."""
        return self.batches, {name: metric.cpu() for name, metric in self.metrics.items()}

    def put_together(self, shares: Sequence[Share]) -> None:
        """Combine the records of several processes, where rank r took the batches r, r + n, r + 2n … of n ranks."""
        self.batches = in_turn([batches for batches, _ in shares])
        for name, metric in shares[0][1].items():
            for _, metrics in shares[1:]:
                for state in metric._defaults:
                    setattr(metric, state, getattr(metric, state) + getattr(metrics[name], state))
            self.metrics[name] = metric

    @property
    def splittable(self) -> bool:
        """Whether all logged torchmetrics objects only count, so that their sums over processes are exact."""
        return all(
            isinstance(value, Tensor) and not value.is_floating_point() and not value.any()
            for metric in self.metrics.values()
            for value in metric._defaults.values()
        ) and all(
            reduction is dim_zero_sum for metric in self.metrics.values() for reduction in metric._reductions.values()
        )

    @property
    def num_examples(self) -> int:
        return sum(batch.num_examples for batch in self.batches)

    def _unlogged(self) -> list[Measure]:
        logged = {_last_name(name) for name in (*self.metrics, *(name for name, *_ in self.batches[-1].logged))}
        return [measure for name, measure in self.measures.items() if name not in logged]

    def returned(self) -> dict[str, Any]:
        keys = dict.fromkeys(key for batch in self.batches for key in batch.returned)
        return {key: _joined([b.returned[key] for b in self.batches if key in b.returned]) for key in keys}

    def data_digest(self) -> str | None:
        if not self.hashed:
            return None
        return xxhash.xxh3_128(
            "".join(digest for batch in self.batches for digest in batch.hashes).encode()
        ).hexdigest()

    def row_digests(self) -> np.ndarray | None:
        rows = [digest for batch in self.batches for digest in batch.rows]
        return np.array(rows, dtype=np.uint64) if rows and len(rows) == self.num_examples else None

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

    def _direction(self, name: str) -> bool | None:
        """Return whether larger values of a task's own measure are better, where it says so."""
        return getattr(getattr(self.measures.get(name), "given", None), "higher_is_better", None)

    def _check_metrics(self, model: Any, split: str, metrics: Mapping[str, float]) -> None:
        step = f"{type(getattr(model, 'wrapped', model)).__name__}.{step_name(split)}"
        missing = [name for name in self.measures if name not in metrics]
        if missing:
            raise ValueError(
                f"The metric {some(missing)} is of predictions and targets, and {step} returns none. Return a mapping "
                f"with 'preds' and 'target' from it."
            )
        if not metrics and hasattr(model, "wrapped"):
            raise ValueError(
                f"{type(model.wrapped).__name__} is a plain network, so a task must say how it is measured. Give "
                f"(datamodule, metric), (val_loader, test_loader, metric) or a function evaluate(model, split), or "
                f"make the model a LightningModule whose validation_step logs metrics."
            )
        if not metrics:
            raise ValueError(
                f"{type(model).__name__} logged no metric on the {split} split; its "
                f"{'validation' if split == 'val' else 'test'}_step must call self.log."
            )

    def _by_last_name(
        self, model: Any, split: str, logged: Mapping[str, float]
    ) -> tuple[dict[str, float], dict[str, bool]]:
        """Return the logged metrics by their last name, and their directions where they say."""
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
        return metrics, directions

    def evaluation(
        self, model: Any, split: str, logged: Mapping[str, float], shareable: bool, extra: Sequence[str]
    ) -> Evaluation:
        metrics, directions = self._by_last_name(model, split, logged)
        logged_names = set(metrics)
        returned = self.returned()
        scores = {key.removeprefix("scores/"): v.numpy() for key, v in returned.items() if key.startswith("scores/")}
        if "correct" in returned:
            scores["accuracy"] = returned["correct"].bool().numpy()
        _check_scores(model, scores, metrics, self.num_examples)
        # 950 of 1,000 is 0.95 and meets a bound of 0.95; the 0.94999999 that is logged in float32 does not
        own = {*metrics, *self.measures}
        metrics |= {name: float(values.mean(dtype=np.float64)) for name, values in scores.items() if name in own}
        if KL in extra and KL not in metrics:
            metrics[KL], directions[KL] = _mean_divergence(model, split, scores), False
        preds, target = returned.get("preds"), returned.get("target")
        asked = {name: Measure(name, name) for name in extra} | dict(self.measures)
        found: dict[str, Metric] = {}
        for name, measure in asked.items() if preds is not None and target is not None else ():
            if name in metrics:
                continue
            metric, value = measure.compute(preds, target)
            if value.ndim == 1 and len(value) == self.num_examples:
                scores[name] = value.double().numpy()
                metrics[name] = float(scores[name].mean())
            elif value.numel() == 1:
                metrics[name] = float(value)
                of_texts = isinstance(measure.given, str) and find_text_metric(measure.given) is not None
                if (isinstance(target, Tensor) or of_texts) and len(target) == self.num_examples:  # a row an example
                    found[name] = metric
            else:
                raise ValueError(
                    f"The metric {name!r} must be one number, or one an example; of {self.num_examples} examples it "
                    f"has the shape {list(value.shape)}."
                )
            if metric.higher_is_better is not None:
                directions[name] = bool(metric.higher_is_better)
        directions |= {name: way for name in scores if (way := self._direction(name)) is not None}
        self._check_metrics(model, split, metrics)
        return Evaluation(
            metrics,
            self.num_examples,
            scores,
            directions,
            preds if found or self.keep_preds else None,
            target if found or self.keep_preds else None,
            found,
            shareable,
            shareable and self.splittable,
            returned["predicted"].numpy() if "predicted" in returned else None,
            self.data_digest(),
            computed=tuple(name for name in metrics if name not in logged_names),
            row_digests=self.row_digests(),
            labels=returned["labels"].numpy() if "labels" in returned else None,
        )


def _mean_divergence(model: Any, split: str, scores: Mapping[str, np.ndarray]) -> float:
    if KL not in scores:
        raise ValueError(
            f"The metric {KL!r} compares predictions with the base's, but the {step_name(split)} of "
            f"{type(model).__name__} returns none. Return 'preds' (batch, classes), or 'logits' (batch, positions, "
            f"vocabulary) with 'mask' (batch, positions), from it."
        )
    return float(scores[KL].mean(dtype=np.float64))


def _joined(parts: Sequence[Any]) -> Any:
    if not isinstance(parts[0], Tensor):
        return [item for part in parts for item in part]
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    shapes = some(list(dict.fromkeys(str(list(part.shape)) for part in parts)))
    raise ValueError(
        f"A metric of all examples together needs predictions and targets of one shape in all batches; found {shapes}. "
        f"Give a function of preds and target that returns one number per example of a batch, or pad the batches alike."
    )


def _last_name(key: str) -> str:
    return re.sub(r"^(val|valid|validation|test)[_/]", "", key).rpartition("/")[2]


def _check_scores(model: Any, scores: Mapping[str, np.ndarray], metrics: Mapping[str, float], count: int) -> None:
    for name, values in scores.items():
        if len(values) != count or values.ndim != 1:
            raise ValueError(
                f"{type(model).__name__} must return one score per example for {name!r}: {count} examples were "
                f"evaluated and the scores have shape {list(values.shape)}."
            )
        mean = float(values.mean())
        if name in metrics and not np.isclose(mean, metrics[name], rtol=1e-4, atol=1e-5, equal_nan=True):
            raise ValueError(
                f"{type(model).__name__} logs {name} {metrics[name]:.6g}, but its scores by example average "
                f"{mean:.6g}: intervals would be those of another number. Log their mean, or name the scores otherwise."
            )


def step_name(split: str) -> str:
    return "validation_step" if split == "val" else "test_step"


@contextlib.contextmanager
def recording(
    model: L.LightningModule,
    split: str,
    recorders: Sequence[Recorder],
    edits: Sequence[Callable[[], None]] | None,
    count: Callable[[float], None],
    reference: Callable[[], None] | None = None,
    turns: Turns | None = None,
) -> Iterator[None]:
    """Let the model's step run under every edit in turn, and note what each logs and returns.

    ``reference`` puts the model into the base, whose outputs on each batch all edits are compared with. Batches beyond
    those that ``turns`` counts are run through the model, and leave no trace.

    With edits, what the step logs does not reach the Trainer, and torchmetrics objects in the model stand aside for a
    copy of each edit's own.
    """
    name = step_name(split)
    step, log = getattr(model, name), model.log
    before = {key: model.__dict__[key] for key in (name, "log") if key in model.__dict__}
    present: list[Recorder] = []  # the one whose step runs, if one does
    silent: list[bool] = []  # not empty while a batch runs that does not count
    originals: list[tuple[Any, str, Any]] = []
    copies: list[list[tuple[Any, str, Any]]] = []
    spare: list[tuple[Any, str, Any]] = []  # for the reference, whose metrics nobody reads

    @functools.wraps(log)
    def noted_log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        for recorder in present:
            recorder.log(name, value, **kwargs)
        if edits is None and not silent:
            log(name, value, *args, **kwargs)

    def uncounted(batch: Any, *args: Any, **kwargs: Any) -> None:
        silent.append(True)
        with standing_in(model):
            for state in [*filter(None, [reference]), *(edits or [lambda: None])]:
                state()
                step(shallow_copy(batch), *args, **kwargs)
        silent.clear()

    def noted_step(recorder: Recorder, kept: Any, *args: Any, at_base: Any = None, **kwargs: Any) -> Any:
        recorder.begin(kept)
        present.append(recorder)
        try:
            outputs = step(*args, **kwargs)
        finally:
            present.clear()
        recorder.take(outputs, at_base)
        return outputs

    @functools.wraps(step)
    def every_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
        batches = model.trainer.num_val_batches if split == "val" else model.trainer.num_test_batches
        total = sum(batches) * len(recorders)
        if turns is not None and turns.num_own is not None and len(recorders[0].batches) >= turns.num_own:
            return uncounted(batch, *args, **kwargs)
        if edits is None:
            outputs = noted_step(recorders[0], shallow_copy(batch), batch, *args, **kwargs)
            count(total)
            return outputs
        if not copies:  # only now has the model been set up for the task
            originals.extend(metric_places(model))
            copies.extend([(parent, child, fresh(metric)) for parent, child, metric in originals] for _ in edits)
            spare.extend((parent, child, fresh(metric)) for parent, child, metric in originals)
        at_base = None
        if reference is not None:
            reference()
            for parent, child, metric in spare:
                parent._modules[child] = metric
            at_base = step(shallow_copy(batch), *args, **kwargs)
        for edit, recorder, metrics in zip(edits, recorders, copies, strict=True):
            edit()
            for parent, child, metric in metrics:
                parent._modules[child] = metric
            noted_step(recorder, batch, shallow_copy(batch), *args, at_base=at_base, **kwargs)
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
