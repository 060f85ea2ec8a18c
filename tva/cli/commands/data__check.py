"""The command ``tva data check``."""

from __future__ import annotations

from tva.console import make_console, print_line
from tva.data.check import DataCheck, check_data

HELP = "check a copy of a named data set: splits, columns, classes, sizes, and what training and test share"
ORDER = "name"


def run(name: str, path: str) -> DataCheck:
    """Check a copy of a named data set: splits, columns, classes, sizes, and what training and test share.

    Args:
        name: A preset's name, such as ``dtd``; ``tva data`` lists them.
        path: The copy: a folder, a file, or a path with ``{split}`` in place of the split's name.
    """
    return check_data(name.removeprefix("preset:"), path)


def show(result: DataCheck) -> None:
    """Print the sizes, what is wrong, and what is worth knowing."""
    console = make_console()
    sizes = ", ".join(f"{split} {count:,}" for split, count in result.examples.items())
    print_line(console, f"{result.name} at {result.path}: {sizes}")
    for problem in result.problems:
        print_line(console, f"wrong: {problem}", "bold red:")
    for note in result.notes:
        print_line(console, f"note: {note}")
    if not result.problems:
        print_line(console, "it is what the paper's code reads" + shares(result))


def shares(result: DataCheck) -> str:
    """Say whether training and test share something, where that was looked for."""
    return "" if result.shared != 0 else f", and training and test share no {result.what}"


def finish(result: DataCheck) -> bool:
    """Return whether nothing is missing or wrong."""
    return not result.problems
