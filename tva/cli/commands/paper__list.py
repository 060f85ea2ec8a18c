"""The command ``tva paper list``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tva.console import make_console, print_line
from tva.paper.suite import list_experiments, load_experiment
from tva.report.table import Column, print_table, words

HELP = "list the paper's experiments, and the scales at which each can be run"


def run() -> list[dict[str, Any]]:
    """List the paper's experiments, and the scales at which each can be run."""
    return [
        {
            "experiment": name,
            "title": scale.title,
            "scale": scale.name,
            "setup": scale.setup_name,
            "tasks": list(scale.options["tasks"]),
            "seeds": scale.seeds,
            "needs": [*scale.needs, *(["--data_root"] if scale.needs_data_root else [])],
        }
        for name in list_experiments()
        for scale in load_experiment(name).values()
    ]


COLUMNS = [
    words("experiment", lambda row: row["experiment"]),
    words("scale", lambda row: row["scale"]),
    Column("tasks", lambda row: str(len(row["tasks"]))),
    words("needs", lambda row: ", ".join(row["needs"]) or "–"),
]


def show(result: Sequence[dict[str, Any]]) -> None:
    """Print one row per scale."""
    console = make_console()
    print_table(console, COLUMNS, result)
    print_line(console, "tva paper plan NAME --scale SCALE reports what one would do; tva paper run NAME does it.")
