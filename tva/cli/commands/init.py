"""The command ``tva init``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from tva.checkpoints import atomic_path
from tva.console import make_console, print_line

HELP = "write a commented YAML file to start from: fit, forget, add, analogy or merge"
ORDER = "kind"
TEMPLATES = Path(__file__).parents[1] / "templates"
COMMANDS = {"fit": "fit", "merge": "compose"}  # of the others: edit


def run(
    kind: Literal["fit", "forget", "add", "analogy", "merge"], output: str | os.PathLike[str] | None = None
) -> Path:
    """Write a commented YAML file to start from.

    Args:
        kind: What the file is for.
        output: Where to write the file; by default KIND.yaml. An existing file is never replaced.

    Raises:
        FileExistsError: The file exists already.
    """
    path = Path(f"{kind}.yaml" if output is None else output)
    if path.exists():
        raise FileExistsError(f"{path} is there already and is not replaced. Name another file with --output.")
    text = (TEMPLATES / f"{kind}.yaml").read_text(encoding="utf-8")
    with atomic_path(path) as temporary:
        temporary.write_text(text.replace("{file}", str(path)), encoding="utf-8")
    return path


def show(result: Path, kind: str) -> None:
    """Print what was written and what to do with it."""
    command = f"tva {COMMANDS.get(kind, 'edit')} --config {result}"
    print_line(make_console(), f"wrote {result}: change what is marked with CHANGE, then run {command}")
