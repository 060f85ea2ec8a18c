"""How often do intervals cover what they are intervals of? By simulation.

    python -m benchmarks run intervals --seeds 0 1 2 [--runs 100]

Every kind of interval that tva reports, on scores whose distribution is known. In brackets is Clopper and Pearson's
95% interval of what is simulated. Seeds are further simulations of the same, so that their counts are added.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.gate import share
from benchmarks.ledger import markdown
from tva.evaluation.intervals import Ends, compare, mean_interval, mean_ratio_interval
from tva.evaluation.metrics import FunctionMetric
from tva.evaluation.result import Evaluation
from tva.report.edit_report import Comparison

OPTIONS = {"runs": 100}  # simulations of a cell, half as many of 1,000 examples
DEPENDS = (
    "benchmarks/intervals.py",
    "tva/evaluation/intervals.py",
    "tva/evaluation/jackknife.py",
    "tva/evaluation/result.py",
)
SIZES = (20, 50, 200, 1000)


def measure(seed: int, runs: int) -> dict[str, Any]:
    """Count for each kind and number of examples: simulations, those with an interval, and those that it covers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few examples are the point here
        return dict([*means(runs, seed), *predictions(runs, seed)])


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return the table."""
    found = list(runs.values())
    rows = [
        [kind, *(_cell(np.sum([run[kind][place] for run in found], axis=0)) for place in range(len(SIZES)))]
        for kind in found[0]
    ]
    return {"coverage": markdown(["interval", *(f"n = {count:,}" for count in SIZES)], rows)}


def _cell(counts: Sequence[int]) -> str:
    """Format how often intervals cover, and how often there is none."""
    num, given, covered = map(int, counts)
    if given < num / 10:
        return "none" if not given else f"none in {num - given} of {num}"
    return share(covered, given) + (f", none in {100 * (1 - given / num):.0f}%" if given < num else "")


Groups = tuple[np.ndarray, np.ndarray, np.ndarray]  # scores of the edited model and of the base, and groups


def right(generator: np.random.Generator, count: int, share: float = 0.8) -> np.ndarray:
    """Draw right and wrong answers, as floats, as a module of anybody's may hand them over."""
    return (generator.random(count) < share).astype(float)


