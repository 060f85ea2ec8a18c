"""The words of a command line, before they are parsed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def replaced_argv(words: Sequence[str]) -> Iterator[None]:
    """Let LightningCLI, and the processes that DDP starts, read these words from where they expect them."""
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before


def join_values(words: Iterable[str]) -> list[str]:
    """Join values that begin with a minus to their options; otherwise argparse takes them for options.

    Example:
        >>> join_values(["--recipe", "-digits", "--scaling_coef", "-1e-3", "--plan", "-h"])
        ['--recipe=-digits', '--scaling_coef=-1e-3', '--plan', '-h']
    """
    joined: list[str] = []
    for word in words:
        before = joined[-1] if joined else ""
        if re.match(r"-[^-]", word) and word != "-h" and re.fullmatch(r"--[^=\s]+", before):
            joined[-1] = f"{before}={word}"
        else:
            joined.append(word)
    return joined


def take_flag(words: Sequence[str], flag: str) -> tuple[list[str], bool]:
    """Take a flag out of words, and return whether it was set.

    Example:
        >>> take_flag(["a", "--json", "b"], "--json"), take_flag(["--json=false"], "--json")
        ((['a', 'b'], True), ([], False))
    """
    left, found = [], False
    for at, word in enumerate(words):
        if word in (flag, f"{flag}=true", f"{flag}=false"):
            found = not word.endswith("false") and words[at + 1 : at + 2] != ["false"]
        elif not (word in ("true", "false") and words[at - 1 : at] == [flag]):
            left.append(word)
    return left, found


def take_value(words: Sequence[str], option: str) -> tuple[list[str], str | None]:
    """Take an option with its value out of words, and return the value; of several the last.

    Raises:
        ValueError: It has no value.

    Example:
        >>> take_value(["--a", "1", "--b=2"], "--a"), take_value(["--b=2"], "--a")
        ((['--b=2'], '1'), (['--b=2'], None))
    """
    left: list[str] = []
    found, rest = None, list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith(f"{option}="):
            found = word.partition("=")[2]
        elif word == option:
            if not rest:
                raise ValueError(f"{option} needs a value.")
            found = rest.pop(0)
        else:
            left.append(word)
    return left, found


def name_words(words: list[str], order: Sequence[str], flags: Sequence[str], usage: str) -> list[str]:
    """Put names before words that have none, in order, and values after flags without one.

    Example:
        >>> name_words(["a", "--json", "b", "--by", "layer"], ["vectors…"], ["json"], "")
        ['--json=true', '--by', 'layer', '--vectors=["a", "b"]']
    """
    free, named = [], []
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            free.append(word)
        elif word[2:] in flags and _is_alone(words, order):
            named.append(f"{word}=true")
        else:
            named.append(word)
            alone = "=" in word or word in ("-h", "--help", "--print_config") or not words or words[0].startswith("--")
            named += [] if alone else [words.pop(0)]
    for name in order if free else ():
        many = name.endswith("…")
        named += [f"--{name[:-1]}={json.dumps(free)}"] if many else [f"--{name}={free.pop(0)}"] if free else []
        free = [] if many else free
    if free:
        why = "" if order else ": every value follows its option"
        raise ValueError(f"{free[0]!r} is unexpected{why}; usage: {usage}")
    return named


def _is_alone(after: Sequence[str], order: Sequence[str]) -> bool:
    """Whether a flag has no value; where words need no name, only true and false can be one."""
    return after[:1] not in (["true"], ["false"]) if order else not after or after[0].startswith("--")
