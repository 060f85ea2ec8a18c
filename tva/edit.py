"""One edit from end to end: compose task vectors, choose the coefficient, apply it, prove it on test data, write it."""

from __future__ import annotations

import itertools
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from tva.console import progress
from tva.recipe import Recipe
from tva.report import ConstraintReport, EditReport, Score, TaskReport, write_report
from tva.search import NORMALIZED, Choice, Constraint, Grid, Objective, Rule, Scores, Search, choose, score
from tva.state_dict import check_same, some
from tva.task_vector import TaskVector, is_vector_file
from tva.validate import Evaluation, Split, evaluate, paired_slack
from tva.version import __version__
from tva.weights import canonical_state_dict, open_finetuned, open_weights

Statistics = Literal["keep", "delta", "reestimate"]


class Editor:
    """A model in memory whose weights are set to ``base + λ · vector``, always from the base.

    Args:
        trainer: Trainer that evaluates.
        model: Any LightningModule; its present weights are the base.
        datamodules: The tasks by name.
        statistics: What becomes of BatchNorm statistics; see `run_edit`.
        reestimate_with: Data modules whose training images statistics are estimated from.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        datamodules: Mapping[str, L.LightningDataModule],
        statistics: Statistics = "keep",
        reestimate_with: Iterable[L.LightningDataModule] = (),
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.datamodules = datamodules
        self.statistics = statistics
        self.reestimate_with = list(reestimate_with)
        self.base: dict[str, Tensor] = {
            name: tensor.detach().clone() for name, tensor in canonical_state_dict(model.state_dict()).items()
        }

    def set(self, vector: TaskVector | None, scaling_coef: float, statistics: Statistics | None = None) -> None:
        """Set the model to ``base + scaling_coef * vector``; without a vector, to the base."""
        statistics = statistics or self.statistics
        live = canonical_state_dict(self.model.state_dict())
        for name, tensor in live.items():
            tensor.copy_(self.base[name])
        if vector is not None:
            vector.write_into(live, self.base, scaling_coef, buffers="delta" if statistics == "delta" else "keep")
            if statistics == "reestimate" and scaling_coef != 0:
                self._reestimate()

    def _reestimate(self, num_batches: int = 20) -> None:
        from torch.optim.swa_utils import update_bn

        def images() -> Iterator[Tensor]:
            for datamodule in self.reestimate_with:
                datamodule.trainer = self.trainer  # it may not have been evaluated yet, or on another stage alone
                datamodule.prepare_data()
                datamodule.setup("fit")
                for batch_images, _ in itertools.islice(datamodule.train_dataloader(), num_batches):
                    yield batch_images

        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same images each time, so that what is written is what was evaluated
            update_bn(images(), self.model)

    def evaluate(self, task: str, split: Split) -> Evaluation:
        """Evaluate the model as it is set."""
        return evaluate(self.trainer, self.model, self.datamodules[task], split)


class _Scored:
    """Evaluations made so far, so that none is made twice and all are recorded.

    Args:
        editor: Sets and evaluates the model.
        vectors: Task vectors of tasks whose fine-tuned model is known.
    """

    def __init__(self, editor: Editor, vectors: Mapping[str, TaskVector]) -> None:
        self.editor = editor
        self.vectors = vectors
        self.log: list[dict[str, Any]] = []
        self._known: dict[tuple[str, float, str, Split], Evaluation] = {}

    def __call__(
        self, label: str, vector: TaskVector | None, coef: float, tasks: Iterable[str], split: Split
    ) -> dict[str, Evaluation]:
        """Evaluate ``base + coef * vector`` on some tasks; ``label`` names the vector in the log."""
        if coef == 0:
            label, vector = "base", None
        missing = [task for task in tasks if (label, coef, task, split) not in self._known]
        if missing:
            # A fine-tuned model is its whole self, statistics included.
            self.editor.set(vector, coef, "delta" if label.startswith("fine-tuned") else None)
        for task in missing:
            evaluation = self.editor.evaluate(task, split)
            self._known[label, coef, task, split] = evaluation
            self.log += [
                {
                    "model": label,
                    "coefficients": {"scaling_coef": coef},
                    "task": task,
                    "split": split,
                    "num_examples": evaluation.num_examples,
                    "metric": metric,
                    "value": value,
                }
                for metric, value in evaluation.metrics.items()
            ]
        return {task: self._known[label, coef, task, split] for task in tasks}

    def finetuned(self, task: str, split: Split) -> Evaluation:
        """Evaluate the model that was fine-tuned on a task on that task."""
        return self(f"fine-tuned on {task}", self.vectors[task], 1.0, [task], split)[task]

    def report(
        self, task: str, role: Literal["target", "control"], split: Split, metric: str | None, coef: float
    ) -> TaskReport:
        """Collect what is known of a task at a coefficient.

        The metric is accuracy unless an objective or a constraint names another.
        """
        by_label = {
            label: evaluation
            for (label, tried, of, on), evaluation in self._known.items()
            if (of, on) == (task, split) and tried in (0, coef)
        }
        scores = {"base": by_label["base"], "edited": by_label.get("edited", by_label["base"])}
        if task in self.vectors:
            scores["finetuned"] = self.finetuned(task, split)
        if "random" in by_label:
            scores["random"] = by_label["random"]
        metrics = scores["base"].metrics
        metric = metric or next(m for m in ("accuracy", *metrics) if m in metrics)
        return TaskReport(
            role=role,
            split=split,
            metric=metric,
            num_examples=scores["base"].num_examples,
            scores={
                label: Score(evaluation.metrics[metric], *(evaluation.interval(metric) or (None, None)))
                for label, evaluation in scores.items()
            },
        )


def run_edit(
    trainer: L.Trainer,
    model: L.LightningModule,
    *,
    vectors: dict[str, str],
    recipe: str,
    output: str,
    targets: dict[str, L.LightningDataModule] | None = None,
    controls: dict[str, L.LightningDataModule] | None = None,
    base: str | None = None,
    coefs: dict[str, float] | None = None,
    scaling_coef: float | None = None,
    search: Search | None = None,
    rule: Rule = "best",
    minimize: str | None = None,
    maximize: str | None = None,
    subject_to: list[str] | None = None,
    confidence: float | None = None,
    statistics: Statistics = "keep",
    random_seed: int | None = 0,
    allow_other_base: bool = False,
) -> EditReport:
    """Edit a model, validate the edit on control tasks, and write it if the constraints hold.

    The coefficient is chosen on validation data; what is reported, and what decides, is test data.

    Args:
        trainer: Any Trainer.
        model: Any LightningModule with validation and test steps; its weights are the base unless ``base`` is given.
            Left with the edited weights.
        vectors: Names to task vector files, or to fine-tuned checkpoints whose task vector is taken here. A task of the
            same name is compared with its fine-tuned model.
        recipe: Expression of those names, such as ``-digits`` or ``analogy(a, b, c)``.
        output: Folder for ``edited.safetensors`` and ``edit.json``.
        targets: Data modules of the tasks that the edit means to change, by name.
        controls: Data modules of the tasks that it must leave alone.
        base: Checkpoint of the base model.
        coefs: Values of the coefficients in the recipe.
        scaling_coef: Coefficient of the whole recipe; by default it is searched.
        search: Which coefficients to try; by default the paper's 21 points from 0 to 1.
        rule: ``"largest"`` coefficient whose constraints hold, or the ``"best"`` objective among those.
        minimize: Objective to make small: ``TASK/METRIC``, ``mean(TASK/METRIC, …)`` or, over all targets,
            ``mean(METRIC)``.
        maximize: Objective to make large.
        subject_to: Constraints such as ``imagenet/accuracy >= 0.95 * base``.
        confidence: In the search a constraint must hold with this one-sided confidence, such as 0.95, on validation
            data; by default its point estimate must. What decides on test data is the point estimate.
        statistics: BatchNorm statistics: ``"keep"`` the base's, add their ``"delta"``, or ``"reestimate"`` them on 20
            training batches of each target.
        random_seed: Seed of the baseline, a random vector of the same norm per tensor at the same coefficient; None
            leaves it out.
        allow_other_base: Apply vectors to a base they were not taken from.

    Returns:
        The report, also printed by the command line. ``report.holds`` is the verdict.

    Raises:
        ValueError: Something does not fit; nothing was written.
        FileNotFoundError: A checkpoint or data file is not there.
    """
    targets, controls = dict(targets or {}), dict(controls or {})
    twice = sorted(targets.keys() & controls.keys())
    if twice:
        raise ValueError(f"A task is a target or a control, not both: {some(twice)}. Rename one of them.")
    tasks = {**targets, **controls}
    if not tasks:
        raise ValueError("An edit must be shown to do something: give at least one data module under targets.")
    checked = Recipe(recipe, vectors, coefs)
    constraints = [Constraint.parse(text, tasks) for text in subject_to or []]
    objective = _objective(minimize, maximize, targets, tasks)
    if scaling_coef is None:
        _check_search(rule, objective, constraints, confidence)
    unknown = [task for task in objective.normalized if task not in vectors] if objective else []
    if unknown:
        raise ValueError(
            f"{objective.text} divides by each task's fine-tuned model, and {some(unknown)} has none: name its task "
            f"vector like the task under vectors."
        )

    if base is not None:
        weights = open_weights(base)
        check_same(canonical_state_dict(model.state_dict()), weights, "the model", f"the base {base}")
        for name, tensor in canonical_state_dict(model.state_dict()).items():
            tensor.copy_(weights[name])
    editor = Editor(trainer, model, tasks, statistics, targets.values())
    loaded = {name: _load_vector(path, editor.base) for name, path in vectors.items()}
    vector = checked.evaluate(loaded)
    vector.check_base(editor.base, allow_other_base=allow_other_base)
    scored = _Scored(editor, {task: loaded[task] for task in tasks if task in loaded})

    if scaling_coef is None:
        choice = _search(scored, vector, search or Grid(), constraints, objective, rule, confidence)
    else:
        choice = Choice(scaling_coef, True, "it was given")
    coef, split = choice.scaling_coef, "test" if choice.feasible else "val"
    random = None if random_seed is None else vector.random_like(random_seed)
    base_scores = scored("base", None, 0.0, tasks, split)
    edited_scores = scored("edited", vector, coef, tasks, split)
    if choice.feasible and random is not None:
        scored("random", random, coef, tasks, split)
    before, after = _metrics(base_scores), _metrics(edited_scores)
    verdicts = [
        ConstraintReport(c.text, c.task, score(after, c.task, c.metric), c.bound(before), c.holds(after, before))
        for c in constraints
    ]
    mentioned = {c.task: c.metric for c in constraints}
    if objective:
        mentioned |= {task: metric for task, metric in objective.terms if metric != NORMALIZED}
    origin = vector.origin.base
    report = EditReport(
        recipe=checked.text,
        coefficients={"scaling_coef": coef, **checked.coefs},
        reason=choice.reason,
        base={"path": base, "fingerprint": origin.digest if origin else None},
        vectors={
            name: {"path": os.fspath(path), "fingerprint": loaded[name].origin.finetuned, "norm": loaded[name].norm()}
            for name, path in vectors.items()
        },
        rule="given" if scaling_coef is not None else rule,
        objective=objective.text if objective else None,
        confidence=confidence,
        statistics=statistics,
        random_seed=random_seed,
        tasks={
            task: scored.report(task, "target" if task in targets else "control", split, mentioned.get(task), coef)
            for task in tasks
        },
        constraints=verdicts,
        holds=choice.feasible and all(verdict.holds for verdict in verdicts),
        evaluations=scored.log,
        versions={
            "tva": __version__,
            **{name: version(name) for name in ("torch", "lightning")},
            "python": platform.python_version(),
        },
        seed=int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
        command=shlex.join(["tva", *sys.argv[1:]]),
    )
    editor.set(vector, coef)
    edited = canonical_state_dict(model.state_dict())
    vector.check_effect(edited, editor.base, coef)
    if choice.feasible and trainer.is_global_zero:
        write_report(report, Path(output), edited if report.holds else None)
    return report


def _metrics(evaluations: Mapping[str, Evaluation]) -> dict[str, Mapping[str, float]]:
    return {task: evaluation.metrics for task, evaluation in evaluations.items()}


def _search(
    scored: _Scored,
    vector: TaskVector,
    search: Search,
    constraints: list[Constraint],
    objective: Objective | None,
    rule: Rule,
    confidence: float | None,
) -> Choice:
    """Evaluate every coefficient on validation data, on the tasks that objective and constraints name and no other."""
    needed = list(dict.fromkeys([*(objective.tasks if objective else ()), *(c.task for c in constraints)]))
    base = scored("base", None, 0.0, needed, "val")
    normalized = objective.normalized if objective else []
    divisors = {task: scored.finetuned(task, "val").metrics["accuracy"] for task in normalized}
    tried: dict[float, Scores] = {}
    slack: dict[tuple[float, str], float] = {}
    for coef in progress(search.coefficients(), "searching the coefficient"):
        evaluations = scored("edited", vector, coef, needed, "val")
        if confidence is not None:
            slack |= {
                (coef, c.text): paired_slack(evaluations[c.task], base[c.task], c.slope, confidence)
                for c in constraints
            }
        metrics = _metrics(evaluations)
        tried[coef] = {
            task: {**values, NORMALIZED: values["accuracy"] / divisors[task]} if task in divisors else values
            for task, values in metrics.items()
        }
    return choose(tried, _metrics(base), constraints, objective, rule, slack)


def _check_search(
    rule: Rule, objective: Objective | None, constraints: list[Constraint], confidence: float | None
) -> None:
    if rule == "best" and objective is None:
        raise ValueError(
            "To search a coefficient, say what is best (minimize= or maximize=), or set rule='largest' with a "
            "constraint in subject_to, or give a scaling_coef."
        )
    if rule == "largest" and not constraints:
        raise ValueError("The rule 'largest' needs a constraint in subject_to: without one the largest is unlimited.")
    if confidence is not None and not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must lie in [0.5, 1), where 0.5 is the point estimate; found {confidence}.")
    odd = [c.text for c in constraints if confidence is not None and c.metric != "accuracy"]
    if odd:
        raise ValueError(f"confidence needs constraints on accuracy, whose examples can be paired; found {some(odd)}.")


def _objective(
    minimize: str | None, maximize: str | None, targets: Mapping[str, Any], tasks: Mapping[str, Any]
) -> Objective | None:
    if minimize is not None and maximize is not None:
        raise ValueError(f"Give one objective: minimize={minimize!r} or maximize={maximize!r}.")
    text = minimize if maximize is None else maximize
    if text is None:
        return None
    return Objective.parse(text, maximize=maximize is not None, targets=list(targets), tasks=list(tasks))


def _load_vector(path: str, base: Mapping[str, Tensor]) -> TaskVector:
    return TaskVector.load(path) if is_vector_file(path) else TaskVector.between(base, open_finetuned(path, base))
