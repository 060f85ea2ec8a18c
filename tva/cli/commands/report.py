"""The command ``tva report``."""

from __future__ import annotations

from json import dumps

from rich.table import Table

from tva.console import make_console
from tva.edit.runs import Revisited
from tva.report.page import state_of
from tva.report.series import interval, number


def show_revisited(result: Revisited, json: bool = False) -> None:
    """Print one line a task of every run, and where the pages are.

    Args:
        result: What `revisit` gave.
        json: Print JSON instead: the contents of every ``edit.json``, what must be said of it, and the pages.
    """
    if json:
        print(dumps(result.to_json(), indent=1, ensure_ascii=False))
        return
    console = make_console()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("run", "verdict", "task", "role"):
        table.add_column(heading)
    for heading in ("base", "edited", "95 % interval"):
        table.add_column(heading, justify="right")
    for run, content in result.contents.items():
        for position, (task, entry) in enumerate(content["tasks"].items()):
            metric, first = entry["metric"], position == 0
            scores = [number(entry[label]["value"], metric) for label in ("base", "edited")]
            words = [run, state_of(content)["word"].lower()] if first else ["", ""]
            table.add_row(*words, task, entry["role"], *scores, interval(entry["edited"], metric).replace("[", r"\["))
    console.print(table)
    for name, notices in result.notices.items():
        for notice in notices:
            console.print(f"note: {name + ': ' if name else ''}{notice}", highlight=False, markup=False)
    for page in result.pages:
        console.print(f"wrote {page}", highlight=False, markup=False)
