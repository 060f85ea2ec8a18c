"""All pairs, or all subsets, of a sum's vectors as edits of their own, evaluated in shared passes over the data."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tva.compose.recipe import Recipe
from tva.edit.editor import MAX_VECTORS, EditState
from tva.edit.outcome import Outcome
from tva.edit.subsets import Each, Subset, subsets_of
from tva.evaluation.result import Evaluation
from tva.search import SCALING, Candidate, Choice, Given, Grid, Objective, Problem
from tva.vectors.task_vector import TaskVector


@dataclass(frozen=True)
class _Subsets:
    outcome: Outcome

    @functools.cached_property
    def vector(self) -> Callable[[Subset], TaskVector]:
        """Makes the sum of a subset; the last few are kept."""
        session = self.outcome.session

        @functools.lru_cache(maxsize=MAX_VECTORS)
        def vector(subset: Subset) -> TaskVector:
            return Recipe(" + ".join(subset), session.options.vectors, {}).evaluate(session.vectors)

        return vector

    def state(self, subset: Subset, candidate: Candidate) -> EditState:
        """Return a subset's sum times a coefficient, as an edit with that recipe has it."""
        text = " + ".join(subset)
        coefs = ((SCALING, candidate.scaling_coef),)
        make = functools.partial(self.vector, subset)
        return EditState(text, text, coefs, make, self.outcome.session.options.statistics, remake=True)


def run_each(outcome: Outcome, each: Each) -> dict[str, Any]:
    """Choose a coefficient for every pair or subset on validation data, and evaluate all on test data.

    For each subset the objective is taken over its own tasks. Batches are read once for all subsets and coefficients.

    Source: Ilharco et al., ICLR 2023, section 4 (pairs, and all subsets of eight tasks).
    """
    session, made = outcome.session, _Subsets(outcome)
    subsets = subsets_of(list(outcome.vectors), each)
    choices = _choose(outcome, made, subsets)
    tasks = list(session.options.tasks)
    feasible = [subset for subset in subsets if choices[subset].feasible]
    states = [made.state(subset, choices[subset].candidate) for subset in feasible]
    results = dict(zip(feasible, session.evaluator(states, tasks, "test"), strict=True))
    finetuned = session.evaluator.finetuned(list(outcome.vectors), "test")
    rows = {}
    for subset in subsets:
        found = results.get(subset)
        row: dict[str, float | None] = {"λ": choices[subset].scaling_coef if found else None}
        row |= {task: found[task].metrics[outcome.metrics[task]] if found else None for task in tasks}
        row["normalized"] = _normalized(outcome, subset, found, finetuned)
        row["normalized, all tasks"] = _normalized(outcome, tuple(outcome.vectors), found, finetuned)
        rows[" + ".join(subset)] = row
    left = len(subsets) - len(feasible)
    reason = f"no coefficient meets the constraints for {left} of {len(subsets)}" if left else ""
    return {"rows": rows, "reason": reason} if reason else {"rows": rows}


def _normalized(
    outcome: Outcome, tasks: Sequence[str], found: Mapping[str, Evaluation] | None, finetuned: Mapping[str, Evaluation]
) -> float | None:
    if found is None:
        return None
    ratios = []
    for task in tasks:
        metric, own = outcome.metrics[task], finetuned[task]
        above, below = found[task].metrics[metric], own.metrics[metric]
        if not own.higher(metric):
            above, below = below, above
        if not below:
            return None
        ratios.append(above / below)
    return sum(ratios) / len(ratios)


def _choose(outcome: Outcome, made: _Subsets, subsets: Sequence[Subset]) -> dict[Subset, Choice]:
    goal, evaluator = outcome.session.goal, outcome.session.evaluator
    search = goal.search
    if isinstance(search, Given):
        return dict.fromkeys(subsets, search.run())
    assert isinstance(search, Grid)
    problems = {subset: _problem(outcome, made, subset) for subset in subsets}
    for task in dict.fromkeys(task for problem in problems.values() for task in problem.base):
        states = [
            made.state(subset, candidate)
            for subset, problem in problems.items()
            if task in problem.base
            for candidate in search.candidates()
        ]
        evaluator(states, [task], "val")  # in one pass; what follows finds these evaluations
    return {subset: search.run(problem) for subset, problem in problems.items()}


def _problem(outcome: Outcome, made: _Subsets, subset: Subset) -> Problem:
    """Return the edit's own choice for a subset, with the objective over the subset's tasks."""
    goal = outcome.session.goal
    objective = goal.objective
    if objective is not None:
        terms = tuple(term for term in objective.terms if term[0] in subset)
        text = f"mean({', '.join('/'.join(term) for term in terms)})"
        objective = Objective(text, terms, objective.maximize) if terms else objective
    named = [*(objective.tasks if objective else ()), *(c.task for c in goal.constraints)]
    session = replace(outcome.session, goal=replace(goal, objective=objective))
    problem = session.problem(
        lambda candidates: [made.state(subset, candidate) for candidate in candidates],
        lambda candidate: candidate.scaling_coef == 0,
    )
    problem.base = {task: problem.base[task] for task in dict.fromkeys(named)}
    return problem
