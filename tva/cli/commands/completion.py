"""The command ``tva completion``."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tva.checkpoints import atomic_path
from tva.console import make_console, print_line
from tva.errors import some

HELP = "print or install tab completion of commands and options for bash, zsh or fish"
ORDER = "shell"
SHELLS = ("bash", "zsh", "fish")
PLACES = {
    "bash": ".local/share/bash-completion/completions/tva",
    "zsh": ".zfunc/_tva",
    "fish": ".config/fish/completions/tva.fish",
}
BASH = """# tab completion of tva: options of its commands, else files
_tva() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} options=
  case "$command ${{COMP_WORDS[2]}}" in
{pairs}
  esac
  [ -n "$options" ] || case "$command" in
{singles}
  esac
  if [ "$COMP_CWORD" = 1 ]; then COMPREPLY=($(compgen -W "{first}" -- "$word"))
  elif [[ $word == -* ]]; then COMPREPLY=($(compgen -W "$options" -- "$word"))
  else COMPREPLY=($(compgen -f -- "$word")); fi
}}
complete -o filenames -F _tva tva
"""


@dataclass(frozen=True)
class Completion:
    """A script for a shell, and where it was installed.

    Attributes:
        shell: Which shell.
        script: Its text.
        path: Where it was written; None where it was only printed.
    """

    shell: str
    script: str
    path: Path | None


def run(shell: Literal["bash", "zsh", "fish"] | None = None, install: bool = False) -> Completion:
    """Print or install tab completion of commands and options.

    Args:
        shell: The shell; by default that of the environment variable SHELL.
        install: Write the script to the place in your home folder where the shell looks for completions.

    Raises:
        ValueError: The shell is not known.
    """
    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        raise ValueError(f"Completion is made for {some(SHELLS)}; found {name!r}. Name one: tva completion bash.")
    options = options_of_commands()
    script = fish_script(options) if name == "fish" else bash_script(options)
    if name == "zsh":
        script = f"#compdef tva\nautoload -U +X bashcompinit && bashcompinit\n{script}"
    path = Path.home() / PLACES[name] if install else None
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(script, encoding="utf-8")
    return Completion(name, script, path)


def options_of_commands() -> dict[str, list[str]]:
    """Return the options of every command."""
    from tva.cli.main import list_commands
    from tva.cli.run_function import make_parser
    from tva.cli.shipped_help import shipped

    found = {}
    for name, module in list_commands().items():
        if name in shipped():
            words = [option for _, options in shipped()[name]["groups"] for option, _ in options]
            flags = {part.split()[0] for word in words for part in word.split(", ") if part.startswith("--")}
        elif not hasattr(loaded := importlib.import_module(module), "run"):
            flags = {"--help"}
        else:
            strings = [string for action in make_parser(name, loaded)._actions for string in action.option_strings]
            flags = {string for string in strings if string.startswith("--") and not string.endswith("+")}
        found[name] = sorted(flags)
    return found


def bash_script(options: dict[str, list[str]]) -> str:
    """Return completion for bash; zsh reads it too.

    Example:
        >>> "vectors ls) options=--json" in bash_script({"fit": ["--help"], "vectors ls": ["--json"]}).replace('"', "")
        True
    """
    lines = {name: f'    "{name}") options="{" ".join(flags)}" ;;' for name, flags in options.items()}
    pairs = "\n".join(line for name, line in lines.items() if " " in name)
    singles = [line for name, line in lines.items() if " " not in name]
    groups: dict[str, list[str]] = {}
    for name in options:
        group, _, rest = name.partition(" ")
        if rest:
            groups.setdefault(group, []).append(rest)
    seconds = [
        f'    "{group}") [ "$COMP_CWORD" = 2 ] && COMPREPLY=($(compgen -W "{" ".join(rest)}" -- "$word")) && return ;;'
        for group, rest in groups.items()
        if group not in options
    ]
    first = " ".join(dict.fromkeys(name.split()[0] for name in options))
    return BASH.format(pairs=pairs, singles="\n".join([*singles, *seconds]), first=first)


def fish_script(options: dict[str, list[str]]) -> str:
    """Return completion for fish."""
    lines = ["# tab completion of tva", "complete -c tva -n __fish_use_subcommand -f"]
    for name, flags in options.items():
        first = name.split()[0]
        lines.append(f"complete -c tva -n __fish_use_subcommand -a {first}")
        if name != first:
            lines.append(f"complete -c tva -n '__fish_seen_subcommand_from {first}' -a {name.split()[1]}")
        lines += [f"complete -c tva -n '__fish_seen_subcommand_from {first}' -l {flag[2:]}" for flag in flags]
    return "\n".join([*dict.fromkeys(lines), ""])


def show(result: Completion) -> None:
    """Print the script, or where it was written."""
    if result.path is None:
        print(result.script, end="")
        return
    then = {"zsh": "; ~/.zshrc must have: fpath+=~/.zfunc; autoload -Uz compinit; compinit"}.get(result.shell, "")
    print_line(make_console(), f"wrote {result.path}: it works in a new shell{then}")
