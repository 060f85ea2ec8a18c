"""The command ``tva revert``."""

from __future__ import annotations

from tva.compose.revert import RevertReport, revert
from tva.console import printable

HELP = "restore the base of an edited checkpoint, bit for bit, from its undo file"
ORDER = "edited"
run = revert


def show(result: RevertReport) -> None:
    """Print what was written."""
    print(printable(str(result), most=100_000, newline="\n"))
