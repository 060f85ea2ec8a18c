"""The command ``tva extract``."""

from __future__ import annotations

from rich.console import Console

from tva.console import make_console, print_line, size_text
from tva.errors import some
from tva.vectors.extract import Extracted, extract
from tva.vectors.extract_adapter import ExtractedAdapter

HELP = "subtract a base from its fine-tuned checkpoint or LoRA adapter, and write the task vector"
run = extract


def show(result: Extracted | ExtractedAdapter) -> None:
    """Print what was written."""
    console = make_console()
    for note in result.notes:
        print_line(console, f"read {note}")
    if isinstance(result, ExtractedAdapter):
        _print_adapter(console, result)
        return
    left = "".join(f", {count} {reason}" for reason, count in result.untouched.items())
    print_line(
        console,
        f"wrote {result.output}: task {result.task}, {result.moved} tensors moved{left}, norm {result.norm:.4g}, "
        f"{size_text(result.num_bytes)} in {result.seconds:.1f} s, from the base {result.base}",
    )


def _print_adapter(console: Console, result: ExtractedAdapter) -> None:
    low, high = result.ranks
    ranks, whole = f"{low}" if low == high else f"{low} to {high}", len(result.whole)
    worst, largest = result.worst
    if result.left_out:
        print_line(console, f"left out {len(result.left_out)} biases beside factors: {some(result.left_out)}")
    print_line(
        console,
        f"wrote {result.output}: an adapter of {result.modules} modules of rank {ranks}, and {whole} saved whole, "
        f"{size_text(result.num_bytes)} in {result.seconds:.1f} s; it lacks {result.error:.2%} of the change, at most "
        f"{largest:.2%}, in {worst}",
    )
