"""The command ``tva vectors ls``."""

from __future__ import annotations

from pathlib import Path

from tva.console import counted, make_console, print_line, size_text
from tva.report.table import Column, print_table, words
from tva.vectors.listing import Listing, list_vectors

HELP = "list the task vectors in a folder, grouped by base"
ORDER = "folder"
run = list_vectors
COLUMNS = [
    words("task", lambda listed: listed.task),
    Column("step", lambda listed: "–" if listed.step is None else f"{listed.step:,}"),
    Column("norm", lambda listed: "–" if listed.norm is None else f"{listed.norm:.4g}"),
    words("encoding", lambda listed: listed.encoding),
    Column("size", lambda listed: size_text(listed.num_bytes)),
    words("written", lambda listed: listed.created and listed.created.replace("T", " ").replace("Z", "")),
]


def show(result: Listing) -> None:
    """Print one table per base."""
    console = make_console()
    name = words("vector", lambda listed: Path(listed.path).relative_to(result.folder))
    for base, vectors in result.bases.items():
        print_line(console, f"base {base}")
        print_table(console, [name, *COLUMNS], vectors)
    for path, reason in result.damaged.items():
        print_line(console, f"damaged: {path}: {reason}", "bold red:")
    count = sum(map(len, result.bases.values()))
    print_line(
        console,
        f"{counted(count, 'task vector')} of {counted(len(result.bases), 'base')} in {result.folder}"
        + (f"; {counted(len(result.damaged), 'damaged file')}" if result.damaged else "")
        + (f"; {counted(result.others, 'other .safetensors file')} not listed" if result.others else ""),
    )
