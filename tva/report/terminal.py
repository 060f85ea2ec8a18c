"""The report of an edit in the terminal: one table, the curves of its search, and the verdict."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tva.console import make_console, print_line
from tva.report.audits import audit_tables
from tva.report.page import before_table
from tva.report.run_files import PAGE
from tva.report.series import axes, coefficient, curve, interval, is_feasible, number, symbol
from tva.report.table import Column, print_table, words

BARS = "▁▂▃▄▅▆▇█"


def print_report(report: Any, console: Console | None = None, folder: Path | None = None) -> None:
    """Print one table: each task before and after, with 95% intervals, the curve of the search, and the verdict.

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
    _print_tasks(console, content)
    print_line(console, _footnote(content), "dim", wrap=True)
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


def _print_tasks(console: Console, content: Mapping[str, Any]) -> None:
    table = before_table(content)
    scores = {head: _number(head, place) for place, head in enumerate(table["heads"])}
    first = ["task", "metric", "role"]
    if all(row["metric"] == "accuracy" for row in table["rows"]):  # which percentages say by themselves
        first.remove("metric")
    if any(row["split"] != "test" for row in table["rows"]):  # of an edit that was not made
        first.append("split")
    columns = [words(head, lambda row, head=head: row[head]) for head in first]
    tasks = content["tasks"]
    within = lambda row: interval(tasks[row["task"]]["edited"], row["metric"])  # noqa: E731 (chance is said below)
    edited = replace(scores.pop("edited"), small=within, keep_small=True)
    columns += [scores.pop("base"), edited, scores.pop("of base")]
    columns.append(Column("verdict", _verdict, is_number=False, keep=True))
    columns += [*scores.values(), Column("n", lambda row: row["n"])]
    columns += [] if "split" in first else [words("split", lambda row: row["split"])]
    print_table(console, columns, table["rows"])
    for row in table["rows"]:
        for found in row["constraints"]:
            style, word = ("green:", "holds") if found["holds"] else ("bold red:", "FAILS")
            print_line(console, f"{word}: {found['text']}: {found['shown']}", style, wrap=True)
    if table["mean"]:
        print_line(console, table["mean"], wrap=True)
    if chances := [text for task in tasks.items() if (text := _chance(task))]:
        print_line(console, f"chance: {'; '.join(chances)}", "dim", wrap=True)


def _number(heading: str, place: int) -> Column:
    return Column(
        heading,
        lambda row: row["cells"][place][0],
        small=lambda row: row["cells"][place][1],
        keep=heading in ("base", "edited"),
    )


def sparklines(content: Mapping[str, Any]) -> list[str]:
    """Draw each task's metric against the coefficient in one line of text, tasks of one metric on one scale."""
    most = 41  # points, evenly spaced ones of more
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
    return f"in brackets: 95% intervals; examples to choose on / to report on: {'; '.join(sizes)}; {spent}"


def _verdict(row: Mapping[str, Any]) -> str:
    found = [c["holds"] for c in row["constraints"]]
    return "–" if not found else "holds" if all(found) else "FAILS"


def _chance(task: tuple[str, Mapping[str, Any]]) -> str:
    name, entry = task
    if entry.get("chance") is None:
        return ""
    below = ", and the edited model is below: inverted, not gone" if entry["below_chance"] else ""
    return f"{name} {number(entry['chance'], entry['metric'])}{below}"
