"""The command ``tva inspect``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from tva.cli.tables import counted, make_table, print_json, print_line
from tva.console import make_console, size_text
from tva.errors import some
from tva.vectors.inspect import Inspection, Row


def show_inspection(result: Inspection, json: bool = False) -> None:
    """Show what a file holds.

    Args:
        result: What was found.
        json: Print JSON instead of a table.
    """
    if json:
        return print_json(result)
    console = make_console()
    whole = result.whole
    print_line(console, f"[bold]{escape(result.path)}[/]: {result.kind}, {size_text(result.num_bytes)}", markup=True)
    facts = {key: _fact(value) for key, value in result.facts.items()}
    for reason, names in result.untouched.items():
        facts[reason] = f"{counted(len(names), 'tensor')}: {some(names)}"
    for key, text in facts.items():
        print_line(console, f"[dim]{key:<{max(map(len, facts))}}[/]  {escape(text)}", markup=True)
    for note in result.notes:
        print_line(console, f"read {note}")
    table = make_table(result.by, "tensors", "elements", "norm", "zero", "largest")
    for name, row in result.groups.items():
        table.add_row(escape(name), *_cells(row))
    table.add_section()
    table.add_row("all", *_cells(whole))
    if result.buffers is not None:
        table.add_row("running statistics, apart", *_cells(result.buffers))
    console.print(table)
    bad = {name: row.not_finite for name, row in result.groups.items() if row.not_finite}
    if bad:
        where = ", ".join(f"{count:,} in {name}" for name, count in list(bad.items())[:3])
        more = f" and in {len(bad) - 3} more" if len(bad) > 3 else ""
        print_line(
            console, f"[bold red]NaN or infinity[/]: {escape(where + more)}. No edit can be made with it.", markup=True
        )


def _cells(row: Row) -> list[str]:
    return [f"{row.tensors:,}", f"{row.elements:,}", f"{row.norm:.4g}", f"{row.zeros:.1%}", f"{row.largest:.3g}"]


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {_fact(part)}" for key, part in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)
