"""The terminal: tables that keep their rows on one line when piped, progress bars that are quiet then."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def make_console() -> Console:
    """Make a console for tables."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process with status 1, which means something else here
            raise BrokenPipeError

    console = Piped()
    return console if console.is_terminal or console.is_jupyter else Piped(width=10_000)


def progress(items: Sequence[T], description: str) -> Iterable[T]:
    """Iterate with a progress bar on the standard error; without one where that is no terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if not console.is_terminal:
        return items
    return track(items, description=description, console=console, transient=True)


@contextmanager
def counting(description: str | None) -> Iterator[Callable[[float], None]]:
    """Give a function that counts one more of so many, on a bar as `progress` has it.

    Args:
        description: Before the bar; None draws none.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if description is None or not console.is_terminal:
        yield lambda total: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda total: bar.update(task, advance=1, total=total if math.isfinite(total) else None)


def size_text(num_bytes: float) -> str:
    """Write a size for people.

    Example:
        >>> size_text(47848), size_text(3.33e6)
        ('47.8 kB', '3.33 MB')
    """
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
