"""What an edit did, as a value, as ``edit.json``, as a table in the terminal and as a figure."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from torch import Tensor

from tva.compose import ComposeReport
from tva.console import make_console
from tva.kinds import KEY
from tva.page import edit_page
from tva.page.card import CARD, check_card, model_card
from tva.page.series import SCALING, axes, number
from tva.page.series import curve as curve_of
from tva.plan import Plan
from tva.record import EDITED
from tva.state_dict import some
from tva.weights import atomic_path, find, save_weights

if TYPE_CHECKING:  # scipy takes seconds to load, and compose's reports need none of it
    from tva.statistics import Comparison

EDIT_JSON = "edit.json"
PAGE = "report.html"
CONFIG = "config.yaml"
WIDE = 150  # columns of a terminal that has room for all of the table
BARS = "▁▂▃▄▅▆▇█"


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
        metric: The metric that it is on.
        above: Whether the metric must lie above the bound.
        val_bound: The bound on validation data, where the coefficient was chosen there.
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
    model: str
    precision: str
    data: Mapping[str, Mapping[str, str | None]]
    edited: Mapping[str, Any] | None
    created: str
    kind: str | None = None

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
        constraints = [vars(constraint) for constraint in self.constraints]
        return _plain({**vars(self), "tasks": tasks, "constraints": constraints, "verdict": self.verdict})


def _plain(value: Any) -> Any:
    """Give what JSON can hold: numbers that are none become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stamp(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Note size and time of an input, by which a later look knows that it is the same."""
    found = find(path)
    files = [file for file in found.rglob("*") if file.is_file()] if found.is_dir() else [found]
    newest = max((file.stat().st_mtime_ns for file in files), default=0)
    return {"bytes": sum(file.stat().st_size for file in files), "modified_ns": newest}


def write_report(
    report: EditReport, folder: Path, weights: Mapping[str, Tensor] | None, header: Mapping[str, str]
) -> None:
    """Write ``edit.json`` and its page; if there are weights, ``edited.safetensors`` and their model card.

    Args:
        report: What to write.
        folder: Made if need be. Weights of an earlier run in it are replaced, or removed if there are none now, so that
            weights and report always belong together.
        weights: The edited state dict, or None if the gate did not open.
        header: Text for the weights' header.
    """
    content = report.to_json()
    page = edit_page(content)
    for name in (EDIT_JSON, PAGE, CONFIG):
        (folder / name).unlink(missing_ok=True)
    if weights is None:
        (folder / EDITED).unlink(missing_ok=True)
    else:
        kind = {KEY: report.kind} if report.kind else {}
        save_weights(weights, folder / EDITED, {**header, "tva.command": report.command, **kind})
    with atomic_path(folder / EDIT_JSON) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    with atomic_path(folder / PAGE) as temporary:
        temporary.write_text(page)
    card = folder / CARD
    if weights is not None:
        with atomic_path(card) as temporary:
            temporary.write_text(model_card(content), encoding="utf-8")
    elif card.exists():
        check_card(folder)
        card.unlink()


def print_report(report: EditReport, console: Console | None = None, folder: Path | None = None) -> None:
    """Print one table: each task before and after, with 95 % intervals, the curve of the search, and the verdict.

    Args:
        report: What to print.
        console: By default the terminal. Where the output is piped every task is one line.
        folder: Where the report was written.
    """
    console = console or make_console()
    coefs = ", ".join(f"{name} = {_coef(value)}" for name, value in report.coefficients.items())
    console.print(f"[bold]base + scaling_coef · ({report.recipe})[/]   {coefs}: {report.reason}", highlight=False)
    left, numbers = ["task", "role", "split", "n"], ["base", "fine-tuned", "edited", "random", "normalized", "of base"]
    if console.width < WIDE:
        left, numbers = ["task", "role"], ["base", "edited"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in left:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    for name, task in report.tasks.items():
        percent = task.metric.endswith("accuracy")
        scores = {label: _score(score, percent) for label, score in task.scores.items()}
        cells = {
            "task": name,
            "role": task.role,
            "split": task.split,
            "n": f"{task.num_examples:,}",
            "base": scores["base"],
            "fine-tuned": scores.get("finetuned", "–"),
            "edited": scores["edited"],
            "random": scores.get("random", "–"),
            "normalized": "–" if task.normalized is None else f"{task.normalized:.1%}",
            "of base": _ratio(task),
            "verdict": _verdict(report, name),
        }
        row = [cells[heading] for heading in (*left, *numbers, "verdict")]
        table.add_row(*(row if console.is_terminal else [cell.replace("\n", " ") for cell in row]))
    console.print(table)
    console.print(f"[dim]{_footnote(report)}[/]", highlight=False)
    for line in sparklines(report.to_json()):
        console.print(line, highlight=False, markup=False)
    for title, found in (*report.baselines.items(), *report.diagnostics.items()):
        _print_extra(console, title, found)
    style = "bold green" if report.holds else "bold red"
    console.print(f"[{style}]{'holds' if report.holds else 'refused'}[/]: {report.verdict}", highlight=False)
    if folder is not None and report.split == "test":
        console.print(f"{folder / PAGE} shows all of it", highlight=False)


def sparklines(content: Mapping[str, Any], most: int = 41) -> list[str]:
    """Draw each task's metric against the coefficient in one line of text, tasks of one metric on one scale.

    Args:
        content: An ``edit.json``.
        most: Points that are drawn at most; evenly spaced ones of more.
    """
    found = axes(content)
    if len(found) != 1:
        return []
    (axis,) = found
    lines = {task: curve_of(content, task, axis) for task in content["tasks"]}
    lines = {task: line for task, line in lines.items() if len(line) > 1}
    places = sorted({at for line in lines.values() for at, _ in line})
    if len(places) > most:
        places = [places[round(step * (len(places) - 1) / (most - 1))] for step in range(most)]
    width, rows = max(map(len, lines), default=0), []
    for task, line in lines.items():
        metric = content["tasks"][task]["metric"]
        alike = [other for other in lines if content["tasks"][other]["metric"] == metric]
        values = [point.value for other in alike for _, point in lines[other]]
        known, low, span = dict(line), min(values), (max(values) - min(values)) or 1.0
        bars = "".join(BARS[round((known[at].value - low) / span * 7)] if at in known else " " for at in places)
        first, last = (number(line[end][1].value, metric) for end in (0, -1))
        rows.append(f"  {task:<{width}}  {first:>6} {bars} {last}")
    if not rows:
        return []
    chosen = content["coefficients"].get(axis)
    nearest = min(range(len(places)), key=lambda place: abs(places[place] - chosen))
    name = "λ" if axis == SCALING else axis
    return [
        f"{name} from {places[0]:g} to {places[-1]:g} on validation data:",
        *rows,
        f"{' ' * (width + 11 + nearest)}▲ {chosen:g}",
    ]


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
    if report.undo is not None:
        share = report.undo_bytes / max(1, report.num_bytes)
        console.print(
            f"wrote {report.undo}: {report.undo_bytes:,} bytes, {share:.1%} of the output's; from the two, tva revert "
            f"{report.output} --output BASE restores the base",
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
            hint = f"Its edit was not finished, or nothing met its constraints; the same command goes on from {log}."
        else:
            hint = "An edit whose gate found no coefficient writes none."
        raise FileNotFoundError(f"No report at {file}. {hint}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no report of an edit, for it is not JSON: {error}") from error
    missing = [name for name in ("recipe", "tasks", "evaluations", "holds") if name not in content]
    if missing:
        raise ValueError(f"{file} is no report of an edit: it lacks {some(missing)}. Give a run that `tva edit` wrote.")
    return content


def to_json(done: ComposeReport | Plan) -> dict[str, Any]:
    """Give what `tva.compose` did, or would do, as plain values."""
    if isinstance(done, Plan):
        rows = [
            {"tensors": row.names, "dtype": str(row.spec.dtype), "shape": list(row.spec.shape), "coefs": row.coefs}
            for row in done.rows
        ]
        return {**vars(done), "rows": rows}
    effects = {
        group: {**vars(effect), "relative_change": effect.relative_change} for group, effect in done.effects.items()
    }
    digests = {"base": done.base.digest, "edited": done.edited.digest}
    undo = None if done.undo is None else str(done.undo)
    return {**vars(done), "output": str(done.output), **digests, "effects": effects, "undo": undo}


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
