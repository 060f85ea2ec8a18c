"""Racing: all candidates on few examples, and ever fewer candidates on more of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tva.evaluation.bounds import clears
from tva.evaluation.intervals import flip_test
from tva.evaluation.result import Evaluation
from tva.search.base import Choice, Problem, Search, joined, part_of
from tva.search.candidate import SCALING, Candidate
from tva.search.goals import Constraint

NUM_FINALISTS = 3


class Race(Search):
    """Sequential halving on nested random subsets of the validation set, dropping only what a test says is beaten.

    In each round the candidates left are evaluated on more examples, ``growth`` times as many in all. Dropped is a
    candidate whose objective is below that of the leader, example by example (sign-flip test), whose constraints fail,
    or, with the rule ``"largest"``, that is smaller than one whose constraints hold: it assumes then that constraints
    only get worse as the coefficient grows, and checks that on the points it evaluates on all examples. The confidence
    is shared among the rounds, in each of which a candidate meets one test.

    Few examples cannot tell neighbors apart. So the race ends while a part of the budget is left, and some of those
    that are tied are compared on all examples: with ``"best"`` three or more spaced evenly in the better half of
    them; with ``"largest"`` those that bisection asks for.

    Args:
        start: Smallest coefficient.
        stop: Largest coefficient.
        num: Candidates along each range, both ends included.
        ranges: By coefficient the smallest and the largest value, instead of ``start`` and ``stop``.
        shared: Give all coefficients in ``ranges`` the same value.
        first: Examples of each task in the first round; by default a twentieth, at least 10.
        growth: How much more examples each round has in all.
        confidence: That the best candidate is not dropped.
        budget: Share of the forward passes of the whole grid that may be spent.
        seed: Of the order in which examples are taken.

    Source: Karnin, Koren and Somekh, "Almost optimal exploration in multi-armed bandits", ICML 2013, for the halving;
    Maron and Moore, "Hoeffding races", NeurIPS 1993, for dropping by a test.
    """

    def __init__(
        self,
        start: float = 0.0,
        stop: float = 1.0,
        num: int = 21,
        ranges: dict[str, list[float]] | None = None,
        shared: bool = False,
        first: int | None = None,
        growth: float = 2.0,
        confidence: float = 0.95,
        budget: float = 0.25,
        seed: int = 0,
    ) -> None:
        super().__init__(ranges or {SCALING: (start, stop)}, shared)
        if num < 2 or growth <= 1 or not 0.5 <= confidence < 1 or not 0 < budget <= 1:
            raise ValueError(
                f"A race needs num >= 2, growth > 1, 0.5 <= confidence < 1 and 0 < budget <= 1; found num={num}, "
                f"growth={growth}, confidence={confidence}, budget={budget}."
            )
        self.num, self.first, self.growth = num, first, growth
        self.confidence, self.budget, self.seed = confidence, budget, seed

    def run(self, problem: Problem) -> Choice:
        """Race the candidates."""
        left = [point for point in self.axes(self.num) if not problem.is_identity(point)]
        problem.shared_among(_num_tests(problem, left))
        sizes = self._sizes(problem)
        budget = self.budget * len(left) * sum(evaluation.num_examples for evaluation in problem.base.values())
        largest = max(sizes.values())
        first = self.first or max(10, largest // 20)
        rounds = 1 + max(0, math.ceil(math.log(largest / first, self.growth)))
        level = (1 - self.confidence) / rounds  # of each test, for a candidate meets one in each round
        pieces: dict[Candidate, dict[str, list[Evaluation]]] = {point: {task: [] for task in sizes} for point in left}
        done = dict.fromkeys(sizes, 0)
        history = []
        goal = float(first)
        while True:
            wanted = {task: min(size, math.ceil(goal)) for task, size in sizes.items()}
            ranges = {task: (done[task], wanted[task]) for task in sizes if wanted[task] > done[task]}
            if ranges:
                for point, found in zip(left, problem.evaluate(left, ranges, self.seed), strict=True):
                    for task, evaluation in found.items():
                        pieces[point][task].append(evaluation)
                done |= {task: stop for task, (_, stop) in ranges.items()}
            scored = {point: {task: joined(parts) for task, parts in pieces[point].items()} for point in left}
            base = {task: part_of(problem.base[task], done[task], self.seed) for task in sizes}
            kept = self._kept(problem, scored, base, level)
            history.append({"examples": dict(done), "candidates": len(left), "left": len(kept)})
            if kept:
                left = kept
            everything = all(done[task] == size for task, size in sizes.items())
            if not kept or everything or (len(left) == 1 and not problem.constraints):
                break
            goal *= self.growth
            more = sum(min(size, math.ceil(goal)) - done[task] for task, size in sizes.items())
            rest = sum(size - done[task] for task, size in sizes.items()) - more
            if problem.num_scored + len(left) * more + _num_finals(problem, left) * rest > budget:
                problem.shared_among(_num_tests(problem, left))
                for point in left:
                    problem.record(point, scored[point], base)
                return self._finish(problem, left, pieces, done, sizes, budget, history)
        problem.shared_among(len(left))
        for point in left:
            problem.record(point, scored[point], base)
        choice = problem.choose(left, {task: evaluation.metrics for task, evaluation in base.items()})
        reason = choice.reason + _outcome(len(left), done, sizes, self.confidence)
        choice = replace(choice, reason=reason, details={"rounds": history, "level": level, "seed": self.seed})
        return problem.assuming_monotone(choice, left) if problem.rule == "largest" else choice

    def _finish(
        self,
        problem: Problem,
        left: Sequence[Candidate],
        pieces: Mapping[Candidate, Mapping[str, list[Evaluation]]],
        done: Mapping[str, int],
        sizes: Mapping[str, int],
        budget: float,
        history: list[dict[str, Any]],
    ) -> Choice:
        points, seen = sorted(left, key=lambda c: c.size), []
        rest = {task: (done[task], size) for task, size in sizes.items() if size > done[task]}
        base = {task: part_of(problem.base[task], size, self.seed) for task, size in sizes.items()}  # in the same order

        def holds(point: Candidate) -> bool:
            (found,) = problem.evaluate([point], rest, self.seed)
            whole = {task: joined([*pieces[point][task], *([found[task]] if task in found else [])]) for task in sizes}
            problem.record(point, whole, base)
            seen.append(point)
            return problem.choose([point]).feasible

        if problem.rule == "largest":
            low, high = -1, len(points)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if holds(points[middle]) else (low, middle)
        else:
            affordable = int((budget - problem.num_scored) / sum(stop - start for start, stop in rest.values()))
            so_far = {task: part_of(problem.base[task], done[task], self.seed).metrics for task in sizes}
            likely = [p for p in points if all(k.holds(problem.tried[p], so_far) for k in problem.constraints)]
            finalists = _spread(_promising(problem, likely or points, affordable), max(1, affordable))
            feasible = [holds(point) for point in finalists]
            if not any(feasible):  # a bound is kept before a budget is
                others = (point for point in points if point not in finalists)
                any(holds(point) for point in others)
        choice = problem.choose(seen)
        tied = f"{len(left)} of {history[0]['candidates']} left tied by the race"
        choice = replace(
            choice,
            reason=f"{choice.reason} ({tied}, {len(seen)} of them compared on all examples)",
            details={"rounds": history, "finalists": [str(point) for point in seen], "seed": self.seed},
        )
        return problem.assuming_monotone(choice, seen) if problem.rule == "largest" else choice

    def _sizes(self, problem: Problem) -> dict[str, int]:
        """Examples of each task that decides; all must be scored one by one."""
        tasks = [constraint.task for constraint in problem.constraints]
        if problem.rule == "best":
            tasks += list(problem.weights())
        for constraint in problem.constraints:
            if constraint.metric not in problem.base[constraint.task].scores:
                raise ValueError(
                    f"A race compares example by example, and there are no such scores for {constraint.text!r}: the "
                    f"model's validation_step must return 'correct' for accuracy, or 'scores' with "
                    f"{constraint.metric!r}. Use Grid or Bisect."
                )
        return {task: problem.base[task].num_examples for task in dict.fromkeys(tasks)}

    def _kept(
        self,
        problem: Problem,
        scored: Mapping[Candidate, Mapping[str, Evaluation]],
        base: Mapping[str, Evaluation],
        level: float,
    ) -> list[Candidate]:
        possible = [c for c in scored if not any(_fails(k, scored[c], base, level) for k in problem.constraints)]
        sure = [c for c in possible if all(_holds(k, scored[c], base, level) for k in problem.constraints)]
        if problem.rule == "largest":
            floor = max((c.size for c in sure), default=-math.inf)
            return [c for c in possible if c.size >= floor]
        if not sure:
            return possible
        weights = problem.weights()
        utility = {
            c: np.concatenate([w * s for s, w in _columns(scored[c], weights)])  # (examples of all tasks,)
            for c in possible
        }
        leader = max(sure, key=lambda c: (utility[c].sum(), -c.size))
        others = [c for c in possible if c != leader]
        if not others:
            return [leader]
        p_values = flip_test(np.stack([utility[leader] - utility[c] for c in others], axis=1))
        return [c for c in possible if c == leader or p_values[others.index(c)] > level]


def _num_finals(problem: Problem, left: Sequence[Candidate]) -> int:
    """How many of those left the end of the race evaluates on all examples."""
    return math.ceil(math.log2(len(left) + 1)) if problem.rule == "largest" else min(len(left), NUM_FINALISTS)


def _num_tests(problem: Problem, left: Sequence[Candidate]) -> int:
    """How many of those left can decide: those that bisection asks for, or any."""
    return _num_finals(problem, left) if problem.rule == "largest" else len(left)


def _promising(problem: Problem, points: Sequence[Candidate], num: int) -> list[Candidate]:
    """Take the better half of those left, or ``num``, by their objective averaged with that of their neighbors."""
    assert problem.objective is not None
    sign = 1.0 if problem.objective.maximize else -1.0
    values = [sign * problem.objective.value(problem.tried[point]) for point in points]
    smooth = [float(np.mean(values[max(0, place - 1) : place + 2])) for place in range(len(points))]
    order = sorted(range(len(points)), key=lambda place: -smooth[place])
    return [points[place] for place in sorted(order[: max(num, (len(points) + 1) // 2)])]


def _spread(points: Sequence[Candidate], num: int) -> list[Candidate]:
    """Take points spaced evenly among those that no test could tell apart."""
    if num >= len(points):
        return list(points)
    return [points[int((place + 0.5) * len(points) / num)] for place in range(num)]


def _columns(
    scored: Mapping[str, Evaluation], weights: Mapping[str, tuple[str, float]]
) -> list[tuple[np.ndarray, float]]:
    """Return each task's scores and their weight: summed over each group, where groups are the unit, as signs flip."""
    return [
        (scored[task].sums(metric), weight / scored[task].num_examples) for task, (metric, weight) in weights.items()
    ]


