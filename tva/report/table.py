"""A table described once, by its columns, and shown in a terminal or in a notebook."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tva.console import print_line, printable, table_width

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        heading: Its title.
        text: Returns the cell of a row.
        is_number: Whether its cells are aligned right.
        fold: Whether a terminal may break long cells into lines.
        keep: Whether it stays where a table is too narrow for all columns.
        small: Returns the small print of a cell, such as an interval.
        keep_small: Whether the small print stays likewise.
        bar: Returns a non-negative number that HTML draws as a bar beside the cell.
    """

    heading: str
    text: Callable[[Any], str]
    is_number: bool = True
    fold: bool = False
    small: Callable[[Any], str] | None = None
    bar: Callable[[Any], float] | None = None
    keep: bool = False
    keep_small: bool = False


def words(heading: str, text: Callable[[Any], Any]) -> Column:
    """Return a column of words; None is shown as a dash."""
    return Column(heading, lambda row: "–" if (found := text(row)) is None else str(found), False, True)


def print_table(
    console: Console,
    columns: Sequence[Column],
    rows: Iterable[Any],
    totals: Iterable[Any] = (),
    title: str = "",
    split: bool = False,
) -> None:
    """Print a table as wide as the terminal, or 80 characters in a pipe; ``--wide`` prints all of it.

    What does not fit is left out and named: first the small print, then columns from the last, except those to keep.
    In a terminal, cells that are still too long are broken into lines. A row in a pipe is always one line, and no cell
    is cut. What cells hold is never read as markup, and shows control characters escaped.

    Args:
        console: Where to.
        columns: Its columns, the row's name first and then the most important.
        rows: What the columns read.
        totals: Rows that stand apart at the end.
        title: Printed above it.
        split: Print columns that do not fit in a further table below, as a matrix needs.
    """
    rows = [*rows, *totals]
    width = table_width(console)
    full = [_Cells.of(column, rows) for column in columns]
    shown = _fitting(full, width, console.is_terminal)
    left = [found for found in full if not any(found.column is other.column for other in shown)]
    _shrink(shown, width if console.is_terminal else None)
    if title:
        print_line(console, title, "italic")
    styles = ("bold",) + ("",) * len(rows)
    for place, style in enumerate(styles):
        for line in _lines(shown, place, style):
            console.print(line, soft_wrap=True) if console.is_terminal else console.file.write(f"{line.plain}\n")
    if left and split:
        print_table(console, [columns[0], *(found.column for found in left)], rows, split=True)
    elif left:
        names = ", ".join(found.texts[0] or "–" for found in left)
        print_line(console, f"not shown: {names} (--wide shows all columns)", "dim", wrap=True)


@dataclass
class _Cells:
    """A column's heading and cells as they are printed."""

    column: Column
    texts: list[str]
    smalls: list[str]
    width: int

    @classmethod
    def of(cls, column: Column, rows: Sequence[Any], with_small: bool = True) -> _Cells:
        texts = [printable(column.heading), *(printable(column.text(row)) for row in rows)]
        smalls = [""] * len(texts)
        if with_small and column.small:
            smalls[1:] = [printable(column.small(row)) for row in rows]
        return cls(column, texts, smalls, _longest(texts, smalls))

    def plain(self) -> _Cells:
        """Return it without small print, unless that is to be kept."""
        smalls = self.smalls if self.column.keep_small else [""] * len(self.texts)
        return _Cells(self.column, self.texts, smalls, _longest(self.texts, smalls))


def _longest(texts: Sequence[str], smalls: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max(cell_len(_joined(text, small)) for text, small in zip(texts, smalls, strict=True))


def _joined(text: str, small: str) -> str:
    return f"{text} {small}" if small else text


def _total(shown: Sequence[_Cells], least: int = 10**9) -> int:
    return sum(min(found.width, least) if found.column.fold else found.width for found in shown) + 2 * (len(shown) - 1)


def _fitting(full: list[_Cells], width: int | None, folds: bool) -> list[_Cells]:
    """Return the columns to print: without small print, and without the last ones, where there is no room for them."""
    if width is None or _total(full) <= width:
        return full
    shown = [found.plain() for found in full]
    least = 3 * width // 4 if folds else 10**9
    while _total(shown, least) > width:
        last = next((found for found in reversed(shown[1:]) if not found.column.keep), None)
        if last is None or len(shown) <= 2:
            break
        shown.remove(last)
    return shown


def _shrink(shown: Sequence[_Cells], width: int | None) -> None:
    while width is not None and (over := _total(shown) - width) > 0:
        folding = [found for found in shown if found.column.fold and found.width > 8]
        if not folding:
            return
        widest = max(folding, key=lambda found: found.width)
        rest = [found.width for found in folding if found is not widest]
        widest.width -= max(1, min(over, widest.width - max(rest, default=8)))


def _lines(shown: Sequence[_Cells], place: int, style: str) -> Iterator[Text]:
    from rich.cells import cell_len
    from rich.text import Text

    broken = [_broken(found, place) for found in shown]
    for at in range(max(map(len, broken))):
        line = Text()
        for found, parts in zip(shown, broken, strict=True):
            text, small = parts[at] if at < len(parts) else ("", "")
            gap = " " * (found.width - cell_len(_joined(text, small)))
            cell = Text(text, style).append(f" {small}" if small else "", "dim")
            line += Text(gap) + cell if found.column.is_number else cell + Text(gap)
            line.append("" if found is shown[-1] else "  ")
        line.rstrip()
        yield line


def _broken(found: _Cells, place: int) -> list[tuple[str, str]]:
    text, small = found.texts[place], found.smalls[place]
    from rich.cells import cell_len

    if cell_len(_joined(text, small)) <= found.width:
        return [(text, small)]
    return [(part, "") for part in textwrap.wrap(_joined(text, small), found.width)]


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

# What a group of tensors holds: rows are pairs of its name and its `tva.vectors.inspect.GroupSummary`.
HELD = [
    Column("tensors", lambda row: f"{row[1].tensors:,}"),
    Column("elements", lambda row: f"{row[1].elements:,}"),
    Column("norm", lambda row: f"{row[1].norm:.4g}", bar=lambda row: row[1].norm),
    Column("zero", lambda row: f"{row[1].zeros:.1%}"),
    Column("largest", lambda row: f"{row[1].largest:.3g}"),
]


def plan_columns(names: Sequence[str]) -> list[Column]:
    """Return the columns of a plan's rows, with one for each coefficient."""
    return [
        words("tensors", lambda row: row.label),
        Column("number", lambda row: f"{len(row.names)}"),
        *(Column(name, lambda row, name=name: _ramp([c[name] for c in row.coefs if name in c])) for name in names),
        Column("shape", lambda row: f"{list(row.spec.sizes)}"),
        Column("dtype", lambda row: row.spec.dtype_name),
    ]


def _ramp(values: list[float]) -> str:
    """Return one number, or the range it takes over the layers."""
    if not values:
        return "kept"
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    ordered = values in (sorted(values), sorted(values, reverse=True))
    return f"{values[0]:g} … {values[-1]:g}" if ordered else f"{min(values):g} to {max(values):g}"
