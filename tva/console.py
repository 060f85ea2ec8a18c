"""The terminal: tables that keep their rows on one line when piped, progress bars that are quiet then."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def make_console() -> Console:
    """Make a console for tables."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=10_000)


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
