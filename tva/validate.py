"""Evaluate a model on a task through the Trainer, with the number of examples and a confidence interval."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from tva.state_dict import some

Split = Literal["val", "test"]


@dataclass(frozen=True)
class Evaluation:
    """What a model scored on one split of one task.

    Attributes:
        metrics: Metric name to value; accuracies lie in [0, 1].
        num_examples: Examples evaluated.
        correct: Whether each example was classified correctly, shape (num_examples,), in the split's order, where the
            model's step returns ``correct``; else None.
    """

    metrics: Mapping[str, float]
    num_examples: int
    correct: Tensor | None

    def interval(self, metric: str) -> tuple[float, float] | None:
        """Give the 95 % Wilson interval of an accuracy; None for other metrics."""
        return wilson_interval(self.metrics[metric], self.num_examples) if metric == "accuracy" else None


def wilson_interval(proportion: float, num_examples: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Compute Wilson's score interval of a proportion.

    Args:
        proportion: Observed proportion, in [0, 1].
        num_examples: Examples it was observed on, at least 1.
        z: Standard normal quantile; the default gives 95 % confidence.

    Returns:
        Lower and upper end, in [0, 1].

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.

    Example:
        >>> low, high = wilson_interval(0.9, 10)
        >>> round(low, 3), round(high, 3)
        (0.596, 0.982)
    """
    center = proportion + z * z / (2 * num_examples)
    spread = z * math.sqrt(proportion * (1 - proportion) / num_examples + z * z / (4 * num_examples**2))
    scale = 1 + z * z / num_examples
    # exactly 0 and 1 are ends of the interval at those proportions, but for rounding
    return max(0.0, min(proportion, (center - spread) / scale)), min(1.0, max(proportion, (center + spread) / scale))


def paired_slack(edited: Evaluation, base: Evaluation, slope: float, confidence: float) -> float:
    r"""Give the half-width by which ``accuracy - slope * base accuracy`` must clear its bound to be believed.

    The examples are the same, so their scores are compared pair by pair: a one-sided interval of the mean of
    :math:`e_i - s b_i`, normal but for the skewness that few but costly losses bring, which would let too much pass.

    Args:
        edited: The edited model on some examples.
        base: The base model on the same.
        slope: What the base's accuracy is multiplied by in the bound.
        confidence: One-sided, in (0.5, 1).

    Raises:
        ValueError: The model's step does not return per-example ``correct``.

    Source: the first Edgeworth correction of Student's t; Hall, "Inverting an Edgeworth expansion", Annals of
    Statistics 1983.
    """
    if edited.correct is None or base.correct is None:
        raise ValueError("A confidence needs per-example scores: the model's validation_step must return 'correct'.")
    differences = edited.correct.double() - slope * base.correct.double()
    deviation, count = float(differences.std()), len(differences)
    if deviation == 0:
        return 0.0
    z = NormalDist().inv_cdf(confidence)
    skewness = float(((differences - differences.mean()) / deviation).pow(3).mean())
    return max(z, z - skewness * (2 * z * z + 1) / (6 * math.sqrt(count))) * deviation / math.sqrt(count)


class _Scores(L.Callback):
    """Count examples, and keep ``correct`` where a step returns it."""

    def __init__(self) -> None:
        self.num_examples = 0
        self.correct: list[Tensor] = []

    def _take(self, outputs: Any, batch: Any) -> None:
        first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch
        while isinstance(first, (list, tuple)):
            first = first[0]
        self.num_examples += len(first)
        if isinstance(outputs, Mapping) and "correct" in outputs:
            self.correct.append(outputs["correct"].cpu())

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self._take(outputs, batch)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self._take(outputs, batch)


def evaluate(
    trainer: L.Trainer, model: L.LightningModule, datamodule: L.LightningDataModule, split: Split
) -> Evaluation:
    """Evaluate a model on one split of a task.

    Args:
        trainer: Any Trainer; its callbacks take part.
        model: Any LightningModule with a ``validation_step`` (or ``test_step``) that logs its metrics.
        datamodule: The task.
        split: ``"val"`` to choose on, ``"test"`` to report on.

    Returns:
        The logged metrics by their last name: ``val/mnist/accuracy`` and ``val_accuracy`` are both ``accuracy``.

    Raises:
        ValueError: The step logged nothing, or two metrics of one name.
    """
    scores = _Scores()
    trainer.callbacks.append(scores)
    try:
        with _quiet():
            run = trainer.validate if split == "val" else trainer.test
            results = run(model, datamodule=datamodule, verbose=False)
    finally:
        trainer.callbacks.remove(scores)
    metrics: dict[str, float] = {}
    for key, value in (results[0] if results else {}).items():
        name = re.sub(r"^(val|valid|validation|test)[_/]", "", key).rpartition("/")[2]
        if name in metrics:
            raise ValueError(f"{type(model).__name__} logs two metrics called {name!r}: {some(results[0], 8)}.")
        metrics[name] = value
    if not metrics:
        raise ValueError(
            f"{type(model).__name__} logged no metric on the {split} split; its "
            f"{'validation' if split == 'val' else 'test'}_step must call self.log."
        )
    correct = torch.cat(scores.correct) if scores.correct and trainer.world_size == 1 else None
    return Evaluation(metrics, scores.num_examples * trainer.world_size, correct)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
