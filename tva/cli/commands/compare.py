"""The command ``tva compare``."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tva.checkpoints import write_export
from tva.console import make_console, print_line
from tva.report.table import Column, print_table, words
from tva.vectors.compare import Compared, compare

HELP = "compare task vectors: cosines, sign conflicts and norms, also by layer and as a picture"
ORDER = "vectors…"
MOST_PAIRS = 6  # that get a column of their own in a table by layer
run = compare


def show(result: Compared) -> None:
    """Print the matrices, and the numbers by group if they were asked for."""
    console, names = make_console(), list(result.names)
    of = f"base {result.base}" if result.base else "bases that are unknown, or differ"
    print_line(console, f"{len(names)} vectors of {of}, {result.elements:,} elements")
    for note in result.notes:
        print_line(console, f"read {note}")
    norms = [Column("norm", lambda i: f"{result.whole.norms[i]:.4g}")]
    for title, matrix in (("cosine", result.whole.cosines), ("sign conflicts", result.whole.conflicts)):
        pairs = [Column(name, _pair(title, matrix, j)) for j, name in enumerate(names)]
        first = words(title, names.__getitem__)
        print_table(console, [first, *(norms if title == "cosine" else []), *pairs], range(len(names)), split=True)
    if result.groups:
        _print_groups(console, result)
    if result.not_finite:
        print_line(console, f"NaN or infinity in: {', '.join(result.not_finite)}", "bold red:")


def finish(result: Compared, plot: str | os.PathLike | None = None) -> None:
    """Draw what was found.

    Args:
        result: What was found.
        plot: A ``.png`` file to draw the matrices in, and with ``by`` the norms and cosines of every group.
    """
    if plot is not None:
        draw_compared(result, Path(plot))
        print_line(make_console(), f"drew {plot}")


def _print_groups(console: Console, result: Compared) -> None:
    """Print one row per group: norms, then every pair or, where they are many, the smallest and the largest."""
    names, first = list(result.names), words(f"norm by {result.by}", lambda row: row[0])
    norms = [Column(name, lambda row, i=i: f"{row[1].norms[i]:.3g}") for i, name in enumerate(names)]
    print_table(console, [first, *norms], result.groups.items(), split=True)
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    many = len(pairs) > MOST_PAIRS
    heads = ["smallest", "largest"] if many else [f"{names[j]}, {names[i]}" for i, j in pairs]
    for title in ("cosine", "sign conflicts"):
        rows = []
        for group, found in result.groups.items():
            matrix = found.cosines if title == "cosine" else found.conflicts
            values = [matrix[i][j] for i, j in pairs]
            rows.append((group, _ends(values) if many else values))
        columns = [Column(head, _value(title, place)) for place, head in enumerate(heads)]
        print_table(console, [words(f"{title} by {result.by}", lambda row: row[0]), *columns], rows, split=True)


def _ends(values: Sequence[float]) -> list[float]:
    real = [value for value in values if not math.isnan(value)] or [math.nan]
    return [min(real), max(real)]


def _pair(title: str, matrix: Sequence[Sequence[float]], j: int) -> Any:
    return lambda i: "–" if title != "cosine" and i == j else _text(title, matrix[i][j])


def _value(title: str, place: int) -> Any:
    return lambda row: _text(title, row[1][place])


def _text(title: str, value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" if title == "cosine" else f"{value:.1%}"


def draw_compared(result: Compared, path: Path) -> None:
    """Draw the cosines and the sign conflicts, and by group the norms and the cosines, as a PNG.

    Raises:
        ValueError: The name does not end in ``.png``.
    """
    if path.suffix != ".png":
        raise ValueError(f"plot must end in .png; found {str(path)!r}.")
    from matplotlib.figure import Figure

    names, groups = list(result.names), result.groups
    side = max(3.2, 0.55 * len(names) + 1.8)
    lower = 3.2 if groups else 0.0
    figure = Figure(figsize=(2 * side + 1.2, side + lower), layout="constrained", dpi=120)
    shape = {"height_ratios": [side, lower]} if groups else None
    axes = figure.subplots(2 if groups else 1, 2, squeeze=False, gridspec_kw=shape)
    _draw_matrix(figure, axes[0][0], names, result.whole.cosines, "cosine", "RdBu_r", (-1.0, 1.0), "{:.2f}")
    _draw_matrix(figure, axes[0][1], names, result.whole.conflicts, "sign conflicts", "viridis", (0.0, 1.0), "{:.0%}")
    if groups:
        places = range(len(groups))
        for i, name in enumerate(names):
            axes[1][0].plot(places, [found.norms[i] for found in groups.values()], marker=".", label=name)
        axes[1][0].set(title=f"norm by {result.by}", ylim=(0, None))
        for i in range(len(names)):
            for j in range(i):
                label = f"{names[j]}, {names[i]}"
                axes[1][1].plot(places, [found.cosines[i][j] for found in groups.values()], marker=".", label=label)
        axes[1][1].axhline(0, color="gray", linewidth=0.5)
        axes[1][1].set(title=f"cosine by {result.by}")
        for axis in axes[1]:
            step = -(-len(groups) // 24)
            axis.set_xticks(list(places)[::step], list(groups)[::step], rotation=60, ha="right", fontsize=6)
            if len(axis.lines) <= 10:
                axis.legend(fontsize=6)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_export(path, drawn.getvalue())


def _draw_matrix(
    figure: Any,
    axis: Any,
    names: list[str],
    matrix: list[list[float]],
    title: str,
    colors: str,
    limits: tuple[float, float],
    form: str,
) -> None:
    image = axis.imshow(matrix, cmap=colors, vmin=limits[0], vmax=limits[1])
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_title(title)
    middle = sum(limits) / 2
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            dark = abs(value - middle) > 0.35 * (limits[1] - limits[0]) if title == "cosine" else value < 0.6
            axis.text(
                j, i, form.format(value), ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )
    figure.colorbar(image, ax=axis, shrink=0.8)
