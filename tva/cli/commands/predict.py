"""The command ``tva predict``."""

from __future__ import annotations

from tva.cli.lightning import run_lightning

HELP = "run a model's prediction step on data, as LightningCLI does"


def start(words: list[str], as_json: bool) -> bool:
    """Run it."""
    return run_lightning("predict", words, as_json, HELP)
