"""The command ``tva fit``."""

from __future__ import annotations

from tva.cli.lightning import run_lightning

HELP = "fine-tune a model; TaskVectorCallback writes task vectors beside its checkpoints"


def start(words: list[str], as_json: bool) -> bool:
    """Run it."""
    return run_lightning("fit", words, as_json, HELP)
