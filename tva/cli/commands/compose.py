"""What `tva.compose` did, or would do: as tables in the terminal, and as plain values."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from tva.compose.apply import ComposeReport
from tva.compose.plan import Plan
from tva.console import make_console, size_text


def print_plan(plan: Plan) -> None:
    """Print what `tva.compose` would do."""
    console = make_console()
    console.print(f"[bold]{plan.formula}[/]", highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("tensors")
    for heading in ("number", "shape", "dtype", *plan.columns):
        table.add_column(heading, justify="right")
    for row in plan.rows:
        dtype = row.spec.dtype_name
        coefs = [_ramp([coefs[key] for coefs in row.coefs if key in coefs]) for key in plan.columns]
        table.add_row(row.label, f"{len(row.names)}", f"{list(row.spec.sizes)}", dtype, *coefs)
    console.print(table)
    for note in plan.notes:
        console.print(f"read {note}", highlight=False)
    whole = f", for {plan.largest} as a whole" if plan.largest else ""
    console.print(
        f"{plan.num_elements / 1e9:.3f} B parameters; would read {plan.read_bytes / 1e9:.2f} GB in {plan.passes} "
        f"pass{'es' if plan.passes > 1 else ''}, write {plan.write_bytes / 1e9:.2f} GB, and take about "
        f"{plan.memory_bytes / 2**20:.0f} MiB of memory{whole}. Nothing was written.",
        highlight=False,
    )


def _ramp(values: list[float]) -> str:
    """Show one number, or how it goes over the layers."""
    if not values:
        return "kept"
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    ordered = values in (sorted(values), sorted(values, reverse=True))
    return f"{values[0]:g} … {values[-1]:g}" if ordered else f"{min(values):g} to {max(values):g}"


def print_composed(report: ComposeReport) -> None:
    """Print what `tva.compose.apply.compose` wrote, and its effect by group of tensors."""
    console = make_console()
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("tensors")
    for heading in ("moved", "changed", "relative change", "deltas lost in rounding"):
        table.add_column(heading, justify="right")
    for group, effect in report.effects.items():
        lost = effect.vanished / effect.elements if effect.elements else 0.0
        table.add_row(group, f"{effect.tensors}", f"{effect.changed}", f"{effect.relative_change:.2e}", f"{lost:.1%}")
    console.print(table)
    for note in report.notes:
        console.print(f"read {note}", highlight=False)
    console.print(
        f"wrote {report.output}: {size_text(report.num_bytes)} in {report.seconds:.1f} s, {report.edited.digest}, "
        f"from the base {report.base.digest}",
        highlight=False,
    )
    if report.undo is not None:
        share = report.undo_bytes / max(1, report.num_bytes)
        console.print(
            f"wrote {report.undo}: {report.undo_bytes:,} bytes, {share:.1%} of the output's; from the two, tva revert "
            f"{report.output} --output BASE restores the base",
            highlight=False,
        )


def to_json(done: ComposeReport | Plan) -> dict[str, Any]:
    """Give what `tva.compose` did, or would do, as plain values."""
    if isinstance(done, Plan):
        rows = [
            {
                "tensors": row.names,
                "dtype": f"torch.{row.spec.dtype_name}",
                "shape": list(row.spec.sizes),
                "coefs": row.coefs,
            }
            for row in done.rows
        ]
        return {**vars(done), "rows": rows}
    effects = {group: {**vars(effect)} for group, effect in done.effects.items()}
    for group, effect in done.effects.items():
        change = effect.relative_change
        effects[group]["relative_change"] = change if math.isfinite(change) else None  # JSON has no infinity
    digests = {"base": done.base.digest, "edited": done.edited.digest}
    undo = None if done.undo is None else str(done.undo)
    return {**vars(done), "output": str(done.output), **digests, "effects": effects, "undo": undo}
