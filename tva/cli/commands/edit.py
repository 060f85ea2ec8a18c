"""The command ``tva edit``."""

from __future__ import annotations

from tva.cli.lightning import run_lightning

HELP = "combine task vectors, choose the coefficient, edit the model and prove it on control tasks"


def start(words: list[str], as_json: bool) -> bool:
    """Run it."""
    return run_lightning("edit", words, as_json, HELP)
