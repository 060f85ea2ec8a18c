"""The package's own error classes, and the words of their messages."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class MismatchError(ValueError):
    """Two state dicts or task vectors that must have the same keys, shapes or base do not."""


class NoEffectError(ValueError):
    """An edit changed no element: its task vector is zero, or vanishes in rounding to the base's dtype."""


def some(items: Iterable[object], limit: int = 3) -> str:
    """List at most ``limit`` items for an error message, with a count of the rest; long texts are cut.

    Example:
        >>> some(["a", "b", "c", "d", "e"])
        "'a', 'b', 'c' and 2 more"
    """
    items = list(items)
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(repr(_cut(item)) if isinstance(item, str) else _cut(str(item)) for item in items[:limit]) + rest


def _cut(text: str, most: int = 200) -> str:
    """Cut a long text in its middle: the ends tell paths and tensor names apart."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[1 - most // 2 :]}"


class RecipeError(ValueError):
    """A recipe cannot be read; the message shows it with a caret under the place."""


class HarnessError(ValueError):
    """An edit with coefficient 0 did not score as the base did: what is measured is not only the edit."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a sentence that names the nearest known word, with a space before it, or an empty string.

    Example:
        >>> did_you_mean("tise", ["ties", "dare"])
        " Did you mean 'ties'?"
    """
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def is_local(name: str) -> bool:
    """Return whether a name can only be that of a file or folder here: the hub has ``owner/name``, or one word.

    Example:
        >>> is_local("./bert"), is_local("runs/digits/model"), is_local("bert-base")
        (True, True, False)
    """
    is_path = name.startswith((".", "/", "~", "$")) or name.endswith("/") or name.count("/") > 1
    return is_path or ("/" in name and Path(name).parent.is_dir())


def nearby(path: Path) -> str:
    """Return a sentence on a file of a similar name that is there, for an error message."""
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist."
    near = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1, cutoff=0.5)
    return f" Did you mean {path.parent / near[0]}?" if near else ""
