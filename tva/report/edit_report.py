"""The report of an edit as an object and as ``edit.json``."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tva.checkpoints import find
from tva.checkpoints.foreign import ForeignFileError, read_json
from tva.console import in_notebook
from tva.errors import some
from tva.report.export import Table, table_rows
from tva.report.run_files import EDIT_JSON
from tva.report.schema import problems
from tva.report.series import formula, number
from tva.report.terminal import print_report


@dataclass(frozen=True)
class Score:
    """One number with its 95% interval, where one is known.

    Attributes:
        value: The metric's value.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """An edited model against the base on the same examples.

    Attributes:
        difference: Edited minus base.
        difference_low: Lower end of its 95% interval; None where none is known that covers.
        difference_high: Upper end.
        ratio: Edited divided by base; None where the base is 0.
        ratio_low: Lower end of its 95% interval; None where the base is so near 0 that it has none, or none is known.
        ratio_high: Upper end, likewise.
        p_value: Two-sided, of "nothing changed": McNemar's exact test where scores are right or wrong, else Student's
            paired t; None where the metric is not a mean of per-example scores.
    """

    difference: float
    difference_low: float | None
    difference_high: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    p_value: float | None


@dataclass(frozen=True)
class TaskReport:
    """What an edit did to one task.

    Attributes:
        role: Whether the edit meant to change it.
        split: Split that the scores are from.
        metric: The metric's name.
        higher_is_better: Its direction.
        num_examples: Examples evaluated; 0 where a function returned one number of all of them.
        scores: ``base`` and ``edited``, and where known ``finetuned`` and ``random``.
        comparison: The edited model against the base, example by example, where examples are known.
        chance: The accuracy that the edited model's predictions would have if they did not depend on the input, where
            the metric is the accuracy and predictions and labels are known.
        revision: Commit of the hub's repository that the data was read from; None of local data.
        num_groups: Groups of examples, where these and not examples are the unit of intervals and tests.
        settings: What the task's numbers depend on besides its examples, such as how texts are sampled.
        normalized_low: Lower end of the 95% interval of ``normalized``, where one is known.
        normalized_high: Upper end.
    """

    role: Literal["target", "control"]
    split: str
    metric: str
    higher_is_better: bool
    num_examples: int
    scores: Mapping[str, Score]
    comparison: Comparison | None
    chance: float | None = None
    revision: str | None = None
    num_groups: int | None = None
    settings: Mapping[str, Any] | None = None
    normalized_low: float | None = None
    normalized_high: float | None = None

    @property
    def below_chance(self) -> bool:
        """Whether the edited model is worse than chance, beyond its interval: what it knew is inverted, not gone."""
        high = self.scores["edited"].high
        return self.chance is not None and high is not None and high < self.chance

    @property
    def normalized(self) -> float | None:
        """The edited model's score divided by that of the task's own fine-tuned model; the inverse for losses."""
        if "finetuned" not in self.scores:
            return None
        above, below = self.scores["edited"].value, self.scores["finetuned"].value
        if not self.higher_is_better:
            above, below = below, above
        return above / below if below else None


@dataclass(frozen=True)
class ConstraintReport:
    """A constraint on the split that is reported.

    Attributes:
        text: As the user wrote it.
        task: The task that it is on.
        value: The edited model's metric.
        bound: What it is compared with.
        limit: The value's one-sided confidence limit, where a confidence is asked for; it decides then.
        holds: Whether it holds.
        metric: The metric that it is on.
        above: Whether the metric must be above the bound.
        val_bound: The bound on validation data, where the coefficient was chosen there.
        needed: Examples (or groups) with which an edit that loses nothing is shown to hold, where a confidence is asked
            for and it is known.
        allowed_loss: The largest loss on the reported examples at which an edit that gains nothing is still shown to
            hold, likewise.
    """

    text: str
    task: str
    value: float
    bound: float
    limit: float | None
    holds: bool
    metric: str
    above: bool
    val_bound: float | None
    needed: int | None = None
    allowed_loss: float | None = None

    @property
    def compared(self) -> str:
        """Return what its bound is compared with."""
        limit = "" if self.limit is None else f", at the confidence limit {self.limit:.4g}"
        return f"{self.value:.4g}{limit}"


@dataclass(frozen=True, repr=False)
class EditReport:
    """All that is known of one edit; the attributes are the keys of ``edit.json``."""

    recipe: str
    coefficients: Mapping[str, float]
    reason: str
    base: Mapping[str, Any]
    vectors: Mapping[str, Mapping[str, Any]]
    rule: str
    objective: str | None
    confidence: float | None
    statistics: str
    random_seed: int | None
    tasks: Mapping[str, TaskReport]
    constraints: Sequence[ConstraintReport]
    holds: bool
    sizes: Mapping[str, Mapping[str, int]]
    search: Mapping[str, Any]
    baselines: Mapping[str, Any]
    diagnostics: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]
    seed: int | None
    command: str
    model: str
    precision: str
    data: Mapping[str, Mapping[str, str | None]]
    edited: Mapping[str, Any] | None
    created: str
    kind: str | None = None
    names: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    audits: Mapping[str, Any] = field(default_factory=dict)
    means: Mapping[str, Any] = field(default_factory=dict)

    @property
    def split(self) -> str:
        """The split reported: ``test``, or ``val`` when no coefficient was feasible."""
        return next(iter(self.tasks.values())).split

    @property
    def verdict(self) -> str:
        """One sentence: whether the constraints hold, and on which data; another if a score has no interval."""
        single = [name for name, task in self.tasks.items() if task.num_examples == 0]
        without = f"; {some(single)}: one number, for which no interval is claimed" if single else ""
        return self._verdict + without

    @property
    def _verdict(self) -> str:
        if self.split == "val":
            return f"NO EDIT: {self.reason}. No weights were written."
        failing = [constraint for constraint in self.constraints if not constraint.holds]
        if failing:
            details = "; ".join(f"{c.text}: {c.compared} against {c.bound:.4g}" for c in failing)
            return f"FAILS on test data: {details}. The edited weights were not written."
        sure = f" with {self.confidence:.0%} confidence" if self.confidence is not None else ""
        return f"all constraints hold on test data{sure}" if self.constraints else "no constraint was set"

    def __repr__(self) -> str:
        changes = [
            " → ".join(number(task.scores[label].value, task.metric) for label in ("base", "edited"))
            for task in self.tasks.values()
        ]
        said = ", ".join(f"{name} {change}" for name, change in zip(self.tasks, changes, strict=True))
        return f"EditReport({formula(vars(self))}; {'holds' if self.holds else 'refused'}; on {self.split} data {said})"

    def _repr_html_(self) -> str:
        """Show it in a notebook: formula, verdict, the table before and after, the curve of the search."""
        from tva.report.notebook import edit_cell

        return edit_cell(self.to_json())

    def show(self) -> None:
        """Show it: in a notebook as a page, elsewhere as a table in the terminal."""
        if not in_notebook():
            return print_report(self)
        from IPython.display import display

        display(self)

    def to_frame(self, table: Table = "tasks") -> Any:
        """Return one table of the edit as a pandas DataFrame.

        Args:
            table: ``"tasks"``: before and after, with intervals; ``"constraints"``; or ``"evaluations"``: every number
                of the search.
        """
        import pandas

        return pandas.DataFrame(table_rows(self.to_json(), table))

    @classmethod
    def load(cls, run: str | os.PathLike[str]) -> EditReport:
        """Read the report of an edit that was made before.

        Args:
            run: Its folder, or the ``edit.json`` in it.

        Raises:
            FileNotFoundError: It does not exist.
            ValueError: It is something else, or of another version of tva.
        """

        content = read_report(Path(run))
        content.pop("verdict", None)
        known = {field.name for field in fields(cls)}
        if content.keys() | _OPTIONAL != known:
            odd = sorted((content.keys() | _OPTIONAL) ^ known)
            raise ValueError(f"{run} is of another version of tva: it differs in {some(odd)}. Make the edit again.")
        tasks = {name: _task_of(entry, Comparison) for name, entry in content["tasks"].items()}
        constraints = [ConstraintReport(**{**c, **_real(c, "value", "bound")}) for c in content["constraints"]]
        return cls(**{**content, "tasks": tasks, "constraints": constraints})

    def to_json(self) -> dict[str, Any]:
        """Return plain values, in the form of ``edit.json``."""
        tasks = {
            name: {
                "role": task.role,
                "split": task.split,
                "metric": task.metric,
                "num_examples": task.num_examples,
                **({} if task.num_groups is None else {"num_groups": task.num_groups}),
                "higher_is_better": task.higher_is_better,
                **{label: vars(score) for label, score in task.scores.items()},
                "normalized": task.normalized,
                **(
                    {}
                    if task.normalized_low is None
                    else {"normalized_low": task.normalized_low, "normalized_high": task.normalized_high}
                ),
                "comparison": vars(task.comparison) if task.comparison else None,
                "chance": task.chance,
                "below_chance": task.below_chance,
                "revision": task.revision,
                **({"settings": dict(task.settings)} if task.settings else {}),
            }
            for name, task in self.tasks.items()
        }
        optional = ("needed", "allowed_loss")
        constraints = [
            {name: value for name, value in vars(constraint).items() if name not in optional or value is not None}
            for constraint in self.constraints
        ]
        found = {**vars(self), "tasks": tasks, "constraints": constraints, "verdict": self.verdict}
        return _plain({name: value for name, value in found.items() if name not in _OPTIONAL or value})


_OPTIONAL = {"audits", "means"}  # keys that are there where there is something to say


def _task_of(entry: Mapping[str, Any], comparison: type[Comparison]) -> TaskReport:
    names = ("role", "split", "metric", "higher_is_better", "num_examples")
    labels = [label for label in entry if isinstance(entry[label], Mapping) and label not in ("comparison", "settings")]
    return TaskReport(
        **{name: entry[name] for name in names},
        scores={label: Score(**{**entry[label], **_real(entry[label], "value")}) for label in labels},
        comparison=comparison(**entry["comparison"]) if entry["comparison"] else None,
        chance=entry.get("chance"),
        revision=entry.get("revision"),
        num_groups=entry.get("num_groups"),
        settings=entry.get("settings"),
        normalized_low=entry.get("normalized_low"),
        normalized_high=entry.get("normalized_high"),
    )


def _real(entry: Mapping[str, Any], *names: str) -> dict[str, float]:
    return {name: math.nan if entry[name] is None else entry[name] for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stamp(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Record the size and modification time of an input, to detect later changes."""
    found = find(path)
    files = [file for file in found.rglob("*") if file.is_file()] if found.is_dir() else [found]
    newest = max((file.stat().st_mtime_ns for file in files), default=0)
    return {"bytes": sum(file.stat().st_size for file in files), "modified_ns": newest}


