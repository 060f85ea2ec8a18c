"""Notebook displays of task vectors, comparisons, composed checkpoints and edits: HTML without scripts."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tva.report.curves import coefficient_map, curves
from tva.report.page import before_table, environment, state_of
from tva.report.render import draw
from tva.report.scores import matrix
from tva.report.series import Content, formula, is_feasible, number
from tva.report.table import EFFECTS, HELD, Column, cells, plan_columns, words
from tva.report.vega import Chart

MOST_ROWS = 24  # of a table; the rest is summed into one
MOST_NAMES = 20  # of a matrix that is drawn
WIDTH = 560  # of a chart, in pixels
BLOCKS = [  # of pairs of a block's name, and its number of elements and sum of squares
    words("block", lambda row: row[0]),
    Column("elements", lambda row: f"{row[1][0]:,}"),
    Column("norm", lambda row: f"{math.sqrt(row[1][1]):.4g}", bar=lambda row: math.sqrt(row[1][1])),
]


def edit_cell(content: Content) -> str:
    """Show an edit: formula, verdict, before and after, and the curve of the search.

    Args:
        content: An ``edit.json``.
    """
    table = before_table(content)
    rows = [[(row["task"], f"{row['role']}, {row['metric']}"), *row["cells"]] for row in table["rows"]]
    constraints = [
        f"{found['text']} {'holds' if found['holds'] else 'FAILS'}: {found['shown']}."
        for row in table["rows"]
        for found in row["constraints"]
    ]
    split = next(iter(content["tasks"].values()))["split"]
    why = f"Chosen: {content['reason']}." if is_feasible(content) else "They are of the closest coefficient."
    return _render(
        "Edit",
        formula(content),
        state=state_of(content),
        verdict=content["verdict"],
        tables=[(["", *table["heads"]], rows)],
        notes=[
            *constraints,
            f"Numbers are of {split} data, in brackets 95% intervals. {why}",
        ],
        charts=[*curves(content), *coefficient_map(content)][:2],
    )


def vector_cell(facts: Mapping[str, Any], blocks: Mapping[str, tuple[int, float]]) -> str:
    """Show a task vector: where it comes from, and its norm by block of layers.

    Args:
        facts: ``task``, ``base``, ``step``, ``kind``, ``metrics``, ``tensors``, ``buffers``, ``untouched`` (reason to
            count) and ``num_bytes``; None where unknown.
        blocks: Block to its number of elements and its sum of squares, in the order shown.
    """
    elements = sum(count for count, _ in blocks.values())
    squares = math.fsum(square for _, square in blocks.values())
    shown = list(blocks.items())
    if len(shown) > MOST_ROWS:
        rest = shown[MOST_ROWS - 1 :]
        count, square = sum(each[0] for _, each in rest), math.fsum(each[1] for _, each in rest)
        shown = [*shown[: MOST_ROWS - 1], (f"and {len(rest)} more blocks", (count, square))]
    left = ", ".join(f"{count} {reason}" for reason, count in facts["untouched"].items())
    lines = {
        "base": facts["base"] or "unknown",
        "moved": f"{facts['tensors']:,} tensors of {elements:,} elements, {facts['num_bytes'] / 1e6:.3g} MB",
        "running statistics": f"{facts['buffers']:,} tensors" if facts["buffers"] else None,
        "not moved": left or None,
        "step": None if facts["step"] is None else f"{facts['step']:,}",
        "kind": facts["kind"],
        "norm": f"{math.sqrt(squares):.4g}",
        **{name: f"{value:.4g}" for name, value in list(facts["metrics"].items())[:4]},
    }
    return _render("Task vector", facts["task"] or "", facts=lines, tables=[_table(BLOCKS, shown)])


def compared_cell(
    names: Sequence[str],
    norms: Sequence[float],
    cosines: Sequence[Sequence[float]],
    conflicts: Sequence[Sequence[float]],
    base: str | None,
) -> str:
    """Show norms, cosines and sign conflicts of task vectors."""
    columns = [words("", lambda row: row[0]), Column("norm", lambda row: f"{row[1]:.4g}", bar=lambda row: row[1])]
    rows = list(zip(names, norms, strict=True))[:MOST_ROWS]
    charts, notes = [], []
    if len(names) <= MOST_NAMES:
        charts = [
            _matrix("cosine", "cosine", names, cosines, True),
            _matrix("conflicts", "share of opposite signs", names, conflicts, False),
        ]
    else:
        notes = [f"The matrices of {len(names)} vectors are not drawn; their numbers are in .whole."]
    facts = {"vectors": f"{len(names)}", "base": base or "unknown, or they differ"}
    tables = [_table(columns, rows)]
    return _render("Task vectors compared", "", facts=facts, tables=tables, charts=charts, notes=notes)


def _matrix(name: str, title: str, names: Sequence[str], values: Sequence[Sequence[float]], signed: bool) -> Chart:
    rows = {
        a: {b: None if math.isnan(value) else value for b, value in zip(names, row, strict=True)}
        for a, row in zip(names, values, strict=True)
    }
    pairs = itertools.combinations(enumerate(names), 2)
    text = "; ".join(f"{a} and {b} {number(values[i][j])}" for (i, a), (j, b) in pairs)
    return matrix(name, title, {"rows": rows}, f"{title} of every pair: {text}.", signed)


def inspected_cell(
    path: str,
    kind: str,
    facts: Mapping[str, str],
    by: str,
    groups: Mapping[str, Any],
    sums: Sequence[tuple[str, Any]],
    notes: Sequence[str],
) -> str:
    """Show what a file holds: its header, and norms by group."""
    shown = list(groups.items())[:MOST_ROWS]
    more = [f"{len(groups) - len(shown)} more groups are in .groups."] if len(groups) > len(shown) else []
    tables = [_table([words(by, lambda row: row[0]), *HELD], [*shown, *sums])]
    return _render(kind.capitalize(), path, facts=facts, tables=tables, notes=[*notes, *more])


def planned_cell(formula: str, columns: Sequence[str], rows: Sequence[Any], notes: Sequence[str]) -> str:
    """Show what composing would do: its coefficients by tensor, and its cost."""
    more = [f"{len(rows) - MOST_ROWS} more rows are in .rows."] if len(rows) > MOST_ROWS else []
    tables = [_table(plan_columns(columns), rows[:MOST_ROWS])]
    return _render("Plan", formula, tables=tables, notes=[*more, *notes])


def composed_cell(output: str, facts: Mapping[str, str], effects: Mapping[str, Any], notes: Sequence[str]) -> str:
    """Show a composed checkpoint: what was written, and the change by group of tensors.

    Args:
        output: Its path.
        facts: What else there is to know.
        effects: What the edit did, by group of tensors.
        notes: What was decided in reading the inputs.
    """
    shown = list(effects.items())[:MOST_ROWS]
    more = [f"{len(effects) - len(shown)} more groups are in .effects."] if len(effects) > len(shown) else []
    return _render("Checkpoint", output, facts=facts, tables=[_table(EFFECTS, shown)], notes=[*notes, *more])


def _table(columns: Sequence[Column], rows: Sequence[Any]) -> tuple[list[str], list[Any]]:
    return [column.heading for column in columns], cells(columns, rows)


def _render(kind: str, title: str, **parts: Any) -> str:
    empty = {"state": None, "verdict": "", "facts": {}, "tables": [], "charts": [], "notes": []}
    parts = {**empty, **parts}
    parts["facts"] = {name: text for name, text in parts["facts"].items() if text is not None}
    parts["charts"] = [(chart, draw(chart.spec, chart.name, WIDTH)) for chart in parts["charts"]]
    return environment().get_template("cell.html").render(kind=kind, title=title, **parts)
