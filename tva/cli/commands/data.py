"""The command ``tva data``."""

from __future__ import annotations

from typing import Any

from tva.data.presets import PRESETS


def describe_presets() -> list[dict[str, Any]]:
    """List the data sets that have a name: presets and what ships with the package."""
    from tva.data.builtin import BUILTIN_SETS, MARKS

    rows = []
    for name, preset in PRESETS.items():
        hub = preset.hub + (f" ({preset.config})" if preset.config else "")
        lists = ", ".join(map(str, preset.lists)) or "control"
        rows.append((f"preset:{name}", preset.num_classes, len(preset.templates) or 80, lists, hub, preset.note))
    for name, spec in BUILTIN_SETS.items():
        note = f"ships with tva; {spec.num_train} / {spec.num_test} examples"
        rows.append((f"builtin:{name}", len(MARKS[name]), len(spec.templates), "", "", note))
    return [dict(zip(("path", "classes", "prompts", "lists", "hub", "note"), row, strict=True)) for row in rows]


def print_presets() -> None:
    """Print them as a table."""
    from rich.table import Table

    from tva.console import make_console

    table = Table(box=None, header_style="bold", pad_edge=False)
    rows = describe_presets()
    for heading in rows[0]:
        table.add_column(heading, overflow="fold", justify="right" if heading in ("classes", "prompts") else "left")
    for row in rows:
        table.add_row(*map(str, row.values()))
    make_console().print(table)
