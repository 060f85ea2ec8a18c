"""How often do intervals cover what they are intervals of? By simulation.

    python -m benchmarks run coverage --seeds 0 [--runs 400]

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
from tva.evaluation.intervals import compare, mean_interval
from tva.evaluation.metrics import compute, find_metric
from tva.evaluation.result import Evaluation

OPTIONS = {"runs": 400}  # simulations of a cell; a quarter of it for metrics of predictions
DEPENDS = ("benchmarks/coverage.py", "tva/evaluation/intervals.py", "tva/evaluation/result.py")
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


def means(runs: int, seed: int) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield how often the interval of a mean covers it, and that of a difference and a ratio."""
    draws: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
        "mean of right or wrong (float), 80 %": lambda g, n: (g.random(n) < 0.8) / 0.8,
        "mean of normal scores": lambda g, n: g.normal(1, 1, n),
        "mean of exponential scores": lambda g, n: g.exponential(1, n),
    }
    for name, draw in draws.items():
        cells = []
        for count in SIZES:
            generator = np.random.default_rng([seed, count])
            factor = 0.8 if "right" in name else 1.0
            ends = [mean_interval(draw(generator, count) * factor) for _ in range(runs)]
            cells.append(covers(ends, factor))
        yield name, cells
    for name in ("difference", "ratio"):
        cells = []
        for count in SIZES:
            generator, ends = np.random.default_rng([seed, count]), list[tuple[float, float] | None]()
            for _ in range(runs):
                base = 2 + generator.random(count)
                found = compare(base + generator.normal(1, 1, count), base)
                low, high = (
                    (found.difference_low, found.difference_high)
                    if name == "difference"
                    else (found.ratio_low, found.ratio_high)
                )
                ends.append(None if low is None or high is None else (low, high))
            cells.append(covers(ends, 1.0 if name == "difference" else 1.4))
        yield f"paired {name} of normal scores", cells


def predictions(runs: int, seed: int) -> Iterator[tuple[str, list[list[int]]]]:
    """Yield how often the interval of a metric of predictions covers it, where there is one."""
    for name in ("f1_score", "auroc", "calibration_error"):
        metric, cells = find_metric(name, 4), []
        truth = float(compute(metric, *classified(np.random.default_rng(seed), 100_000)))
        for count in SIZES:
            generator, ends = np.random.default_rng([seed, count]), list[tuple[float, float] | None]()
            for _ in range(runs if count <= 200 else runs // 4):
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
