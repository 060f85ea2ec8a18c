"""How often does the gate pass an edit that is at its bound? By simulation.

    python -m benchmarks run gate --seeds 0 [--runs 600] [--searches 150]

Every edit is exactly at its bound, or a little beyond, so that at 95% confidence at most 5% may pass. There are two
tables: one test, and the coefficient that a search chooses among 20. In brackets is Clopper and Pearson's 95% interval
of what is simulated. Seeds are further simulations of the same, so that their counts are added.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.ledger import markdown
from tva.evaluation.batch_cache import example_order
from tva.evaluation.bounds import clears
from tva.evaluation.result import Evaluation
from tva.search import Bisect, Candidate, Constraint, Grid, Objective, Optuna, Problem, Race, Search

OPTIONS = {"runs": 600, "searches": 150}  # simulations of a cell of the first table, and of the second
DEPENDS = ("benchmarks/gate.py", "tva/evaluation/bounds.py", "tva/evaluation/intervals.py", "tva/search")
SIZES = (1, 5, 20, 50, 200, 1000)
Pair = tuple[np.ndarray, np.ndarray]  # scores of the edited model and of the base, each of shape (examples,)


def share(count: float, runs: int) -> str:
    """Format a share with its exact interval."""
    found = stats.binomtest(int(count), runs).proportion_ci(0.95, method="exact")
    return f"{100 * count / runs:.1f}% [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def measure(seed: int, runs: int, searches: int) -> dict[str, Any]:
    """Return how often each edit passes, and how often each search goes too far."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few examples are the point here
        return {
            "runs": runs,
            "passed": {
                name: [passed(draw, count, slope, above, runs, seed) for count in SIZES]
                for name, (slope, above, draw) in EDITS.items()
            },
            "searches": searches,
            "chosen": {
                name: {curve: chosen(*how, kept, searches, seed) for curve, kept in CURVES.items()}
                for name, how in SEARCHES.items()
            },
        }


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return both tables."""
    found, num = list(runs.values()), sum(run["runs"] for run in runs.values())
    tests = [
        [name, *(share(sum(run["passed"][name][place] for run in found), num) for place in range(len(SIZES)))]
        for name in found[0]["passed"]
    ]
    num = sum(run["searches"] for run in found)
    searches = [
        [name, *(_chosen([run["chosen"][name][curve] for run in found], num) for curve in curves)]
        for name, curves in found[0]["chosen"].items()
    ]
    return {
        "tests": markdown(["edit", *(f"n = {count:,}" for count in SIZES)], tests),
        "searches": markdown(["search", *CURVES], searches),
    }


def _chosen(cells: Sequence[Mapping[str, float]], num: int) -> str:
    scored = f", {sum(c['scored'] for c in cells) / num:.1f} passes" if "scored" in cells[0] else ""
    return f"{share(sum(c['too_far'] for c in cells), num)}, λ {sum(c['sum'] for c in cells) / num:.2f}{scored}"


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
    "right 90%, 95% kept": answers(0.9, 0.95, 0.0),
    "right 50%, 95% kept": answers(0.5, 0.95, 0.0),
    "right 28%, 95% kept": answers(0.28, 0.95, 0.0),
    "right 100%, 95% kept": answers(1.0, 0.95, 0.0),
    "right 99%, 95% kept, half of the others gained": answers(0.99, 0.95, 0.5),
    "right 60%, 90% kept, 10% of the others gained": answers(0.6, 0.9, 0.1),
}
LOSSES = {
    "loss, normal damage to all": losses(0.3, lambda g, b: 1.05 * b + g.normal(0, 0.1, len(b))),
    "loss, 10% of examples + 0.5": losses(0.3, lambda g, b: b + 0.5 * (g.random(len(b)) < 0.1)),
    "loss, 2% of examples + 2.5": losses(0.1, lambda g, b: b + 2.5 * (g.random(len(b)) < 0.02)),
    "loss, 0.5% of examples + 10 (beyond the guard)": losses(0.1, lambda g, b: b + 10 * (g.random(len(b)) < 0.005)),
    "loss, log-normal factors": losses(1.0, lambda g, b: 1.05 * b * g.lognormal(-0.125, 0.5, len(b))),
    "loss, nothing changed (this one may pass)": losses(0.5, lambda g, b: b + g.normal(0, 0.05, len(b))),
}


EDITS = {name: (slope, True, draw) for name, (slope, draw) in RIGHT.items()} | {
    name: (1.05, False, draw) for name, draw in LOSSES.items()
}


def passed(
    draw: Callable[[np.random.Generator, int], Pair], count: int, slope: float, above: bool, runs: int, seed: int
) -> int:
    """Count the edits of one cell that pass; right and wrong are given as floats, as anybody's module may do."""
    generator = np.random.default_rng([seed, count])
    pairs = (draw(generator, count) for _ in range(runs))
    edits = ((edited.astype(float), base.astype(float)) for edited, base in pairs)
    return sum(clears(edited, base, slope, 0.0, 0.95, above) for edited, base in edits)


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
        """Make the choice of a coefficient that keeps 95% of the base with 95% confidence."""
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


def chosen(search: Search, rule: str, kept: Callable[[float], float], runs: int, seed: int) -> dict[str, float]:
    """Count how often the chosen coefficient goes too far; add up how far it goes, and the passes over the examples."""
    problems = [Curve(kept, (seed, run)).problem(rule) for run in range(runs)]
    choices = [search.run(problem) for problem in problems]
    coefs = [choice.scaling_coef if choice.feasible else 0.0 for choice in choices]
    scored = sum(problem.num_scored / problem.base["control"].num_examples for problem in problems)
    too_far = sum(coef > 0 and kept(coef) < 0.95 for coef in coefs)
    return {"too_far": too_far, "sum": sum(coefs), "scored": scored}
