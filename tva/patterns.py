"""Regular expressions of users and files, matched against names from files without backtracking for ever."""

import functools
import math
import re
import sys
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as kinds
    from re import _parser as parser
else:
    import sre_constants as kinds
    import sre_parse as parser

STEPS = 10**8  # of one match, as `_ways` counts them: about a second


class Pattern:
    r"""A regular expression that is refused, when it meets a name, where matching the name could take forever.

    Args:
        pattern: The expression.
        where: Option, or file and field, for errors.
        steps: That matching one name may take, as `_ways` counts them.

    Raises:
        ValueError: It is not a regular expression.

    Example:
        >>> Pattern(r"^head\.", "exclude").search("head.weight") is not None
        True
        >>> Pattern("(a|a)+b", "exclude").search("a" * 50)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: exclude holds '(a|a)+b', which could take forever to match a name of 50 characters. ...
    """

    def __init__(self, pattern: str, where: str, steps: float = STEPS) -> None:
        self.pattern, self.where, self.steps = pattern, where, steps
        try:
            self._compiled = re.compile(pattern)
            self._parsed: Any = parser.parse(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            shown = pattern if len(pattern) <= 80 else f"{pattern[:79]}…"
            raise ValueError(f"{where} holds {shown!r}, which is not a regular expression: {error}.") from error
        self._longest = -1

    def search(self, name: str) -> re.Match[str] | None:
        """Search a name."""
        return self._checked(name).search(name)

    def fullmatch(self, name: str) -> re.Match[str] | None:
        """Match a whole name."""
        return self._checked(name).fullmatch(name)

    def subn(self, replacement: str, name: str) -> tuple[str, int]:
        """Replace every match in a name; return the new name and the number of matches."""
        return self._checked(name).subn(replacement, name)

    def _checked(self, name: str) -> re.Pattern[str]:
        if len(name) > self._longest:
            starts = 1 if self._parsed and self._parsed[0] == (kinds.AT, kinds.AT_BEGINNING) else len(name) + 1
            ways, loose = _ways(self._parsed, len(name))
            if starts * ways / math.factorial(min(loose, 20)) > self.steps:
                shown = self.pattern if len(self.pattern) <= 80 else f"{self.pattern[:79]}…"
                raise ValueError(
                    f"{self.where} holds {shown!r}, which could take forever to match a name of {len(name)} "
                    f"characters. Write it without a repetition in a repetition and with fewer of them."
                )
            self._longest = len(name)
        return self._compiled


def _ways(parsed: Any, length: int) -> tuple[float, int]:
    """Bound in how many ways a parsed expression can match beginnings of a text of some length.

    Returns:
        The ways, which are the steps that a match by backtracking takes; and how many repetitions without an end they
        come from: those share the text, so that n of them divide it in length ** n / n! ways.
    """
    ways, loose = 1.0, 0
    for kind, value in parsed:
        inner = 0
        if kind in (kinds.MAX_REPEAT, kinds.MIN_REPEAT):
            least, most, repeated = value
            each, inner = _ways(repeated, length)
            width = max(1, repeated.getwidth()[0])
            counts = max(1, min(int(most), length // width) - least + 1)
            if each > 1 and most > 1:
                each = each ** min(int(most), length + 1) if each < 1e9 and min(int(most), length) < 60 else math.inf
                inner = 0
            each, inner = each * counts, inner + (counts > 2)
        elif kind is kinds.BRANCH:
            parts = [_ways(part, length) for part in value[1]]
            each, inner = sum(part[0] for part in parts), max(part[1] for part in parts)
        elif kind is kinds.SUBPATTERN:
            each, inner = _ways(value[-1], length)
        elif kind in (kinds.ASSERT, kinds.ASSERT_NOT):
            each, inner = _ways(value[1], length)
        elif kind is kinds.GROUPREF:
            each = float(length + 1)
        elif kind is kinds.GROUPREF_EXISTS:
            each = sum(_ways(part, length)[0] for part in value[1:] if part)
        else:  # one character, a place, or, from Python 3.11 on, a group that is not tried again
            each = 1.0 if kind in _SIMPLE else math.inf
        ways, loose = ways * each, loose + inner
    return ways, loose


_SIMPLE = {kinds.LITERAL, kinds.NOT_LITERAL, kinds.ANY, kinds.IN, kinds.AT}


@functools.lru_cache(maxsize=1024)
def pattern_of(pattern: str, where: str, steps: float = STEPS) -> Pattern:
    """Return a `Pattern`, the same one for the same arguments."""
    return Pattern(pattern, where, steps)
