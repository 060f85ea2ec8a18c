"""A command that is one function: its signature is the command line, its docstring the help."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import textwrap
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, is_dataclass
from inspect import signature
from types import ModuleType
from typing import Any

from tva.cli.arguments import name_words
from tva.cli.config_files import check_files, check_paths, check_recipe, config_files, with_place
from tva.cli.explain import explain


def run_function(name: str, command: ModuleType, words: Sequence[str], as_json: bool = False) -> bool:
    """Run a command, and print its result.

    Args:
        name: Its name, such as ``"vectors ls"``.
        command: Its module; `tva.cli.commands` says what such a module holds.
        words: The arguments after the name.
        as_json: Print JSON only.

    Returns:
        Whether what the command was asked for holds.

    Raises:
        ValueError: The arguments cannot be parsed.
    """
    words = command.read_words(words) if hasattr(command, "read_words") else list(words)
    options = _parse(name, command, words)
    as_json = options.pop("json") or as_json
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        result = command.run(**_own(command.run, options))
    if as_json:
        print_json(command.to_json(result) if hasattr(command, "to_json") else result)
    else:
        command.show(result, **_own(command.show, options))
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        return not hasattr(command, "finish") or command.finish(result, **_own(command.finish, options)) is not False


def make_parser(name: str, command: ModuleType) -> Any:
    """Return the parser of a command that is a function."""
    from jsonargparse import ArgumentParser

    from tva.cli.help import HelpFormatter

    usage = _usage(name, command)
    parser = ArgumentParser(
        prog=f"tva {name}",
        usage=_wrapped(usage, len(f"usage: tva {name} ")),
        description=sentence(command.HELP),
        formatter_class=HelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="Take options from a YAML file.")
    parser.add_argument("--json", type=bool, default=False, help="Print the result as JSON, and nothing else.")
    seen = set[str]()
    for step in _steps(command):
        skip = seen | ({next(iter(signature(step).parameters))} if step is not command.run else set())
        parser.add_function_arguments(step, as_positional=False, as_group=False, skip=skip)
        seen |= set(signature(step).parameters)
    return parser


def _parse(name: str, command: ModuleType, words: list[str]) -> dict[str, Any]:
    from tva.cli.configs import check_configs

    check_configs(words)
    parser, usage, files = make_parser(name, command), _usage(name, command), config_files(words)
    check_files(files, {action.dest.partition(".")[0] for action in parser._actions})
    if name == "compose":
        check_recipe(files, words)
        check_paths(files, words)
    parameters = [parameter for step in _steps(command) for parameter in signature(step).parameters.items()]
    flags = ["json", *(key for key, parameter in parameters if parameter.default is False)]
    try:
        given = parser.parse_args(name_words(words, getattr(command, "ORDER", "").split(), flags, usage))
    except OverflowError as error:  # of jsonargparse, which makes floats of integers
        raise ValueError(f"A number among the options is too large ({error}). Give a smaller one.") from error
    except ArgumentError as error:
        names = [action.dest for action in parser._actions]
        raise ValueError(with_place(explain(error.message, name, names, usage), words)) from error
    return {key: value for key, value in given.as_dict().items() if key != "config"}


def _steps(command: ModuleType) -> list[Callable[..., Any]]:
    return [command.run, command.show, *([command.finish] if hasattr(command, "finish") else [])]


def _own(step: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in signature(step).parameters if key in options}


def _usage(name: str, command: ModuleType) -> str:
    order = getattr(command, "ORDER", "").split()
    shown = [word.rstrip("…").upper() + " …" * word.endswith("…") for word in order]
    parameters = signature(command.run).parameters
    literal = re.compile(r"Literal\[([^]]*)\]")
    found = {key: literal.search(str(parameter.annotation)) for key, parameter in parameters.items()}
    choices = {key: re.findall(r"'(\w+)'", match[1]) for key, match in found.items() if match}
    shown = ["|".join(choices.get(word, ())) or shown[at] for at, word in enumerate(order)]
    named = []
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in [word.rstrip("…") for word in order]:
            by_name = ".NAME" * str(parameter.annotation).startswith(("dict", "Mapping"))
            named.append(f"--{key}{by_name} {key.upper()}")
    return " ".join(["tva", name, *shown, *named, "[options]"])


def _wrapped(usage: str, indent: int) -> str:
    """Return a usage in lines of at most 79 characters, with every option beside its value."""
    text = re.sub(r"(--\S+) ", "\\1\xa0", usage)  # which does not break
    return textwrap.fill(text, 72, subsequent_indent=" " * indent).replace("\xa0", " ")


def sentence(line: str) -> str:
    """Return a help line as a sentence."""
    return f"{line[0].upper()}{line[1:]}."


def print_json(result: Any) -> None:
    """Print a result as JSON: a dataclass by its ``to_json()`` or its fields, paths as text, null for NaN."""
    print(json.dumps(_plain(result), indent=1, ensure_ascii=False), flush=True)


def _plain(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return _plain(value.to_json())
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, os.PathLike) else value
