"""The command ``tva validate``."""

from __future__ import annotations

from tva.cli.subcommand import run_subcommand

HELP = "evaluate a model on validation data, as LightningCLI does"


def start(words: list[str], as_json: bool) -> bool:
    """Run it."""
    return run_subcommand("validate", words, as_json, HELP)
