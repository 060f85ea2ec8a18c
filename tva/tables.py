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

from tva.compress import CompressReport
from tva.console import make_console, size_text
from tva.extract import Extracted
from tva.look import Compared, Inspection, Row
from tva.match import Fit, Matched
from tva.registry import Listing
from tva.state_dict import some
from tva.vectors import labels
from tva.weights import atomic_path

WORDS = ("task", "encoding", "written")  # columns of words, the others are numbers
MOST_PAIRS = 6  # that get a column of their own in a table by layer


def show_extracted(result: Extracted, json: bool = False) -> None:
    """Show what was written.

    Args:
        result: What was written.
        json: Print JSON instead of text.
    """
    if json:
        return _print_json(result)
    console = make_console()
    for note in result.notes:
        _line(console, f"read {note}")
    left = "".join(f", {count} {reason}" for reason, count in result.untouched.items())
    _line(
        console,
        f"wrote {result.output}: task {result.task}, {result.moved} tensors moved{left}, norm {result.norm:.4g}, "
        f"{size_text(result.num_bytes)} in {result.seconds:.1f} s, from the base {result.base}",
    )


def show_compressed(result: CompressReport, json: bool = False) -> None:
    """Show what was stored how.

    Args:
        result: What was written.
        json: Print JSON instead of a table.
    """
    if json:
        return _print_json(result)
    console = make_console()
    table = _table("encoding", "tensors", "bytes", "of float32", "error")
    for name, share in (*sorted(result.shares.items(), key=lambda item: -item[1].num_bytes), ("whole", result.whole)):
        part = share.num_bytes / (4 * share.elements) if share.elements else 0.0
        table.add_row(name, f"{share.tensors}", f"{share.num_bytes:,}", f"{part:.2%}", f"{share.error:.3g}")
    console.print(table)
    error, name = result.largest_error
    _line(console, f"largest error of a tensor: {error:.3g}, of {name}")
    part = result.num_bytes / result.float32_bytes if result.float32_bytes else 0.0
    _line(
        console,
        f"wrote {result.output}: {result.num_bytes:,} bytes with its header, {part:.2%} of the float32 size "
        f"({result.float32_bytes:,}), error {result.whole.error:.3g}, in {result.seconds:.1f} s",
    )


def show_inspection(result: Inspection, json: bool = False) -> None:
    """Show what a file holds.

    Args:
        result: What was found.
        json: Print JSON instead of a table.
    """
    if json:
        return _print_json(result)
    console = make_console()
    whole = result.whole
    _line(console, f"[bold]{escape(result.path)}[/]: {result.kind}, {size_text(result.num_bytes)}", markup=True)
    facts = {key: _fact(value) for key, value in result.facts.items()}
    for reason, names in result.untouched.items():
        facts[reason] = f"{_count(len(names), 'tensor')}: {some(names)}"
    for key, text in facts.items():
        _line(console, f"[dim]{key:<{max(map(len, facts))}}[/]  {escape(text)}", markup=True)
    for note in result.notes:
        _line(console, f"read {note}")
    table = _table(result.by, "tensors", "elements", "norm", "zero", "largest")
    for name, row in result.groups.items():
        table.add_row(escape(name), *_cells(row))
    table.add_section()
    table.add_row("all", *_cells(whole))
    if result.buffers is not None:
        table.add_row("running statistics, apart", *_cells(result.buffers))
    console.print(table)
    bad = {name: row.not_finite for name, row in result.groups.items() if row.not_finite}
    if bad:
        where = ", ".join(f"{count:,} in {name}" for name, count in list(bad.items())[:3])
        more = f" and in {len(bad) - 3} more" if len(bad) > 3 else ""
        _line(
            console, f"[bold red]NaN or infinity[/]: {escape(where + more)}. No edit can be made with it.", markup=True
        )


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
        return _print_json(result)
    console = make_console()
    names = list(result.names)
    of = f"base {result.base}" if result.base else "bases that are unknown, or differ"
    _line(console, f"{len(names)} vectors of {of}, {result.elements:,} elements")
    for note in result.notes:
        _line(console, f"read {note}")
    for title, matrix in (("cosine", result.whole.cosines), ("sign conflicts", result.whole.conflicts)):
        table = _table(title, *(["norm"] if title == "cosine" else []), *names)
        for i, name in enumerate(names):
            norm = [f"{result.whole.norms[i]:.4g}"] if title == "cosine" else []
            table.add_row(escape(name), *norm, *(_pair(title, i, j, matrix[i][j]) for j in range(len(names))))
        console.print(table)
    if result.groups:
        _print_groups(console, result)
    if result.not_finite:
        _line(console, f"[bold red]NaN or infinity[/] in {escape(', '.join(result.not_finite))}", markup=True)
    if plot is not None:
        _line(console, f"drew {plot}")