def _holds(
    constraint: Constraint, scored: Mapping[str, Evaluation], base: Mapping[str, Evaluation], level: float
) -> bool:
    return _clears(constraint, scored, base, level, constraint.above)


def _fails(
    constraint: Constraint, scored: Mapping[str, Evaluation], base: Mapping[str, Evaluation], level: float
) -> bool:
    return _clears(constraint, scored, base, level, not constraint.above)


def _clears(
    constraint: Constraint, scored: Mapping[str, Evaluation], base: Mapping[str, Evaluation], level: float, above: bool
) -> bool:
    edited, before = (side[constraint.task].scores[constraint.metric] for side in (scored, base))
    # rare damage is excluded at the end, where a coefficient is chosen, and not wherever one is dropped
    slope, offset, groups = constraint.slope, constraint.offset, scored[constraint.task].groups
    return clears(edited, before, slope, offset, 1 - level, above, guard=False, groups=groups)


def _outcome(num_left: int, done: Mapping[str, int], sizes: Mapping[str, int], confidence: float) -> str:
    examples: Sequence[str] = [f"{done[task]:,} of {size:,} of {task}" for task, size in sizes.items()]
    tied = f", where {num_left} candidates were left, tied at {confidence:.0%} confidence" if num_left > 1 else ""
    return f" ({', '.join(examples)}{tied})"
