"""The command ``tva vectors match``."""

from __future__ import annotations

from collections.abc import Mapping

from tva.console import make_console, print_line
from tva.report.table import Column, print_table, words
from tva.vectors.lazy import labels
from tva.vectors.match import Match, Matched, match

HELP = "find out whether a checkpoint is its base plus multiples of task vectors, and which multiples"
ORDER = "checkpoint vectors…"
run = match


def show(result: Matched) -> None:
    """Print the best multiple of each vector, and the verdict."""
    console = make_console()
    print_line(console, f"{result.checkpoint} (x) is {result.distance:.4g} away from the base {result.base} (b)")
    for note in result.notes:
        print_line(console, f"read {note}")
    paths = [found.path for found in result.fits]
    names = dict(zip(paths, labels(paths, [found.task for found in result.fits]), strict=True))
    rows = [
        (
            names[found.path],
            f"{found.coef:.6g}",
            found.residual,
            "0" if _negligible(found, result) else f"{result.joint[found.path]:.6g}",
        )
        for found in result.fits
    ]
    columns = [
        words("vector τ", lambda row: row[0]),
        Column("k", lambda row: row[1]),
        Column("‖x − b − kτ‖ / ‖x − b‖", lambda row: _residual(row[2])),
        Column("k, all together", lambda row: row[3]),
    ]
    print_table(console, columns, rows, [("all together", "", result.joint_residual, "")])
    if result.independent < len(paths):
        print_line(
            console,
            f"Only {result.independent} of these {len(paths)} vectors are linearly independent: other numbers, all "
            f"together, fit as well.",
        )
    for path, reason in result.left_out.items():
        print_line(console, f"left out: {path}: {reason}", "dim:")
    print_line(console, _verdict(result, names), "bold")


def _verdict(result: Matched, names: Mapping[str, str]) -> str:
    best, dtypes = result.fits[0], " and ".join(result.dtypes)
    most = f"rounding to {dtypes} leaves up to {result.rounding:.1e}"
    if not best.exact and not result.joint_exact:
        return f"x is not a sum of these vectors: all together leave {result.joint_residual:.3g}, {most}."
    if best.exact:
        terms, left = {best.path: best.coef}, best.residual
    else:
        terms = {found.path: result.joint[found.path] for found in result.fits if not _negligible(found, result)}
        left = result.joint_residual
    text = " ".join(f"{'−' if coef < 0 else '+'} {abs(coef):.6g} · {names[path]}" for path, coef in terms.items())
    return f"x = b {text}: what is left, {left:.1e}, is no more than rounding explains ({most})."


def _negligible(found: Match, result: Matched) -> bool:
    """Whether a vector's part in the sum of all is less than what rounding leaves."""
    return abs(result.joint[found.path]) * found.norm <= result.rounding * result.distance


def _residual(value: float) -> str:
    return f"{value:.2e}" if value < 0.001 else f"{value:.4f}"
