"""The options of an edit, in one place, and the goal that they describe."""

from __future__ import annotations

import functools
import keyword
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from tva.checkpoints import NameFilter
from tva.compose.recipe import Recipe
from tva.edit.audit_options import Audit, Relearn, audit_of
from tva.edit.editor import Statistics
from tva.edit.subsets import Each, check_each
from tva.errors import some
from tva.evaluation.batch_cache import Place
from tva.evaluation.measures import as_tasks
from tva.report.front import check_front
from tva.search import NORMALIZED, SCALING, Constraint, Given, Grid, Objective, Rule, Search
from tva.vectors.task_vector import TaskVector

Baseline = Literal["gradient_ascent", "average", "endpoints", "joint", "ensemble", "random", "other_task", "parts"]
ANALOGY = re.compile(r"\s*analogy\(\s*(\w+)\s*,\s*(\w+)\s*,\s*(\w+)\s*\)\s*")
Diagnosis = Literal["cosine", "signs", "norms", "linearity", "disentanglement", "blame"]


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """All options of an edit, for `tva edit`, `edit_model` and `Trainer.edit`.

    Args:
        output: Folder for ``edit.json`` and ``report.html`` and, if the constraints hold, for ``edited.safetensors``
            and the model card ``README.md``.
        vectors: Mapping from names to task vector files, or to fine-tuned checkpoints, whose task vectors are then
            computed; from Python also to `TaskVector` in memory, or a list of any of these, named by their paths. A
            task of the same name is compared with its fine-tuned model.
        recipe: Expression of those names, such as ``-digits`` or ``analogy(a, b, c)``. Names that are not vectors are
            coefficients, with a value in ``coefs`` or a range in the search.
        targets: Data modules of the tasks that the edit means to change, by name; from Python also
            ``(val_loader, test_loader, metric)``, ``(datamodule, metric)``, or a function ``evaluate(model, split)``
            (see `tva.evaluation.measures`).
        controls: Data modules of the tasks that it must not change, in the same form.
        base: Checkpoint of the base model.
        coefs: Values of the coefficients in the recipe.
        scaling_coef: Coefficient of the whole recipe; by default it is searched.
        search: Search for the coefficients: ``Grid``, ``Bisect``, ``Race``, ``Optuna`` or ``Learned``; by default the
            paper's grid of 21 points from 0 to 1.
        rule: Choose the ``"largest"`` coefficient whose constraints hold, or the one with the ``"best"`` objective
            among those.
        minimize: Objective to minimize: ``TASK/METRIC``, ``mean(TASK/METRIC, …)`` or, over all targets,
            ``mean(METRIC)``. A metric is one that the model logs or, if its steps return ``preds`` and ``target``, the
            name of a multi-class metric of torchmetrics. The prefix ``normalized_`` divides it by that of the task's
            own fine-tuned model.
        maximize: Objective to maximize.
        subject_to: Constraints such as ``imagenet/accuracy >= 0.95 * base``.
        confidence: One-sided confidence, such as 0.95, with which constraints must hold on validation data, where the
            coefficient is chosen, and on test data. By default only their point estimates must hold.
        statistics: How to handle BatchNorm statistics: ``"keep"`` the base's, add their ``"delta"``, or
            ``"reestimate"`` them on 20 training batches of each target.
        random_seed: Seed of the random baseline, a vector with the same norm in every tensor, at the same coefficient;
            None leaves it out.
        baselines: What else to compare with: ``random``, ``other_task``, ``parts``, ``gradient_ascent``, ``average``,
            ``endpoints``, ``joint``, ``ensemble``.
        diagnostics: What else to analyze: ``cosine``, ``signs``, ``norms``, ``linearity``, ``disentanglement``,
            ``blame``.
        audits: Tests, on test data, of whether what was forgotten comes back: after a few training steps on each target
            (``relearn``), or when the weights are rounded to 8-bit integers (``int8``). Constraints can be set on
            ``TASK/relearn_METRIC`` and ``TASK/int8_METRIC``; ``base`` is then the base after the same audit.
        relearn: Training options of the audit ``relearn``.
        each: Also report all ``"pairs"`` or ``"subsets"`` of a sum's vectors, each with its own coefficient; the data
            is read once for all.
        joint: Checkpoint of one model that was fine-tuned on all tasks together, for the baseline ``"joint"``.
        engine: Where candidates are evaluated: ``local``, in this process; ``local:N``, in N processes on this machine;
            ``ray``, on a Ray cluster started on this machine; ``ray:ADDRESS``, on a running cluster. The numbers equal
            those of one process.
        front: A ``.csv`` or ``.json`` file for the Pareto front of each target against each control: the undominated
            coefficients of the search on validation data, with intervals. The page always marks them.
        log: JSON lines file of all evaluations, which the next run reuses; by default ``OUTPUT.evaluations.jsonl``.
        cache: Size of the cache of transformed batches between passes over the same data, such as ``2GiB``.
        cache_in: Where batches are cached: in ``"memory"``, on the ``"device"``, or memory-mapped on ``"disk"``.
        include: Regular expressions that are searched for in the names of tensors; only those found are edited.
        exclude: Regular expressions of names to leave out, of the model and of the vectors, such as ``^head[.]``; these
            tensors keep the model's weights, also when fine-tuned models are evaluated.
        key_map: Regular expressions to replacements, for vectors whose names differ from the model's by more than one
            prefix.
        format: Format of the weights: a folder that ``transformers``, ``sentence_transformers``, ``timm`` or
            ``open_clip`` loads, a ``lightning`` checkpoint, a plain ``state_dict``, or a folder that
            ``torch.distributed.checkpoint`` loads (``dcp``); by default that of the base.
        allow_other_base: Apply vectors to a base from which they were not taken.
        keep_undo: Also write ``edited.undo.safetensors``, from which ``tva revert`` restores the base bit for bit.
        allow_other_kind: Apply vectors of a linearized model (``tangent: true``) to an ordinary one, or vice versa.
        allow_shared_examples: Allow more than 5% of the test examples to be among those on which the coefficient was
            chosen.
    """

    output: str | os.PathLike[str]
    vectors: Mapping[str, str | os.PathLike[str]]
    recipe: str
    targets: dict[str, L.LightningDataModule] | None = None
    controls: dict[str, L.LightningDataModule] | None = None
    base: str | os.PathLike[str] | None = None
    coefs: dict[str, float] | None = None
    scaling_coef: float | None = None
    search: Search | None = None
    rule: Rule = "best"
    minimize: str | None = None
    maximize: str | None = None
    subject_to: list[str] | None = None
    confidence: float | None = None
    statistics: Statistics = "keep"
    random_seed: int | None = 0
    baselines: list[Baseline] | None = None
    diagnostics: list[Diagnosis] | None = None
    audits: list[Audit] | None = None
    relearn: Relearn | None = None
    each: Each | None = None
    joint: str | os.PathLike[str] | None = None
    engine: str = "local"
    front: str | os.PathLike[str] | None = None
    log: str | os.PathLike[str] | None = None
    cache: str = "1GiB"
    cache_in: Place = "memory"
    include: list[str] | str | None = None
    exclude: list[str] | str | None = None
    key_map: dict[str, str] | None = None
    format: (
        Literal["transformers", "sentence_transformers", "timm", "open_clip", "lightning", "state_dict", "dcp"] | None
    ) = None
    allow_other_base: bool = False
    keep_undo: bool = False
    allow_other_kind: bool = False
    allow_shared_examples: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", named_vectors(self.vectors))
        for name in ("targets", "controls"):
            object.__setattr__(self, name, as_tasks(getattr(self, name)))
        for name in ("base", "joint"):
            path = getattr(self, name)
            object.__setattr__(self, name, path if path is None else os.fspath(path))

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output)

    @property
    def log_file(self) -> str:
        """The file that evaluations are logged to."""
        return os.fspath(self.folder) + ".evaluations.jsonl" if self.log is None else os.fspath(self.log)

    @property
    def inputs(self) -> list[str | os.PathLike[str]]:
        """Paths of the checkpoints and vectors that are read."""
        return [
            path for path in (*self.vectors.values(), self.base, self.joint) if isinstance(path, (str, os.PathLike))
        ]

    @functools.cached_property
    def only(self) -> NameFilter:
        """Which names of tensors take part."""
        return NameFilter(self.include, self.exclude)

    @property
    def tasks(self) -> dict[str, L.LightningDataModule]:
        """The data modules of all tasks, targets first."""
        return {**(self.targets or {}), **(self.controls or {})}

    def checked(self) -> Goal:
        """Parse and check the options; only files that the recipe names are opened.

        Raises:
            ValueError: An option is wrong, or two options exclude each other.
            FileNotFoundError: A file that the recipe names is missing.
        """
        self._check_tasks()
        if self.front is not None:
            check_front(self.front, len(self.targets or {}), len(self.controls or {}))
        _ = self.only  # raises where a pattern cannot be used
        search = Given(self.scaling_coef) if self.scaling_coef is not None else self.search or Grid()
        starts = {name: bounds[0] for name, bounds in search.ranges.items() if name != SCALING}
        both = sorted(starts.keys() & (self.coefs or {}).keys())
        if both:
            raise ValueError(f"{some(both)} has a value in coefs and a range in the search; give one of them.")
        recipe = Recipe(self.recipe, self.vectors, {**(self.coefs or {}), **starts})
        unused = sorted(starts.keys() - recipe.coefs.keys())
        if unused:
            raise ValueError(
                f"The search has a range for {some(unused)}, which the recipe {self.recipe!r} does not use."
            )
        objective = self._objective()
        given = [Constraint.parse(text, self.tasks) for text in self.subject_to or []]
        audited = [constraint for constraint in given if audit_of(constraint.metric)]
        constraints = [constraint for constraint in given if constraint not in audited]
        goal = Goal(self, recipe, search, starts, objective, constraints, audited)
        if not goal.is_given:
            self._check_rule(objective, constraints)
        self._check_confidence(given)
        self._check_baselines(objective)
        self._check_audits(audited)
        if self.format == "dcp" and self.keep_undo:
            raise ValueError("An undo file restores safetensors, and format is 'dcp'. Leave keep_undo or format out.")
        if self.each is not None:
            check_each(self.recipe, search, self.targets or {})
        return goal

    def _check_tasks(self) -> None:
        twice = sorted((self.targets or {}).keys() & (self.controls or {}).keys())
        if twice:
            raise ValueError(f"A task is a target or a control, not both: {some(twice)}. Rename one of them.")
        if not self.tasks:
            raise ValueError("An edit must be shown to do something: give at least one task under targets.")

    def _objective(self) -> Objective | None:
        if self.minimize is not None and self.maximize is not None:
            raise ValueError(f"Give one objective: minimize={self.minimize!r} or maximize={self.maximize!r}.")
        text = self.minimize if self.maximize is None else self.maximize
        if text is None:
            return None
        maximize = self.maximize is not None
        objective = Objective.parse(text, maximize=maximize, targets=list(self.targets or {}), tasks=list(self.tasks))
        unknown = [task for task in objective.normalized if task not in self.vectors]
        audited = [metric for _, metric in objective.terms if audit_of(metric)]
        if audited:
            raise ValueError(
                f"The search does not run audits, so an objective cannot be on {some(audited)}. Put it in subject_to."
            )
        if unknown:
            raise ValueError(
                f"{objective.text} divides by each task's fine-tuned model, and {some(unknown)} has none: name its "
                f"task vector like the task under vectors."
            )
        return objective

    def _check_rule(self, objective: Objective | None, constraints: Sequence[Constraint]) -> None:
        if self.rule == "best" and objective is None:
            raise ValueError(
                "To search a coefficient, say what is best (minimize= or maximize=), or set rule='largest' with a "
                "constraint in subject_to, or give a scaling_coef."
            )
        if self.rule == "largest" and not constraints:
            raise ValueError("The rule 'largest' needs a constraint in subject_to: without one nothing limits it.")

    def _check_confidence(self, constraints: Sequence[Constraint]) -> None:
        if self.confidence is None:
            return
        if not 0.5 <= self.confidence < 1:
            raise ValueError(
                f"confidence must be in [0.5, 1), where 0.5 is the point estimate; found {self.confidence}."
            )
        for constraint in constraints:
            _ = constraint.slope  # raises where the bound is not linear in the base

    def _check_audits(self, audited: Sequence[Constraint]) -> None:
        asked = self.audits or []
        if self.relearn is not None and "relearn" not in asked:
            raise ValueError("relearn says how the audit 'relearn' trains: add it to audits, or drop relearn.")
        if "relearn" in asked:
            without = [
                name
                for name, task in (self.targets or {}).items()
                if getattr(task, "train_dataloader", None) is None or not is_overridden("train_dataloader", task)
            ]
            if without or not self.targets:
                raise ValueError(
                    f"The audit 'relearn' trains on the targets; {some(without) or 'there is no target, which'} has no "
                    f"training data (train_dataloader). Give a data module that has, or leave the audit out."
                )
        for constraint in audited:
            audit, _ = audit_of(constraint.metric) or ("", "")
            if audit not in asked:
                raise ValueError(
                    f"The constraint {constraint.text!r} is on the audit {audit!r}: add it, as in audits: [{audit}]."
                )
            if audit == "relearn" and constraint.task not in (self.targets or {}):
                raise ValueError(
                    f"The audit 'relearn' trains on targets, and the constraint {constraint.text!r} is on the control "
                    f"{constraint.task!r}. Put a target there: {some(self.targets or {})}."
                )

    def _check_baselines(self, objective: Objective | None) -> None:
        asked = self.baselines or []
        if "gradient_ascent" in asked and objective is None:
            raise ValueError("The baseline 'gradient_ascent' is stopped by an objective: give minimize= or maximize=.")
        if "parts" in asked and not ANALOGY.fullmatch(self.recipe):
            raise ValueError(
                f"The baseline 'parts' takes an analogy apart: the recipe must be analogy(a, b, c), with names of "
                f"vectors; found {self.recipe!r}."
            )
        if "other_task" in asked and not self.vectors.keys() - set(re.findall(r"\w+", self.recipe)):
            raise ValueError(
                f"The baseline 'other_task' needs a vector that the recipe does not use; {self.recipe!r} uses "
                f"{some(self.vectors)}. Give one more under vectors."
            )
        if ("joint" in asked) != (self.joint is not None):
            raise ValueError("The baseline 'joint' and the checkpoint joint= go together: give both or none.")


