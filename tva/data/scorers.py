"""Find what scores texts: swear words, a file of words, a pattern, labeled texts, Detoxify, or any function."""

from __future__ import annotations

import functools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tva.data.loading import expand, load_splits
from tva.errors import some
from tva.plugins import installed, load

GROUP = "tva.scorers"
Scorer = Callable[[list[str]], Sequence[float]]

# Beginnings of common English swear words and insults. A crude measure, which needs no model and no network.
SWEARING = "arsehole asshole bastard bitch bullshit cocksuck crap cunt damn dick douche dumbass faggot fuck goddamn hoe"
SWEARING += " idiot jackass moron motherfuck nigg piss prick pussy retard scumbag shit slut twat whore"


def word_scorer(words: Sequence[str], beginnings: bool = False) -> Scorer:
    """Return a scorer that is 1 where a text holds one of some words, else 0.

    Args:
        words: Words or phrases, matched whole and in any case.
        beginnings: Whether they are beginnings of words instead.

    Example:
        >>> word_scorer(["hell"])(["Go to HELL!", "hello"])
        [1.0, 0.0]
    """
    end = "" if beginnings else r"(?!\w)"
    return regex_scorer(rf"(?i)(?<!\w)(?:{'|'.join(map(re.escape, words))}){end}")


def regex_scorer(pattern: str) -> Scorer:
    """Return a scorer that is 1 where a regular expression is found in a text, else 0.

    Raises:
        ValueError: The pattern is not a regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"The scorer regex:{pattern} is not a regular expression: {error}.") from error
    return functools.partial(_matches, compiled)


def _matches(pattern: re.Pattern[str], texts: list[str]) -> list[float]:
    return [float(pattern.search(text) is not None) for text in texts]


def detoxify_scorer(model: str = "original") -> Scorer:
    """Return the toxicity of texts by Detoxify, in [0, 1].

    Args:
        model: Detoxify's ``original``, ``unbiased`` or ``multilingual``, which it downloads when first used.

    Raises:
        ValueError: Detoxify is not installed.
    """
    try:
        from detoxify import Detoxify
    except ImportError as error:
        raise ValueError(
            "The scorer detoxify needs the package: pip install 'tva[detoxify]'. Without it, 'swearing' counts texts "
            "with swear words."
        ) from error
    network = Detoxify(model)
    return lambda texts: network.predict(texts)["toxicity"]


def _of_file(path: str) -> Scorer:
    file = Path(os.path.expandvars(os.path.expanduser(path)))
    if not file.is_file():
        raise FileNotFoundError(f"The scorer words:{path} needs a file with one word or phrase per line; found none.")
    words = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not words:
        raise ValueError(f"The scorer words:{path} needs one word or phrase per line; the file holds none.")
    return word_scorer(words)


_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


def learned_scorer(texts: Sequence[str], counts: Sequence[bool]) -> Scorer:
    r"""Return a scorer that estimates from labeled texts how likely a text is one of those that count, in [0, 1].

    Naive Bayes on the words that are in a text, each once, with half an example more of each; both kinds of texts are
    taken to be as frequent, and words that no labeled text has say nothing.

    Args:
        texts: The labeled texts.
        counts: Of each whether it is of the kind that is counted.

    Source: Bernoulli naive Bayes without absent words; Manning et al., "Introduction to Information Retrieval", 13.3.

    Example:
        >>> score = learned_scorer(["you fool", "you friend"], [True, False])
        >>> [round(found, 3) for found in score(["a fool", "a friend", "you"])]
        [0.75, 0.25, 0.5]
    """
    totals, found = [0, 0], [Counter[str](), Counter[str]()]
    for text, counted in zip(texts, counts, strict=True):
        totals[counted] += 1
        found[counted].update(_words(text))

    def log_share(word: str, kind: int) -> float:
        return math.log((found[kind][word] + 0.5) / (totals[kind] + 1))

    odds = {word: log_share(word, 1) - log_share(word, 0) for word in found[0] | found[1]}

    def score(texts: list[str]) -> list[float]:
        sums = [sum(odds.get(word, 0.0) for word in sorted(_words(text))) for text in texts]
        return [1 / (1 + math.exp(-max(-500.0, total))) for total in sums]

    return score


def _words(text: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(text)}


def _learned(argument: str) -> Scorer:
    """Read labeled texts for `learned_scorer` from ``FILE:LABEL,LABEL``.

    Raises:
        ValueError: A label is not one of the file's.
    """
    path, _, names = argument.rpartition(":")
    (table,) = load_splits({"train": expand(path)}).values()
    known = getattr((table.features or {}).get("label"), "names", None)
    labels = [known[label] if known else str(label) for label in table["label"]]
    wanted = {name.strip() for name in names.split(",")}
    if unknown := sorted(wanted - set(labels)):
        raise ValueError(
            f"The scorer learned:{argument} counts the labels {some(unknown)}; {path} has {some(sorted(set(labels)))}."
        )
    return learned_scorer(list(table["text"]), [label in wanted for label in labels])


# Scorers by name: what is behind a colon, as in ``words:insults.txt``, is their argument.
SCORERS: dict[str, Callable[..., Scorer]] = {
    "swearing": lambda: word_scorer(SWEARING.split(), beginnings=True),
    "words": _of_file,
    "regex": regex_scorer,
    "learned": _learned,
    "detoxify": detoxify_scorer,
}


def find_scorer(name: str) -> Scorer:
    """Find what scores texts.

    Args:
        name: ``swearing``; ``words:FILE``; ``regex:PATTERN``; ``learned:FILE:LABEL,…``, by `learned_scorer` from a
            table with the columns ``text`` and ``label``; ``detoxify`` or ``detoxify:MODEL``; an entry point in the
            group ``tva.scorers``; or the dotted path of a function that takes a list of texts and returns as many
            numbers, such as ``my_package.score``.

    Raises:
        ValueError: There is none of that name, or it is not a function.

    Example:
        >>> find_scorer("swearing")(["Damn it.", "How do you do?"])
        [1.0, 0.0]
    """
    kind, colon, argument = name.partition(":")
    points = installed(GROUP)
    if kind in SCORERS:
        needs = {"words": "FILE", "regex": "PATTERN", "learned": "FILE:LABEL,…"}.get(kind)
        if (needs and (not argument or (":" in needs and ":" not in argument))) or (kind == "swearing" and colon):
            raise ValueError(f"The scorer {name!r} must be {kind}{f':{needs}' if needs else ''}.")
        return SCORERS[kind](argument) if argument else SCORERS[kind]()
    if name in points:
        found = points[name].load()
    elif "." in name:
        found = load(name)
    else:
        known = sorted([*SCORERS, *points])
        raise ValueError(
            f"There is no scorer {name!r}; there are {some(known, 20)}. Name one of these, or a function of your own "
            f"by its path, such as my_package.score."
        )
    if not callable(found) or isinstance(found, type):
        raise ValueError(f"The scorer {name!r} must be a function of a list of texts; found {found!r}.")
    return found


class TextScore:
    """A scorer with its name and direction, checked at every call.

    Args:
        name: As `find_scorer` takes it.
        higher_is_better: Whether large scores are good; by default as the scorer's attribute says, else no.
    """

    def __init__(self, name: str, higher_is_better: bool | None = None) -> None:
        self.name, self.scorer = name, find_scorer(name)
        own = getattr(self.scorer, "higher_is_better", False)
        self.higher_is_better = bool(own if higher_is_better is None else higher_is_better)

    def __call__(self, texts: list[str]) -> list[float]:
        """Score texts.

        Raises:
            ValueError: The scorer did not return one finite number per text.
        """
        returned: Any = self.scorer(texts)
        try:
            found = [float(value) for value in returned]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The scorer {self.name!r} must return one number per text; it returned {returned!r:.80}."
            ) from error
        if len(found) != len(texts) or not all(map(math.isfinite, found)):
            raise ValueError(
                f"The scorer {self.name!r} must return one finite number per text; for {len(texts)} texts it returned "
                f"{len(found)} numbers, {sum(map(math.isfinite, found))} of them finite."
            )
        return found
