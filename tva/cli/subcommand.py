"""What the commands that run a Trainer do before Lightning is imported, which takes seconds."""

from __future__ import annotations

from tva.cli.shipped_help import format_help, shipped


def run_subcommand(command: str, words: list[str], as_json: bool, about: str) -> bool:
    """Run a subcommand of LightningCLI, or print its help.

    Args:
        command: Such as ``"fit"``.
        words: The arguments after it.
        as_json: Print what was reached as JSON only.
        about: What the command does, for its help.

    Returns:
        True, unless the command ends the process.
    """
    described = shipped().get(command) if words in (["-h"], ["--help"]) else None
    if described is not None:
        print(format_help(described))
        return True
    from tva.cli.lightning import run_lightning

    return run_lightning(command, words, as_json, about)
