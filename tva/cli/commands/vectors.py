"""The command ``tva vectors``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.markup import escape

from tva.cli.tables import counted, make_table, print_json, print_line
from tva.console import make_console, size_text
from tva.vectors.lazy import labels
from tva.vectors.listing import Listing
from tva.vectors.match import Fit, Matched


def show_listing(result: Listing, json: bool = False) -> None:
    """Show the vectors in a folder.

    Args:
        result: What was found.
        json: Print JSON instead of tables.
    """
    if json:
        return print_json(result)
    console = make_console()
    for base, vectors in result.bases.items():
        print_line(console, f"base {base}")
        table = make_table("vector", "task", "step", "norm", "encoding", "size", "written")
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
        print_line(console, f"[bold red]damaged[/] {escape(path)}: {escape(reason)}", markup=True)
    count = sum(map(len, result.bases.values()))
    print_line(
        console,
        f"{counted(count, 'task vector')} of {counted(len(result.bases), 'base')} in {result.folder}"
        + (f"; {counted(len(result.damaged), 'damaged file')}" if result.damaged else "")
        + (f"; {counted(result.others, 'other .safetensors file')} not listed" if result.others else ""),
    )


def show_matched(result: Matched, json: bool = False) -> None:
    """Show whether a checkpoint is base + k · vector.

    Args:
        result: What was found.
        json: Print JSON instead of a table.
    """
    if json:
        return print_json(result)
    console = make_console()
    print_line(console, f"{result.checkpoint} (x) is {result.distance:.4g} away from the base {result.base} (b)")
    for note in result.notes:
        print_line(console, f"read {note}")
    paths = [found.path for found in result.fits]
    names = dict(zip(paths, labels(paths, [found.task for found in result.fits]), strict=True))
    table = make_table("vector τ", "k", "‖x − b − kτ‖ / ‖x − b‖", "k, all together")
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
        print_line(
            console,
            f"Only {result.independent} of these {len(paths)} vectors are linearly independent: other numbers, all "
            f"together, fit as well.",
        )
    for path, reason in result.left_out.items():
        print_line(console, f"[dim]left out[/] {escape(path)}: {escape(reason)}", markup=True)
    print_line(console, f"[bold]{escape(_verdict(result, names))}[/]", markup=True)


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
