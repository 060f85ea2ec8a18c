"""What an edit works with: the model with its base's weights, the task vectors, and the evaluator."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L

from tva.checkpoints import canonical_state_dict, fingerprint
from tva.edit.editor import Editor, EditState
from tva.edit.evaluator import Evaluator
from tva.edit.form import Form
from tva.edit.opening import load_vector, open_base
from tva.edit.options import EditOptions, Goal
from tva.edit.sharded import ShardedModel
from tva.edit.sharded_editor import ShardedEditor
from tva.edit.sharded_vectors import is_template, load_part, open_sharded
from tva.evaluation.batch_cache import BatchCache
from tva.evaluation.log import EvaluationLog
from tva.evaluation.result import Evaluation
from tva.models.tangent import check_at_base
from tva.search import SCALING, Candidate, Problem
from tva.sizes import parse_bytes
from tva.vectors.kind import check_kinds, kind_of
from tva.vectors.task_vector import TaskVector


@dataclass(frozen=True)
class EditSession:
    """An opened edit, from which any state of the model can be made and evaluated.

    Attributes:
        goal: What the edit is asked to do.
        editor: Sets the model's weights.
        vectors: Task vectors by name.
        evaluator: Evaluates states.
        kind: The model's kind; see `tva.vectors.kind`.
        form: In which the edit is written.
    """

    goal: Goal
    editor: Editor
    vectors: Mapping[str, TaskVector]
    evaluator: Evaluator
    kind: str | None
    form: Form

    @functools.cached_property
    def left_out(self) -> list[str]:
        """The names of the model's tensors that take no part."""
        return [name for name in self.editor.base if not self.options.only.keeps(name)]

    @property
    def options(self) -> EditOptions:
        """The options of the edit."""
        return self.goal.options

    @property
    def recipe_vectors(self) -> dict[str, TaskVector]:
        """The task vectors that the recipe names."""
        return {name: self.vectors[name] for name in self.goal.recipe.vectors}

    @functools.cached_property
    def _vector_with(self) -> Callable[[tuple[tuple[str, Any], ...]], TaskVector]:
        @functools.lru_cache(maxsize=4)
        def vector_with(values: tuple[tuple[str, Any], ...]) -> TaskVector:
            found = self.goal.recipe_at(dict(values)).evaluate(self.vectors)
            self.editor.check_base(found, self.options.allow_other_base)
            return found

        return vector_with

    def state_of(self, candidate: Candidate, label: str = "edited") -> EditState:
        """Return the state of the recipe at a candidate's coefficients."""
        values = tuple((name, value) for name, value in candidate.coefs if name != SCALING)
        recipe = self.goal.recipe
        coefs = {SCALING: candidate.scaling_coef, **recipe.coefs, **dict(values)}
        vector = functools.partial(self._vector_with, values)
        coefs_then = tuple(coefs.items())
        return EditState(label, recipe.text, coefs_then, vector, self.options.statistics, candidate=candidate)

    def learned_state(self, vector: TaskVector) -> EditState:
        """Return the state of a learned vector, which is identified by its contents."""
        made = f"learned({self.goal.recipe.text}), {fingerprint(vector.deltas).digest}"
        coefs = ((SCALING, 1.0), *self.goal.recipe.coefs.items())
        return EditState("edited", made, coefs, lambda: vector, self.options.statistics)

    def problem(
        self,
        states: Callable[[Sequence[Candidate]], list[EditState]],
        is_identity: Callable[[Candidate], bool],
        training_context: Callable[[], Any] | None = None,
    ) -> Problem:
        """Return the choice to make on validation data.

        Args:
            states: Returns the states of candidates.
            is_identity: Whether a candidate edits nothing.
            training_context: Makes what a search needs that trains.
        """
        goal, options = self.goal, self.options

        def evaluate(candidates: Sequence[Candidate], ranges: Any, seed: int | None) -> list[dict[str, Evaluation]]:
            return self.evaluator(states(candidates), ranges, "val", ranges, seed)

        return Problem(
            evaluate,
            {task: self.evaluator.base(task, "val") for task in goal.needed or options.targets or {}},
            goal.constraints,
            goal.objective,
            options.rule,
            options.confidence,
            self.evaluator.finetuned(goal.objective.normalized, "val") if goal.objective else {},
            is_identity,
            training_context,
            self.editor.trainer,
        )


def open_session(
    trainer: L.Trainer,
    model: L.LightningModule,
    goal: Goal,
    log: EvaluationLog | None = None,
    metrics: Mapping[str, Sequence[str]] | None = None,
    form: Form | None = None,
    sharded: ShardedModel | None = None,
) -> EditSession:
    """Set the model to the base, load the task vectors, and check that they fit together.

    Args:
        trainer: Trainer that evaluates.
        model: The model to edit.
        goal: What the edit is asked to do.
        log: Keeps evaluations; by default the log that the options name.
        metrics: By task the metrics to compute where the model does not log them; by default those that the goal names.
        form: In which the edit is written; by default as the options say.
        sharded: The model, where each process holds a part of every weight.

    Raises:
        ValueError: Model, base and vectors do not fit together.
    """
    options = goal.options
    if sharded is not None:
        editor, kind = open_sharded(sharded, options), None
        vectors = {name: load_part(str(path), editor, options) for name, path in options.vectors.items()}
    else:
        editor, kind = _open_editor(trainer, model, options)
        vectors = {name: load_vector(path, model, editor.base, options) for name, path in options.vectors.items()}
    options.only.check_used()
    if options.allow_other_kind:
        vectors = {name: vector.as_kind(kind) for name, vector in vectors.items()}
    for name, vector in vectors.items():
        check_kinds(
            {f"the vector {name}": vector.origin.kind, f"the model {type(model).__name__}": kind},
            "pass allow_other_kind if the other kind is meant",
        )
    log = EvaluationLog(options.log_file, trainer) if log is None else log
    cache = BatchCache(parse_bytes(options.cache, "cache"), options.cache_in)
    evaluator = Evaluator(editor, vectors, log, cache, goal.metrics if metrics is None else metrics)
    form = form or Form.of(model, options.base, options.format)
    if isinstance(editor, ShardedEditor):
        form.known_base = is_template(editor, form)
        _ = evaluator.facts  # for which every process is needed
    session = EditSession(goal, editor, vectors, evaluator, kind, form)
    session.state_of(Candidate(tuple(goal.starts.items()))).vector()  # raises on any mismatch before evaluating
    return session


def _open_editor(trainer: L.Trainer, model: L.LightningModule, options: EditOptions) -> tuple[Editor, str | None]:
    if any(hasattr(part, "peft_config") for part in model.modules()):
        raise ValueError(
            "An edit takes the plain model, and this one holds LoRA. Leave lora out of its options: the vectors that "
            "TaskVectorCallback writes of LoRA are dense, under the plain model's names."
        )
    if options.base is not None:
        live = canonical_state_dict(model.state_dict())
        weights = open_base(options.base, model, live, options)
        for name, tensor in live.items():
            if name in weights:
                tensor.copy_(weights[name])
    kind = kind_of(model)
    check_at_base(model)
    return Editor(trainer, model, options.tasks, options.statistics, (options.targets or {}).values()), kind
