"""A finished edit, as its baselines and diagnostics see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import lightning as L

from tva.checkpoints import fingerprint
from tva.edit.editor import Bench, State
from tva.evaluation.result import Split
from tva.search import SCALING, Candidate, Constraint, Objective, Rule
from tva.vectors.task_vector import TaskVector


@dataclass(frozen=True)
class Finished:
    """An edit that was chosen, and what it was made from.

    Attributes:
        bench: Evaluates.
        state: The edited state.
        state_of: Makes the state of other coefficients.
        vectors: The recipe's task vectors by name.
        targets: Data modules of the tasks to change.
        controls: Data modules of the tasks to leave alone.
        constraints: On the edit.
        objective: Of the search.
        rule: Of the search.
        confidence: Of the constraints.
        metrics: The metric that is reported for each task.
        split: Split that is reported.
        joint: Checkpoint that was fine-tuned on all tasks together.
    """

    bench: Bench
    state: State
    state_of: Callable[[Candidate], State]
    vectors: Mapping[str, TaskVector]
    targets: Mapping[str, L.LightningDataModule]
    controls: Mapping[str, L.LightningDataModule]
    constraints: Sequence[Constraint]
    objective: Objective | None
    rule: Rule
    confidence: float | None
    metrics: Mapping[str, str]
    split: Split
    joint: str | None

    def moved(self, label: str, vector: TaskVector, coef: float = 1.0) -> State:
        """Make the state of the base moved along a vector, known by the vector's contents."""
        made = fingerprint({**vector.deltas, **vector.buffers}).digest
        return State(label, f"{label}, {made}", ((SCALING, coef),), lambda: vector, self.state.statistics)

    def rows(self, states: Sequence[State]) -> dict[str, dict[str, float]]:
        """Evaluate states on the split that is reported; give each one's reported metric by task."""
        results = self.bench(states, self.metrics, self.split)
        return {
            state.label: {task: found[task].metrics[metric] for task, metric in self.metrics.items()}
            for state, found in zip(states, results, strict=True)
        }
