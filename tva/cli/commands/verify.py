"""The command ``tva verify``."""

from __future__ import annotations

from tva.compose.verify import VerifyReport, verify
from tva.console import printable

HELP = "recompute an edited checkpoint from its record and inputs, and compare it bit by bit"
ORDER = "edited"
run = verify


def show(result: VerifyReport) -> None:
    """Print what was found."""
    print(printable(str(result), most=100_000, newline="\n"))


def finish(result: VerifyReport) -> bool:
    """Return whether the record holds."""
    return result.holds
