"""The command ``tva validate``."""

from __future__ import annotations

from tva.cli.lightning import run_lightning

HELP = "evaluate a model on validation data, as LightningCLI does"


def start(words: list[str], as_json: bool) -> bool:
    """Run it."""
    return run_lightning("validate", words, as_json, HELP)
