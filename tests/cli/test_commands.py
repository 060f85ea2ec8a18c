"""The list of commands: one file each, a help line that is read without an import, and commands from elsewhere."""

import contextlib
import importlib
import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from tva.cli.main import help_line, list_commands, main
from tva.plugins import installed

OUTSIDE = '''
"""A command of another package."""

HELP = "double a number"
ORDER = "number"


def run(number: int, times: int = 2) -> dict:
    """Double a number.

    Args:
        number: Any.
        times: How often it is taken.
    """
    print("computing")
    return {"product": number * times, "nothing": float("nan")}


def show(result) -> None:
    """Print it."""
    print(f"product: {result['product']}")


def finish(result, most: int = 100) -> bool:
    """Return whether it is small.

    Args:
        result: The product.
        most: What is small.
    """
    return result["product"] <= most
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A command ``double`` that another installed package defines."""
    Path("outside_command.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    points = {"double": EntryPoint("double", "outside_command", "tva.commands")}
    monkeypatch.setattr(
        importlib.import_module("tva.cli.main"),
        "installed",
        lambda group: points if group == "tva.commands" else installed(group),
    )
    yield points
    sys.modules.pop("outside_command", None)


def test_every_command_has_a_help_line_of_its_own():
    commands = list_commands()
    assert {"fit-many", "vectors ls", "vectors match", "compose", "edit", "validate", "test", "predict"} <= set(
        commands
    )
    lines = {name: help_line(module) for name, module in commands.items()}
    assert len(set(lines.values())) == len(lines)
    for name, module in commands.items():
        assert lines[name] == importlib.import_module(module).HELP, name
        assert not lines[name].endswith(".")


def test_help_loads_neither_torch_nor_a_command_and_fits_80_columns():
    code = "import sys; from tva.cli.main import main; main(['--help']); main(['vectors', '--help']); "
    code += (
        "heavy = {'torch', 'lightning', 'numpy', 'rich', 'jsonargparse', 'tva.cli.commands.data'} & set(sys.modules); "
    )
    code += "assert not heavy & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert max(map(len, done.stdout.splitlines())) < 80
    assert "vectors match  find out whether" in done.stdout


def test_a_command_of_another_package_is_one_file(outside, capsys):
    main(["--help"])
    assert "double         double a number\n" in capsys.readouterr().out
    main(["double", "21"])
    assert capsys.readouterr().out == "computing\nproduct: 42\n"
    main(["double", "--number=4", "--times", "3", "--json"])
    found = capsys.readouterr()
    assert (json.loads(found.out), found.err) == ({"product": 12, "nothing": None}, "computing\n")
    with pytest.raises(SystemExit) as stop:
        main(["double", "--json", "21", "--most", "7"])
    assert (stop.value.code, json.loads(capsys.readouterr().out)["product"]) == (1, 42)
    with pytest.raises(SystemExit, match="0"):
        main(["double", "--help"])
    shown = capsys.readouterr().out
    assert "usage: tva double NUMBER [options]" in shown
    assert all(f"\n  {option} " in shown for option in ("--times TIMES", "--most MOST", "--json"))


def test_a_command_that_tva_has_is_not_replaced(outside, capsys):
    outside["edit"] = EntryPoint("edit", "outside_command", "tva.commands")
    with pytest.raises(SystemExit, match="2"):
        main(["edit"])
    assert "outside_command defines the command 'edit', which is tva's own" in capsys.readouterr().err


def test_a_file_that_is_not_a_command_is_named(outside, capsys):
    Path("outside_command.py").write_text("HELP = 'nothing yet'")
    with pytest.raises(SystemExit, match="2"):
        main(["double"])
    assert "outside_command, the module of the command 'double', must define run, show" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge"], "no command 'merge'. Did you mean 'compose'?"),
        (["composse"], "Did you mean 'compose'?"),
        (["vectors"], "tva vectors is followed by ls or match."),
        (["vectors", "lst"], "tva vectors is followed by ls or match; found 'lst'."),
    ],
)
def test_unknown_commands_name_what_was_meant(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("command", ["compose", "vectors match", "fit", "edit", "fit-many"])
def test_a_commands_help_fits_80_columns_and_has_no_markup(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: tva {command} ")
    assert not re.search(r"``|PathLike|Optional\[|default: null|<class", shown)
    wide = [line for line in shown.splitlines() if len(line) > 80]
    assert all(line.lstrip().startswith("--") for line in wide)  # an option's own name is never broken
