"""The command ``tva push``."""

from __future__ import annotations

from tva.console import make_console, print_line
from tva.edit.push import Pushed, push

HELP = "upload an edit's weights, task vectors and model card to the Hugging Face Hub"
ORDER = "run repository"
run = push


def show(result: Pushed) -> None:
    """Print which files were uploaded."""
    console = make_console()
    for name, size in result.files.items():
        print_line(console, f"{size:>14,} bytes  {name}")
    for note in result.notes:
        print_line(console, f"left out: {note}")
    sent = f"pushed: {result.url}" if result.url else f"nothing was sent; this would go to {result.repository}"
    print_line(console, sent)
