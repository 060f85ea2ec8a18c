"""The result of an evaluation: metrics with intervals, and the scores behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from tva.evaluation import intervals
from tva.evaluation.intervals import compare, is_binary, mean_interval, quick_interval
from tva.evaluation.jackknife import Jackknife, compare_jackknives, jackknife
from tva.evaluation.metrics import KL, compute, has_ground
from tva.report.edit_report import Comparison

Split = Literal["val", "test"]


_LOWER_IS_BETTER = ("loss", "perplexity", "error", "nll", "wer", "cer", "mae", "mse", "rmse", "ece")


@dataclass(frozen=True)
class Evaluation:
    """What a model scored on examples of one task.

    Attributes:
        metrics: Metric name to value; accuracies are in [0, 1].
        num_examples: Examples evaluated.
        scores: Metric name to one score per example, shape (examples,), in the order of the examples; the metric is
            their mean. ``accuracy`` has boolean scores where the model's step returns ``correct``.
        higher_is_better: Metric name to its direction, where the metric says.
        preds: What the model's step returned as ``preds``, where a metric was asked for that it does not log.
        target: Likewise.
        extra: Metrics computed from ``preds`` and ``target``.
        shareable: Whether several edits can be evaluated in one pass: all that the model logs is logged in its step.
        splittable: Whether several processes can evaluate some batches each and get the numbers of one, bit for bit.
        predicted: The predicted class of each example, where the model's step returns ``preds`` (batch, classes).
        data_digest: Hash of all batches as the model's step got them, where one model was evaluated as it is.
        row_digests: Hash of each example's input, shape (examples,), likewise.
        labels: The class of each example, likewise, where the model's step returns ``preds`` and ``target``.
        computed: Names of the metrics that the model does not log: those in ``extra``, and those of ``scores`` that
            were computed from ``preds`` and ``target``.
        groups: The group of each example, shape (examples,), where groups (documents, speakers, patients) are the
            independent draws and not examples.
    """

    @property
    def num_groups(self) -> int | None:
        """Groups of examples, where these are the unit."""
        return None if self.groups is None else len(np.unique(self.groups))

    @property
    def effective_groups(self) -> float | None:
        """The number of equal groups that carry as much information as the groups of these examples."""
        return None if self.groups is None else intervals.effective_groups(self.groups)

    metrics: Mapping[str, float]
    num_examples: int
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    preds: Any = None
    target: Any = None
    extra: Mapping[str, Metric] = field(default_factory=dict)
    shareable: bool = False
    splittable: bool = False
    predicted: np.ndarray | None = None
    data_digest: str | None = None
    row_digests: np.ndarray | None = None
    labels: np.ndarray | None = None
    computed: tuple[str, ...] = ()
    groups: np.ndarray | None = None

    def sums(self, metric: str) -> np.ndarray:
        """Return a metric's scores by example in float64, added up by group where groups are the unit."""
        scores = self.scores[metric].astype(np.float64)
        if self.groups is None:
            return scores
        return np.bincount(np.unique(self.groups, return_inverse=True)[1], weights=scores)

    def higher(self, metric: str) -> bool:
        """Whether larger values of a metric are better: as the metric says, else by its name."""
        return self.higher_is_better.get(metric, not metric.endswith(_LOWER_IS_BETTER))

    def interval(self, metric: str) -> tuple[float, float] | None:
        """Return a metric's 95% interval, where it can be known.

        Wilson's of scores that are right or wrong, a bootstrap of another mean over examples, a jackknife of a metric
        of predictions. None for a metric whose scores by example are not known, whatever its name, and for a metric of
        predictions with too few examples, or without a ground (`has_ground`); nor for a divergence from the base of
        0, which at the base is no estimate.
        """
        if metric == KL and not self.scores[metric].any():
            return None
        if metric in self.scores:
            return mean_interval(self.scores[metric], groups=self.groups)
        if metric in self.extra:
            return self._jackknife(metric).interval()
        return None

    def quick_interval(self, metric: str) -> tuple[float, float] | None:
        """Return a 95% interval that is cheap to compute, for the many points of a curve; None if there is none."""
        return quick_interval(self.scores[metric], groups=self.groups) if metric in self.scores else None

    def compare(self, base: Evaluation, metric: str) -> Comparison | None:
        """Compare a metric with the base's on the same examples; None where examples are not known, or only one is."""
        if metric in self.scores and metric in base.scores:
            scores = self.scores[metric], base.scores[metric]
            enough = is_binary(*scores) or self.num_examples > 1
            return compare(*scores, groups=self.groups) if enough and self.num_groups != 1 else None
        if metric in self.extra and metric in base.extra:
            return compare_jackknives(self._jackknife(metric), base._jackknife(metric))
        return None

    def _jackknife(self, metric: str) -> Jackknife:
        known = self.__dict__.setdefault("_jackknives", {})  # a base is compared with every edit
        if metric not in known:
            known[metric] = self._left_out(metric)
        return known[metric]

    def _left_out(self, metric: str) -> Jackknife:
        assert self.preds is not None
        assert self.target is not None
        found, preds, target = self.extra[metric], self.preds, self.target
        value, labels = self.metrics[metric], None
        if not has_ground(found):
            return Jackknife(value, np.array([value, value]), value, enough=False)
        if isinstance(target, Tensor) and isinstance(preds, Tensor) and target.ndim == 1:
            of_classes = preds.ndim == 2 or not preds.is_floating_point() or len(target.unique()) == 2
            labels = target.numpy() if of_classes and not target.is_floating_point() else None
        return jackknife(
            value,
            lambda rows: float(compute(found, _rows(preds, rows), _rows(target, rows))),
            len(target),
            labels,
            self.groups,
        )

    def same_as(self, other: Evaluation) -> bool:
        """Whether two evaluations agree in every number, bit for bit."""
        return (
            dict(self.metrics) == dict(other.metrics)
            and self.scores.keys() == other.scores.keys()
            and all(np.array_equal(scores, other.scores[name], equal_nan=True) for name, scores in self.scores.items())
        )


def _rows(values: Tensor | list[str], rows: np.ndarray) -> Tensor | list[str]:
    return values[torch.from_numpy(rows)] if isinstance(values, Tensor) else [values[row] for row in rows]