def named_vectors(given: Any) -> dict[str, str | TaskVector]:
    """Return vectors by name: paths as strings, vectors in memory unchanged.

    Args:
        given: A mapping from names; or a list of paths and `TaskVector`, or one, which get names from their paths and
            tasks.

    Raises:
        TypeError: One is neither a path nor a `TaskVector`.
        ValueError: Two get the same name.
    """
    if isinstance(given, (str, os.PathLike, TaskVector)):
        given = [given]
    if not isinstance(given, Mapping):
        named: dict[str, Any] = {}
        for place, vector in enumerate(given, start=1):
            name = _name_of(vector, f"vector{place}")
            if name in named:
                raise ValueError(
                    f"Two vectors would be called {name!r}. Give them names, as in "
                    f"vectors={{'a': {str(vector)[:60]!r}, …}}."
                )
            named[name] = vector
        given = named
    odd = [name for name, vector in given.items() if not isinstance(vector, (str, os.PathLike, TaskVector))]
    if odd:
        raise TypeError(
            f"A vector must be the path of a task vector file or of a fine-tuned checkpoint, or a TaskVector; "
            f"{some(odd)} is a {type(given[odd[0]]).__name__}. Of two models in memory take "
            f"TaskVector.between(base.state_dict(), finetuned.state_dict())."
        )
    return {name: vector if isinstance(vector, TaskVector) else os.fspath(vector) for name, vector in given.items()}


