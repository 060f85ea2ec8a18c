"""Mistakes in YAML files that are found, with file and line, before anything heavy is imported.

The files must have passed `tva.cli.configs.check_configs`, which holds them to limits.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from tva.errors import RecipeError, did_you_mean

NULL = "tag:yaml.org,2002:null"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def config_files(words: Sequence[str]) -> list[Path]:
    """Return the files that a command line names with ``--config``.

    Example:
        >>> config_files(["--config", "a.yaml", "--x=1", "--config=b.yaml"])
        [PosixPath('a.yaml'), PosixPath('b.yaml')]
    """
    found = [after for word, after in pairwise(words) if word in ("--config", "-c")]
    joined = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    return [Path(name) for name in (*found, *joined)]


def check_files(files: Sequence[Path], options: Collection[str]) -> None:
    """Check that every file exists and is YAML, and that its outermost keys are options.

    Args:
        files: What is a text of YAML instead of a path, or not a regular file, is left to the parser.
        options: Names of the command's options, before the first dot.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A key is not an option, or is given twice, at the line named.
    """
    for file in files:
        if not file.is_file():
            _check_exists(file)
            continue
        root = read_nodes(file)
        if not isinstance(root, yaml.MappingNode):
            continue  # the parser says what it must be
        seen: dict[str, int] = {}
        for key, _ in root.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name.partition(".")[0] not in options:
                near = did_you_mean(name.partition(".")[0], options)
                near = near or " Put options of the fits below 'shared'." * ("shared" in options)
                raise ValueError(f"{file}, line {line}: there is no option {name!r}.{near}")
            if name in seen:
                raise ValueError(f"{file}, line {line}: {name!r} is given twice, first in line {seen[name]}. Keep one.")
            seen[name] = line


def _check_exists(file: Path) -> None:
    if not re.search(r"[:{\n]", str(file)) and not file.exists():
        beside = [str(file.parent / path.name) for path in file.parent.glob("*.y*ml")]
        raise FileNotFoundError(f"--config: there is no file {str(file)!r}.{did_you_mean(str(file), beside)}")


def read_nodes(file: Path) -> Any:
    """Return the YAML nodes of a file that `check_configs` accepts; the nodes know their lines."""
    return yaml.compose(file.read_text(encoding="utf-8"), Loader=_LOADER)


def check_recipe(files: Sequence[Path], words: Sequence[str]) -> None:
    """Check the expression of a recipe that a file holds together with its vectors.

    Raises:
        RecipeError: It is not an expression of vectors and coefficients; the file and line are named.
    """
    given = {word.lstrip("-").partition("=")[0].partition(".")[0] for word in words if word.startswith("--")}
    if len(files) != 1 or not files[0].is_file() or given & {"recipe", "vectors", "coefs", "search"}:
        return  # what the command line gives is checked with the rest
    top = _entries(read_nodes(files[0]))
    recipe, vectors, search = top.get("recipe"), _entries(top.get("vectors")), top.get("search")
    if not isinstance(recipe, yaml.ScalarNode) or not vectors:
        return
    from tva.compose.syntax import Expression

    options = _entries(search)
    ranges = _entries(options.get("ranges") or _entries(options.get("init_args")).get("ranges"))
    known = {**_entries(top.get("coefs")), **ranges}
    coefs = {name: _value(node) for name, node in known.items() if name not in vectors and name != "scaling_coef"}
    if search is not None and not ranges:  # a search may have coefficients that the file does not name
        coefs |= {name: 1.0 for name in re.findall(r"[^\W\d]\w*(?!\w*\s*[.(=])", recipe.value) if name not in vectors}
    try:
        Expression(recipe.value, list(vectors), coefs)
    except RecipeError as error:
        raise RecipeError(f"{files[0]}, line {recipe.start_mark.line + 1}: {error}") from error


def check_paths(files: Sequence[Path], words: Sequence[str]) -> None:
    """Check that the checkpoints and vectors on this machine that a file names are there.

    Raises:
        FileNotFoundError: One is not; the file and line are named.
    """
    if len(files) != 1 or not files[0].is_file() or any(word.startswith("--print_config") for word in words):
        return
    from tva.checkpoints import find, is_hub

    top = _entries(read_nodes(files[0]))
    for name, node in {**{key: top.get(key) for key in ("base", "joint")}, **_entries(top.get("vectors"))}.items():
        path = node.value if isinstance(node, yaml.ScalarNode) and node.tag != NULL else ""
        given = any(re.match(rf"--(vectors\.)?{re.escape(name)}\b|--vectors[+=]?", word) for word in words)
        if path and not given and not is_hub(path) and not re.search(r"[+\0]", path):
            try:
                find(path)
            except FileNotFoundError as error:
                line = node.start_mark.line + 1
                raise FileNotFoundError(f"{files[0]}, line {line}: {name}: {error}") from error


def _value(node: Any) -> Any:
    """Return a coefficient's value, those of its groups, or the middle of its range; 1 of what is none of these."""
    if isinstance(node, yaml.MappingNode):
        return {name: _value(entry) for name, entry in _entries(node).items()}
    parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
    try:
        return statistics.fmean(float(part.value) for part in parts)
    except (TypeError, ValueError):  # reported where options are parsed
        return 1.0


def _entries(node: Any) -> dict[str, Any]:
    return {str(key.value): value for key, value in node.value} if isinstance(node, yaml.MappingNode) else {}


def with_place(message: str, words: Sequence[str]) -> str:
    """Return a message about an option with the file and line that give it, if a file and not the command line does.

    Args:
        message: Begins with the option.
        words: The command line.

    Example:
        >>> with_place("--confidence must be a number; found 'high'.", ["--confidence", "high"])
        "--confidence must be a number; found 'high'."
    """
    found = re.match(r"--([\w.]+)", message)
    if found is None:
        return _where_quoted(message, words)
    if any(re.fullmatch(rf"{re.escape(found[0])}\+?(=.*)?", word, re.S) for word in words):
        return message
    for file in config_files(words):
        node, line = (read_nodes(file), None) if file.is_file() else (None, None)
        for name in found[1].split("."):
            if line is not None and not isinstance(node, yaml.MappingNode):
                break  # the value that should have held it
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            inner = [value.value for key, value in pairs if key.value == "init_args" and value.id == "mapping"]
            match = next((pair for pair in [*pairs, *(inner[0] if inner else [])] if pair[0].value == name), None)
            line, node = (match[0].start_mark.line + 1, match[1]) if match else (None, None)
            if match is None:
                break
        if line is not None:
            return f"{file}, line {line}: {message}"
    return _where_quoted(message, words)


def _where_quoted(message: str, words: Sequence[str]) -> str:
    """Return a message with the line that holds what it quotes or names first, if just one does, and no word does."""
    option, found = re.match(r"(\w+) must be ", message), re.match(r"[^']*?'([^']{3,})'|(\w+) must be ", message)
    quoted = re.compile(rf"(?<!\w){re.escape(found[1] or f'{found[2]}:')}(?!\w)") if found else None
    for word in words:
        if (quoted and quoted.search(word)) or (option and word.partition("=")[0] == f"--{option[1]}"):
            return message
    files = config_files(words)
    texts = [(file, file.read_text(encoding="utf-8").split("\n")) for file in files if file.is_file()]
    places = [(file, at) for file, lines in texts for at, line in enumerate(lines, 1) if quoted and quoted.search(line)]
    return f"{places[0][0]}, line {places[0][1]}: {message}" if len(places) == 1 else message
