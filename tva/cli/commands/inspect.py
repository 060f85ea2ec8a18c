"""The command ``tva inspect``."""

from __future__ import annotations

from tva.console import make_console, print_facts, print_line, size_text
from tva.report.table import HELD, print_table, words
from tva.vectors.inspect import Inspection, inspect

HELP = "show what a task vector or any checkpoint holds: its header, and norms by group of tensors"
ORDER = "path"
run = inspect


def show(result: Inspection) -> None:
    """Print the header, then one row per group."""
    console = make_console()
    print_line(console, f"{result.path}: {result.kind}, {size_text(result.num_bytes)}", "bold")
    print_facts(console, result.fact_texts())
    for note in result.notes:
        print_line(console, f"read {note}")
    totals = [("all", result.whole)]
    if result.buffers is not None:
        totals.append(("running statistics, apart", result.buffers))
    print_table(console, [words(result.by, lambda row: row[0]), *HELD], result.groups.items(), totals)
    bad = {name: row.not_finite for name, row in result.groups.items() if row.not_finite}
    if bad:
        where = ", ".join(f"{count:,} in {name}" for name, count in list(bad.items())[:3])
        more = f" and in {len(bad) - 3} more" if len(bad) > 3 else ""
        print_line(console, f"NaN or infinity: {where}{more}. No edit can be made with it.", "bold red:")
