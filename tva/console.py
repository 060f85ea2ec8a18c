"""The terminal: plain one-line rows and no progress bar when piped; text from files is shown escaped."""

from __future__ import annotations

import itertools
import math
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
PIPED_WIDTH = 80  # of tables, where the terminal's width is unknown
_wide: ContextVar[bool] = ContextVar("wide", default=False)
# The C0 and C1 control characters, and those that reverse the direction of writing.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


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


@contextmanager
def wide_tables(wide: bool) -> Iterator[None]:
    """Print every column of every table, as ``--wide`` asks."""
    before = _wide.set(wide or _wide.get())
    try:
        yield
    finally:
        _wide.reset(before)


def table_width(console: Console) -> int | None:
    """Return how many characters wide a table may be: 80 in a pipe unless ``COLUMNS`` says; None without a limit."""
    if _wide.get() or console.is_jupyter:
        return None
    columns = os.environ.get("COLUMNS", "")
    return console.width if console.is_terminal else int(columns) if columns.isdecimal() else PIPED_WIDTH


def progress(items: Sequence[T], description: str) -> Iterator[T]:
    """Iterate with a progress bar on the standard error; where that is no terminal, with a line every 30 s."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, description=description, console=console, transient=True)
        return
    begin_pace()
    for number, item in enumerate(items):
        say_where(lambda number=number: f"{description}: {number:,} of {len(items):,}")
        yield item


@contextmanager
def counting(description: str | None) -> Iterator[Callable[[float], None]]:
    """Return a function that advances a progress bar by one, as `progress` shows it.

    Args:
        description: Before the bar; None draws none.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if description is None:
        yield lambda total: None
        return
    if not console.is_terminal:
        done = itertools.count(1)
        yield lambda total: say_where(_batches, description, next(done), total)
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda total: bar.update(task, advance=1, total=total if math.isfinite(total) else None)


def _batches(description: str, done: int, total: float) -> str:
    return f"{description}: batch {done:,}" + (f" of {total:,.0f}" if math.isfinite(total) else "")


EVERY_S = 30.0  # between two lines about long work that runs without a terminal
_said_at = time.monotonic()


def begin_pace() -> None:
    """Let the next line about long work come after 30 s."""
    global _said_at
    _said_at = time.monotonic()


def say_where(describe: Callable[..., str], *facts: Any) -> None:
    """Print where long work is to the standard error: a line every 30 s, where that is no terminal.

    Args:
        describe: Returns the line, of ``facts``; called only if one is due.
        facts: What it is called with.
    """
    if time.monotonic() - _said_at < EVERY_S or sys.stderr.isatty():
        return
    begin_pace()
    print(f"{time.strftime('%H:%M:%S')} {describe(*facts)}", file=sys.stderr, flush=True)


@contextmanager
def reporting(describe: Callable[[], str]) -> Iterator[None]:
    """Print a line to the standard error every 30 s while the block waits for other processes."""
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(EVERY_S):
            print(f"{time.strftime('%H:%M:%S')} {describe()}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def printable(text: str, most: int = 300, newline: str = "") -> str:
    r"""Return text from a file as a terminal can show it: control characters escaped, and cut if it is long.

    Args:
        text: Any text.
        most: Characters at most.
        newline: ``"\n"`` keeps line breaks.

    Example:
        >>> print(printable("a\x1b[2Jb"), printable("x" * 10, most=8))
        a\x1b[2Jb xxxxxxx…
    """
    text = text if len(text) <= most else text[: most - 1] + "…"
    return CONTROL.sub(lambda found: found[0] if found[0] == newline else ascii(found[0])[1:-1], text)


def print_line(console: Console, text: str, style: str = "", wrap: bool = False) -> None:
    """Print one line as it is: no markup is read in it, and control characters are escaped.

    Args:
        console: Where to.
        text: The line.
        style: Such as ``"bold"``, or ``"bold red:"`` to apply it up to the first colon only.
        wrap: Break it where the terminal ends.
    """
    from rich.text import Text

    line = Text(printable(text, most=100_000))
    style, first, _ = style.partition(":")
    line.stylize(style, 0, text.index(":") if first else None)
    console.print(line, soft_wrap=not wrap)


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Print names with what they are, one a line; in a terminal long ones go on below themselves."""
    left = max(map(len, facts), default=0) + 2
    for name, text in facts.items():
        width = max(20, console.width - left) if console.is_terminal else 10**6
        lines = textwrap.wrap(printable(text), width, break_on_hyphens=False) or [""]
        for at, line in enumerate(lines):
            print_line(console, f"{'' if at else name:<{left}}{line}".rstrip())


def counted(number: int, what: str) -> str:
    """Return a number with its noun.

    Example:
        >>> counted(1, "vector"), counted(1200, "vector")
        ('1 vector', '1,200 vectors')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def size_text(num_bytes: float) -> str:
    """Write a size for people.

    Example:
        >>> size_text(47848), size_text(3.33e6), size_text(1.2e13)
        ('47.8 kB', '3.33 MB', '12 TB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
