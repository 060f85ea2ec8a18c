"""The command line ``tva``: which command runs, and with which exit status the process ends."""

from __future__ import annotations

import ast
import atexit
import difflib
import gc
import importlib
import os
import select
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType, ModuleType
from typing import TextIO

from tva.cli.arguments import join_values, take_flag
from tva.cli.failures import WRONG, describe
from tva.console import printable, wide_tables
from tva.plugins import installed, modules_in

COMMANDS = "tva.cli.commands"
HELP = """usage: tva COMMAND [options]

Edit trained networks by arithmetic on their weights, and prove what each edit
did.

commands:
{commands}

tva COMMAND --help lists a command's options. Every option can also be given in
a YAML file with --config. With --json a command prints its result as JSON, and
nothing else, on standard output. Tables are as wide as the terminal, or 80
characters in a pipe; --wide prints the columns that did not fit.

exit status:
  0    done
  1    the constraints or the record of an edit do not hold, or a fit failed
  2    something in the input is wrong; the message says what
  3    a bug in tva; TVA_DEBUG=1 shows where
  130  interrupted
  141  the reader of the output left early, as head does
  143  ended by SIGTERM, as batch systems send it
"""
# What other tools call a command.
SYNONYMS = {
    "merge": "compose",
    "apply": "compose",
    "mix": "compose",
    "train": "fit",
    "finetune": "fit",
    "eval": "test",
    "evaluate": "test",
    "diff": "extract",
    "subtract": "extract",
    "undo": "revert",
    "restore": "revert",
    "check": "verify",
    "show": "inspect",
    "info": "inspect",
    "upload": "push",
    "new": "init",
    "template": "init",
    "list": "vectors ls",
    "ls": "vectors ls",
}


# What to say of a command that was interrupted.
RESUMES = {
    **dict.fromkeys(("compose", "revert"), " Completed work is kept: the same command with --resume continues."),
    "edit": " Evaluations are kept in its log: the same command continues.",
    **dict.fromkeys(("extract", "compress", "report"), " Nothing was written: run the same command again."),
}
LIGHTNING = ("fit", "validate", "test", "predict")  # which end after the batch, as Lightning does with SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a command as Ctrl-C does, with a status of its own."""


def list_commands() -> dict[str, str]:
    """Return the module of every command by the command's name, sorted; none is imported.

    Raises:
        ValueError: An installed package defines a command that tva has.
    """
    own = {name.replace("__", " ").replace("_", "-"): f"{COMMANDS}.{name}" for name in modules_in(COMMANDS)}
    others = {name: point.value for name, point in installed("tva.commands").items()}
    for name in own.keys() & others.keys():
        raise ValueError(f"{others[name]} defines the command {name!r}, which is tva's own. Uninstall its package.")
    return dict(sorted({**own, **others}.items()))


def help_line(module: str) -> str:
    """Return the ``HELP`` of a command's module, read from its source without importing it."""
    spec = find_spec(module)
    source = spec.loader.get_source(module) if spec and hasattr(spec.loader, "get_source") else None
    for statement in ast.parse(source or "").body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "HELP":
            return str(ast.literal_eval(statement.value))
    return f'({module} has no line HELP = "…")'


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: The command and its options; by default those of the process.

    Raises:
        SystemExit: The status is not 0; ``tva --help`` lists what each means.
    """
    try:
        try:
            status = _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        sys.exit(141)  # 128 + SIGPIPE, as a shell says of a program that ends so
    if status:
        sys.exit(status)


def run() -> None:
    """Run the process's command and, where it has done its work, end the process.

    After ``compose`` it ends at once: unloading torch and numba costs half a second.
    """
    if sys.argv[1:2] and sys.argv[1] not in LIGHTNING:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
        _leave_process_group()
    finally:  # what is left is unloading
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    if sys.argv[1:2] == ["compose"]:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _leave_process_group() -> None:
    """Join gloo's threads: Lightning ends only NCCL's group, and a thread that outlives the interpreter aborts it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _main(argv: list[str]) -> int:
    """Run one command; return the exit status."""
    command = argv[0] if argv else ""
    try:
        if command in ("", "-h", "--help"):
            _print_help(list_commands())
            return 0
        if command == "--version":
            from tva.version import __version__

            print(f"tva {__version__}")
            return 0
        if command == "--install-completion":
            argv = [command := "completion", *argv[1:], "--install"]
        commands = list_commands()
        if " ".join(argv[:2]) in commands:
            argv = [command := " ".join(argv[:2]), *argv[2:]]
        if command not in commands:
            return _no_command(argv, commands)
        words, as_json = take_flag(join_values(argv[1:]), "--json")
        words, wide = take_flag(words, "--wide")
        with wide_tables(wide):
            return 0 if _run(command, commands[command], words, as_json) else 1
    except (KeyboardInterrupt, SystemExit) as error:
        cause = error.__context__ if isinstance(error, SystemExit) else error  # a Trainer exits with 1 at Ctrl-C
        if not isinstance(cause, KeyboardInterrupt):
            raise
        ended, status = ("terminated", 143) if isinstance(cause, Terminated) else ("interrupted", 130)
        print(f"tva: {ended}.{RESUMES.get(command, '')}", file=sys.stderr)
        return status
    except Exception as error:
        if os.environ.get("TVA_DEBUG") or (isinstance(error, BrokenPipeError) and _is_unread(sys.stdout)):
            raise
        message, status = describe(error)
        return _say(message, status)


