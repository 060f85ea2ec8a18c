"""Help in plain words: no markup, and types as people name them."""

from __future__ import annotations

import re
from typing import Any

from jsonargparse import DefaultHelpFormatter

_PLAIN = [
    (r"``", ""),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"Union\[str, PathLike\[str\], null\]|str \| PathLike\[str\]( \| null)?", "path"),
    (r"Optional\[(.*?)\](?=[,)]( default|$)|\))", r"\1"),
    (r"Union\[([^\[\]]*), null\]", r"\1"),
    (r" \| null(?=[,)])", ""),
    (r"(?:Mapping|dict)\[str, (path|str|float|int)\]", r"\1 by name"),
    (r"(?:Sequence|list)\[(path|str|float|int)\]", r"list of \1"),
    (r"Literal\[(.*?)\]", r"\1"),
    (r"list of path\b", "list of paths"),
    (r", default: null(?=[,)])", ""),
]


def plain(text: str) -> str:
    """Return a help text without markup, and with types as people name them.

    Example:
        >>> plain("Where ``a`` is. (type: Union[str, PathLike[str], null], default: null)")
        'Where a is. (type: path)'
        >>> plain("(required, type: Mapping[str, str | PathLike[str]])"), plain("(type: Optional[dict[str, str]])")
        ('(required, type: path by name)', '(type: str by name)')
    """
    for pattern, words in _PLAIN:
        text = re.sub(pattern, words, text)
    return text


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's formatter, in plain words."""

    def _expand_help(self, action: Any) -> str:
        return plain(super()._expand_help(action))
