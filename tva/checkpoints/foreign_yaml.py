"""YAML of unknown origin within limits: aliases can make a gigabyte of a few lines."""

from pathlib import Path
from typing import Any

import yaml

from tva.checkpoints.foreign import read_bytes

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
BYTES = 2**24  # of a configuration
NODES = 100_000  # of one, each as often as an alias repeats it
DEPTH = 100
DIGITS = 300  # of a number; a float has at most 309


class LimitError(yaml.YAMLError):
    """Valid YAML that exceeds the limits."""


TAG = "tag:yaml.org,2002:"


def _check_tag(event: yaml.Event) -> None:
    """Refuse a tag that does not fit its value: libraries raise arbitrary errors on it."""
    tag = getattr(event, "tag", None)
    if tag in (None, "!", f"{TAG}str", f"{TAG}map", f"{TAG}seq"):
        return
    scalar = isinstance(event, yaml.ScalarEvent)
    if not scalar or yaml.SafeLoader("").resolve(yaml.ScalarNode, event.value, (True, False)) != tag:
        raise LimitError(f"the tag {tag:.80} is not of the value behind it. Leave it out")


def check_yaml(text: str) -> None:
    """Refuse YAML that nests deeply, that aliases expand or make recursive, or whose numbers have too many digits.

    Raises:
        yaml.YAMLError: It is refused, or is not YAML.

    Example:
        >>> check_yaml("a: &a [1, 2]\\nb: *a")
        >>> check_yaml("a: &a [*a]")
        Traceback (most recent call last):
        tva.checkpoints.foreign_yaml.LimitError: the alias '*a' is in what it stands for
    """
    total, open_nodes = 0, list[tuple[str | None, int]]()  # anchor, and the nodes before it
    sizes: dict[str, tuple[int, int]] = {}  # of anchors: nodes and depth
    depths: list[int] = []  # of what is inside each open node
    for event in yaml.parse(text, Loader=LOADER):
        deep = 1
        if (getattr(event, "tag", None) or "").startswith("tag:yaml.org,2002:python/"):
            raise LimitError(f"the tag {event.tag} is of Python's objects")
        _check_tag(event)
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            open_nodes.append((event.anchor, total))
            depths.append(1)
            total += 1
            deep = 0
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            anchor, before = open_nodes.pop()
            deep = depths.pop() + 1
            if anchor is not None:
                sizes[anchor] = total - before, deep
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in [anchor for anchor, _ in open_nodes]:
                raise LimitError(f"the alias '*{event.anchor}' is in what it stands for")
            size, deep = sizes.get(event.anchor, (1, 1))
            total += size
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1, 1
            if event.implicit[0] and len(event.value) > DIGITS and event.value.strip("+-_.0123456789") == "":
                raise LimitError(f"it has a number of {len(event.value)} digits; at most {DIGITS} are read")
        if depths:
            depths[-1] = max(depths[-1], deep)
        if len(depths) > DEPTH or deep > DEPTH:
            raise LimitError(f"it is nested more than {DEPTH} deep")
        if total > NODES:
            raise LimitError(f"it has more than {NODES:,} values, counting each as often as an alias repeats it")


def read_yaml_text(path: Path) -> str:
    """Read a YAML file as text that `check_yaml` accepts.

    Raises:
        ValueError: It is not a regular file, is too large, is not text, or is refused by `check_yaml`.
    """
    try:
        text = read_bytes(path, BYTES).decode()
        check_yaml(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}. Save it as one.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = f"{error.problem or error.context}. Check the indentation, quotes and brackets here and above."
        if mark is not None and "\t" in (text.split("\n")[mark.line : mark.line + 1] or [""])[0]:
            problem = "a tab is where only spaces may be. Replace it with spaces."
        raise ValueError(f"{path}{where}: not YAML that can be read: {problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML that can be read: {error}.") from error
    return text


def read_yaml(path: Path) -> Any:
    """Read a YAML file of one document as plain values.

    Raises:
        ValueError: It is refused; see `read_yaml_text`.
    """
    try:
        return yaml.load(read_yaml_text(path), Loader=LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        shown = " ".join(str(error).split())[:300]
        raise ValueError(shown if shown.startswith(str(path)) else f"{path} is not YAML: {shown}.") from error
