"""Configurations of unknown origin."""

import os
import re
from pathlib import Path

import pytest
from small_cli import fit_config, write_yaml

from tva.cli.main import main

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 100,000 values, counting each as often as an alias repeats it"),
        ("base: x\nvectors:\n" + "".join(f"  {line}\n" for line in LAUGHS.splitlines()), "more than 100,000 values"),
        ("a: &a [*a]\nbase: *a\n", r"the alias '\*a' is in what it stands for"),
        ("[" * 2000, "nesting depth|nested more than 100 deep"),
        ("".join(" " * depth + "a:\n" for depth in range(200)), "nested more than 100 deep"),
        ("base: " + "9" * 100_000, "a number of 100000 digits"),
        (b"base: \xc7\n", "is not a text in UTF-8"),
        ("base: !!python/object/apply:os.system ['touch x']", "the tag .*python/object/apply:os.system"),
    ],
)
@pytest.mark.parametrize("command", ["compose", "edit"])
def test_a_configuration_that_takes_all_time_or_memory_is_refused_by_its_name(capsys, command, text, message):
    path = Path("given.yaml")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit, match="2"):
        main([command, "--config", str(path)])
    error = " ".join(capsys.readouterr().err.split())
    assert "given.yaml" in error
    assert re.search(message, error)


@pytest.mark.parametrize("form", ["--config={}", "--config {}"])
def test_a_configuration_must_be_a_regular_file(capsys, form):
    os.mkfifo("given.yaml")
    with pytest.raises(SystemExit, match="2"):
        main(["compose", *form.format(Path("given.yaml")).split()])
    assert "given.yaml must be a regular file, and is a pipe" in capsys.readouterr().err


def test_aliases_within_the_limits_are_read(capsys):
    path = Path("given.yaml")
    path.write_text("base: &there nowhere.safetensors\noutput: o.safetensors\nvectors: {a: *there}\nrecipe: a\n")
    with pytest.raises(SystemExit, match="2"):
        main(["compose", "--config", str(path)])
    assert "A checkpoint was expected at nowhere.safetensors" in capsys.readouterr().err


def test_a_fit_never_replaces_a_configuration_of_ones_own(capsys):
    """Without a logger a fit's configuration is saved as config.yaml in the Trainer's folder, which may be this one."""
    config = {**fit_config(".", max_epochs=1), "seed_everything": 1}
    text = "# mine\n" + Path(write_yaml(Path("config.yaml"), config)).read_text()
    Path("config.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "config.yaml"])
    assert "where a file is that tva did not write" in " ".join(capsys.readouterr().err.split())
    assert Path("config.yaml").read_text() == text
    assert os.listdir(".") == ["config.yaml"]
    Path("config.yaml").rename("fit.yaml")
    for _ in range(2):
        main(["fit", "--config", "fit.yaml"])
        assert Path("config.yaml").read_text().startswith("# lightning.pytorch==")
