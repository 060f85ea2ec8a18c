"""The input of a search strategy: a function that scores candidates, and the rule by which one of them is chosen."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning as L
import numpy as np

from tva.errors import some
from tva.evaluation.batch_cache import example_order
from tva.evaluation.bounds import slack as slack_of
from tva.evaluation.result import Evaluation
from tva.search.candidate import SCALING, Candidate
from tva.search.confidence import chains, lacking_power, leading, rising
from tva.search.goals import NORMALIZED, Constraint, Objective, Rule, Scores, score


@dataclass(frozen=True)
class Choice:
    """What a search chose.

    Attributes:
        candidate: The coefficients; the closest to feasible if none is.
        feasible: Whether a candidate other than no edit meets all constraints on the data it was chosen on.
        reason: One sentence for people.
        vector: The task vector to apply instead of the recipe's, where the search made one.
        details: What more there is to know, as JSON values.
    """

    candidate: Candidate
    feasible: bool
    reason: str
    vector: Any = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scaling_coef(self) -> float:
        """The coefficient of the whole recipe."""
        return self.candidate.scaling_coef


Evaluate = Callable[[Sequence[Candidate], Mapping[str, tuple[int, int]] | None, int | None], Any]


class Problem:
    """A choice to make: the goal, and a function that scores candidates on validation data.

    Args:
        evaluate: Function of candidates, a range of examples by task (None: all) and the seed of their order; returns
            one mapping from task to `Evaluation` per candidate.
        base: The base's evaluations on all validation examples.
        constraints: All must hold.
        objective: What the rule ``"best"`` makes large or small.
        rule: See `choose`.
        confidence: One-sided confidence that all constraints hold at the chosen coefficient, however many are tried;
            with None, their point estimates must hold. See `in_sequence` and `shared_among`.
        finetuned: Evaluations of the tasks' own fine-tuned models, where the objective is normalized.
        is_identity: Whether a candidate edits nothing.
        training_context: Makes what a strategy needs that trains; see `tva.search.learned`.
        trainer: Its processes all run the strategy, and must all evaluate the same candidates.

    Attributes:
        num_scored: Examples evaluated under a candidate so far, over all tasks: the forward passes spent.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        base: Mapping[str, Evaluation],
        constraints: Sequence[Constraint] = (),
        objective: Objective | None = None,
        rule: Rule = "best",
        confidence: float | None = None,
        finetuned: Mapping[str, Evaluation] | None = None,
        is_identity: Callable[[Candidate], bool] = lambda candidate: candidate.scaling_coef == 0,
        training_context: Callable[[], Any] | None = None,
        trainer: L.Trainer | None = None,
    ) -> None:
        self._evaluate = evaluate
        self.base = base
        self.constraints = list(constraints)
        self.objective = objective
        self.rule = rule
        self.confidence = confidence
        self.finetuned = dict(finetuned or {})
        self.is_identity = is_identity
        self.training_context = training_context
        self._trainer = trainer
        self.num_scored = 0
        self.tried: dict[Candidate, Scores] = {}
        self.slack: dict[tuple[Candidate, str], float] = {}
        self.scores: dict[Candidate, dict[tuple[str, str], np.ndarray]] = {}
        self.groups: dict[str, np.ndarray | None] = {}
        self.num_tests = 1
        self.sequences: list[list[Candidate]] = []
        self.power: list[str] = []

    @property
    def test_confidence(self) -> float | None:
        """The confidence with which one candidate is tested; 0.5 is the point estimate."""
        if self.confidence is None or self.confidence == 0.5:
            return self.confidence
        return 1 - (1 - self.confidence) / self.num_tests

    def in_sequence(self, candidates: Sequence[Candidate]) -> None:
        """Announce the candidates before they are scored: tested from the smallest edit on, up to the first that fails.

        So the confidence holds for whatever is chosen among them, at no cost while a larger edit does more damage.
        Where no edit at all does not meet the constraints, small edits do not either: then all share the confidence.
        """
        edits = [candidate for candidate in candidates if not self.is_identity(candidate)]
        if self.confidence is None or self.confidence == 0.5 or not edits:
            return
        if all(constraint.holds_at_base(self.base) for constraint in self.constraints):
            self.sequences = chains(edits)
        self.shared_among(len(self.sequences) or len(edits))

    def shared_among(self, num_tests: int) -> None:
        """Announce how many candidates are tested at most; each test gets its share of the error that is allowed.

        Where the examples do not suffice even for an edit that loses nothing, that is said here, before the search.
        """
        self.num_tests = max(1, num_tests)
        confidence = self.test_confidence
        if confidence is None or confidence == 0.5 or self.power:
            return
        self.power = lacking_power(self.constraints, self.base, confidence)
        if self.power and (self._trainer is None or self._trainer.is_global_zero):
            warnings.warn("; ".join(self.power)[0].upper() + "; ".join(self.power)[1:] + ".", stacklevel=3)

    def evaluate(
        self,
        candidates: Sequence[Candidate],
        ranges: Mapping[str, tuple[int, int]] | None = None,
        seed: int | None = None,
        tasks: Collection[str] | None = None,
    ) -> list[dict[str, Evaluation]]:
        """Evaluate candidates in one pass over the data of each task.

        Args:
            candidates: Any number.
            ranges: By task the first and last + 1 example, of an order that ``seed`` gives; all by default.
            seed: None is the data set's own order.
            tasks: Only these; by default all that objective and constraints name.
        """
        ranges = ranges or {task: (0, self.base[task].num_examples) for task in self.base}
        ranges = {task: window for task, window in ranges.items() if tasks is None or task in tasks}
        self.num_scored += len(candidates) * sum(stop - start for start, stop in ranges.values())
        return self._evaluate(candidates, ranges, seed)

    def once(self, make: Callable[[], Any]) -> Any:
        """Call a function in the first process only, and return its value in all."""
        if self._trainer is None:
            return make()
        return self._trainer.strategy.broadcast(make() if self._trainer.is_global_zero else None)

    def score(self, candidates: Sequence[Candidate], tasks: Collection[str] | None = None) -> None:
        """Evaluate candidates on all validation examples, so that `choose` can take one of them."""
        for candidate, found in zip(candidates, self.evaluate(candidates, tasks=tasks), strict=True):
            self.record(candidate, found, self.base)

    def record(
        self, candidate: Candidate, found: Mapping[str, Evaluation], base: Mapping[str, Evaluation]
    ) -> tuple[Scores, dict[str, float]]:
        """Note what a candidate scored, beside the base's scores on the same examples."""
        metrics: dict[str, dict[str, float]] = {task: dict(evaluation.metrics) for task, evaluation in found.items()}
        for task, metric in self.objective.terms if self.objective else ():
            if metric.startswith(NORMALIZED) and task in found:
                metrics[task][metric] = self._normalized(found[task], task, metric)
        needed, kept = {}, {}
        for constraint in self.constraints:
            if constraint.task not in found:
                continue
            edited = found[constraint.task]
            self.groups[constraint.task] = edited.groups
            if self.test_confidence is not None:
                needed[constraint.text] = constraint_slack(
                    constraint, edited, base[constraint.task], self.test_confidence
                )
            if constraint.metric in edited.scores:
                kept[constraint.task, constraint.metric] = edited.scores[constraint.metric]
        self.scores[candidate] = kept
        self.tried[candidate] = metrics
        self.slack |= {(candidate, text): value for text, value in needed.items()}
        return metrics, needed

    def _normalized(self, evaluation: Evaluation, task: str, metric: str) -> float:
        name = metric.removeprefix(NORMALIZED)
        value = score({task: evaluation.metrics}, task, name)
        own = score({task: self.finetuned[task].metrics}, task, name)
        if evaluation.higher(name):
            return value / own if own else math.nan
        return own / value if value else math.nan

    def weights(self) -> dict[str, tuple[str, float]]:
        """Return the objective as a sum: by task the metric and what one unit of it is worth, larger being better.

        Raises:
            ValueError: It is no sum of means over examples, so that candidates cannot be compared example by example.
        """
        assert self.objective is not None
        found: dict[str, tuple[str, float]] = {}
        for task, metric in self.objective.terms:
            name, divisor = metric.removeprefix(NORMALIZED), 1.0
            lacking = self.base[task].scores.keys().isdisjoint({name})
            if metric.startswith(NORMALIZED):
                divisor = self.finetuned[task].metrics[name]
                lacking |= not self.base[task].higher(name)
            if lacking or task in found:
                raise ValueError(
                    f"Candidates are compared example by example, which {self.objective.text!r} does not allow: the "
                    f"model's validation_step must return 'correct' for accuracy, or 'scores' with {name!r}. Use the "
                    f"Grid."
                )
            sign = 1.0 if self.objective.maximize else -1.0
            found[task] = (name, sign / len(self.objective.terms) / divisor)
        return found

    def choose(self, among: Iterable[Candidate] | None = None, base: Scores | None = None) -> Choice:
        """Choose among candidates that were scored, all on the same examples."""
        tried = self.tried if among is None else {candidate: self.tried[candidate] for candidate in among}
        before = {task: evaluation.metrics for task, evaluation in self.base.items()} if base is None else base
        choice = choose(
            tried, before, self.constraints, self.objective, self.rule, self.slack, self.is_identity, self.sequences
        )
        if choice.feasible or not self.power:
            return choice
        return replace(choice, reason="; ".join([choice.reason, *self.power]))

    def assuming_monotone(self, choice: Choice, points: Sequence[Candidate]) -> Choice:
        """Add to a choice that its search took the constraints to get only worse, and whether the points agree.

        Args:
            choice: Of ``points``.
            points: Evaluated on all examples.
        """
        against = rising(
            self.constraints, points, self.scores, self.groups, lambda point: self.choose([point]).feasible
        )
        how = "constraints are taken to get only worse as the coefficient grows"
        how += f", but {against}: take Grid" if against else ""
        details = {**choice.details, "monotone": against is None}
        return replace(choice, reason=f"{choice.reason} ({how})", details=details)


