"""What an edit did, as a value, as ``edit.json``, as a table in the terminal and as a figure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from torch import Tensor

from tva.compose import ComposeReport
from tva.console import make_console
from tva.plan import Plan
from tva.weights import atomic_path, save_weights

if TYPE_CHECKING:  # scipy takes seconds to load, and compose's reports need none of it
    from tva.statistics import Comparison

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
        higher_is_better: Its direction.
        num_examples: Examples evaluated.
        scores: ``base`` and ``edited``, and where known ``finetuned`` and ``random``.
        comparison: The edited model against the base, example by example, where examples are known.
    """

    role: Literal["target", "control"]
    split: str
    metric: str
    higher_is_better: bool
    num_examples: int
    scores: Mapping[str, Score]
    comparison: Comparison | None

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
    """

    text: str
    task: str
    value: float
    bound: float
    limit: float | None
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
    sizes: Mapping[str, Mapping[str, int]]
    search: Mapping[str, Any]
    baselines: Mapping[str, Any]
    diagnostics: Mapping[str, Any]
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
            details = "; ".join(f"{c.text}: {_value(c)} against {c.bound:.4g}" for c in failing)
            return f"FAILS on test data: {details}. The edited weights were not written."
        sure = f" with {self.confidence:.0%} confidence" if self.confidence is not None else ""
        return f"all constraints hold on test data{sure}" if self.constraints else "no constraint was set"

    def to_json(self) -> dict[str, Any]:
        """Give plain values, in the form of ``edit.json``."""
        tasks = {
            name: {
                "role": task.role,
                "split": task.split,
                "metric": task.metric,
                "num_examples": task.num_examples,
                "higher_is_better": task.higher_is_better,
                **{label: vars(score) for label, score in task.scores.items()},
                "normalized": task.normalized,
                "comparison": vars(task.comparison) if task.comparison else None,
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
    """Print one table: each task before and after, with 95 % intervals below the numbers, and the verdict."""
    console = console or make_console()
    coefs = ", ".join(f"{name} = {_coef(value)}" for name, value in report.coefficients.items())
    console.print(f"[bold]base + scaling_coef · ({report.recipe})[/]   {coefs}: {report.reason}", highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("task", "role", "split", "n"):
        table.add_column(heading)
    for heading in ("base", "fine-tuned", "edited", "random", "normalized", "of base"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for name, task in report.tasks.items():
        percent = task.metric.endswith("accuracy")
        cells = {label: _score(score, percent) for label, score in task.scores.items()}
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
            _ratio(task),
            _verdict(report, name),
        )
    console.print(table)
    console.print(f"[dim]{_footnote(report)}[/]", highlight=False)
    for title, found in (*report.baselines.items(), *report.diagnostics.items()):
        _print_extra(console, title, found)
    style = "bold green" if report.holds else "bold red"
    console.print(f"[{style}]{'holds' if report.holds else 'refused'}[/]: {report.verdict}", highlight=False)


def _print_extra(console: Console, title: str, found: Any) -> None:
    """Print one baseline or diagnosis: rows of named numbers."""
    if "rows" not in found:
        console.print(f"[bold]{title}[/]: {found['reason']}", highlight=False)
        return
    table = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    table.add_column("")
    columns = list(next(iter(found["rows"].values()), {}))
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in found["rows"].items():
        cells = (row.get(column) for column in columns)
        table.add_row(
            name, *("–" if cell is None else cell if isinstance(cell, str) else f"{cell:.4g}" for cell in cells)
        )
    console.print(table)
    if "reason" in found:
        console.print(f"[dim]{found['reason']}[/]", highlight=False)


def _footnote(report: EditReport) -> str:
    sizes = [
        f"{task} {split.get('val', 0):,} / {split.get('test', 0):,}" for task, split in report.sizes.items() if split
    ]
    spent = f"{report.search['num_forward']:,} examples evaluated"
    if report.search["num_reused"]:
        spent += f", {report.search['num_reused']} evaluations re-used from {report.search['log']}"
    return f"in brackets: 95 % intervals; examples to choose on / to report on: {'; '.join(sizes)}; {spent}"


def _coef(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else json.dumps(value)


def _score(score: Score, percent: bool) -> str:
    number = _number(score.value, percent)
    if score.low is None or score.high is None:
        return number
    return f"{number}\n[dim]\\[{_number(score.low, percent)}, {_number(score.high, percent)}][/]"


def _ratio(task: TaskReport) -> str:
    found = task.comparison
    if found is None or found.ratio is None or found.ratio_low is None or found.ratio_high is None:
        before, after = task.scores["base"].value, task.scores["edited"].value
        return f"{after / before:.1%}" if before > 0 else "–"
    return f"{found.ratio:.1%}\n[dim]\\[{found.ratio_low:.1%}, {found.ratio_high:.1%}][/]"


def print_plan(plan: Plan) -> None:
    """Print what `tva.compose` would do."""
    console = make_console()
    console.print(f"[bold]{plan.formula}[/]", highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("tensors")
    for heading in ("number", "shape", "dtype", *plan.columns):
        table.add_column(heading, justify="right")
    for row in plan.rows:
        dtype = str(row.spec.dtype).removeprefix("torch.")
        coefs = [_ramp([coefs[key] for coefs in row.coefs if key in coefs]) for key in plan.columns]
        table.add_row(row.label, f"{len(row.names)}", f"{list(row.spec.shape)}", dtype, *coefs)
    console.print(table)
    for note in plan.notes:
        console.print(f"read {note}", highlight=False)
    whole = f", for {plan.largest} as a whole" if plan.largest else ""
    console.print(
        f"{plan.num_elements / 1e9:.3f} B parameters; would read {plan.read_bytes / 1e9:.2f} GB in {plan.passes} "
        f"pass{'es' if plan.passes > 1 else ''}, write {plan.write_bytes / 1e9:.2f} GB, and take about "
        f"{plan.memory_bytes / 2**20:.0f} MiB of memory{whole}. Nothing was written.",
        highlight=False,
    )


def _ramp(values: list[float]) -> str:
    """Show one number, or how it goes over the layers."""
    if not values:
        return "kept"
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    ordered = values in (sorted(values), sorted(values, reverse=True))
    return f"{values[0]:g} … {values[-1]:g}" if ordered else f"{min(values):g} to {max(values):g}"


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
        return "\n".join(f"{c.text}: {_value(c)}, {'holds' if c.holds else 'FAILS'}" for c in of_task)
    scores = report.tasks[name].scores
    before, after = scores["base"].value, scores["edited"].value
    return f"{(after - before) / before:+.0%} of base" if before else f"{after - before:+.3g}"


def _value(constraint: ConstraintReport) -> str:
    """Say what a constraint's bound is compared with."""
    limit = "" if constraint.limit is None else f", at the confidence limit {constraint.limit:.4g}"
    return f"{constraint.value:.4g}{limit}"


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