def read_report(path: Path, whole: bool = True) -> dict[str, Any]:
    """Read an ``edit.json``, or that of a run's folder.

    Args:
        path: Either of them.
        whole: Check every field against the schema, rather than a few that tell that it is a report.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: It is something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"No report at {path}: a run's folder, or its {EDIT_JSON}, was expected there.")
    file = path / EDIT_JSON if path.is_dir() else path
    if not file.exists():
        below = [str(found.parent) for level in ("*", "*/*") for found in sorted(path.glob(f"{level}/{EDIT_JSON}"))]
        log = Path(f"{path}.evaluations.jsonl")
        if below:
            hint = f"The runs below it are {some(below)}."
        elif log.exists():
            hint = f"Its edit did not finish; the same command resumes from {log}."
        else:
            hint = "Every finished edit leaves one there."
        raise FileNotFoundError(f"No report at {file}. {hint}")
    try:
        content = read_json(file, dict)
    except ForeignFileError as error:
        raise ValueError(f"{file} is not an edit report: {error}") from error
    fields = {"recipe": str, "tasks": dict, "evaluations": list, "holds": bool}
    found = content if isinstance(content, dict) else {}
    wrong = [name for name, kind in fields.items() if not isinstance(found.get(name), kind)]
    if wrong:
        raise ValueError(
            f"{file} is not an edit report: it lacks {some(wrong)}, or has values of another type there. Give a run "
            f"that `tva edit` wrote."
        )
    for where, problem in problems(content) if whole else ():
        raise ValueError(
            f"{file} is not an edit report of this version of tva: {where.lstrip('/') or 'it'} {problem}. Give a run "
            f"that `tva edit` wrote, or make the edit again."
        )
    return content
