"""The command line ``tva``: the only door to jsonargparse."""

from __future__ import annotations

import atexit
import difflib
import gc
import json
import os
import select
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib import import_module
from inspect import signature
from typing import TextIO

from tva.cli.arguments import explain, join_values, name_words, replaced_argv

COMMANDS = {
    "fit": "fine-tune a model; with TaskVectorCallback it writes task vectors beside its checkpoints",
    "fit-many": "fine-tune on many tasks, each in its own process; skips what is finished, goes on where it stopped",
    "compose": "apply a recipe to a checkpoint on disk, within a stated memory: no Trainer, no data, any architecture",
    "compress": "write a task vector in fewer bytes: by an encoding's name, to an error or to a size",
    "verify": "compute an edited checkpoint again from its record and inputs, and compare it bit by bit",
    "revert": "restore the base of an edited checkpoint, bit for bit, from it and its undo file",
    "edit": "combine task vectors, choose the coefficient, edit the model and prove it on control tasks",
    "extract": "take a task vector from a base and its fine-tuned checkpoint or LoRA adapter",
    "inspect": "tell what a task vector file, or any checkpoint, holds: its header, norms by group of tensors",
    "compare": "tell how task vectors lie to each other: cosines, sign conflicts, norms; by layer, as a picture",
    "vectors ls": "list the task vectors in a folder, those together that share a base",
    "vectors match": "tell whether a checkpoint is its base plus a number times a vector, and which number",
    "report": "rebuild the page of finished edits, and put several side by side",
    "play": "open a finished edit on a local page where sliders set its coefficients",
    "push": "upload an edit's weights, task vectors and model card to the Hugging Face hub",
    "data": "list the data sets that have a name",
}
# Commands on files alone: the function, what shows its result, and which arguments need no name ("…": all the rest).
FILE_COMMANDS = {
    "compress": ("tva.vectors.compress.compress", "tva.cli.commands.compress.show_compressed", "vector"),
    "verify": ("tva.compose.verify.verify", "tva.cli.commands.verify.show_verified", "edited"),
    "revert": ("tva.compose.revert.revert", "tva.cli.commands.revert.show_reverted", "edited"),
    "extract": ("tva.vectors.extract.extract", "tva.cli.commands.extract.show_extracted", ""),
    "inspect": ("tva.vectors.inspect.inspect", "tva.cli.commands.inspect.show_inspection", "path"),
    "compare": ("tva.vectors.compare.compare", "tva.cli.commands.compare.show_compared", "vectors…"),
    "vectors ls": ("tva.vectors.listing.list_vectors", "tva.cli.commands.vectors.show_listing", "folder"),
    "vectors match": ("tva.vectors.match.match", "tva.cli.commands.vectors.show_matched", "checkpoint vectors…"),
    "play": ("tva.cli.commands.play.prepare", "tva.cli.commands.play.serve", "run"),
    "report": ("tva.edit.runs.revisit", "tva.cli.commands.report.show_revisited", "runs…"),
    "push": ("tva.edit.push.push", "tva.cli.commands.push.show_pushed", "run repository"),
}
# Options that may also stand alone.
FLAGS = ("--plan", "--resume", "--allow_other_base", "--allow_other_kind", "--json", "--redo", "--keep_undo")
LIGHT = {"compose": "_compose", "fit-many": "_fit_many", "data": "_data"}  # what needs no Lightning
HELP = """usage: tva COMMAND [options]

Edit trained networks by arithmetic on their weights, and prove what the edit did.

commands:
{commands}

tva COMMAND --help lists a command's options; every option can also stand in a YAML file given with --config.
with --json every command prints its result as JSON, and nothing else on the standard output.
exit status: 0 done; 1 an edit whose constraints or record do not hold, or one of many fits failed; 2 something in what
was given is wrong; 141 the reader of a pipe left early, as head does.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: The command and its options; by default those of the process.

    Raises:
        SystemExit: Status 1 if the constraints or the record of an edit do not hold, 2 if something is wrong with what
            was given, 141 if the standard output is a pipe whose reader has left.
    """
    try:
        try:
            _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        sys.exit(141)  # 128 + SIGPIPE, as a shell says of a program that ends so


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors are told without being asked for
    except (OSError, ValueError):
        return False
    return bool(poll.poll(0))


