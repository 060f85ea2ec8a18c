"""How often do intervals cover what they are intervals of? By simulation.

    python -m benchmarks run intervals --seeds 0 1 2 [--runs 200]

Every kind of interval that tva reports, on scores whose distribution is known. In brackets is Clopper and Pearson's
95 % interval of what is simulated. Seeds are further simulations of the same, so that their counts are added.
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

OPTIONS = {"runs": 200}  # simulations of a cell
DEPENDS = (
    "benchmarks/intervals.py",
    "tva/evaluation/intervals.py",
    "tva/evaluation/jackknife.py",
    "tva/evaluation/result.py",
)
SIZES = (5, 20, 50, 200, 1000)


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
    return share(covered, given) + (f", none in {100 * (1 - given / num):.0f} %" if given < num else "")


Simulate = Callable[[np.random.Generator, int], Ends]  # an interval from that many examples


def right(generator: np.random.Generator, count: int, share: float = 0.8) -> np.ndarray:
    """Draw right and wrong answers, as floats, as a module of anybody's may hand them over."""
    return (generator.random(count) < share).astype(float)


def pair(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw answers of an edited model that keeps 90 % of those that another, right in 80 %, has, and gains a tenth."""
    other = right(generator, count)
    return np.where(other > 0, right(generator, count, 0.9), right(generator, count, 0.1)), other


def in_groups(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw answers to groups of one to nine examples that are alike; the edited model loses a tenth of the groups."""
    sizes = generator.integers(1, 10, size=count)
    groups = np.repeat(np.arange(count), sizes)[:count]
    easy = generator.beta(4, 1, size=count)[groups]
    other = generator.random(count) < easy
    return (other & (generator.random(count) < 0.9)[groups]).astype(float), other.astype(float), groups


def of_pair(found: Comparison, which: str) -> Ends:
    """Return an interval of a comparison."""
    low, high = getattr(found, f"{which}_low"), getattr(found, f"{which}_high")
    return None if low is None or high is None else (low, high)


def normal(generator: np.random.Generator, count: int) -> Comparison:
    """Compare normal scores around 3.5 with others around 2.5."""
    base = 2 + generator.random(count)
    return compare(base + generator.normal(1, 1, count), base)


def grouped(generator: np.random.Generator, count: int) -> Comparison:
    """Compare answers in groups."""
    edited, other, groups = in_groups(generator, count)
    return compare(edited, other, groups=groups)


def group_mean(generator: np.random.Generator, count: int) -> Ends:
    """Return the interval of a mean of answers in groups."""
    _, other, groups = in_groups(generator, count)
    return mean_interval(other, groups=groups)


def three_tasks(generator: np.random.Generator, count: int) -> Ends:
    """Return the interval of the mean of three tasks' normalized accuracies."""
    return mean_ratio_interval([(*pair(generator, count), None) for _ in range(3)])


KINDS: dict[str, tuple[Simulate, float]] = {
    "accuracy, 80 % right": (lambda g, n: mean_interval(right(g, n)), 0.8),
    "accuracy, 97 % right": (lambda g, n: mean_interval(right(g, n, 0.97)), 0.97),
    "mean of normal scores": (lambda g, n: mean_interval(g.normal(1, 1, n)), 1.0),
    "mean of exponential scores": (lambda g, n: mean_interval(g.exponential(1, n)), 1.0),
    "accuracy, difference from the base": (lambda g, n: of_pair(compare(*pair(g, n)), "difference"), -0.06),
    "accuracy, share of the base; normalized accuracy": (lambda g, n: of_pair(compare(*pair(g, n)), "ratio"), 0.925),
    "normalized accuracy, mean of three tasks": (three_tasks, 0.925),
    "normal scores, difference from the base": (lambda g, n: of_pair(normal(g, n), "difference"), 1.0),
    "normal scores, share of the base": (lambda g, n: of_pair(normal(g, n), "ratio"), 1.4),
    "accuracy, groups of 1 to 9": (group_mean, 0.8),
    "the same, share of the base": (lambda g, n: of_pair(grouped(g, n), "ratio"), 0.9),
}


def means(runs: int, seed: int) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield how often the intervals of means, and of differences and ratios of two, cover."""
    for name, (simulate, truth) in KINDS.items():
        generators = [np.random.default_rng([seed, count]) for count in SIZES]
        yield (
            name,
            [
                covers([simulate(generator, count) for _ in range(runs)], truth)
                for generator, count in zip(generators, SIZES, strict=True)
            ],
        )


def f1(preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the mean F1 of the classes that occur, as torchmetrics' ``MulticlassF1Score`` does, but quickly."""
    classes = preds.shape[1]
    cells = torch.bincount(target * classes + preds.argmax(1), minlength=classes**2).view(classes, classes)
    both = cells.sum(0) + cells.sum(1)
    return (2 * cells.diagonal() / both.clip(min=1)).sum() / (both > 0).sum()


def auroc(preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the mean area under the curve of each class against the others, as ``MulticlassAUROC`` does."""
    areas, count = [], len(target)
    for label in range(preds.shape[1]):
        places = torch.empty(count, dtype=torch.float64)
        places[preds[:, label].argsort()] = torch.arange(1.0, count + 1, dtype=torch.float64)
        own = target == label
        num = int(own.sum())
        areas.append((places[own].sum() - num * (num + 1) / 2) / max(1, num * (count - num)))
    return torch.stack(areas).mean()


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
            found = [_intervals(metric, classified(generator, count, classes, apart)) for _ in range(runs)]
            truths = (base, edited - base, edited / base)
            cells.append([covers(ends, truth) for ends, truth in zip(zip(*found, strict=True), truths, strict=True)])
        for place, what in enumerate(("", ", difference from the base", ", share of the base")):
            yield name + what, [cell[place] for cell in cells]


def _intervals(metric: FunctionMetric, sides: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[Ends, Ends, Ends]:
    """Return the intervals of the base's metric, of the difference from it and of the share of it."""
    base, edited = (
        Evaluation(
            {"m": float(metric.function(*side))}, len(side[1]), preds=side[0], target=side[1], extra={"m": metric}
        )
        for side in sides
    )
    found = edited.compare(base, "m")
    assert found is not None
    return base.interval("m"), of_pair(found, "difference"), of_pair(found, "ratio")


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
