"""A table described once, by its columns, and shown in a terminal or in a notebook."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tva.console import printable

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        heading: Its title.
        text: Returns the cell of a row.
        is_number: Whether its cells are aligned right.
        fold: Whether a terminal breaks long cells into lines, instead of cutting them.
        small: Returns the small print of a cell, such as an interval.
        bar: Returns a non-negative number that HTML draws as a bar beside the cell.
    """

    heading: str
    text: Callable[[Any], str]
    is_number: bool = True
    fold: bool = False
    small: Callable[[Any], str] | None = None
    bar: Callable[[Any], float] | None = None


MANY_ROWS = 500


def words(heading: str, text: Callable[[Any], Any]) -> Column:
    """Return a column of words; None is shown as a dash."""
    return Column(heading, lambda row: "–" if (found := text(row)) is None else str(found), False, True)


def print_table(
    console: Console, columns: Sequence[Column], rows: Iterable[Any], totals: Iterable[Any] = (), title: str = ""
) -> None:
    """Print a table; what its cells hold is never read as markup, and shows control characters escaped.

    Args:
        console: Where to.
        columns: Its columns, the row's name first.
        rows: What the columns read.
        totals: Rows that stand apart at the end.
        title: Printed above it.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False, title=title or None, title_justify="left")
    for column in columns:
        justify, overflow = "right" if column.is_number else "left", "fold" if column.fold else "ellipsis"
        table.add_column(Text(printable(column.heading)), justify=justify, overflow=overflow)

    def add(row: Any) -> None:
        texts = [Text(printable(column.text(row))) for column in columns]
        for text, column in zip(texts, columns, strict=True):
            if small := column.small(row) if column.small else "":
                text.append(("\n" if console.is_terminal else " ") + printable(small), "dim")
        table.add_row(*texts)

    if not (console.is_terminal or console.is_jupyter) and len(rows := list(rows)) > MANY_ROWS:
        _print_plain(console, columns, [*rows, *totals], title)
        return
    for row in rows:
        add(row)
    table.add_section()
    for row in totals:
        add(row)
    console.print(table)


def _print_plain(console: Console, columns: Sequence[Column], rows: Sequence[Any], title: str) -> None:
    """Print what `print_table` does into a pipe, which takes rich half a millisecond a row."""
    from rich.cells import cell_len

    lines = [[printable(column.heading) for column in columns]]
    for row in rows:
        smalls = [column.small(row) if column.small else "" for column in columns]
        texts = [printable(column.text(row)) for column in columns]
        lines.append(
            [f"{text} {printable(small)}" if small else text for text, small in zip(texts, smalls, strict=True)]
        )
    widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
    if title:
        console.file.write(f"{title}\n")
    for line in lines:
        gaps = [" " * (width - cell_len(text)) for text, width in zip(line, widths, strict=True)]
        parts = [
            gap + text if column.is_number else text + gap
            for column, text, gap in zip(columns, line, gaps, strict=True)
        ]
        console.file.write("  ".join(parts).rstrip() + "\n")


def cells(columns: Sequence[Column], rows: Sequence[Any]) -> list[list[tuple[Any, ...]]]:
    """Return the cells that ``cell.html`` shows: text, small print and, where a column has one, a bar in percent."""
    found = [[(column.text(row), column.small(row) if column.small else "") for column in columns] for row in rows]
    for place, column in enumerate(columns):
        if column.bar is not None:
            lengths = [column.bar(row) for row in rows]
            largest = max((length for length in lengths if math.isfinite(length)), default=0.0) or 1.0
            for cell, length in zip(found, lengths, strict=True):
                share = min(1.0, length / largest) if not math.isnan(length) else 0.0
                cell[place] = (*cell[place], round(100 * share, 1))
    return found


# What an edit did to each group of tensors: rows are pairs of a group's name and its `tva.compose.engine.GroupEffect`.
EFFECTS = [
    words("tensors", lambda row: row[0]),
    Column("moved", lambda row: f"{row[1].tensors:,}"),
    Column("changed", lambda row: f"{row[1].changed:,}"),
    Column("relative change", lambda row: f"{row[1].relative_change:.2e}", bar=lambda row: row[1].relative_change),
    Column("deltas lost in rounding", lambda row: f"{row[1].vanished / max(1, row[1].elements):.1%}"),
]
