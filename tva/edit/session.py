"""What an edit works with: the model with its base's weights, the task vectors, and the evaluator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
from torch import Tensor

from tva.arithmetic import check_same
from tva.checkpoints import (
    NameFilter,
    canonical_state_dict,
    fingerprint,
    match_names,
    open_finetuned,
    open_weights,
)
from tva.edit.editor import Editor, EditState
from tva.edit.evaluator import Evaluator
from tva.edit.options import EditOptions, Goal
from tva.errors import MismatchError
from tva.evaluation.batch_cache import BatchCache
from tva.evaluation.log import EvaluationLog
from tva.evaluation.result import Evaluation
from tva.models.network import own_state
from tva.models.tangent import check_at_base
from tva.search import SCALING, Candidate, Problem
from tva.sizes import parse_bytes
from tva.vectors.header import Origin, is_vector_file
from tva.vectors.kind import KEY, check_kinds, kind_of
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
    """

    goal: Goal
    editor: Editor
    vectors: Mapping[str, TaskVector]
    evaluator: Evaluator
    kind: str | None

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
            found.check_base(self.editor.base, allow_other_base=self.options.allow_other_base)
            return found

        return vector_with

    def state_of(self, candidate: Candidate, label: str = "edited") -> EditState:
        """Return the state of the recipe at a candidate's coefficients."""
        values = tuple((name, value) for name, value in candidate.coefs if name != SCALING)
        recipe = self.goal.recipe
        coefs = {SCALING: candidate.scaling_coef, **recipe.coefs, **dict(values)}
        vector = functools.partial(self._vector_with, values)
        return EditState(label, recipe.text, tuple(coefs.items()), vector, self.options.statistics)

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
) -> EditSession:
    """Set the model to the base, load the task vectors, and check that they fit together.

    Args:
        trainer: Trainer that evaluates.
        model: The model to edit.
        goal: What the edit is asked to do.
        log: Keeps evaluations; by default the log that the options name.
        metrics: By task the metrics to compute where the model does not log them; by default those that the goal names.

    Raises:
        ValueError: Model, base and vectors do not fit together.
    """
    options = goal.options
    editor, kind = _open_editor(trainer, model, options)
    vectors = {name: load_vector(path, editor.base, options.only, model) for name, path in options.vectors.items()}
    options.only.check_used()
    if options.allow_other_kind:
        vectors = {name: vector.as_kind(kind) for name, vector in vectors.items()}
    for name, vector in vectors.items():
        check_kinds(
            {f"the vector {name}": vector.origin.kind, f"the model {type(model).__name__}": kind},
            "pass allow_other_kind if the other kind is meant",
        )
    log = EvaluationLog(options.log_file, trainer) if log is None else log
    cache = BatchCache(parse_bytes(options.cache), options.cache_in)
    evaluator = Evaluator(editor, vectors, log, cache, goal.metrics if metrics is None else metrics)
    session = EditSession(goal, editor, vectors, evaluator, kind)
    session.state_of(Candidate(tuple(goal.starts.items()))).vector()  # raises on any mismatch before evaluating
    return session


def _open_editor(trainer: L.Trainer, model: L.LightningModule, options: EditOptions) -> tuple[Editor, str | None]:
    """Put the base into the model; return what edits it, and the model's kind."""
    if any(hasattr(part, "peft_config") for part in model.modules()):
        raise ValueError(
            "An edit takes the plain model, and this one holds LoRA. Leave lora out of its options: the vectors that "
            "TaskVectorCallback writes of LoRA are dense, under the plain model's names."
        )
    if options.base is not None:
        weights = open_weights(options.base)
        live = canonical_state_dict(model.state_dict())
        kept, wanted = ({name: side[name] for name in options.only.kept(side)} for side in (live, weights))
        check_same(kept, wanted, "the model", f"the base {options.base}")
        for name, tensor in live.items():
            if name in wanted or (name in weights and weights[name].shape == tensor.shape):
                tensor.copy_(weights[name])
    kind = kind_of(model)
    check_at_base(model)
    return Editor(trainer, model, options.tasks, options.statistics, (options.targets or {}).values()), kind


ADVICE = (
    "Leave it out by exclude, or make a task vector file of it with tva extract, which has --key_map, and give that"
)


def load_vector(
    path: str | TaskVector, base: Mapping[str, Tensor], only: NameFilter, model: L.LightningModule | None = None
) -> TaskVector:
    """Load a task vector file, or take the vector of a fine-tuned checkpoint.

    Args:
        path: The file or folder, or a vector in memory.
        base: Weights of the base.
        only: Which names take part; the vector does not move the others.
        model: The model, whose library may know a folder in which names are others than in memory.
    """
    kept = only.kept(base)
    excluded = {name: "excluded" for name in base if not only.keeps(name)}
    if isinstance(path, TaskVector) or is_vector_file(path):
        vector = path if isinstance(path, TaskVector) else TaskVector.load(path)
        parts = (vector.deltas, vector.buffers, vector.untouched)
        deltas, buffers, untouched = ({name: part[name] for name in only.kept(part)} for part in parts)
        origin = vector.origin
    else:
        opened, kind = _open_finetuned(path, base, only, model)
        vector = TaskVector.between({name: base[name] for name in kept}, opened, origin=Origin(kind=kind))
        deltas, buffers, untouched, origin = vector.deltas, vector.buffers, vector.untouched, vector.origin
    if excluded and origin.base is not None:
        whole = fingerprint(base)
        if all(origin.base.tensors.get(name) == whole.tensors[name] for name in kept):
            origin = replace(origin, base=whole)  # what does not take part may be another
    return TaskVector(deltas, buffers, untouched | excluded, origin)


def _open_finetuned(
    path: str, base: Mapping[str, Tensor], only: NameFilter, model: L.LightningModule | None
) -> tuple[Mapping[str, Tensor], str | None]:
    """Return a fine-tuned model's weights under the base's names, and their kind."""
    try:
        opened = open_finetuned(path, base, only=only, advice=ADVICE)
    except MismatchError:
        state = None if model is None else own_state(model, path)
        if state is None:
            raise
        names = match_names(only.kept(state), only.kept(base)).names
        return {name: state[old] for name, old in names.items()}, None
    return opened, opened.metadata.get(KEY)
