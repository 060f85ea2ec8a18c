"""What an edit did, as a value, as ``edit.json``, as a table in the terminal and as a figure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from torch import Tensor

from tva.compose import ComposeReport
from tva.console import make_console
from tva.weights import atomic_path, save_weights

EDITED = "edited.safetensors"
EDIT_JSON = "edit.json"


@dataclass(frozen=True)
class Score:
    """One number with its 95 % interval, where one is known.

    Attributes:
        value: The metric's value.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TaskReport:
    """What an edit did to one task.

    Attributes:
        role: Whether the edit meant to change it.
        split: Split that the scores are from.
        metric: The metric's name.
        num_examples: Examples evaluated.
        scores: ``base`` and ``edited``, and where known ``finetuned`` and ``random``.
    """

    role: Literal["target", "control"]
    split: str
    metric: str
    num_examples: int
    scores: Mapping[str, Score]

    @property
    def normalized(self) -> float | None:
        """The edited model's score divided by that of the task's own fine-tuned model."""
        finetuned = self.scores.get("finetuned")
        return self.scores["edited"].value / finetuned.value if finetuned and finetuned.value else None


@dataclass(frozen=True)
class ConstraintReport:
    """A constraint on the split that is reported.

    Attributes:
        text: As the user wrote it.
        task: The task that it is on.
        value: The edited model's metric.
        bound: What it is compared with.
        holds: Whether it holds.
    """

    text: str
    task: str
    value: float
    bound: float
    holds: bool


@dataclass(frozen=True)
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
    evaluations: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]
    seed: int | None
    command: str

    @property
    def split(self) -> str:
        """The split reported: ``test``, or ``val`` when no coefficient was feasible."""
        return next(iter(self.tasks.values())).split

    @property
    def verdict(self) -> str:
        """One sentence: whether the constraints hold, and on which data."""
        if self.split == "val":
            return f"NO EDIT: {self.reason}. Nothing was written."
        failing = [constraint for constraint in self.constraints if not constraint.holds]
        if failing:
            details = "; ".join(f"{c.text}: {c.value:.4g} against {c.bound:.4g}" for c in failing)
            return f"FAILS on test data: {details}. The edited weights were not written."
        return "all constraints hold on test data" if self.constraints else "no constraint was set"

    def to_json(self) -> dict[str, Any]:
        """Give plain values, in the form of ``edit.json``."""
        tasks = {
            name: {
                "role": task.role,
                "split": task.split,
                "metric": task.metric,
                "num_examples": task.num_examples,
                **{label: vars(score) for label, score in task.scores.items()},
                "normalized": task.normalized,
            }
            for name, task in self.tasks.items()
        }
        return {**vars(self), "tasks": tasks, "constraints": [vars(constraint) for constraint in self.constraints]}


def write_report(report: EditReport, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
    """Write ``edit.json``, and ``edited.safetensors`` if there are weights.

    Args:
        report: What to write.
        folder: Made if need be. Weights of an earlier run in it are replaced, or removed if there are none now, so that
            weights and report always belong together.
        weights: The edited state dict, or None if the gate did not open.
    """
    (folder / EDIT_JSON).unlink(missing_ok=True)
    if weights is None:
        (folder / EDITED).unlink(missing_ok=True)
    else:
        save_weights(weights, folder / EDITED, {"tva.recipe": report.recipe, "tva.command": report.command})
    with atomic_path(folder / EDIT_JSON) as temporary:
        temporary.write_text(json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n")


def print_report(report: EditReport, console: Console | None = None) -> None:
    """Print one table: each task before and after, and the verdict."""
    console = console or make_console()
    coefs = ", ".join(f"{name} = {value:g}" for name, value in report.coefficients.items())
    console.print(f"[bold]base + scaling_coef · ({report.recipe})[/]   {coefs}: {report.reason}", highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("task", "role", "split", "n"):
        table.add_column(heading)
    for heading in ("base", "fine-tuned", "edited [95 % interval]", "random", "normalized"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for name, task in report.tasks.items():
        percent = task.metric.endswith("accuracy")
        cells = {label: _number(score.value, percent) for label, score in task.scores.items()}
        edited = task.scores["edited"]
        if edited.low is not None and edited.high is not None:
            cells["edited"] += f" [{_number(edited.low, percent)}, {_number(edited.high, percent)}]"
        table.add_row(
            name,
            task.role,
            task.split,
            f"{task.num_examples:,}",
            cells["base"],
            cells.get("finetuned", "–"),
            cells["edited"],
            cells.get("random", "–"),
            "–" if task.normalized is None else f"{task.normalized:.1%}",
            _verdict(report, name),
        )
    console.print(table)
    style = "bold green" if report.holds else "bold red"
    console.print(f"[{style}]{'holds' if report.holds else 'refused'}[/]: {report.verdict}", highlight=False)


def print_composed(report: ComposeReport) -> None:
    """Print what `tva.compose.compose` wrote, and its effect by group of tensors."""
    console = make_console()
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("tensors")
    for heading in ("moved", "changed", "relative change", "deltas lost in rounding"):
        table.add_column(heading, justify="right")
    for group, effect in report.effects.items():
        lost = effect.vanished / effect.elements if effect.elements else 0.0
        table.add_row(group, f"{effect.tensors}", f"{effect.changed}", f"{effect.relative_change:.2e}", f"{lost:.1%}")
    console.print(table)
    for note in report.notes:
        console.print(f"read {note}", highlight=False)
    console.print(
        f"wrote {report.output}: {report.num_bytes / 1e6:.1f} MB in {report.seconds:.1f} s, {report.edited.digest}, "
        f"from the base {report.base.digest}",
        highlight=False,
    )


def _verdict(report: EditReport, name: str) -> str:
    of_task = [constraint for constraint in report.constraints if constraint.task == name]
    if of_task:
        return "; ".join(f"{c.text}: {'holds' if c.holds else 'FAILS'}" for c in of_task)
    scores = report.tasks[name].scores
    before, after = scores["base"].value, scores["edited"].value
    return f"{(after - before) / before:+.0%} of base" if before else f"{after - before:+.3g}"


def _number(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:.4g}"


def read_report(path: Path) -> dict[str, Any]:
    """Read an ``edit.json``, or that of a run's folder.

    Raises:
        FileNotFoundError: There is none.
    """
    path = path / EDIT_JSON if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"No report at {path}; an edit whose gate found no coefficient writes none.")
    return json.loads(path.read_text())


def curve(report: Mapping[str, Any], task: str, split: str = "val") -> Iterator[tuple[float, float]]:
    """Give (coefficient, value) pairs of a task's metric from an ``edit.json``, in ascending order."""
    metric = report["tasks"][task]["metric"]
    points = {
        entry["coefficients"]["scaling_coef"]: entry["value"]
        for entry in report["evaluations"]
        if entry["task"] == task
        and entry["split"] == split
        and entry["metric"] == metric
        and entry["model"] in ("base", "edited")
    }
    return iter(sorted(points.items()))
