"""The words of a command line: what is made of them before they are parsed, and what is said of wrong ones."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

MAPPING = r"(?:<class ')?(?:collections\.abc\.|typing\.)?(?:dict|Mapping)"
_TYPES = {
    "<class 'float'>": "a number",
    "<class 'int'>": "a whole number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
    "<class 'NoneType'>": "null",
}


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
    """Join values that begin with a minus to their options; argparse takes them for options else.

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


def name_words(words: list[str], order: Sequence[str], flags: Sequence[str], usage: str) -> list[str]:
    """Give names to words that have none, in order, and values to flags that stand alone.

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


def explain(problem: str, command: str, options: Collection[str], usage: str = "") -> str:
    """Say in one's own words what a parser found wrong; what is not known here stays as it is.

    Args:
        problem: The message of argparse or jsonargparse.
        command: Such as ``"compose"``.
        options: Names of the command's options, as far as they are known.
        usage: How the command is written, if it is short.

    Example:
        >>> print(explain("unrecognized arguments: --recpie a", "compose", ["recipe", "base"]))
        There is no option --recpie. Did you mean --recipe? 'tva compose --help' lists all.
        >>> print(explain("the following arguments are required: base, vectors", "compose", []))
        --base, --vectors must be given. 'tva compose --help' lists all options.
        >>> print(explain('Parser key "by":\\n  Expected a <class \\'int\\'>. Got value: x', "inspect", []))
        --by must be a whole number; found 'x'.
    """
    lists_all = f"'tva {command} --help' lists all"
    if found := re.match(r"(?:unrecognized arguments: |Option ')([^\s']+)", problem):
        word = found[1].partition("=")[0]
        if problem.startswith("unrec") and not word.startswith("-"):
            return f"{word!r} is unexpected: every value follows its option. {lists_all} options."
        name = word.lstrip("-").split(".")[0]
        near = difflib.get_close_matches(name, options, n=1)
        return f"There is no option --{name}." + (f" Did you mean --{near[0]}?" if near else "") + f" {lists_all}."
    if found := re.match(r"the following arguments are required: (.*)", problem):
        names = ", ".join(f"--{name}" for name in found[1].split(", "))
        return f"{names} must be given" + (f"; usage: {usage}" if usage else f". {lists_all} options.")
    if found := re.match(r"argument (--\S+): expected one argument", problem):
        return f"{found[1]} must be followed by a value."
    if found := re.match(r'Parser key "([^"]+)":\s*(.*)', problem, re.S):
        return _explain_value(found[1], found[2]) or problem
    return problem


def _explain_value(key: str, problem: str) -> str | None:
    """Say which values an option takes, and what it was given."""
    if found := re.fullmatch(r"Expected a (.*?)\. Got value: (.*)", problem, re.S):
        wanted, value = [found[1]], found[2]
    elif found := re.match(r"Does not validate against any of the Union subtypes\s+Subtypes: \[(.*)\]\n", problem):
        value = problem.rpartition("Given value: ")[2]
        wanted = re.split(r", (?=<class|typing|collections|dict|list|os)", found[1])
    else:
        return None
    if inner := re.fullmatch(r"NestedArg\(key='(.*)', val='(.*)'\)", value, re.S):
        key, value = f"{key}.{inner[1]}", inner[2]
        wanted = [re.sub(MAPPING + r"\[str, (.*)\]$", r"\1", each) for each in wanted]
    texts = [_TYPES.get(each) or re.sub(r"typing\.Literal\[(.*)\]", r"\1", each) for each in wanted]
    if any(re.match(MAPPING + r"(\[|'>|$)", each) for each in wanted):
        return f"--{key} must be names with values, as in --{key}.NAME VALUE; found {value!r}."
    texts = [re.sub(r"collections\.abc\.|typing\.|<class '|'>", "", text) for text in texts]
    return f"--{key} must be {' or '.join(text for text in texts if text != 'null')}; found {value!r}."
