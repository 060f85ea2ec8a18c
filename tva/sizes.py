"""Sizes of memory as people write them, and what this process takes."""

import math
import re
from pathlib import Path


def parse_bytes(text: str, option: str = "a size") -> int:
    """Read a size such as ``512MiB`` or ``2 GB``.

    Args:
        text: The size.
        option: What it was given as, for the error.

    Example:
        >>> parse_bytes("512MiB"), parse_bytes("2 GB"), parse_bytes("1000")
        (536870912, 2000000000, 1000)
    """
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", start=1):
        units |= {f"{letter}B": 1000**power, f"{letter}IB": 1024**power}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    size = float(found[1]) * units.get(found[2].upper(), math.inf) if found else math.inf
    if not math.isfinite(size):
        raise ValueError(f"{option} must be such as '512MiB' or '2 GB'; found {text!r}.")
    return int(size)


def anonymous_memory() -> int:
    """Bytes of anonymous memory of this process; 0 where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


SLACK = 2**24  # bytes for what an allocator keeps and for thread stacks


def check_memory(need: int, max_memory: str, what: str) -> None:
    """Check that what is to be held fits a limit of this process's anonymous memory.

    Args:
        need: Bytes beside what the process takes already.
        max_memory: The limit.
        what: What is held, for the error.

    Raises:
        ValueError: It does not fit.
    """
    taken, limit = anonymous_memory() + SLACK, parse_bytes(max_memory, "max_memory")
    if taken + need > limit:
        raise ValueError(
            f"max_memory must be {(taken + need) / 2**20 + 1:.0f}MiB or more: {what} takes {need / 2**20:.0f} MiB, and "
            f"the process {taken / 2**20:.0f} MiB by itself; found {max_memory}."
        )
