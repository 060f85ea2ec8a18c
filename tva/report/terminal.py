"""What an edit did, in the terminal: one table, the curves of its search, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from tva.console import make_console, print_line
from tva.report.audits import audit_tables
from tva.report.page import before_table
from tva.report.run_files import PAGE
from tva.report.series import axes, coefficient, curve, is_feasible, number, symbol
from tva.report.table import Column, print_table, words

WIDE = 150  # columns of a terminal that has room for all of the table
BARS = "▁▂▃▄▅▆▇█"


def print_report(report: Any, console: Console | None = None, folder: Path | None = None) -> None:
    """Print one table: each task before and after, with 95 % intervals, the curve of the search, and the verdict.

    Args:
        report: A `tva.report.edit_report.EditReport`.
        console: By default the terminal. Where the output is piped every task is one line.
        folder: Where the report was written.
    """
    console, content = console or make_console(), report.to_json()
    coefs = ", ".join(f"{name} = {coefficient(value)}" for name, value in content["coefficients"].items())
    print_line(
        console, f"base + scaling_coef · ({content['recipe']})   {coefs}: {content['reason']}", "bold", wrap=True
    )
    left_out = _print_tasks(console, content)
    print_line(console, _footnote(content), "dim", wrap=True)
    if left_out:
        print_line(console, f"columns for a wider terminal: {', '.join(left_out)}", "dim", wrap=True)
    for line in sparklines(content):
        print_line(console, line)
    audits = {f"audit {name}": found for name, found in audit_tables(content).items()}
    for title, found in (*content["baselines"].items(), *content["diagnostics"].items(), *audits.items()):
        _print_extra(console, title, found)
    for note in content.get("notes", []):
        print_line(console, f"note: {note}", "yellow:", wrap=True)
    checked = ("bold green:", "holds") if content["constraints"] else ("bold blue:", "not checked")
    style, word = checked if content["holds"] else ("bold red:", "refused")
    print_line(console, f"{word}: {content['verdict']}", style, wrap=True)
    if folder is not None:
        print_line(console, f"{folder / PAGE} shows all of it", wrap=True)


def _print_tasks(console: Console, content: Mapping[str, Any]) -> list[str]:
    """Print the table of tasks; return the columns for which the terminal is too narrow."""
    table = before_table(content)
    left = ["task", "metric", "role", "split", "n"]
    if all(row["metric"] == "accuracy" for row in table["rows"]):  # which percentages say by themselves
        left.remove("metric")
    wanted = left + table["heads"]
    if console.width < WIDE:
        wanted = [head for head in wanted if head in ("task", "metric", "role", "base", "edited")]
    columns = [words(head, lambda row, head=head: row[head]) for head in left if head in wanted]
    columns += [_number(head, place) for place, head in enumerate(table["heads"]) if head in wanted]
    print_table(console, [*columns, Column("verdict", _verdict, is_number=False, fold=True)], table["rows"])
    return [head for head in (*left, *table["heads"]) if head not in wanted]


def _number(heading: str, place: int) -> Column:
    return Column(heading, lambda row: row["cells"][place][0], small=lambda row: row["cells"][place][1])


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


def _print_extra(console: Console, title: str, found: Mapping[str, Any]) -> None:
    """Print one baseline or diagnosis: rows of named numbers."""
    rows = found.get("rows", {})
    if not rows:
        print_line(console, f"{title}: {found.get('reason', '')}", "bold:", wrap=True)
        return
    columns = [Column(key, lambda row, key=key: _cell(row[1].get(key))) for key in next(iter(rows.values()), {})]
    print_table(console, [words("", lambda row: row[0]), *columns], rows.items(), title=title)
    if "reason" in found:
        print_line(console, found["reason"], "dim", wrap=True)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else number(value)


def _footnote(content: Mapping[str, Any]) -> str:
    sizes = [
        f"{task} {split.get('val', 0):,} / {split.get('test', 0):,}"
        + (f" ({split['shared']:,} of them in both)" if "shared" in split else "")
        for task, split in content["sizes"].items()
        if any(split.values())
    ]
    search = content["search"]
    spent = f"{search['num_forward']:,} examples evaluated"
    if search["num_reused"]:
        spent += f", {search['num_reused']} evaluations reused from {search['log']}"
    return f"in brackets: 95 % intervals; examples to choose on / to report on: {'; '.join(sizes)}; {spent}"


def _verdict(row: Mapping[str, Any]) -> str:
    constraints = [f"{c['text']}: {c['shown']}, {'holds' if c['holds'] else 'FAILS'}" for c in row["constraints"]]
    ratio = row["cells"][-1][0]
    return "; ".join(constraints) or (f"{ratio} of base" if ratio != "–" else ratio)
