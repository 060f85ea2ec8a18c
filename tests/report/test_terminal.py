"""What commands print: tables for people, one line per row where piped, JSON where asked for, a curve in one line."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_cli import edit_config, fit_config, write_yaml
from small_edit import edit

from tva import save_weights
from tva.cli.main import main
from tva.console import wide_tables
from tva.report.edit_report import read_report
from tva.report.table import Column, print_table
from tva.report.terminal import print_report, sparklines


def printed(report, width=None):
    """The lines that a report prints on a terminal that is so wide; without a width, into a pipe."""
    file = io.StringIO()
    options = {"force_terminal": True, "width": width, "legacy_windows": False} if width else {"width": 10_000}
    print_report(report, Console(file=file, **options))
    return file.getvalue().splitlines()


@pytest.fixture(scope="module")
def report(vectors, tmp_path_factory):
    return edit(vectors, subject_to=["other/accuracy >= 0.1 * base"], folder=tmp_path_factory.mktemp("run"))


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
    assert ("split" in head) == (width > 100)
    assert any(line.startswith("not shown: ") for line in lines) == (width < 100)
    assert "edited" in head
    assert any(re.match(r"a +target +.*\d%", line) for line in lines)


def table(columns, rows, width=None, **options):
    file = io.StringIO()
    terminal = {"force_terminal": True, "width": width} if width else {"width": 10_000}
    print_table(Console(file=file, **terminal), columns, rows, **options)
    return [re.sub(r"\x1b\[[\d;]*m", "", line) for line in file.getvalue().splitlines()]


def test_a_table_keeps_to_80_characters_and_names_what_it_leaves_out(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    path = Column("path", lambda row: f"{'x' * 40}/{row}", is_number=False, fold=True)
    numbers = [Column(f"number {n}", lambda row: f"{row:,}", small=lambda row: "[small]") for n in range(4)]
    columns = [path, *numbers, Column("verdict", lambda row: "holds", is_number=False, keep=True)]
    for width in (None, 80):
        lines = table(columns, [1, 2000], width)
        assert max(map(len, lines)) <= 80
        assert "verdict" in lines[0]
        assert lines[-1] == "not shown: number 2, number 3 (--wide shows all columns)"
        assert lines[2] == f"{'x' * 40}/2000     2,000     2,000  holds"
    with wide_tables(True):
        lines = table(columns, [1, 2000])
    assert lines[2].count("2,000 [small]") == 4
    assert not any("not shown" in line for line in lines)


def test_long_cells_are_whole_in_a_pipe_and_broken_in_a_terminal():
    path = Column("path", lambda row: "x" * 100, is_number=False, fold=True)
    columns = [path, Column("size", lambda row: "7")]
    assert table(columns, [0]) == ["path" + " " * 98 + "size", "x" * 100 + "     7"]
    lines = table(columns, [0], 40)
    assert max(map(len, lines)) <= 40
    assert "".join(line.split()[0] for line in lines[1:]) == "x" * 100


def test_a_matrix_goes_on_below_where_it_is_too_wide():
    columns = [Column("", str)] + [Column(f"a long name {n}", lambda row, n=n: f"{row}-{n}") for n in range(9)]
    lines = table(columns, [0, 1], split=True)
    assert max(map(len, lines)) <= 80
    assert re.findall(r"1-\d", "".join(lines)) == [f"1-{n}" for n in range(9)]


def test_what_is_measured_is_said_where_it_is_not_accuracy_throughout(report):
    assert "metric" not in next(line for line in printed(report) if line.startswith("task"))
    tasks = {**report.tasks, "other": replace(report.tasks["other"], metric="loss")}
    lines = printed(replace(report, tasks=tasks))
    assert re.match("task +metric +role", next(line for line in lines if line.startswith("task")))
    assert any(re.match("other +loss +control", line) for line in lines)
    assert any(re.match("a +accuracy +target", line) for line in lines)


def test_an_edit_without_a_constraint_is_not_said_to_hold(report):
    assert any(line.startswith("holds: all constraints hold") for line in printed(report))
    assert "not checked: no constraint was set" in printed(replace(report, constraints=[]))


def test_the_curve_is_a_line_of_bars_with_the_choice_below():
    def entry(coef, task, value):
        made = {"model": "edited", "coefficients": {"scaling_coef": coef}, "task": task, "split": "val"}
        return made | {"metric": "accuracy", "num_examples": 10, "value": value}

    values = {"a": [0.0, 0.5, 1.0], "long": [1.0, 1.0, 0.0]}
    content = {
        "tasks": {task: {"metric": "accuracy", "split": "test"} for task in values},
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


def test_json_is_all_that_is_printed(runs, capsys):
    config = write_yaml(Path("edit.yaml"), edit_config(runs, Path("out"), scaling_coef=0.3))
    main(["edit", "--config", config, "--json"])
    assert json.loads(capsys.readouterr().out) == read_report(Path("out"))
    save_weights({"w": torch.zeros(4), "n": torch.tensor(3)}, "base.safetensors")
    save_weights({"w": torch.ones(4), "n": torch.tensor(3)}, "a.safetensors")
    files = ["--base", "base.safetensors", "--vectors.a", "a.safetensors"]
    options = [*files, "--recipe", "a", "--output", "edited.safetensors"]
    main(["compose", *options, "--plan", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["formula"] == "base + 1 · (a)"
    assert plan["rows"][0] == {"tensors": ["n"], "dtype": "torch.int64", "shape": [], "coefs": [{}]}
    main(["compose", "--json", *options])
    done = json.loads(capsys.readouterr().out)
    assert done["output"] == "edited.safetensors"
    assert re.fullmatch("[0-9a-f]{32}", done["edited"])
    assert done["effects"]["w"]["relative_change"] is None or done["effects"]["w"]["changed"] == 1


def test_every_command_prints_json(runs, monkeypatch, capsys):
    def found(*words):
        main([*words, "--json"])
        return json.loads(capsys.readouterr().out)

    states = {"base": torch.zeros(4), "a": torch.ones(4), "b": torch.tensor([1.0, -1.0, 0.0, 2.0])}
    for name, values in states.items():
        save_weights({"h.0.w": values}, f"{name}.safetensors")
    both = ("a.tv.safetensors", "b.tv.safetensors")
    for vector in both:
        made = found(
            "extract", "--base", "base.safetensors", "--finetuned", vector.replace(".tv", ""), "--output", vector
        )
        assert made["output"] == vector
    assert found("inspect", both[0])["whole"]["norm"] == 2
    assert found("compare", *both)["whole"]["cosines"][0][1] == pytest.approx(2 / (2 * 6**0.5))
    assert found("compress", both[0], "--output", "small.safetensors", "--encoding", "int8")["num_bytes"] > 0
    assert len(next(iter(found("vectors", "ls", ".")["bases"].values()))) == 3
    assert found("vectors", "match", "a.safetensors", "--base", "base.safetensors", both[0])["fits"][0]["coef"] == 1
    files = ["--base", "base.safetensors", "--vectors.a", both[0], "--recipe", "a", "--output", "o.safetensors"]
    assert found("compose", *files, "--keep_undo")["output"] == "o.safetensors"
    assert found("verify", "o.safetensors")["holds"] is True
    assert found("revert", "o.safetensors", "--output", "again.safetensors")["output"] == "again.safetensors"
    assert {row["path"] for row in found("data")} > {"preset:cars", "builtin:digits"}
    fit = fit_config(Path("fit"))
    done = found("fit", "--config", write_yaml(Path("fit.yaml"), fit), "--trainer.max_epochs", "1")
    assert (done["steps"], done["epochs"]) == (3, 1)
    assert done["vectors"] == [os.path.realpath("fit/last.tv.safetensors")]
    assert 0 <= done["metrics"]["val_accuracy"] <= 1
    many = {"tasks": ["x"], "output": "many", "shared": {key: fit[key] for key in ("model", "data")}}
    (planned,) = found("fit-many", "--config", write_yaml(Path("many.yaml"), many), "--plan")
    assert (planned["task"], planned["state"], planned["vector"]) == ("x", "new", None)
    write_yaml(Path("edit.yaml"), edit_config(runs, "out", scaling_coef=0.3))
    edited = found("edit", "--config", "edit.yaml")
    assert (edited["holds"], edited["command"]) == (True, "tva edit --config edit.yaml --json=true")
    assert found("report", "out")["pages"] == ["out/report.html"]
    assert "edited.safetensors" in found("push", "out", "me/x", "--dry_run")["files"]
    pytest.importorskip("nicegui")
    monkeypatch.setattr("nicegui.ui.run", lambda *_, **__: None)
    assert found("play", "out", "--port", "8917")["sliders"][0]["name"] == "scaling_coef"


@pytest.mark.parametrize("words", [["--help"], pytest.param(["data", "--json"], marks=pytest.mark.slow)])
def test_a_reader_that_leaves_ends_a_command_quietly(words):
    command = [sys.executable, "-m", "tva", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(300) == 141  # what a shell says of a program that a closed pipe has ended
    process.stderr.close()


def test_a_pipe_that_breaks_elsewhere_is_an_error(monkeypatch, capsys):
    def broken(**_):
        raise BrokenPipeError(32, "the hub hung up")

    monkeypatch.setattr("tva.cli.commands.data.run", broken)
    with pytest.raises(SystemExit) as stop:
        main(["data"])
    assert stop.value.code == 2
    assert "the hub hung up" in capsys.readouterr().err


@pytest.mark.slow
def test_compose_through_a_pipe_is_plain():
    long = ".".join(["block"] * 40)
    save_weights({f"{long}.weight": torch.ones(4)}, "base.safetensors")
    save_weights({f"{long}.weight": torch.full((4,), 2.0)}, "a.safetensors")
    files = ["--base", "base.safetensors", "--vectors.a", "a.safetensors"]
    command = [sys.executable, "-m", "tva", "compose", *files, "--recipe", "a", "--output", "o", "--plan"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("block")]
    assert row.startswith(f"{long}.weight ")
    assert row.split()[-1] == "1"
