"""How often do intervals cover what they are intervals of? By simulation.

    python -m benchmarks run intervals --seeds 0 [--runs 400]

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
from tva.evaluation.intervals import compare, mean_interval, mean_ratio_interval
from tva.evaluation.metrics import compute, find_metric
from tva.evaluation.result import Evaluation
from tva.report.edit_report import Comparison

OPTIONS = {"runs": 400}  # simulations of a cell; a quarter of it for metrics of predictions
DEPENDS = ("benchmarks/intervals.py", "tva/evaluation/intervals.py", "tva/evaluation/result.py")
SIZES = (5, 20, 50, 200, 1000)
Ends = tuple[float, float] | None


def measure(seed: int, runs: int) -> dict[str, Any]:
    """Count for each kind and number of examples: simulations, those with an interval, and those that it covers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few examples are the point here
        return dict([*means(runs, seed), *predictions(max(1, runs // 4), seed)])


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


def predictions(runs: int, seed: int) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield how often the interval of a metric of predictions covers it, where there is one."""
    for name in ("f1_score", "auroc", "calibration_error"):
        metric, cells = find_metric(name, 4), []
        truth = float(compute(metric, *classified(np.random.default_rng(seed), 100_000)))
        for count in SIZES:
            generator, ends = np.random.default_rng([seed, count]), list[Ends]()
            for _ in range(runs):
                preds, target = classified(generator, count)
                value = float(compute(metric, preds, target))
                found = Evaluation({name: value}, count, preds=preds, target=target, extra={name: metric})
                ends.append(found.interval(name))
            cells.append(covers(ends, truth))
        yield f"`{name}`, 4 classes", cells


def classified(generator: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw probabilities of 4 classes, and labels."""
    labels, logits = generator.integers(4, size=count), generator.normal(size=(count, 4))
    logits[np.arange(count), labels] += 1.2
    return torch.from_numpy(1.5 * logits).softmax(-1), torch.from_numpy(labels)


def covers(ends: Sequence[Ends], truth: float) -> list[int]:
    """Count simulations, those with an interval, and those that it covers."""
    given = [pair for pair in ends if pair is not None]
    return [len(ends), len(given), sum(low <= truth <= high for low, high in given)]
