"""What a parser found wrong, in plain words."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator
from typing import Any, is_typeddict

from tva.errors import did_you_mean

_TYPES = {
    "<class 'float'>": "a number",
    "<class 'int'>": "a whole number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
    "<class 'NoneType'>": "null",
    "float": "a number",
}
_MAPPING = r"(?:<class ')?(?:collections\.abc\.|typing\.)?(?:dict|Mapping)"
_LIST = r"(?:<class ')?(?:collections\.abc\.|typing\.)?(?:list|Sequence)"
SPEC = ("class_path", "init_args", "dict_kwargs")


def explain(problem: str, command: str, options: Collection[str], usage: str = "") -> str:
    """Return in plain words what a parser found wrong; what is not known here stays as it is.

    Args:
        problem: The message of argparse or jsonargparse.
        command: Such as ``"compose"``.
        options: Names of the command's options.
        usage: How the command is written, if it is short.

    Example:
        >>> print(explain("unrecognized arguments: --recpie a", "compose", ["recipe", "base"]))
        There is no option --recpie. Did you mean --recipe? 'tva compose --help' lists all.
        >>> print(explain("unrecognized arguments: --devices 2", "fit", ["trainer.devices"]))
        There is no option --devices. Did you mean --trainer.devices? 'tva fit --help' lists all.
        >>> print(explain("the following arguments are required: base, vectors", "compose", []))
        --base, --vectors must be given. 'tva compose --help' lists all options.
        >>> print(explain('Parser key "by":\\n  Expected a <class \\'int\\'>. Got value: x', "inspect", []))
        --by must be a whole number; found 'x'.
    """
    lists_all = f"'tva {command} --help' lists all"
    problem = re.sub(r"^Subcommand '.*?' does not accept option '", "Option '", problem)
    problem = re.sub(r"^Option '(\S+)' is required .*", r"the following arguments are required: \1", problem)
    problem = re.sub(r"^ambiguous option: (\S+) could match .*", r"unrecognized arguments: \1", problem)
    if found := re.match(r"(?:unrecognized arguments: |Option ')([^\s']+)", problem):
        word = found[1].partition("=")[0]
        if problem.startswith("unrec") and not word.startswith("-"):
            return f"{word!r} is unexpected: every value follows its option. {lists_all} options."
        name = word.lstrip("-")
        return f"There is no option --{name}.{_nearest_option(name, options)} {lists_all}."
    if found := re.match(r"the following arguments are required: (.*)", problem):
        names = ", ".join(f"--{name.removeprefix(f'{command}.')}" for name in found[1].split(", "))
        return f"{names} must be given" + (f"; usage: {usage}" if usage else f". {lists_all} options.")
    if found := re.match(r"argument (--\S+): expected one argument", problem):
        return f"{found[1]} must be followed by a value."
    if found := re.match(r"Unexpected config: (.*)|Problems parsing config: (.*)", problem, re.S):
        if found[2]:
            return f"The file given with --config is not valid YAML: {found[2]}"
        return "The file given with --config must hold options, each as NAME: VALUE" + (
            f"; found {found[1]!r}." if found[1].strip() else "; it is empty."
        )
    if found := re.match(r'Parser key "config": File does not exist: (.*)', problem, re.S):
        return f"--config: there is no file {found[1]}."
    if found := re.match(r'Parser key "([^"]+)":\s*(.*)', problem, re.S):
        return _explain_value(found[1].removeprefix(f"{command}."), found[2]) or problem
    return problem


def _nearest_option(name: str, options: Collection[str]) -> str:
    """Return a sentence with the option that was meant, also where it is nested in another."""
    whole = [each for each in options if each.endswith(f".{name}")]
    last = {each.rpartition(".")[2]: each for each in options}
    near = f" Did you mean {whole[0]!r}?" if whole else did_you_mean(name, options) or did_you_mean(name, last)
    found = re.search(r"'(.*)'", near)
    return f" Did you mean --{last.get(found[1], found[1]) if found[1] not in options else found[1]}?" if found else ""


def _explain_value(key: str, problem: str) -> str | None:
    """Return which values an option takes, and what was found; None if the problem is not understood."""
    if found := re.fullmatch(r"Expected a (.*?)\. Got value: (.*)", problem, re.S):
        wanted, value, causes = [found[1]], found[2], []
    elif found := re.search(r"Does not validate against any of the Union subtypes\s+Subtypes: \[(.*)\]\n", problem):
        value = problem.rpartition("Given value: ")[2]
        wanted = re.split(r", (?=<class|typing|collections|dict|list|os|\w+\.)", found[1])
        causes = list(_causes(problem))
    else:
        value, wanted, causes = problem.rpartition("Got value: ")[2], [], [textwrap.dedent(problem)]
    if inner := re.fullmatch(r"NestedArg\(key='(.*)', val='(.*)'\)", value, re.S):
        key, value = key if key.endswith(f".{inner[1]}") else f"{key}.{inner[1]}", inner[2]
        wanted = [re.sub(_MAPPING + r"\[str, (.*)\]$", r"\1", each) for each in wanted]
    explained = (_explain_cause(key, cause, value, wanted) for cause in causes)
    if explanation := next(filter(None, explained), None):
        return explanation
    if not wanted:
        return None
    for kind in filter(is_typeddict, map(_load, wanted)):
        return f"--{key}: {kind.__name__} has {', '.join(kind.__annotations__)}; found {value!r}."
    if any(re.match(_MAPPING + r"(\[|'>|$)", each) for each in wanted):
        return f"--{key} must be names with values, as in --{key}.NAME VALUE; found {value!r}."
    if any(re.match(_LIST + r"(\[|'>|$)", each) for each in wanted):
        if value.startswith("[") and (choices := re.findall(r"(?<!class )'([\w.]+)'", " ".join(wanted))):
            unknown = [each for each in re.findall(r"[\w.]+", value) if each not in choices]
            near = did_you_mean(unknown[0], choices) if unknown else ""
            return f"--{key} must be a list of {', '.join(choices)}; found {value!r}.{near}"
        one = value if re.fullmatch(r"-?[\d.]+", value) else f'"{value}"'
        return f"--{key} must be a list; found {value!r}. Write --{key}='[{one}]', or --{key}+=VALUE for each."
    texts = [_TYPES.get(each) or re.sub(r"typing\.Literal\[(.*)\]", _choices, each) for each in wanted]
    texts = [re.sub(r"collections\.abc\.|typing\.|<class '|'>", "", text) for text in texts]
    near = did_you_mean(value, re.findall(r"'(\w+)'", " ".join(texts)))
    return f"--{key} must be {' or '.join(text for text in texts if text != 'null')}; found {value!r}.{near}"


def _choices(literal: re.Match[str]) -> str:
    return " or ".join(literal[1].rsplit(", ", 1))


def _causes(problem: str) -> Iterator[str]:
    """Yield the reasons why a value is of none of several types."""
    text = textwrap.dedent(problem.partition("Errors:\n")[2].partition("\n  Given value type:")[0])
    for cause in re.split(r"^- ", text, flags=re.M):
        if cause.strip() and not re.match(r"Expected a <class '(NoneType|list)'>", cause):
            yield cause.strip()


def _explain_cause(key: str, cause: str, value: str, wanted: Collection[str]) -> str | None:
    if found := re.match(r"Expected a dot import path string: (.*)", cause):
        known = sorted({each.__name__ for base in wanted for each in _subclasses(_load(base))})
        near = did_you_mean(found[1], known)
        return (
            f"--{key}: no class is called {found[1]!r}.{near} Name your own with its module, as in my_module.MyClass."
        )
    if found := re.search(r"Parameter '(.*?)' from '(.*?)(?:\.__init__)?' does not specify a type", cause):
        name, path = found.groups()
        return (
            f"--{key}: the parameter {name!r} of {path} has no type, so that its value cannot be checked. Annotate it, "
            f"as in '{name}: int'."
        )
    if (found := re.match(r"Problem with given class_path '(.*?)':\s*(.*)", cause, re.S)) is None:
        return None
    path, reason = found[1], textwrap.dedent(found[2]).strip()
    if wrong := _wrong_keys(value):
        near = did_you_mean(wrong[0], SPEC)
        return f"--{key}: a class is given by class_path and init_args; found {wrong[0]!r}.{near}"
    if option := re.match(r"Option '(.*?)' is not accepted", reason):
        return _no_option(key, path, option[1], wanted)
    if missing := re.match(r"module '(.*?)' has no attribute '(.*?)'", reason):
        near = did_you_mean(missing[2], dir(importlib.import_module(missing[1])))
        return f"--{key}: the module {missing[1]} has no {missing[2]!r}.{near}"
    if missing := re.match(r"No module named '(.*?)'", reason):
        if f"{path}.".startswith(f"{missing[1]}."):
            where = "It must be installed, or be in the folder in which the command is run."
            return f"--{key}: {path}: there is no module {missing[1]!r}. {where}"
        return f"--{key}: {path} cannot be imported, for it imports {missing[1]!r}, which is not installed."
    if missing := re.match(r"the following arguments are required: (.*)", reason):
        return f"--{key}: {path} must be given {missing[1]}, as in --{key}.{missing[1].split(', ')[0]} VALUE."
    if inner := re.match(r'Parser key "([^"]+)":\s*(.*)', reason, re.S):
        nested = key if f".{inner[1]}." in f"{key}." else f"{key}.{inner[1]}"
        return _explain_value(nested, inner[2].strip())
    return f"--{key}: {path}: {reason}"


def _wrong_keys(value: str) -> list[str]:
    """Return what a mapping that names a class holds besides."""
    try:
        given = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return []
    return [key for key in given if key not in SPEC] if isinstance(given, dict) and "class_path" in given else []


def _no_option(key: str, path: str, option: str, wanted: Collection[str]) -> str:
    given = _load(path)
    which = f"--{key}".removesuffix(f".{option}").removesuffix(".init_args")
    if any(given is _load(base) for base in wanted):  # nothing more precise was named
        return f"{which}: there is no option {option!r} of a class named there. Name the class by class_path first."
    known = sorted(set(_options_of(given)))
    near = did_you_mean(option, known)
    return f"{which}: {path} has no option {option!r}.{near} It has {', '.join(known) or 'none'}."


def _options_of(kind: Any) -> Iterator[str]:
    """Yield the parameters of a class and, where it passes others on, of those that it inherits from."""
    for each in kind.__mro__ if isinstance(kind, type) else [kind]:
        for name, parameter in inspect.signature(each).parameters.items() if each is not object else ():
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                yield name
        if not any(p.kind == p.VAR_KEYWORD for p in inspect.signature(each).parameters.values()):
            return


def _load(path: str) -> Any:
    """Return the class at a dotted path, which a type may enclose; None if there is none."""
    names = re.findall(r"[\w.]+\.\w+", path)
    if not names:
        return None
    module, _, name = names[-1].rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _subclasses(base: Any) -> Iterator[type]:
    for each in base.__subclasses__() if isinstance(base, type) else ():
        yield each
        yield from _subclasses(each)
