"""The command ``tva edit``."""

from __future__ import annotations

from tva.cli.subcommand import run_subcommand

HELP = "combine task vectors, choose the coefficient, edit the model and test it on target and control tasks"


def start(words: list[str], as_json: bool) -> bool:
    """Run it."""
    return run_subcommand("edit", words, as_json, HELP)
