"""The command ``tva inspect``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tva.console import counted, make_console, print_facts, print_line, size_text
from tva.errors import some
from tva.report.table import Column, print_table, words
from tva.vectors.inspect import Inspection, inspect

HELP = "show what a task vector or any checkpoint holds: its header, and norms by group of tensors"
ORDER = "path"
run = inspect
COLUMNS = [
    Column("tensors", lambda row: f"{row[1].tensors:,}"),
    Column("elements", lambda row: f"{row[1].elements:,}"),
    Column("norm", lambda row: f"{row[1].norm:.4g}"),
    Column("zero", lambda row: f"{row[1].zeros:.1%}"),
    Column("largest", lambda row: f"{row[1].largest:.3g}"),
]


def show(result: Inspection) -> None:
    """Print the header, then one row a group."""
    console = make_console()
    print_line(console, f"{result.path}: {result.kind}, {size_text(result.num_bytes)}", "bold")
    facts = {key: _fact(value) for key, value in result.facts.items()}
    for reason, names in result.untouched.items():
        facts[reason] = f"{counted(len(names), 'tensor')}: {some(names)}"
    print_facts(console, facts)
    for note in result.notes:
        print_line(console, f"read {note}")
    totals = [("all", result.whole)]
    if result.buffers is not None:
        totals.append(("running statistics, apart", result.buffers))
    print_table(console, [words(result.by, lambda row: row[0]), *COLUMNS], result.groups.items(), totals)
    bad = {name: row.not_finite for name, row in result.groups.items() if row.not_finite}
    if bad:
        where = ", ".join(f"{count:,} in {name}" for name, count in list(bad.items())[:3])
        more = f" and in {len(bad) - 3} more" if len(bad) > 3 else ""
        print_line(console, f"NaN or infinity: {where}{more}. No edit can be made with it.", "bold red:")


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {_fact(part)}" for key, part in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)
