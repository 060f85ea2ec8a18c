"""The help of the commands that run a Trainer, printed without importing Lightning, which takes seconds.

``lightning_help.json.xz`` holds their options as the parsers describe them; ``python -m tva.cli.shipped_help`` writes
it anew. It is used only with the version of Lightning that it was made from.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import textwrap
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

FILE = Path(__file__).with_name("lightning_help.json.xz")
COMMANDS = ("edit", "fit", "predict", "test", "validate")
INDENT = 24  # of the explanations, as argparse has it


@cache
def shipped() -> dict[str, Any]:
    """Return the descriptions by command; empty if they were made from another version of Lightning."""
    stored = read()
    return stored["commands"] if stored["lightning"] == version("lightning") else {}


def read() -> dict[str, Any]:
    """Return what the file holds, as `generate` returned it."""
    stored: dict[str, Any] = json.loads(lzma.decompress(FILE.read_bytes()))
    return stored


def format_help(described: dict[str, Any], width: int | None = None) -> str:
    """Return the help text of a command.

    Args:
        described: Usage, description and groups of options, as `describe` returns them.
        width: Characters a line; by default those of the terminal, or ``COLUMNS``.
    """
    width = max(40, (width or shutil.get_terminal_size().columns) - 2)
    lines = [described["usage"], "", textwrap.fill(described["description"], width)]
    for title, options in described["groups"]:
        lines += ["", f"{title}:"]
        for option, explanation in options:
            wrapped = textwrap.wrap(explanation, width - INDENT) or [""]
            fits = len(option) <= INDENT - 4
            first = f"  {option:<{INDENT - 4}}  {wrapped.pop(0)}" if fits else f"  {option}"
            lines += [first.rstrip(), *(" " * INDENT + line for line in wrapped)]
    return "\n".join(lines)


def describe(text: str) -> dict[str, Any]:
    """Return usage, description and groups of options of a help text that argparse wrapped at no width.

    Example:
        >>> describe("usage: tva x\\n\\nDo it.\\n\\noptions:\\n  --output OUTPUT\\n" + " " * 24 + "Where.")["groups"]
        [['options', [['--output OUTPUT', 'Where.']]]]
    """
    usage, description, *blocks = text.strip().split("\n\n")
    groups = []
    for block in blocks:
        title, *lines = block.split("\n")
        options: list[list[str]] = []
        for line in lines:
            if line.startswith(" " * INDENT):
                options[-1][1] = f"{options[-1][1]} {line.strip()}".strip()
            elif line.startswith("  -"):
                option, _, explanation = line.strip().partition("  ")
                options.append([option, explanation.strip()])
        if options:
            groups.append([title.rstrip(":"), options])
    return {"usage": usage, "description": " ".join(description.split()), "groups": groups}


def generate() -> dict[str, Any]:
    """Return what the file holds, from the parsers themselves."""
    from tva.cli.lightning import make_parser

    with patch.dict(os.environ, COLUMNS="100000"):
        texts = {command: make_parser(command).format_help() for command in COMMANDS}
    return {
        "lightning": version("lightning"),
        "commands": {command: describe(_plain(text)) for command, text in texts.items()},
    }


def _plain(text: str) -> str:
    """Return help without the markup of Lightning's docstrings, and classes by the names that YAML takes too."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "").replace("\b", "")
    text = text.replace("lightning.pytorch.trainer.trainer.Trainer.", "").replace("lightning.pytorch.core.", "")
    return re.sub(r"(?<=known subclasses: )[\w., ]+", lambda found: re.sub(r"\b(\w+\.)+", "", found[0]), text)


if __name__ == "__main__":
    FILE.write_bytes(lzma.compress(json.dumps(generate()).encode(), preset=lzma.PRESET_EXTREME | 9))