def _main(argv: Sequence[str] | None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print(HELP.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())))
        return
    if argv[0] == "--version":
        from tva.version import __version__

        print(f"tva {__version__}")
        return
    if " ".join(argv[:2]) in COMMANDS:  # of two words
        argv = [" ".join(argv[:2]), *argv[2:]]
    if argv[0] not in COMMANDS:
        both = " ".join(argv[:2]) if argv[0] == "vectors" else argv[0]
        near = difflib.get_close_matches(both, COMMANDS, n=1)
        _fail(f"there is no command {argv[0]!r}; commands are {', '.join(COMMANDS)}." + _did_you_mean(near))
    if argv[0] in ("compose", "data", "edit", "fit", "fit-many"):
        alone = [not after or after.startswith("--") for after in [*argv[1:], ""]]
        argv = [f"{word}=true" if word in FLAGS and last else word for word, last in zip(argv, alone, strict=True)]
    argv = join_values(argv)
    try:
        with replaced_argv(argv):
            if argv[0] in FILE_COMMANDS:
                holds = _on_files(argv[0], argv[1:])
            else:
                holds = globals()[LIGHT[argv[0]]]() if argv[0] in LIGHT else _run_lightning(argv[0])
    except ArgumentError as error:
        _fail(explain(error.message, argv[0], _options_of(argv[0])))
    except KeyboardInterrupt:
        more = (
            " What is done is kept: the same command with --resume goes on." if argv[0] in ("compose", "revert") else ""
        )
        print(f"tva: interrupted.{more}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("TVA_DEBUG") or (isinstance(error, BrokenPipeError) and _is_unread(sys.stdout)):
            raise
        _fail(f"{error}\n(TVA_DEBUG=1 shows where this comes from.)")
    if not holds:
        sys.exit(1)


def _options_of(command: str) -> list[str]:
    """Give the names of a command's options; of those that are Lightning's the first part."""
    others = {
        "compose": ["tva.compose.apply.compose"],
        "fit-many": ["tva.cli.commands.fit_many.fit_many"],
        "edit": ["tva.edit.run.run_edit"],
    }
    names = ["config", "help", "json"]
    names += ["model", "data", "trainer", "seed_everything", "output"] if command in ("fit", "edit") else []
    for path in others.get(command) or FILE_COMMANDS.get(command, ())[:2]:
        module, _, function = path.rpartition(".")
        names += signature(getattr(import_module(module), function)).parameters
    return names


def run() -> None:
    """Run the process's command and, where it has done its work, end the process.

    After ``compose`` it ends at once: to take torch and numba down piece by piece takes half a second.
    """
    main()
    if sys.argv[1:2] == ["compose"]:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _did_you_mean(near: Sequence[str]) -> str:
    return f" Did you mean {near[0]!r}?" if near else ""


def _fail(message: str) -> None:
    print(f"tva: error: {message}", file=sys.stderr)
    sys.exit(2)


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


@_no_collecting()
def _compose() -> bool:
    """Run ``compose``, which needs no Lightning."""
    from jsonargparse import auto_cli

    from tva.cli.commands.compose import print_composed, print_plan, to_json
    from tva.compose.apply import ComposeReport, compose

    words, as_json = _without_json(sys.argv[2:])
    options = {"as_positional": False, "exit_on_error": False}
    more = "--json prints what was done, or would be, as JSON."
    done = auto_cli(compose, args=words, prog="tva compose", epilog=more, **options)
    if as_json:
        print(json.dumps(to_json(done), indent=1, ensure_ascii=False))
    elif isinstance(done, ComposeReport):
        print_composed(done)
    else:
        print_plan(done)
    return True


def _without_json(words: Sequence[str]) -> tuple[list[str], bool]:
    """Take ``--json`` from words, and say whether it was there."""
    return [word for word in words if not word.startswith("--json=")], "--json=true" in words


def _on_files(command: str, words: Sequence[str]) -> bool:
    """Run a command that is one function on files, and show its result; needs no Lightning."""
    from jsonargparse import ArgumentParser

    *called, order = FILE_COMMANDS[command]
    function, show = (getattr(import_module(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in called)
    shown = " ".join(name.rstrip("…").upper() + " …" * name.endswith("…") for name in order.split())
    parameters = signature(function).parameters
    needed = [name for name, each in parameters.items() if each.default is each.empty]
    named = [f"--{name} {name.upper()}" for name in needed if name not in order.replace("…", "").split()]
    usage = " ".join(["tva", command, *shown.split(), *named, "[options]"])
    parser = ArgumentParser(prog=f"tva {command}", usage=usage, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    parser.add_function_arguments(function, as_positional=False)
    parser.add_function_arguments(show, as_positional=False, skip={"result"})
    flags = [key for f in (function, show) for key, each in signature(f).parameters.items() if each.default is False]
    try:
        given = parser.parse_args(name_words(list(words), order.split(), flags, usage))
    except ArgumentError as error:
        raise ValueError(explain(error.message, command, _options_of(command), usage)) from error
    options = {key: value for key, value in given.as_dict().items() if key != "config"}
    result = function(**{key: value for key, value in options.items() if key in parameters})
    return show(result, **{key: value for key, value in options.items() if key not in parameters}) is not False


def _fit_many() -> bool:
    """Run ``fit-many``, whose processes import what is heavy."""
    import yaml
    from jsonargparse import auto_cli

    from tva.cli.commands.fit_many import fit_many, print_results, to_json

    # jsonargparse would put --shared.trainer.max_steps in the place of the whole of shared.trainer
    (words, as_json), changes = _without_json(sys.argv[2:]), {}
    while (at := next((at for at, word in enumerate(words) if word.startswith("--shared.")), None)) is not None:
        key, equals, value = words.pop(at).removeprefix("--shared.").partition("=")
        if not equals and at == len(words):
            raise ValueError(f"--shared.{key} must be followed by a value.")
        changes[key] = yaml.safe_load(value if equals else words.pop(at))
    if changes:
        words += ["--changes", json.dumps(changes)]
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        more = "--json prints what became of every fit as JSON."
        options = {"as_positional": False, "exit_on_error": False}
        results = auto_cli(fit_many, args=words, prog="tva fit-many", epilog=more, **options)
    if as_json:
        print(json.dumps([to_json(result) for result in results], indent=1, ensure_ascii=False))
    else:
        print_results(results)
    if "--plan=true" not in sys.argv[2:] and any(result.state == "interrupted" for result in results):
        sys.exit(130)
    return not any(result.state in ("failed", "changed") for result in results)


def _data() -> bool:
    """Run ``data``."""
    words, as_json = _without_json(sys.argv[2:])
    if words in (["-h"], ["--help"]):
        print(f"usage: tva data [ls] [--json]\n\n{COMMANDS['data']}; --json prints it as JSON.")
        return True
    if words not in ([], ["ls"]):
        raise ValueError(f"tva data lists the data sets that have a name; its one option is --json. Found {words}.")
    from tva.cli.commands.data import describe_presets, print_presets

    if as_json:
        print(json.dumps(describe_presets(), indent=1, ensure_ascii=False))
    else:
        print_presets()
    return True


def _run_lightning(command: str) -> bool:
    """Run ``fit`` or ``edit``; these imports take seconds."""
    from tva.cli.lightning import run_lightning

    return run_lightning(command)
