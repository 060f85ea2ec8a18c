"""The command ``tva compose``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from tva.compose.adapter import AdapterReport
from tva.compose.apply import ComposeReport, compose
from tva.compose.plan import Plan
from tva.console import make_console, print_line, size_text
from tva.report.table import EFFECTS, Column, print_table, words

HELP = "apply a recipe to a checkpoint on disk in bounded memory: no Trainer, no data, any architecture"
run = compose


def read_words(words: Sequence[str]) -> list[str]:
    """Return the arguments, with ``--as`` by the name that it has in Python, where ``as`` is a keyword."""
    return [re.sub(r"^--as(?==|$)", "--write_as", word) for word in words]


def show(result: ComposeReport | AdapterReport | Plan) -> None:
    """Print what was written with its effect by group of tensors, or what would be done."""
    console = make_console()
    if isinstance(result, Plan):
        _print_plan(console, result)
        return
    if isinstance(result, AdapterReport):
        _print_adapter(console, result)
        return
    print_table(console, EFFECTS, result.effects.items())
    for note in result.notes:
        print_line(console, f"read {note}")
    print_line(
        console,
        f"wrote {result.output}: {size_text(result.num_bytes)} in {result.seconds:.1f} s, {result.edited.digest}, "
        f"from the base {result.base.digest}",
    )
    if result.undo is not None:
        share = result.undo_bytes / max(1, result.num_bytes)
        print_line(
            console,
            f"wrote {result.undo}: {result.undo_bytes:,} bytes, {share:.1%} of the output's; from the two, tva revert "
            f"{result.output} --output BASE restores the base",
        )


def _print_adapter(console: Console, result: AdapterReport) -> None:
    for note in result.notes:
        print_line(console, f"read {note}")
    if result.core:
        print_line(console, "merged in the core space of the adapters; in the space of the weights it is another edit")
    low, high = result.ranks
    ranks = f"{low}" if low == high else f"{low} to {high}"
    whole = f", and {result.whole} tensors saved whole" if result.whole else ""
    worst, largest = result.worst
    lost = f"; recompressing lost {result.error:.2%} of the change, at most {largest:.2%}, in {worst}" if worst else ""
    print_line(
        console,
        f"wrote {result.output}: an adapter of {result.modules} modules of rank {ranks}"
        f"{whole}, {size_text(result.num_bytes)} in {result.seconds:.1f} s{lost}",
    )


def _print_plan(console: Console, plan: Plan) -> None:
    columns = [
        words("tensors", lambda row: row.label),
        Column("number", lambda row: f"{len(row.names)}"),
        Column("shape", lambda row: f"{list(row.spec.sizes)}"),
        Column("dtype", lambda row: row.spec.dtype_name),
        *(Column(key, lambda row, key=key: _ramp([c[key] for c in row.coefs if key in c])) for key in plan.columns),
    ]
    print_line(console, plan.formula, "bold")
    print_table(console, columns, plan.rows)
    for note in plan.notes:
        print_line(console, f"read {note}")
    whole = f", for {plan.largest} as a whole" if plan.largest else ""
    print_line(
        console,
        f"{plan.num_elements / 1e9:.3f} B parameters; would read {plan.read_bytes / 1e9:.2f} GB in {plan.passes} "
        f"pass{'es' if plan.passes > 1 else ''}, write {plan.write_bytes / 1e9:.2f} GB, and take about "
        f"{plan.memory_bytes / 2**20:.0f} MiB of memory{whole}. Nothing was written.",
    )


def _ramp(values: list[float]) -> str:
    """Return one number, or the range it takes over the layers."""
    if not values:
        return "kept"
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    ordered = values in (sorted(values), sorted(values, reverse=True))
    return f"{values[0]:g} … {values[-1]:g}" if ordered else f"{min(values):g} to {max(values):g}"


def to_json(result: ComposeReport | AdapterReport | Plan) -> dict[str, Any]:
    """Return plain values."""
    if isinstance(result, AdapterReport):
        return vars(result)
    if isinstance(result, Plan):
        rows = [
            {
                "tensors": row.names,
                "dtype": f"torch.{row.spec.dtype_name}",
                "shape": list(row.spec.sizes),
                "coefs": row.coefs,
            }
            for row in result.rows
        ]
        return {**vars(result), "rows": rows}
    effects = {
        group: {**vars(effect), "relative_change": effect.relative_change} for group, effect in result.effects.items()
    }
    return {**vars(result), "base": result.base.digest, "edited": result.edited.digest, "effects": effects}
