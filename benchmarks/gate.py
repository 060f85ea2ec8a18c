"""How often does the gate pass an edit that is at its bound, and how often does an interval cover? By simulation.

    python benchmarks/gate.py [--runs 1000] [--searches 200] [--seed 0]

Every edit is exactly at its bound, or a little beyond, so that at 95 % confidence at most 5 % may pass. Printed are
three tables in Markdown: one test, the coefficient that a search chooses among 20, and the coverage of intervals. In
brackets is Clopper and Pearson's 95 % interval of what is simulated.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats

from tva.evaluation.batch_cache import example_order
from tva.evaluation.bounds import clears
from tva.evaluation.intervals import compare, mean_interval
from tva.evaluation.metrics import compute, find_metric
from tva.evaluation.result import Evaluation
from tva.search import Bisect, Candidate, Constraint, Grid, Objective, Optuna, Problem, Race, Search

SIZES = (1, 5, 20, 50, 200, 1000)
Pair = tuple[np.ndarray, np.ndarray]  # scores of the edited model and of the base, each of shape (examples,)


def share(count: float, runs: int) -> str:
    """Format a share with its exact interval."""
    found = stats.binomtest(int(count), runs).proportion_ci(0.95, method="exact")
    return f"{100 * count / runs:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    for row in (heads, ["---"] * len(heads), *rows):
        print("| " + " | ".join(row) + " |")
    print(flush=True)


# --- one test of one edit


def answers(right: float, kept: float, gained: float) -> tuple[float, Callable[[np.random.Generator, int], Pair]]:
    """Make right and wrong answers, of which a share is kept and of the others one gained; with what is kept in all."""

    def draw(generator: np.random.Generator, count: int) -> Pair:
        base = generator.random(count) < right
        return np.where(base, generator.random(count) < kept, generator.random(count) < gained), base

    return kept + (1 - right) * gained / right, draw


def losses(spread: float, damage: Callable[..., np.ndarray]) -> Callable[[np.random.Generator, int], Pair]:
    """Make losses of mean 1 that an edit raises to 1.05 on average."""

    def draw(generator: np.random.Generator, count: int) -> Pair:
        base = generator.gamma(1 / spread**2, spread**2, count)
        return damage(generator, base), base

    return draw


RIGHT = {
    "right 90 %, 95 % kept": answers(0.9, 0.95, 0.0),
    "right 50 %, 95 % kept": answers(0.5, 0.95, 0.0),
    "right 28 %, 95 % kept": answers(0.28, 0.95, 0.0),
    "right 100 %, 95 % kept": answers(1.0, 0.95, 0.0),
    "right 99 %, 95 % kept, half of the others gained": answers(0.99, 0.95, 0.5),
    "right 60 %, 90 % kept, 10 % of the others gained": answers(0.6, 0.9, 0.1),
}
LOSSES = {
    "loss, normal damage to all": losses(0.3, lambda g, b: 1.05 * b + g.normal(0, 0.1, len(b))),
    "loss, 10 % of examples + 0.5": losses(0.3, lambda g, b: b + 0.5 * (g.random(len(b)) < 0.1)),
    "loss, 2 % of examples + 2.5": losses(0.1, lambda g, b: b + 2.5 * (g.random(len(b)) < 0.02)),
    "loss, 0.5 % of examples + 10 (beyond the guard)": losses(0.1, lambda g, b: b + 10 * (g.random(len(b)) < 0.005)),
    "loss, log-normal factors": losses(1.0, lambda g, b: 1.05 * b * g.lognormal(-0.125, 0.5, len(b))),
    "loss, nothing changed (this one may pass)": losses(0.5, lambda g, b: b + g.normal(0, 0.05, len(b))),
}


def tests(runs: int, seed: int) -> None:
    """Print how often one test passes."""
    rows = []
    for name, (slope, draw) in RIGHT.items():
        rows.append([name, *(passed(draw, count, slope, True, runs, seed) for count in SIZES)])
    for name, draw in LOSSES.items():
        rows.append([name, *(passed(draw, count, 1.05, False, runs, seed) for count in SIZES)])
    table(["edit", *(f"n = {count:,}" for count in SIZES)], rows)


def passed(
    draw: Callable[[np.random.Generator, int], Pair], count: int, slope: float, above: bool, runs: int, seed: int
) -> str:
    """Simulate one cell; right and wrong are given as floats, as a module of anybody's may do."""
    generator = np.random.default_rng([seed, count])
    pairs = (draw(generator, count) for _ in range(runs))
    edits = ((edited.astype(float), base.astype(float)) for edited, base in pairs)
    return share(sum(clears(edited, base, slope, 0.0, 0.95, above) for edited, base in edits), runs)


# --- the coefficient that a search chooses


