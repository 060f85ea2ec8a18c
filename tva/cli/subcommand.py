"""What the commands that run a Trainer do before Lightning is imported, which takes seconds."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Collection

from tva.cli.config_files import check_files, check_paths, check_recipe, config_files, with_place
from tva.cli.explain import explain
from tva.cli.shipped_help import format_help, shipped


def run_subcommand(command: str, words: list[str], as_json: bool, about: str) -> bool:
    """Run a subcommand of LightningCLI, or print its help; mistakes in a config are found before Lightning is imported.

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
    if "LOCAL_RANK" not in os.environ:
        print(f"tva {command}: loading …", file=sys.stderr, flush=True)
    from tva.cli.configs import check_configs

    check_configs(words)
    files = config_files(words)
    if command in shipped():
        flags = _flags(command)
        options = {name.partition(".")[0] for name in flags} | {command}
        for word in words:
            _check_word(word, command, options, flags)
        check_files(files, options)
    if command == "edit":
        check_recipe(files, words)
        check_paths(files, words)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    from tva.cli.lightning import run_lightning

    try:
        return run_lightning(command, words, as_json, about)
    except ValueError as error:
        placed = with_place(str(error), words)
        if placed == str(error):
            raise
        raise ValueError(placed) from error


def _flags(command: str) -> set[str]:
    shown = [option for _, options in shipped()[command]["groups"] for option, _ in options]
    return {name for option in shown for name in re.findall(r"--([\w.]+)", option)}


def _check_word(word: str, command: str, options: Collection[str], flags: Collection[str]) -> None:
    """Check that a word of the command line is an option, or begins one, if it begins like one."""
    found = re.match(r"--([^\s=.+]+)", word)
    if found and found[1] not in options and not any(flag.startswith(found[1]) for flag in flags):
        raise ValueError(explain(f"unrecognized arguments: {word}", command, sorted(flags)))


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    """Whether a log message is not one of Lightning's tips to install another product."""
    return "Tip: For seamless" not in record.getMessage()
