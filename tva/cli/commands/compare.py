"""The command ``tva compare``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from tva.checkpoints import atomic_path
from tva.cli.tables import MOST_PAIRS, make_table, print_json, print_line
from tva.console import make_console
from tva.vectors.compare import Compared


def show_compared(result: Compared, json: bool = False, plot: str | None = None) -> None:
    """Show how vectors lie to each other.

    Args:
        result: What was found.
        json: Print JSON instead of tables.
        plot: Draw it too, as a PNG of this name.
    """
    if plot is not None:
        draw_compared(result, Path(plot))
    if json:
        return print_json(result)
    console = make_console()
    names = list(result.names)
    of = f"base {result.base}" if result.base else "bases that are unknown, or differ"
    print_line(console, f"{len(names)} vectors of {of}, {result.elements:,} elements")
    for note in result.notes:
        print_line(console, f"read {note}")
    for title, matrix in (("cosine", result.whole.cosines), ("sign conflicts", result.whole.conflicts)):
        table = make_table(title, *(["norm"] if title == "cosine" else []), *names)
        for i, name in enumerate(names):
            norm = [f"{result.whole.norms[i]:.4g}"] if title == "cosine" else []
            table.add_row(escape(name), *norm, *(_pair(title, i, j, matrix[i][j]) for j in range(len(names))))
        console.print(table)
    if result.groups:
        _print_groups(console, result)
    if result.not_finite:
        print_line(console, f"[bold red]NaN or infinity[/] in {escape(', '.join(result.not_finite))}", markup=True)
    if plot is not None:
        print_line(console, f"drew {plot}")


def _print_groups(console: Console, result: Compared) -> None:
    """One row a group: norms, then every pair or, where they are many, the least and the largest of them."""
    names, form = list(result.names), {"cosine": "{:.3f}", "sign conflicts": "{:.1%}"}
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    table = make_table(f"norm by {result.by}", *names)
    for group, found in result.groups.items():
        table.add_row(escape(group), *(f"{norm:.3g}" for norm in found.norms))
    console.print(table)
    for title in form:
        each = [f"{names[j]}, {names[i]}" for i, j in pairs] if len(pairs) <= MOST_PAIRS else ["least", "largest"]
        table = make_table(f"{title} by {result.by}", *each)
        for group, found in result.groups.items():
            matrix = found.cosines if title == "cosine" else found.conflicts
            values = [matrix[i][j] for i, j in pairs]
            if len(pairs) > MOST_PAIRS:
                real = [value for value in values if not math.isnan(value)] or [math.nan]
                values = [min(real), max(real)]
            table.add_row(escape(group), *("–" if math.isnan(v) else form[title].format(v) for v in values))
        console.print(table)


def _pair(title: str, i: int, j: int, value: float) -> str:
    if math.isnan(value) or (title != "cosine" and i == j):
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
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


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
