"""The command ``tva paper table``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tva.console import make_console, print_line
from tva.paper.results import Effect, Row, effects_of, find_fits, find_made, ledger, left_out, rows_of
from tva.paper.suite import list_experiments, load_experiment
from tva.paper.table import HEADINGS, cells, write_tables
from tva.report.table import Column, print_table

HELP = "put the paper's numbers and ours side by side: Markdown, CSV, LaTeX, JSON and figures"
ORDER = "names…"


@dataclass(frozen=True)
class Tables:
    """Results of the experiments.

    Attributes:
        rows: Numbers.
        effects: Directions.
        files: Files written.
        notes: What was left out.
    """

    rows: Sequence[Row]
    effects: Sequence[Effect]
    files: Sequence[Path]
    notes: Sequence[str] = ()


def run(
    names: list[str] = [],  # noqa: B006 (never changed; jsonargparse shows it)
    scale: str | None = None,
    output: str = "runs/paper",
    confidence: float = 0.95,
    write: str | None = None,
    figures: bool = False,
) -> Tables:
    """Put the paper's numbers and ours side by side: Markdown, CSV, LaTeX, JSON and figures.

    Args:
        names: Experiments, or paths of YAML files of your own; by default all that have results.
        scale: Only this scale; by default all that have results.
        output: Folder that ``tva paper run`` wrote to.
        confidence: One-sided confidence with which an effect must hold.
        write: Folder for ``table.md``, ``table.csv``, ``table.tex`` and ``table.json``; by default ``output``.
        figures: Also draw curves over the coefficient, pairs and cosines as SVG and PNG, into the subfolder
            ``figures``.
    """
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be in [0.5, 1); found {confidence}.")
    rows: list[Row] = []
    effects: list[Effect] = []
    made: list[Any] = []
    results = []
    for name in names or list_experiments():
        for each in load_experiment(name).values():
            found = find_made(Path(output), each) if scale in (None, each.name) else []
            if not found:
                continue
            results.append((each, found))
            rows += rows_of(each, found)
            effects += effects_of(each, found, confidence)
            made += [(each, one) for one in found]
    if not made:
        wanted = " ".join(names) or "any experiment"
        raise ValueError(f"There are no results of {wanted} in {output}. Run `tva paper run NAME --output {output}`.")
    folder = Path(write or output)
    files = write_tables(
        folder, rows, ledger(rows, effects, made, find_fits(Path(output), [each.setup_name for each, _ in results]))
    )
    if figures:
        from tva.paper.figures import figures_of, write_figures

        drawn = {name: spec for each, found in results for name, spec in figures_of(each, found)}
        files += write_figures(folder / "figures", drawn)
    notes = [note for each, found in results for note in left_out(each, found)]
    return Tables(rows, effects, files, notes)


KEPT = ("number", "paper", "ours")
COLUMNS = [
    Column(heading, lambda row, place=place: cells(row)[place], place > 2, fold=place <= 2, keep=heading in KEPT)
    for place, heading in enumerate(HEADINGS)
    if place >= 2  # experiment and scale are the title
]
EFFECTS = [
    Column("effect", lambda effect: effect.effect, False, fold=True, keep=True),
    Column("difference", lambda effect: _number(effect.difference)),
    Column("at least", lambda effect: _number(effect.limit)),
    Column("holds", lambda effect: "yes" if effect.holds else "not shown", False, keep=True),
]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def show(result: Tables) -> None:
    """Print the numbers, the effects, and where the files are."""
    console = make_console()
    for name, scale in dict.fromkeys((row.experiment, row.scale) for row in result.rows):
        title = f"{name}, {scale}"
        print_table(
            console, COLUMNS, [row for row in result.rows if (row.experiment, row.scale) == (name, scale)], title=title
        )
        if effects := [effect for effect in result.effects if (effect.experiment, effect.scale) == (name, scale)]:
            print_table(console, EFFECTS, effects)
    for note in result.notes:
        print_line(console, f"note: {note}")
    for file in result.files:
        print_line(console, f"wrote {file}")


def finish(result: Tables, check: bool = False) -> bool:
    """Return whether all effects hold, if this is checked.

    Args:
        result: What is known.
        check: Exit with status 1 unless every effect holds at this confidence over seeds.
    """
    if check and not result.effects:
        raise ValueError("--check tests effects, and these experiments have none at these scales. Leave it out.")
    return not check or all(effect.holds for effect in result.effects)