def constraint_slack(constraint: Constraint, edited: Evaluation, base: Evaluation, confidence: float) -> float:
    """Return by how much a constraint must hold to hold with the confidence asked for.

    Raises:
        ValueError: The metric is no mean of per-example scores.
    """
    if constraint.metric not in edited.scores or constraint.metric not in base.scores:
        raise ValueError(
            f"A confidence needs per-example scores, and there are none for {constraint.text!r}: the model's steps "
            f"must return 'correct' for accuracy, or 'scores' with {constraint.metric!r}; a function that evaluates "
            f"must return one number per example."
        )
    scores = edited.scores[constraint.metric], base.scores[constraint.metric]
    return slack_of(*scores, constraint.slope, confidence, constraint.above, groups=edited.groups)


def part_of(evaluation: Evaluation, size: int, seed: int | None) -> Evaluation:
    """Take the first examples of an order from an evaluation of all examples."""
    rows = example_order(evaluation.num_examples, seed)[:size].numpy()
    scores = {name: values[rows] for name, values in evaluation.scores.items()}
    metrics = {name: float(np.mean(values)) for name, values in scores.items()}
    groups = None if evaluation.groups is None else evaluation.groups[rows]
    return Evaluation(metrics, size, scores, evaluation.higher_is_better, groups=groups)


