"""The command ``tva fit``."""

from __future__ import annotations

from tva.cli.subcommand import run_subcommand

HELP = "fine-tune a model; TaskVectorCallback writes task vectors next to its checkpoints"


def start(words: list[str], as_json: bool) -> bool:
    """Run it."""
    return run_subcommand("fit", words, as_json, HELP)
