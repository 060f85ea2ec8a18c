"""The command ``tva extract``."""

from __future__ import annotations

from tva.cli.tables import print_json, print_line
from tva.console import make_console, size_text
from tva.vectors.extract import Extracted


def show_extracted(result: Extracted, json: bool = False) -> None:
    """Show what was written.

    Args:
        result: What was written.
        json: Print JSON instead of text.
    """
    if json:
        return print_json(result)
    console = make_console()
    for note in result.notes:
        print_line(console, f"read {note}")
    left = "".join(f", {count} {reason}" for reason, count in result.untouched.items())
    print_line(
        console,
        f"wrote {result.output}: task {result.task}, {result.moved} tensors moved{left}, norm {result.norm:.4g}, "
        f"{size_text(result.num_bytes)} in {result.seconds:.1f} s, from the base {result.base}",
    )
