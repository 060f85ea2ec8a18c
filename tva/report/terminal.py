"""What an edit did, in the terminal: one table, the curves of its search, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tva.console import make_console
from tva.report.run_files import PAGE
from tva.report.series import axes, coefficient, curve, interval, is_feasible, number, symbol

WIDE = 150  # columns of a terminal that has room for all of the table
BARS = "▁▂▃▄▅▆▇█"


def print_report(report: Any, console: Console | None = None, folder: Path | None = None) -> None:
    """Print one table: each task before and after, with 95 % intervals, the curve of the search, and the verdict.

    Args:
        report: A `tva.report.edit_report.EditReport`.
        console: By default the terminal. Where the output is piped every task is one line.
        folder: Where the report was written.
    """
    console = console or make_console()
    coefs = ", ".join(f"{name} = {coefficient(value)}" for name, value in report.coefficients.items())
    console.print(f"[bold]base + scaling_coef · ({report.recipe})[/]   {coefs}: {report.reason}", highlight=False)
    left, numbers = ["task", "role", "split", "n"], ["base", "fine-tuned", "edited", "random", "normalized", "of base"]
    if console.width < WIDE:
        left, numbers = ["task", "role"], ["base", "edited"]
    if any(task.metric != "accuracy" for task in report.tasks.values()):  # which percentages say by themselves
        left.insert(1, "metric")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in left:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    for name, task in report.tasks.items():
        scores = {label: _score(score, task.metric) for label, score in task.scores.items()}
        cells = {
            "task": name,
            "metric": task.metric,
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
    checked = ("bold green", "holds") if report.constraints else ("bold blue", "not checked")
    style, word = checked if report.holds else ("bold red", "refused")
    console.print(f"[{style}]{word}[/]: {report.verdict}", highlight=False)
    if folder is not None:
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
    lines = {task: curve(content, task, axis) for task in content["tasks"]}
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
    return [
        f"{symbol(axis)} from {places[0]:g} to {places[-1]:g} on validation data:",
        *rows,
        f"{' ' * (width + 11 + nearest)}▲ {chosen:g}{'' if is_feasible(content) else ', the closest'}",
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


def _footnote(report: Any) -> str:
    sizes = [
        f"{task} {split.get('val', 0):,} / {split.get('test', 0):,}" for task, split in report.sizes.items() if split
    ]
    spent = f"{report.search['num_forward']:,} examples evaluated"
    if report.search["num_reused"]:
        spent += f", {report.search['num_reused']} evaluations re-used from {report.search['log']}"
    return f"in brackets: 95 % intervals; examples to choose on / to report on: {'; '.join(sizes)}; {spent}"


def _score(score: Any, metric: str) -> str:
    between = interval(vars(score), metric)
    return number(score.value, metric) + (f"\n[dim]\\{between}[/]" if between else "")


def _ratio(task: Any) -> str:
    found = task.comparison
    if found is None or found.ratio is None or found.ratio_low is None or found.ratio_high is None:
        before, after = task.scores["base"].value, task.scores["edited"].value
        return f"{after / before:.1%}" if before > 0 else "–"
    return f"{found.ratio:.1%}\n[dim]\\[{found.ratio_low:.1%}, {found.ratio_high:.1%}][/]"


def _verdict(report: Any, name: str) -> str:
    of_task = [constraint for constraint in report.constraints if constraint.task == name]
    if of_task:
        return "\n".join(f"{c.text}: {c.compared}, {'holds' if c.holds else 'FAILS'}" for c in of_task)
    scores = report.tasks[name].scores
    before, after = scores["base"].value, scores["edited"].value
    return f"{(after - before) / before:+.0%} of base" if before else f"{after - before:+.3g}"
