"""The command ``tva extract``."""

from __future__ import annotations

from tva.console import make_console, print_line, size_text
from tva.vectors.extract import Extracted, extract

HELP = "subtract a base from its fine-tuned checkpoint or LoRA adapter, and write the task vector"
run = extract


def show(result: Extracted) -> None:
    """Print what was written."""
    console = make_console()
    for note in result.notes:
        print_line(console, f"read {note}")
    left = "".join(f", {count} {reason}" for reason, count in result.untouched.items())
    print_line(
        console,
        f"wrote {result.output}: task {result.task}, {result.moved} tensors moved{left}, norm {result.norm:.4g}, "
        f"{size_text(result.num_bytes)} in {result.seconds:.1f} s, from the base {result.base}",
    )
