"""The command ``tva report``."""

from __future__ import annotations

from typing import Any

from tva.console import counted, make_console, print_line
from tva.edit.runs import Revisited, revisit
from tva.errors import some
from tva.report.page import state_of
from tva.report.series import interval, number
from tva.report.table import Column, print_table, words

HELP = "rebuild the pages of finished edits, compare several side by side, and export their numbers"
ORDER = "runs…"
run = revisit


def _score(label: str) -> Any:
    return lambda row: number(row[3][label]["value"], row[3]["metric"])


COLUMNS = [
    words("run", lambda row: row[0]),
    words("verdict", lambda row: row[1]),
    words("task", lambda row: row[2]),
    words("role", lambda row: row[3]["role"]),
    Column("base", _score("base")),
    Column("edited", _score("edited")),
    Column("95% interval", lambda row: interval(row[3]["edited"], row[3]["metric"])),
]


def show(result: Revisited) -> None:
    """Print one row per task of every run, and where the pages are."""
    console, rows = make_console(), []
    for name, content in result.contents.items():
        first = (name, state_of(content)["word"].lower())
        for task, entry in content["tasks"].items():
            rows.append((*first, task, entry))
            first = ("", "")
    print_table(console, COLUMNS, rows)
    for name, notices in result.notices.items():
        for notice in notices:
            print_line(console, f"note: {name + ': ' if name else ''}{notice}", wrap=True)
    if result.skipped:
        left = some([str(path) for path in result.skipped])
        print_line(console, f"left out, since they hold no edit: {left}", wrap=True)
    drawn = [page for page in result.pages if page.suffix.lower() in (".png", ".svg", ".pdf")]
    for page in result.pages:
        if page not in drawn:
            print_line(console, f"wrote {page}")
    if drawn:
        print_line(console, f"drew {counted(len(drawn), 'chart')} in {drawn[0].parent}")