def _run(command: str, path: str, words: list[str], as_json: bool) -> bool:
    """Import a command and run it; return whether what it was asked for holds."""
    with _no_collecting():
        module = _load(command, path)
    if hasattr(module, "start"):
        return module.start(words, as_json)
    from tva.cli.run_function import run_function

    return run_function(command, module, words, as_json)


def _load(command: str, path: str) -> ModuleType:
    module = importlib.import_module(path)
    missing = [name for name in ("HELP", "run", "show") if not hasattr(module, name)]
    if missing and not hasattr(module, "start"):
        raise ValueError(f"{path}, the module of the command {command!r}, must define {', '.join(missing)}.")
    return module


def _print_help(commands: dict[str, str], group: str = "") -> None:
    shown = {name: help_line(module) for name, module in commands.items()}
    width, lines = max(map(len, shown)), []
    for name, text in shown.items():
        gap = " " * (width + 4)
        lines.append(textwrap.fill(text, 79, initial_indent=f"  {name:<{width}}  ", subsequent_indent=gap))
    listed = "\n".join(lines)
    usage = f"usage: tva {group} COMMAND [options]\n\ncommands:\n{listed}"
    print(usage if group else HELP.format(commands=listed))


def _no_command(argv: list[str], commands: dict[str, str]) -> int:
    """Report a command that does not exist; the first word of others has a help page of these."""
    within = [name for name in commands if name.startswith(f"{argv[0]} ")]
    if within and argv[1:] in (["-h"], ["--help"]):
        _print_help({name: commands[name] for name in within}, argv[0])
        return 0
    if within:
        found = f"; found {argv[1]!r}" if argv[1:] else ""
        return _say(f"tva {argv[0]} is followed by {' or '.join(n.split()[1] for n in within)}{found}.", WRONG)
    meant = next(iter(difflib.get_close_matches(argv[0], [*commands, *SYNONYMS], n=1)), None)
    near = f" Did you mean {SYNONYMS.get(meant, meant)!r}?" if meant else ""
    return _say(f"there is no command {argv[0]!r}.{near} 'tva --help' lists all.", WRONG)


def _say(message: str, status: int) -> int:
    lines = f"tva: error: {printable(message, most=6000, newline=chr(10))}".split("\n")
    if sys.stderr.isatty():  # a line that is indented is shown as it is, such as a recipe with a caret below
        width = shutil.get_terminal_size().columns
        lines = [
            line if line[:1] == " " else textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
            for line in lines
        ]
    print("\n".join(lines), file=sys.stderr)
    return status


@contextmanager
def _no_collecting() -> Iterator[None]:
    """Let Python's garbage collector rest: it finds nothing while torch loads, and takes a fifth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reader has left."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # poll reports errors even if none were requested
    except (OSError, ValueError):
        return False
    return bool(poll.poll(0))
