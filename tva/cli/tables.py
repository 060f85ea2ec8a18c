"""Show in the terminal, as JSON or as a picture what was found in task vectors on disk."""

from __future__ import annotations

import json as json_
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WORDS = ("task", "encoding", "written")  # columns of words, the others are numbers
MOST_PAIRS = 6  # that get a column of their own in a table by layer


def make_table(first: str, *headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(escape(first), overflow="fold")
    for heading in headings:
        table.add_column(escape(heading), justify="left" if heading in WORDS else "right")
    return table


def print_line(console: Console, text: str, markup: bool = False) -> None:
    console.print(text, highlight=False, markup=markup, soft_wrap=True)


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def print_json(result: Any) -> None:
    print(json_.dumps(_plain(asdict(result)), indent=1, ensure_ascii=False))


def _plain(value: Any) -> Any:
    """Make what JSON can hold: no paths, and null for what is no number."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