def _print_groups(console: Console, result: Compared) -> None:
    """One row a group: norms, then every pair or, where they are many, the least and the largest of them."""
    names, form = list(result.names), {"cosine": "{:.3f}", "sign conflicts": "{:.1%}"}
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    table = _table(f"norm by {result.by}", *names)
    for group, found in result.groups.items():
        table.add_row(escape(group), *(f"{norm:.3g}" for norm in found.norms))
    console.print(table)
    for title in form:
        each = [f"{names[j]}, {names[i]}" for i, j in pairs] if len(pairs) <= MOST_PAIRS else ["least", "largest"]
        table = _table(f"{title} by {result.by}", *each)
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


def show_listing(result: Listing, json: bool = False) -> None:
    """Show the vectors in a folder.

    Args:
        result: What was found.
        json: Print JSON instead of tables.
    """
    if json:
        return _print_json(result)
    console = make_console()
    for base, vectors in result.bases.items():
        _line(console, f"base {base}")
        table = _table("vector", "task", "step", "norm", "encoding", "size", "written")
        for listed in vectors:
            table.add_row(
                escape(str(Path(listed.path).relative_to(result.folder))),
                escape(listed.task or "–"),
                "–" if listed.step is None else f"{listed.step:,}",
                "–" if listed.norm is None else f"{listed.norm:.4g}",
                listed.encoding or "–",
                size_text(listed.num_bytes),
                (listed.created or "–").replace("T", " ").replace("Z", ""),
            )
        console.print(table)
    for path, reason in result.damaged.items():
        _line(console, f"[bold red]damaged[/] {escape(path)}: {escape(reason)}", markup=True)
    count = sum(map(len, result.bases.values()))
    _line(
        console,
        f"{_count(count, 'task vector')} of {_count(len(result.bases), 'base')} in {result.folder}"
        + (f"; {_count(len(result.damaged), 'damaged file')}" if result.damaged else "")
        + (f"; {_count(result.others, 'other .safetensors file')} not listed" if result.others else ""),
    )


def show_matched(result: Matched, json: bool = False) -> None:
    """Show whether a checkpoint is base + k · vector.

    Args:
        result: What was found.
        json: Print JSON instead of a table.
    """
    if json:
        return _print_json(result)
    console = make_console()
    _line(console, f"{result.checkpoint} (x) is {result.distance:.4g} away from the base {result.base} (b)")
    for note in result.notes:
        _line(console, f"read {note}")
    paths = [found.path for found in result.fits]
    names = dict(zip(paths, labels(paths, [found.task for found in result.fits]), strict=True))
    table = _table("vector τ", "k", "‖x − b − kτ‖ / ‖x − b‖", "k, all together")
    for found in result.fits:
        table.add_row(
            escape(names[found.path]),
            f"{found.coef:.6g}",
            _residual(found.residual),
            "0" if _negligible(found, result) else f"{result.joint[found.path]:.6g}",
        )
    table.add_section()
    table.add_row("all together", "", _residual(result.joint_residual), "")
    console.print(table)
    if result.independent < len(paths):
        _line(
            console,
            f"Only {result.independent} of these {len(paths)} vectors are linearly independent: other numbers, all "
            f"together, fit as well.",
        )
    for path, reason in result.left_out.items():
        _line(console, f"[dim]left out[/] {escape(path)}: {escape(reason)}", markup=True)
    _line(console, f"[bold]{escape(_verdict(result, names))}[/]", markup=True)


def _verdict(result: Matched, names: Mapping[str, str]) -> str:
    best, dtypes = result.fits[0], " and ".join(result.dtypes)
    most = f"rounding to {dtypes} leaves up to {result.rounding:.1e}"
    if not best.exact and not result.joint_exact:
        return f"x is no sum of these vectors: all together leave {result.joint_residual:.3g}, {most}."
    if best.exact:
        terms, left = {best.path: best.coef}, best.residual
    else:
        terms = {found.path: result.joint[found.path] for found in result.fits if not _negligible(found, result)}
        left = result.joint_residual
    text = " ".join(f"{'−' if coef < 0 else '+'} {abs(coef):.6g} · {names[path]}" for path, coef in terms.items())
    return f"x = b {text}: what is left, {left:.1e}, is no more than rounding explains ({most})."


def _negligible(found: Fit, result: Matched) -> bool:
    """Whether a vector's part in the sum of all is less than what rounding leaves."""
    return abs(result.joint[found.path]) * found.norm <= result.rounding * result.distance


def _residual(value: float) -> str:
    return f"{value:.2e}" if value < 0.001 else f"{value:.4f}"


# --- a picture


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


# --- words


def _table(first: str, *headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(escape(first), overflow="fold")
    for heading in headings:
        table.add_column(escape(heading), justify="left" if heading in WORDS else "right")
    return table


def _line(console: Console, text: str, markup: bool = False) -> None:
    console.print(text, highlight=False, markup=markup, soft_wrap=True)


def _cells(row: Row) -> list[str]:
    return [f"{row.tensors:,}", f"{row.elements:,}", f"{row.norm:.4g}", f"{row.zeros:.1%}", f"{row.largest:.3g}"]


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {_fact(part)}" for key, part in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _print_json(result: Any) -> None:
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
