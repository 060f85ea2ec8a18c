"""Write the table of results: Markdown, CSV, LaTeX, and all numbers behind it as JSON."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tva.checkpoints import check_export, write_export
from tva.paper.results import Row

HEADINGS = ("experiment", "scale", "number", "paper", "ours", "95% over seeds", "seeds", "edits", "difference")


def cells(row: Row) -> tuple[str, ...]:
    """Return a row's cells as text, in the order of `HEADINGS`."""
    places = 1 if row.unit == "percent" else 3

    def text(value: float | None, sign: str = "") -> str:
        return "–" if value is None else f"{value:{sign}.{places}f}"

    paper = text(row.paper) + (f" ({row.column})" if row.paper is not None else "")
    ends = "–" if row.low is None else f"[{text(row.low)}, {text(row.high)}]"
    counts = str(len(row.seeds)), str(row.edits)
    return row.experiment, row.scale, row.row, paper, text(row.ours), ends, *counts, text(row.difference, "+")


def to_markdown(rows: Sequence[Row]) -> str:
    """Return one table per scale, with what differs from the paper's set-up below it."""
    lines = ["# Experiments of the paper", ""]  # by its first line an earlier table is known
    for experiment, scale in dict.fromkeys((row.experiment, row.scale) for row in rows):
        own = [row for row in rows if (row.experiment, row.scale) == (experiment, scale)]
        lines += [f"## {experiment}, {scale}", "", f"| {' | '.join(HEADINGS[2:])} |", "|" + "---|" * len(HEADINGS[2:])]
        lines += [f"| {' | '.join(cells(row)[2:])} |" for row in own]
        lines += ["", f"Differs from the paper: {own[0].differs}.", ""] if own[0].differs else [""]
    return "\n".join(lines)


def to_csv(rows: Sequence[Row]) -> str:
    """Return numbers as they are, one row per line."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow([*HEADINGS[:5], "low", "high", *HEADINGS[6:], "unit", "column", "differs"])
    for row in rows:
        numbers = row.paper, row.ours, row.low, row.high, len(row.seeds), row.edits, row.difference
        writer.writerow([row.experiment, row.scale, row.row, *numbers, row.unit, row.column, row.differs])
    return output.getvalue()


def to_latex(rows: Sequence[Row]) -> str:
    """Return a ``tabular`` that needs the package booktabs."""
    lines = [r"\begin{tabular}{lllrrrrrr}", r"\toprule", " & ".join(map(_escaped, HEADINGS)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(_escaped, cells(row))) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\textasciitilde{}"}
_LATEX |= {"–": "--", "−": "$-$", "λ": r"$\lambda$"}  # which pdflatex lacks in text


def write_tables(folder: Path, rows: Sequence[Row], ledger: dict[str, Any]) -> list[Path]:
    """Write ``table.md``, ``table.csv``, ``table.tex`` and ``table.json``, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "table.md": to_markdown(rows),
        "table.csv": to_csv(rows),
        "table.tex": to_latex(rows),
        "table.json": json.dumps(ledger, indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        check_export(folder / name, text)
    return [write_export(folder / name, text) for name, text in texts.items()]
