"""An edit that was chosen and evaluated, as baselines, diagnostics and the report use it."""

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tva.checkpoints import fingerprint
from tva.edit.editor import EditState
from tva.edit.session import EditSession
from tva.evaluation.intervals import mean_ratio_interval
from tva.evaluation.measures import measures_of
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
        decided: By task of a constraint how many edits its test part has decided, this one included.
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
    decided: Mapping[str, int] = field(default_factory=dict)
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
        modules = self.session.editor.datamodules
        return {
            task: reported_metric(found["base"], named, task, measures_of(modules[task]))
            for task, found in self.evaluations.items()
        }

    def score(self, evaluation: Evaluation, metric: str) -> Score:
        """Return a metric of an evaluation with its interval."""
        return Score(evaluation.metrics[metric], *(evaluation.interval(metric) or (None, None)))

    def _over_finetuned(self, task: str) -> tuple[Evaluation, Evaluation] | None:
        """Return the evaluations whose ratio is the normalized score, the one above the line first."""
        found = self.evaluations[task]
        if "finetuned" not in found:
            return None
        pair = found["edited"], found["finetuned"]
        return pair if found["base"].higher(self.metrics[task]) else pair[::-1]

    def normalized_interval(self, task: str) -> dict[str, float | None]:
        """Return the ends of the interval of a task's normalized score, from the same examples of both models."""
        pair = self._over_finetuned(task)
        found = pair and pair[0].compare(pair[1], self.metrics[task])
        return {"normalized_low": found.ratio_low, "normalized_high": found.ratio_high} if found else {}

    def means(self) -> dict[str, dict[str, Any]]:
        """Return the mean of the targets' normalized scores with its interval, where there are two or more."""
        pairs = {task: self._over_finetuned(task) for task in self.session.options.targets or {}}
        known = {task: pair for task, pair in pairs.items() if pair is not None}
        scores, ratios = [], []
        for task, (above, below) in known.items():
            metric = self.metrics[task]
            if metric not in above.metrics or not below.metrics.get(metric):
                return {}
            ratios.append(above.metrics[metric] / below.metrics[metric])
            if metric in above.scores and metric in below.scores:
                scores.append((above.scores[metric], below.scores[metric], above.groups))
        if len(known) < 2:
            return {}
        low, high = (mean_ratio_interval(scores) if len(scores) == len(known) else None) or (None, None)
        return {"normalized": {"value": sum(ratios) / len(ratios), "low": low, "high": high, "tasks": list(known)}}

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


def reported_metric(
    evaluation: Evaluation, named: Mapping[str, Sequence[str]], task: str, own: Collection[str] = ()
) -> str:
    """Return the task's metric if one is named, else its own, else accuracy, else another task's, else the first.

    Args:
        evaluation: Of the base on the task.
        named: By task the metrics that objective and constraints name.
        task: The task.
        own: Names of the metrics that the task's data brings, which the model may log itself.
    """
    if task in named:
        return named[task][0]
    others = (metric for metrics in named.values() for metric in metrics)
    return next(
        metric
        for metric in (*own, *evaluation.computed, "accuracy", *others, *evaluation.metrics)
        if metric in evaluation.metrics
    )