class Curve:
    """Right and wrong on a control by the share that each coefficient keeps, with answers of their own at each."""

    def __init__(self, kept: Callable[[float], float], seed: Sequence[int], num: int = 400) -> None:
        self.kept, self.seed, self.num = kept, seed, num
        self.base = np.random.default_rng([*seed, 0]).random(num) < 0.9

    def evaluate(
        self, candidates: Sequence[Candidate], windows: Mapping[str, tuple[int, int]], seed: int | None
    ) -> list[dict[str, Evaluation]]:
        """Evaluate as an edit's problem does."""
        return [{"control": self._one(candidate.scaling_coef, windows["control"], seed)} for candidate in candidates]

    def _one(self, coef: float, window: tuple[int, int], seed: int | None) -> Evaluation:
        own = np.random.default_rng([*self.seed, 1 + round(1e6 * coef)]).random(self.num)
        scores = (self.base & (own < self.kept(coef)))[example_order(self.num, seed)[slice(*window)].numpy()]
        return Evaluation({"accuracy": float(scores.mean()), "size": coef}, len(scores), {"accuracy": scores})

    def problem(self, rule: Any) -> Problem:
        """Make the choice of a coefficient that keeps 95 % of the base with 95 % confidence."""
        base = Evaluation({"accuracy": float(self.base.mean()), "size": 0.0}, self.num, {"accuracy": self.base})
        objective = Objective.parse("control/size", maximize=True, targets=[], tasks=["control"])
        keep = Constraint.parse("control/accuracy >= 0.95 * base", ["control"])
        return Problem(self.evaluate, {"control": base}, [keep], objective, rule, 0.95)


CURVES: dict[str, Callable[[float], float]] = {
    "falls from 1 to 0.9": lambda coef: 1 - 0.1 * coef,
    "shelf: 0.945 from 0.3 on": lambda coef: 1.0 if coef < 0.29 else 0.945,
    "0.9499 everywhere": lambda coef: 0.9499,
}
SEARCHES: dict[str, tuple[Search, str]] = {
    "Grid, largest": (Grid(), "largest"),
    "Grid, best": (Grid(), "best"),
    "Bisect": (Bisect(), "largest"),
    "Race, largest": (Race(), "largest"),
    "Optuna, 20 trials": (Optuna(num_trials=20), "best"),
}


def searches(runs: int, seed: int) -> None:
    """Print how often the chosen coefficient goes too far, and how far it goes on average."""
    rows = []
    for name, (search, rule) in SEARCHES.items():
        cells = []
        for kept in CURVES.values():
            chosen = [search.run(Curve(kept, (seed, run)).problem(rule)) for run in range(runs)]
            coefs = [choice.scaling_coef if choice.feasible else 0.0 for choice in chosen]
            cells.append(f"{share(sum(c > 0 and kept(c) < 0.95 for c in coefs), runs)}, λ {np.mean(coefs):.2f}")
        rows.append([name, *cells])
    table(["search", *CURVES], rows)


# --- intervals


def means(runs: int, seed: int) -> Iterator[list[str]]:
    """Yield how often the interval of a mean covers it, and that of a difference and a ratio."""
    draws: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
        "mean of right or wrong (float), 80 %": lambda g, n: (g.random(n) < 0.8) / 0.8,
        "mean of normal scores": lambda g, n: g.normal(1, 1, n),
        "mean of exponential scores": lambda g, n: g.exponential(1, n),
    }
    for name, draw in draws.items():
        cells = []
        for count in SIZES[1:]:
            generator = np.random.default_rng([seed, count])
            factor = 0.8 if "right" in name else 1.0
            ends = [mean_interval(draw(generator, count) * factor) for _ in range(runs)]
            cells.append(covers(ends, factor))
        yield [name, *cells]
    for name in ("difference", "ratio"):
        cells = []
        for count in SIZES[1:]:
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
        yield [f"paired {name} of normal scores", *cells]


def predictions(runs: int, seed: int) -> Iterator[list[str]]:
    """Yield how often the interval of a metric of predictions covers it, where there is one."""
    for name in ("f1_score", "auroc", "calibration_error"):
        metric, cells = find_metric(name, 4), []
        truth = float(compute(metric, *classified(np.random.default_rng(seed), 100_000)))
        for count in SIZES[1:]:
            generator, ends = np.random.default_rng([seed, count]), list[tuple[float, float] | None]()
            for _ in range(runs if count <= 200 else runs // 4):
                preds, target = classified(generator, count)
                value = float(compute(metric, preds, target))
                found = Evaluation({name: value}, count, preds=preds, target=target, extra={name: metric})
                ends.append(found.interval(name))
            cells.append(covers(ends, truth))
        yield [f"`{name}`, 4 classes", *cells]


def classified(generator: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw probabilities of 4 classes, and labels."""
    labels, logits = generator.integers(4, size=count), generator.normal(size=(count, 4))
    logits[np.arange(count), labels] += 1.2
    return torch.from_numpy(1.5 * logits).softmax(-1), torch.from_numpy(labels)


def covers(ends: Sequence[tuple[float, float] | None], truth: float) -> str:
    """Format how often intervals cover, and how often there is none."""
    given = [pair for pair in ends if pair is not None]
    if not given or len(given) < len(ends) / 10:
        return "none" if not given else f"none in {len(ends) - len(given)} of {len(ends)}"
    missing = f", none in {100 * (1 - len(given) / len(ends)):.0f} %" if len(given) < len(ends) else ""
    return share(sum(low <= truth <= high for low, high in given), len(given)) + missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=int, default=1000, help="of each cell of the first table; intervals have a fifth"
    )
    parser.add_argument("--searches", type=int, default=200, help="of each cell of the second table")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # too few examples are the point here
    tests(options.runs, options.seed)
    searches(options.searches, options.seed)
    few = max(1, options.runs // 5)
    rows = [*means(few, options.seed), *predictions(max(1, few // 4), options.seed)]
    table(["interval", *(f"n = {count:,}" for count in SIZES[1:])], rows)


if __name__ == "__main__":
    main()
