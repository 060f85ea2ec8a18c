"""The command ``tva completion``."""

from __future__ import annotations

import importlib
import os
import re
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
TOP = "--help --version --install-completion"
BASH = """# tab completion of tva: options of its commands, else files
_tva() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} options= choices= IFS=$' \t\n'
  case "$command ${{COMP_WORDS[2]}}" in
{pairs}
  esac
  [ -n "$options" ] || case "$command" in
{singles}
  esac
  [ "$COMP_CWORD" = 1 ] && options="{top}"
  if [[ $word == -* ]]; then COMPREPLY=($(compgen -W "$options" -- "$word"))
  elif [ "$COMP_CWORD" = 1 ]; then COMPREPLY=($(compgen -W "{first}" -- "$word"))
  else
    [ "$COMP_CWORD" = 2 ] && COMPREPLY=($(compgen -W "$choices" -- "$word"))
    IFS=$'\n'  # a file's name may hold spaces
    [ -n "$COMPREPLY" ] || COMPREPLY=($(compgen -f -- "$word"))
  fi
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
        # zsh runs the file when Tab is first pressed; its last line answers that Tab too
        script = (
            f"#compdef tva\nautoload -U +X bashcompinit && bashcompinit\n{script}_bash_complete -o filenames -F _tva\n"
        )
    path = Path.home() / PLACES[name] if install else None
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(script, encoding="utf-8")
    return Completion(name, script, path)


def options_of_commands() -> dict[str, list[str]]:
    """Return the options of every command, and what may follow its name."""
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
            parser = make_parser(name, loaded)
            strings = [string for action in parser._actions for string in action.option_strings]
            flags = {string for string in strings if string.startswith("--") and not string.endswith("+")}
            choices = re.match(rf"tva {name} ([a-z|]+) ", parser.usage)
            flags |= set(choices[1].split("|") if choices else [])
            flags |= {other.split()[1] for other in list_commands() if other.startswith(f"{name} ")}
        found[name] = sorted(flags)
    return found


def bash_script(options: dict[str, list[str]]) -> str:
    """Return completion for bash; zsh reads it too.

    Example:
        >>> "vectors ls) options=--json" in bash_script({"fit": ["--help"], "vectors ls": ["--json"]}).replace('"', "")
        True
    """
    lines = {}
    for name, words in options.items():
        flags, choices = (" ".join(word for word in words if (word[:2] == "--") is flag) for flag in (True, False))
        lines[name] = f'    "{name}") options="{flags}" choices="{choices}" ;;'
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
    return BASH.format(pairs=pairs, singles="\n".join([*singles, *seconds]), first=first, top=TOP)


def fish_script(options: dict[str, list[str]]) -> str:
    """Return completion for fish."""
    lines = ["# tab completion of tva", "complete -c tva -n __fish_use_subcommand -f"]
    lines += [f"complete -c tva -n __fish_use_subcommand -l {flag[2:]}" for flag in TOP.split()]
    for name, flags in options.items():
        first = name.split()[0]
        lines.append(f"complete -c tva -n __fish_use_subcommand -a {first}")
        if name != first:
            lines.append(f"complete -c tva -n '__fish_seen_subcommand_from {first}' -a {name.split()[1]}")
        words = [f"-l {flag[2:]}" if flag.startswith("--") else f"-a {flag}" for flag in flags]
        lines += [f"complete -c tva -n '__fish_seen_subcommand_from {first}' {word}" for word in words]
    return "\n".join([*dict.fromkeys(lines), ""])


def show(result: Completion) -> None:
    """Print the script, or where it was written."""
    if result.path is None:
        print(result.script, end="")
        return
    then = {
        "bash": f"; without the package bash-completion, ~/.bashrc must have: source {result.path}",
        "zsh": "; ~/.zshrc must have: fpath+=~/.zfunc; autoload -Uz compinit; compinit",
    }
    said = f"wrote {result.path}: it works in a new shell{then.get(result.shell, '')}"
    print_line(make_console(), said, wrap=True)