def _name_of(vector: Any, otherwise: str) -> str:
    """Name a vector by its task or its path's last part, as an identifier that a recipe can use."""
    if isinstance(vector, TaskVector):
        text = vector.origin.task or otherwise
    else:
        path = Path(os.fspath(vector))
        text = path.name.split(".")[0] if path.suffix in (".safetensors", ".ckpt", ".bin", ".pt", ".pth") else path.name
    name = re.sub(r"\W+", "_", text).strip("_")
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"v_{name}" if name else otherwise


@dataclass(frozen=True)
class Goal:
    """The options of an edit, parsed and checked.

    Attributes:
        options: The options it was parsed from.
        recipe: The recipe, each searched coefficient at the start of its range.
        search: Chooses the coefficients.
        starts: By coefficient that is searched, besides ``scaling_coef``, the start of its range.
        objective: What the rule ``"best"`` maximizes or minimizes.
        constraints: Constraints that must hold on validation data, where the coefficient is chosen, and on test data.
        audited: Constraints on audits, which must hold on test data.
    """

    options: EditOptions
    recipe: Recipe
    search: Search
    starts: Mapping[str, float]
    objective: Objective | None
    constraints: Sequence[Constraint]
    audited: Sequence[Constraint] = ()

    @property
    def is_given(self) -> bool:
        """Whether the coefficient is given rather than searched."""
        return isinstance(self.search, Given)

    @property
    def needed(self) -> list[str]:
        """The tasks that objective and constraints name."""
        named = [*(self.objective.tasks if self.objective else ()), *(c.task for c in self.constraints)]
        return list(dict.fromkeys(named))

    @functools.cached_property
    def metrics(self) -> dict[str, list[str]]:
        """Metrics by task that the objective and the constraints name; the reported one comes first."""
        found: dict[str, list[str]] = {}
        terms: Sequence[tuple[str, str]] = self.objective.terms if self.objective else ()
        named = [(task, metric.removeprefix(NORMALIZED)) for task, metric in terms]
        audited = [(c.task, parts[1]) for c in self.audited if (parts := audit_of(c.metric))]
        for task, metric in [*named, *((c.task, c.metric) for c in self.constraints), *audited]:
            found.setdefault(task, [])
            if metric not in found[task]:
                found[task].append(metric)
        return found

    def recipe_at(self, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe with other values of the searched coefficients."""
        coefs = {**(self.options.coefs or {}), **values}
        return Recipe(self.options.recipe, self.options.vectors, coefs)
