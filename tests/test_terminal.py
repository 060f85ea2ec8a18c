"""What commands print: tables for people, one line a row where piped, JSON where asked for, a curve in one line."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from test_cli import blobs, edit_config, runs, write_yaml  # noqa: F401 (a fixture)
from test_edit import edit, vectors  # noqa: F401 (a fixture)

from tva import save_weights
from tva.cli import main
from tva.report import read_report
from tva.terminal import print_report, sparklines


def printed(report, width=None):
    """The lines that a report prints on a terminal that is so wide; without a width, into a pipe."""
    file = io.StringIO()
    options = {"force_terminal": True, "width": width, "legacy_windows": False} if width else {"width": 10_000}
    print_report(report, Console(file=file, **options))
    return file.getvalue().splitlines()


@pytest.fixture(scope="module")
def report(vectors, tmp_path_factory):  # noqa: F811
    return edit(vectors, tmp_path_factory.mktemp("run"), subject_to=["other/accuracy >= 0.1 * base"])


def test_in_a_pipe_every_task_is_one_line_without_colors(report):
    lines = printed(report)
    assert not any("\x1b" in line for line in lines)
    for task in report.tasks:
        (line,) = [line for line in lines if re.match(rf"{task} +(target|control)", line)]
        scores = report.tasks[task].scores
        assert f"{scores['edited'].value:.1%} [{scores['edited'].low:.1%}, {scores['edited'].high:.1%}]" in line
    assert any("other/accuracy >= 0.1 * base" in line and "holds" in line for line in lines)


@pytest.mark.parametrize("width", [80, 150])
def test_a_terminal_is_not_overrun(report, width):
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in printed(report, width)]
    assert max(map(len, lines)) <= width
    head = next(line for line in lines if line.startswith("task"))
    assert ("fine-tuned" in head) == (width > 100)
    assert "edited" in head
    assert any(re.match(r"a +target +.*\d%", line) for line in lines)


def test_the_curve_is_a_line_of_bars_with_the_choice_below():
    def entry(coef, task, value):
        return {
            "model": "edited",
            "coefficients": {"scaling_coef": coef},
            "task": task,
            "split": "val",
            "metric": "accuracy",
            "num_examples": 10,
            "value": value,
        }

    values = {"a": [0.0, 0.5, 1.0], "long": [1.0, 1.0, 0.0]}
    content = {
        "tasks": {task: {"metric": "accuracy"} for task in values},
        "coefficients": {"scaling_coef": 0.5},
        "evaluations": [entry(at / 2, task, found[at]) for task, found in values.items() for at in range(3)],
    }
    assert sparklines(content) == [
        "λ from 0 to 1 on validation data:",
        "  a       0.0% ▁▅█ 100.0%",
        "  long  100.0% ██▁ 0.0%",
        "                ▲ 0.5",
    ]
    assert sparklines({**content, "evaluations": content["evaluations"][:1]}) == []


def test_json_is_all_that_is_printed(runs, tmp_path, capsys):  # noqa: F811
    config = write_yaml(tmp_path / "edit.yaml", edit_config(runs, tmp_path / "out", scaling_coef=0.3))
    main(["edit", "--config", config, "--json"])
    assert json.loads(capsys.readouterr().out) == read_report(tmp_path / "out")
    save_weights({"w": torch.zeros(4), "n": torch.tensor(3)}, tmp_path / "base.safetensors")
    save_weights({"w": torch.ones(4), "n": torch.tensor(3)}, tmp_path / "a.safetensors")
    files = ["--base", str(tmp_path / "base.safetensors"), "--vectors.a", str(tmp_path / "a.safetensors")]
    options = [*files, "--recipe", "a", "--output", str(tmp_path / "edited.safetensors")]
    main(["compose", *options, "--plan", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["formula"] == "base + 1 · (a)"
    assert plan["rows"][0] == {"tensors": ["n"], "dtype": "torch.int64", "shape": [], "coefs": [{}]}
    main(["compose", "--json", *options])
    done = json.loads(capsys.readouterr().out)
    assert done["output"] == str(tmp_path / "edited.safetensors")
    assert re.fullmatch("[0-9a-f]{32}", done["edited"])
    assert done["effects"]["w"]["relative_change"] is None or done["effects"]["w"]["changed"] == 1


@pytest.mark.slow
def test_compose_through_a_pipe_is_plain(tmp_path):
    long = ".".join(["block"] * 40)
    save_weights({f"{long}.weight": torch.ones(4)}, tmp_path / "base.safetensors")
    save_weights({f"{long}.weight": torch.full((4,), 2.0)}, tmp_path / "a.safetensors")
    files = ["--base", str(tmp_path / "base.safetensors"), "--vectors.a", str(tmp_path / "a.safetensors")]
    command = [
        sys.executable,
        "-m",
        "tva",
        "compose",
        *files,
        "--recipe",
        "a",
        "--output",
        str(tmp_path / "o"),
        "--plan",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("block")]
    assert row.startswith(f"{long}.weight ")
    assert row.split()[-1] == "1"
