"""The help of the commands that run a Trainer: what the parsers say, without waiting for Lightning."""

import json
import subprocess
import sys

import pytest

from tva.cli.main import main
from tva.cli.shipped_help import COMMANDS, format_help, generate, read, shipped


@pytest.mark.slow
def test_the_shipped_help_is_the_parsers():
    """In a process of its own: help lists all classes there are, and tests define some."""
    code = "import json; from tva.cli.shipped_help import generate; print(json.dumps(generate()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert read() == json.loads(done.stdout), "run: python -m tva.cli.shipped_help"


def test_the_shipped_help_has_every_option():
    for command, described in generate()["commands"].items():
        groups = {title: [option for option, _ in options] for title, options in described["groups"]}
        assert groups == {
            title: [option for option, _ in options] for title, options in shipped()[command]["groups"]
        }, "run: python -m tva.cli.shipped_help"


@pytest.mark.parametrize("width", [80, 120])
def test_help_fits_the_terminal_but_for_options_with_long_names(width, monkeypatch):
    for command in COMMANDS:
        lines = format_help(shipped()[command], width).splitlines()
        assert all(len(line) <= width or line.startswith("  --") for line in lines)


def test_help_of_edit_needs_no_lightning():
    code = (
        "import sys; from tva.cli.main import main; main(['edit', '--help']); "
        "assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "\nOptions of edit:\n" in done.stdout
    assert done.stdout.index("--recipe RECIPE") < done.stdout.index("--trainer.devices DEVICES")


def test_another_version_of_lightning_is_asked_for_its_help(monkeypatch, capsys):
    monkeypatch.setattr("tva.cli.shipped_help.version", lambda package: "0.0")
    shipped.cache_clear()
    try:
        assert shipped() == {}
        with pytest.raises(SystemExit):
            main(["validate", "--help"])
    finally:
        shipped.cache_clear()
    assert "--trainer.devices DEVICES" in capsys.readouterr().out
