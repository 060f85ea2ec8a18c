"""Try every point of a grid, or only those that a monotone constraint leaves in doubt."""

from __future__ import annotations

import math
from dataclasses import replace

from tva.search.base import Choice, Problem, Search
from tva.search.candidate import SCALING, Candidate


class Grid(Search):
    """Evenly spaced coefficients; by default the paper's 21 points 0, 0.05, …, 1.

    All points are evaluated in one pass over the data.

    Args:
        start: First coefficient.
        stop: Last coefficient.
        num: How many, both ends included; at least 2.
        ranges: By coefficient the smallest and the largest value, instead of ``start`` and ``stop``: all combinations
            of ``num`` values each.
        shared: Give all coefficients in ``ranges`` the same value.

    Example:
        >>> [candidate.scaling_coef for candidate in Grid(num=5).candidates()]
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    def __init__(
        self,
        start: float = 0.0,
        stop: float = 1.0,
        num: int = 21,
        ranges: dict[str, list[float]] | None = None,
        shared: bool = False,
    ) -> None:
        if num < 2 or not stop > start:
            raise ValueError(f"A grid must have 2 points or more and start < stop; found num={num}, {start} … {stop}.")
        super().__init__(ranges or {SCALING: (start, stop)}, shared)
        self.num = num

    def candidates(self) -> list[Candidate]:
        """Return the candidates, the smallest value first."""
        return self.axes(self.num)

    def run(self, problem: Problem) -> Choice:
        """Score every candidate and take the best."""
        problem.in_sequence(self.candidates())
        problem.score(self.candidates())
        return problem.choose()


class Bisect(Search):
    """Find the largest coefficient whose constraints hold, when they hold up to some point and fail beyond it.

    About log₂(num) evaluations instead of num, and on the constraints' tasks only. It assumes that constraints only get
    worse as the coefficient grows, and checks that on the points it evaluates. Where they do not, it finds a
    coefficient at which they hold and the next fails, and not always the largest.

    Args:
        start: First coefficient, on the same side of 0 as ``stop``.
        stop: Last coefficient.
        num: Points that can be distinguished, both ends included.
        ranges: One coefficient's name with its smallest and largest value, instead of ``start`` and ``stop``.
    """

    def __init__(
        self, start: float = 0.0, stop: float = 1.0, num: int = 21, ranges: dict[str, list[float]] | None = None
    ) -> None:
        if num < 2 or not stop > start:
            raise ValueError(f"Bisect needs 2 points or more and start < stop; found num={num}, {start} … {stop}.")
        super().__init__(ranges or {SCALING: (start, stop)})
        if len(self.ranges) > 1:
            raise ValueError(f"Bisect searches one coefficient; found {list(self.ranges)}. Use Grid, Race or Optuna.")
        ((low, high),) = self.ranges.values()
        if low < 0 < high:
            raise ValueError(f"Bisect goes from 0 in one direction; found {low:g} … {high:g}. Use Grid, or one side.")
        self.num = num

    def run(self, problem: Problem) -> Choice:
        """Halve the interval between a coefficient whose constraints hold and one whose do not."""
        if problem.rule != "largest":
            raise ValueError("Bisect finds the boundary of a constraint: set rule='largest', or use Grid or Race.")
        points = [point for point in self.axes(self.num) if not problem.is_identity(point)]
        points.sort(key=lambda point: point.size)
        problem.shared_among(math.ceil(math.log2(len(points) + 1)))
        tasks = {constraint.task for constraint in problem.constraints}
        low, high = -1, len(points)  # the last known to hold, the first known to fail
        while high - low > 1:
            middle = (low + high) // 2
            problem.score([points[middle]], tasks)
            holds = problem.choose([points[middle]]).feasible
            low, high = (middle, high) if holds else (low, middle)
        choice = replace(problem.choose(), details={"num_tried": len(problem.tried)})
        if choice.feasible:
            choice = replace(choice, reason=f"{choice.reason}, by bisection")
        return problem.assuming_monotone(choice, list(problem.tried))
