"""An edit that was chosen and evaluated, as baselines, diagnostics and the report use it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tva.checkpoints import fingerprint
from tva.edit.editor import EditState
from tva.edit.session import EditSession
from tva.evaluation.result import Evaluation, Split
from tva.report.edit_report import ConstraintReport, Score
from tva.search import SCALING, Choice
from tva.vectors.task_vector import TaskVector


@dataclass(frozen=True)
class Outcome:
    """An edit that was chosen, and what it did.

    Attributes:
        session: What the edit works with.
        choice: The coefficients that the search chose.
        state: The edited state.
        split: The split that is reported: ``test``, or ``val`` where no coefficient was feasible.
        evaluations: By task the evaluations on that split: ``base``, ``edited``, and where known ``random`` and
            ``finetuned``.
        verdicts: Whether each constraint holds.
        shared: By task how many test examples the coefficient was chosen on, where there are any.
        baselines: Results of the baselines that were asked for.
        diagnostics: Results of the diagnostics that were asked for.
        audits: Results of the audits that were asked for.
    """

    session: EditSession
    choice: Choice
    state: EditState
    split: Split
    evaluations: Mapping[str, Mapping[str, Evaluation]]
    verdicts: Sequence[ConstraintReport]
    shared: Mapping[str, int] = field(default_factory=dict)
    baselines: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    audits: Mapping[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether the edited weights may be written."""
        return self.choice.feasible and all(verdict.holds for verdict in self.verdicts)

    @property
    def vectors(self) -> dict[str, TaskVector]:
        """The task vectors that the recipe names."""
        return self.session.recipe_vectors

    @functools.cached_property
    def metrics(self) -> dict[str, str]:
        """The metric that is reported, by task."""
        named = self.session.goal.metrics
        return {task: reported_metric(found["base"], named, task) for task, found in self.evaluations.items()}

    def score(self, evaluation: Evaluation, metric: str) -> Score:
        """Return a metric of an evaluation with its interval."""
        return Score(evaluation.metrics[metric], *(evaluation.interval(metric) or (None, None)))

    def moved(self, label: str, vector: TaskVector, coef: float = 1.0) -> EditState:
        """Return the state of the base moved along a vector, identified by the vector's contents."""
        made = fingerprint({**vector.deltas, **vector.buffers}).digest
        return EditState(label, f"{label}, {made}", ((SCALING, coef),), lambda: vector, self.state.statistics)

    def rows(self, states: Sequence[EditState]) -> dict[str, dict[str, float]]:
        """Evaluate states on the split that is reported; return each one's reported metric by task."""
        results = self.session.evaluator(states, self.metrics, self.split)
        return {
            state.label: {task: found[task].metrics[metric] for task, metric in self.metrics.items()}
            for state, found in zip(states, results, strict=True)
        }


def reported_metric(evaluation: Evaluation, named: Mapping[str, Sequence[str]], task: str) -> str:
    """Return the task's metric if one is named, else its own, else accuracy, else another task's, else the first.

    Args:
        evaluation: Of the base on the task.
        named: By task the metrics that objective and constraints name.
        task: The task.
    """
    if task in named:
        return named[task][0]
    others = (metric for metrics in named.values() for metric in metrics)
    return next(
        metric
        for metric in (*evaluation.computed, "accuracy", *others, *evaluation.metrics)
        if metric in evaluation.metrics
    )
