"""The command ``tva data``."""

from __future__ import annotations

from typing import Any, Literal

from tva.console import make_console
from tva.data.presets import all_presets
from tva.data.text_presets import TEXT_PRESETS
from tva.report.table import Column, print_table

HELP = "list the data sets that can be named: presets, and those that ship with tva"
ORDER = "what"
UNPINNED = "unpinned"  # what the hub has now


def run(what: Literal["ls"] = "ls") -> list[dict[str, Any]]:
    """List the data sets that can be named: presets, and those that ship with tva.

    Args:
        what: Only ``ls`` is possible.
    """
    from tva.data.builtin import BUILTIN_SETS, MARKS

    rows = []
    for name, preset in all_presets().items():
        hub = preset.hub + (f" ({preset.config})" if preset.config else "")
        lists = ", ".join(map(str, preset.lists)) or ("control" if name == "imagenet" else "")
        pin = preset.revision or UNPINNED, preset.license or "not recorded"
        rows.append((f"preset:{name}", preset.num_classes, len(preset.templates) or 80, lists, hub, *pin, preset.note))
    for name, texts in TEXT_PRESETS.items():
        hub = texts.hub + (f" ({texts.config})" if texts.config else "")
        note = "; ".join(filter(None, ("texts", texts.note)))
        rows.append((f"preset:{name}", len(texts.classes), 0, "", hub, UNPINNED, texts.license, note))
    for name, spec in BUILTIN_SETS.items():
        note = f"ships with tva; {spec.num_train} / {spec.num_test} examples"
        rows.append((f"builtin:{name}", len(MARKS[name]), len(spec.templates), "", "", "", "", note))
    keys = ("path", "classes", "prompts", "lists", "hub", "revision", "license", "note")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def show(result: list[dict[str, Any]]) -> None:
    """Print one row a data set."""
    numbers = ("classes", "prompts")
    kept = ("revision", "license")
    columns = [
        Column(key, lambda row, key=key: str(row[key]), key in numbers, fold=key not in numbers, keep=key in kept)
        for key in result[0]
    ]
    print_table(make_console(), columns, result)
