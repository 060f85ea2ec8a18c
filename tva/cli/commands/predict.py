"""The command ``tva predict``."""

from __future__ import annotations

from tva.cli.subcommand import run_subcommand

HELP = "run a model's prediction step on data, as LightningCLI does"


def start(words: list[str], as_json: bool) -> bool:
    """Run it."""
    return run_subcommand("predict", words, as_json, HELP)