def joined(pieces: Sequence[Evaluation]) -> Evaluation:
    """Put evaluations of successive parts together; metrics that are no means of per-example scores are dropped."""
    scores = {name: np.concatenate([piece.scores[name] for piece in pieces]) for name in pieces[0].scores}
    metrics = {name: float(np.mean(values)) for name, values in scores.items()}
    parts = [piece.groups for piece in pieces if piece.groups is not None]
    groups = np.concatenate(parts) if len(parts) == len(pieces) else None
    count = sum(piece.num_examples for piece in pieces)
    return Evaluation(metrics, count, scores, pieces[0].higher_is_better, groups=groups)


def choose(
    tried: Mapping[Candidate, Scores],
    base: Scores,
    constraints: Collection[Constraint],
    objective: Objective | None,
    rule: Rule,
    slack: Mapping[tuple[Hashable, str], float] | None = None,
    is_identity: Callable[[Candidate], bool] = lambda candidate: candidate.scaling_coef == 0,
    sequences: Sequence[Sequence[Candidate]] = (),
) -> Choice:
    """Choose a candidate from those tried.

    Args:
        tried: Scores on validation data for each candidate.
        base: Scores of the base model on the same data.
        constraints: All must hold.
        objective: What the rule ``"best"`` makes large or small; ties go to the candidate nearest to no edit.
        rule: ``"largest"``, the paper's for forgetting: the coefficient farthest from no edit whose constraints hold.
            ``"best"``: the best objective among those.
        slack: By how much a constraint must hold to be believed, by (candidate, constraint's text); 0 where missing.
        is_identity: Whether a candidate edits nothing; such a one is never feasible, unless nothing else was tried.
        sequences: Where given, a candidate is feasible only if it and all before it in its sequence hold.

    Source: Ilharco et al., ICLR 2023, section 3: "the largest λ such that the control accuracy is at least 95% of the
    pre-trained model's"; the other rule is that of Ortiz-Jimenez et al., NeurIPS 2023.

    Example:
        >>> at = {c: Candidate.of(scaling_coef=c) for c in (0.0, 0.3, 0.6)}
        >>> scores = {at[c]: {"control": {"accuracy": 0.8 - 0.1 * c}} for c in at}
        >>> keep = Constraint.parse("control/accuracy >= 0.95 * base", tasks=["control"])
        >>> choose(scores, scores[at[0.0]], [keep], None, "largest").scaling_coef
        0.3
    """
    edits = [candidate for candidate in tried if not is_identity(candidate)] or list(tried)

    def needed(candidate: Candidate, constraint: Constraint) -> float:
        return (slack or {}).get((candidate, constraint.text), 0.0)

    hold = [c for c in edits if all(k.holds(tried[c], base, needed(c, k)) for k in constraints)]
    order = [[c for c in sequence if c in tried] for sequence in sequences]
    tested = leading(order, set(hold).__contains__) if sequences else set(hold)
    feasible = [c for c in hold if c in tested]
    beyond = [c for c in hold if c not in tested]
    held_too = (
        f"; they hold at {some(map(str, beyond))} too, but not at a smaller one, where tests end" if beyond else ""
    )
    if not feasible:
        failing = [c for c in edits if c not in hold]
        closest = min(failing, key=lambda c: sum(k.shortfall(tried[c], base, needed(c, k)) for k in constraints))
        missed = [k.text for k in constraints if not k.holds(tried[closest], base, needed(closest, k))]
        tally = f"none of the {len(edits)} coefficients tried meets" if len(edits) > 1 else "the coefficient misses"
        return Choice(closest, False, f"{tally} {some(missed)} on validation data; the closest is {closest}{held_too}")
    if rule == "largest":
        largest = max(feasible, key=lambda c: c.size)
        between = [c for c in edits if c not in hold and c.size < largest.size and _same_side(c, largest)]
        gap = f"; they fail at {some(map(str, between))} before it" if between else ""
        return Choice(
            largest, True, f"the largest coefficient whose constraints hold on validation data{gap}{held_too}"
        )
    if objective is None:
        raise ValueError("The rule 'best' needs an objective: pass minimize= or maximize=.")
    sign = -1.0 if objective.maximize else 1.0
    best = min(feasible, key=lambda c: (sign * objective.value(tried[c]), c.size))
    verb = "maximizes" if objective.maximize else "minimizes"
    held = " among those whose constraints hold" if constraints else ""
    return Choice(best, True, f"it {verb} {objective.text} on validation data{held}{held_too}")