def pair(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw answers of an edited model that keeps 90% of those that another, right in 80%, has, and gains a tenth."""
    other = right(generator, count)
    return np.where(other > 0, right(generator, count, 0.9), right(generator, count, 0.1)), other


def answers(generator: np.random.Generator, sizes: np.ndarray) -> Groups:
    """Draw answers to groups of examples that are alike; the edited model loses a tenth of the groups."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    other = generator.random(len(groups)) < generator.beta(4, 1, size=len(sizes))[groups]
    return (other & (generator.random(len(sizes)) < 0.9)[groups]).astype(float), other.astype(float), groups


def numbers(generator: np.random.Generator, sizes: np.ndarray) -> Groups:
    """Draw normal scores of groups, a third of whose variance is between groups; the edited model's are 1 higher."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    base, damage = (
        generator.normal(0, 0.5**0.5, len(sizes))[groups] + generator.normal(size=len(groups)) for _ in "ab"
    )
    return 2.5 + base + 1 + damage, 2.5 + base, groups


def of_groups(found: Groups) -> list[Ends]:
    """Return the intervals of the base's mean, of the difference from it and of the share of it."""
    edited, base, groups = found
    return [mean_interval(base, groups=groups), *both(compare(edited, base, groups=groups))]


def both(found: Comparison) -> list[Ends]:
    """Return the intervals of a comparison: of the difference and of the ratio."""
    ends = (found.difference_low, found.difference_high), (found.ratio_low, found.ratio_high)
    return [None if low is None or high is None else (low, high) for low, high in ends]


def normal(generator: np.random.Generator, count: int) -> list[Ends]:
    """Compare normal scores around 3.5 with others around 2.5."""
    base = 2 + generator.random(count)
    return both(compare(base + generator.normal(1, 1, count), base))


def pareto(generator: np.random.Generator, count: int) -> np.ndarray:
    """Draw sizes of groups, a few of which are most of the examples."""
    return np.minimum(1 + 2 * generator.pareto(1.2, count), 1000).astype(int)


PAIR = (", difference from the base", ", share of the base")
KINDS: tuple[tuple[str, dict[str, float], Callable[[np.random.Generator, int], Sequence[Ends]]], ...] = (
    ("accuracy, 80% right", {"": 0.8}, lambda g, n: [mean_interval(right(g, n))]),
    ("accuracy, 97% right", {"": 0.97}, lambda g, n: [mean_interval(right(g, n, 0.97))]),
    ("accuracy", dict(zip(PAIR, (-0.06, 0.925), strict=True)), lambda g, n: both(compare(*pair(g, n)))),
    (
        "normalized accuracy, mean of three tasks",
        {"": 0.925},
        lambda g, n: [mean_ratio_interval([(*pair(g, n), None) for _ in range(3)])],
    ),
    ("mean of normal scores", {"": 1.0}, lambda g, n: [mean_interval(g.normal(1, 1, n))]),
    ("mean of exponential scores", {"": 1.0}, lambda g, n: [mean_interval(g.exponential(1, n))]),
    ("normal scores", dict(zip(PAIR, (1.0, 1.4), strict=True)), normal),
    (
        "accuracy, n groups of 5",
        dict(zip(("", *PAIR), (0.8, -0.08, 0.9), strict=True)),
        lambda g, n: of_groups(answers(g, np.full(n, 5))),
    ),
    (
        "accuracy, n groups of 1 to 9",
        dict(zip(("", *PAIR), (0.8, -0.08, 0.9), strict=True)),
        lambda g, n: of_groups(answers(g, g.integers(1, 10, size=n))),
    ),
    (
        "normal scores, n groups of Pareto sizes",
        dict(zip(("", *PAIR), (2.5, 1.0, 1.4), strict=True)),
        lambda g, n: of_groups(numbers(g, pareto(g, n))),
    ),
)


def means(runs: int, seed: int) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield how often the intervals of means, and of differences and ratios of two, cover."""
    for name, truths, simulate in KINDS:
        found = []
        for count in SIZES:
            generator = np.random.default_rng([seed, count])
            found.append([simulate(generator, count) for _ in range(_of(runs, count))])
        for place, (what, truth) in enumerate(truths.items()):
            yield name + what, [covers([ends[place] for ends in cell], truth) for cell in found]


def _of(runs: int, count: int) -> int:
    return runs if count < 1000 else runs // 2


def f1(preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the mean F1 of the classes that occur, as torchmetrics' ``MulticlassF1Score`` does, but quickly."""
    classes, labels = preds.shape[1], target.numpy()
    cells = np.bincount(labels * classes + preds.numpy().argmax(1), minlength=classes**2).reshape(classes, classes)
    sums = cells.sum(0) + cells.sum(1)
    return torch.tensor((2 * cells.diagonal() / sums.clip(min=1)).sum() / (sums > 0).sum())


def auroc(preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the mean area under the curve of each class against the others, as ``MulticlassAUROC`` does."""
    scores, labels, areas, count = preds.numpy(), target.numpy(), [], len(target)
    for label in range(scores.shape[1]):
        own = labels[scores[:, label].argsort()] == label  # in ascending order of the score
        num = int(own.sum())
        areas.append((np.flatnonzero(own).sum() - num * (num - 1) / 2) / max(1, num * (count - num)))
    return torch.tensor(np.mean(areas))


f1.has_interval = auroc.has_interval = True  # type: ignore[attr-defined]


def calibration_error(preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the calibration error in 15 bins."""
    confidence, predicted = preds.max(dim=-1)
    off = torch.zeros(15, dtype=torch.float64)
    off.index_add_(0, (15 * confidence).long().clip(max=14), (predicted == target).double() - confidence)
    return off.abs().sum() / len(target)


PREDICTIONS = {  # name: metric, classes, how far apart they are
    "F1, 4 classes": (f1, 4, 1.2),
    "F1, 2 classes, easy": (f1, 2, 1.5),
    "AUROC, 4 classes": (auroc, 4, 1.2),
    "AUROC, 2 classes, easy": (auroc, 2, 1.5),
    "calibration error of one's own, 4 classes": (calibration_error, 4, 1.2),
}


def predictions(runs: int, seed: int) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield how often the intervals of metrics of predictions, and of their differences and ratios, cover."""
    for name, (function, classes, apart) in PREDICTIONS.items():
        metric, cells = FunctionMetric(function), []
        base, edited = (
            float(function(*side)) for side in classified(np.random.default_rng(seed), 300_000, classes, apart)
        )
        for count in SIZES:
            generator = np.random.default_rng([seed, count])
            sides = (classified(generator, count, classes, apart) for _ in range(_of(runs, count)))
            found = [_intervals(metric, side) for side in sides]
            truths = (base, edited - base, edited / base)
            cells.append([covers(ends, truth) for ends, truth in zip(zip(*found, strict=True), truths, strict=True)])
        for place, what in enumerate(("", *PAIR)):
            yield name + what, [cell[place] for cell in cells]


def _intervals(metric: FunctionMetric, sides: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Ends]:
    """Return the intervals of the base's metric, of the difference from it and of the share of it."""
    base, edited = (
        Evaluation(
            {"m": float(metric.function(*side))}, len(side[1]), preds=side[0], target=side[1], extra={"m": metric}
        )
        for side in sides
    )
    found = edited.compare(base, "m")
    assert found is not None
    return [base.interval("m"), *both(found)]


def classified(
    generator: np.random.Generator, count: int, classes: int, apart: float
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Draw probabilities and labels, of a base and of a model that is edited, by noise."""
    labels, logits = generator.integers(classes, size=count), generator.normal(size=(count, classes))
    logits[np.arange(count), labels] += apart
    noisy = logits + 0.8 * generator.normal(size=logits.shape)
    target = torch.from_numpy(labels)
    first, second = (torch.from_numpy(1.5 * side).softmax(-1) for side in (logits, noisy))
    return (first, target), (second, target)


def covers(ends: Sequence[Ends], truth: float) -> list[int]:
    """Count simulations, those with an interval, and those that it covers."""
    given = [pair for pair in ends if pair is not None]
    return [len(ends), len(given), sum(low <= truth <= high for low, high in given)]