def _same_side(one: Candidate, other: Candidate) -> bool:
    return all(a * b >= 0 for (_, a), (_, b) in zip(one.coefs, other.coefs, strict=True))


class Search:
    """Base class of strategies; a subclass has one method that is given a function to score candidates.

    A module in this folder adds its subclasses to ``tva.search``; so does an installed package by an entry point of the
    group ``tva.searches``; any other importable class is named by its path, ``class_path: my_package.Halves``.

    Example:
        >>> class Halves(Search):
        ...     "Try 1, ½, ¼ … of the range's end, and take the first that meets the constraints."
        ...
        ...     def run(self, problem):
        ...         (name, (low, high)) = next(iter(self.ranges.items()))
        ...         problem.shared_among(6)  # tests share the confidence, where there is one
        ...         for step in range(6):
        ...             candidate = Candidate.of(**{name: low + (high - low) / 2**step})
        ...             problem.score([candidate])
        ...             if problem.choose([candidate]).feasible:
        ...                 break
        ...         return problem.choose()

    Args:
        ranges: By coefficient the smallest and the largest value; ``scaling_coef`` is that of the whole recipe, which
            is 1 where others are searched and it is not named.
        shared: Give all of them the same value.
    """

    def __init__(self, ranges: Mapping[str, Sequence[float]] | None = None, shared: bool = False) -> None:
        self.ranges = {name: tuple(map(float, bounds)) for name, bounds in (ranges or {SCALING: (0.0, 1.0)}).items()}
        self.shared = shared
        odd = [name for name, bounds in self.ranges.items() if len(bounds) != 2 or not bounds[1] > bounds[0]]
        if odd:
            raise ValueError(
                f"A range must be two numbers, the smaller first; found {some(odd)}: {self.ranges[odd[0]]}."
            )

    def run(self, problem: Problem) -> Choice:
        """Choose the coefficients."""
        raise TypeError(f"{type(self).__name__} does not say which coefficients to try; use tva.search.Grid.")

    def axes(self, num: int) -> list[Candidate]:
        """Return evenly spaced candidates, ``num`` along each range, ends included, the smallest first."""
        # rounded, so that 0.15000000000000002 is printed and recorded as 0.15
        steps = {
            name: [round(low + (high - low) * step / (num - 1), 12) for step in range(num)]
            for name, (low, high) in self.ranges.items()
        }
        rows = zip(*steps.values(), strict=True) if self.shared else itertools.product(*steps.values())
        return [Candidate(tuple(zip(steps, row, strict=True))) for row in rows]
