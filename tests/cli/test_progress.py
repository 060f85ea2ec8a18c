"""Long work says where it is: a line every 30 s in a pipe, a bar that counts the steps of a fit in a terminal."""

import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_cli import edit_config, fit_config, write_yaml

from tva import console, save_weights
from tva.cli.commands.fit_many import Result, _running, make_fits
from tva.cli.commands.paper__run import Step, run_edits
from tva.cli.fit_progress import StepBar
from tva.cli.main import main


@pytest.fixture
def hurried(monkeypatch):
    """Every line that could come comes at once."""
    monkeypatch.setattr(console, "EVERY_S", 0.0)


@pytest.fixture
def checkpoints(tmp_path):
    for name, value in (("base", 1.0), ("a", 2.0)):
        save_weights({"w": torch.full((4,), value), "v": torch.full((4,), value)}, f"{name}.safetensors")
    return Path("base.safetensors"), Path("a.safetensors"), tmp_path


def test_work_on_files_names_its_tensor(checkpoints, hurried, capsys):
    base, a, folder = map(str, checkpoints)
    main(["extract", "--base", base, "--finetuned", a, "--output", f"{folder}/a.tv.safetensors"])
    assert re.search(r"^\d\d:\d\d:\d\d extracting: 1 of 2$", capsys.readouterr().err, re.M)
    main(["compose", "--base", base, "--vectors.a", a, "--recipe", "a", "--output", f"{folder}/out.safetensors"])
    assert re.search(r"^\d\d:\d\d:\d\d composing: 1 of 2$", capsys.readouterr().err, re.M)
    main(["compress", f"{folder}/a.tv.safetensors", "--output", f"{folder}/b.tv.safetensors", "--max_error", "0.1"])
    assert re.search(r"^\d\d:\d\d:\d\d measuring: 1 of 2$", capsys.readouterr().err, re.M)


def test_nothing_is_said_before_30_seconds(checkpoints, capsys):
    base, a, folder = map(str, checkpoints)
    main(["extract", "--base", base, "--finetuned", a, "--output", f"{folder}/a.tv.safetensors"])
    assert capsys.readouterr().err == ""


def test_an_edit_in_a_pipe_names_what_it_evaluates(runs, hurried, capsys):
    search = {"class_path": "tva.search.Learned", "init_args": {"num_steps": 3}}
    config = write_yaml(Path("edit.yaml"), edit_config(runs, Path("out"), search=search))
    main(["edit", "--config", config])
    found = capsys.readouterr().err
    assert found.startswith("tva edit: loading …\n")
    assert re.search(r"^\d\d:\d\d:\d\d the base on blobs1 \(val\): batch 1 of \d+$", found, re.M)
    assert re.search(r"^\d\d:\d\d:\d\d 2 edits on blobs2 \(test\): batch 1 of \d+$", found, re.M)
    assert re.search(r"^\d\d:\d\d:\d\d learning coefficients: step 2 of 3$", found, re.M)


def test_a_fit_in_a_pipe_names_its_step_and_its_loss(hurried, capsys):
    main(["fit", "--config", write_yaml(Path("fit.yaml"), fit_config(Path("fit"), max_steps=7, max_epochs=-1))])
    found = capsys.readouterr().err
    assert re.search(r"^\d\d:\d\d:\d\d step 7 of 7(, \S*loss \S+)?$", found, re.M)
    assert "epoch" not in found


def test_the_bar_of_a_fit_counts_the_steps_of_max_steps(monkeypatch):
    """Lightning 2.6 shows "Epoch 5/-2" and begins anew in every epoch."""
    shown = []

    def update(self, bar, done, visible=True):
        shown.append((self._get_train_description(0).strip(), done, self.total_train_batches))

    monkeypatch.setattr(StepBar, "_update", update)
    config = fit_config(Path("fit"), max_steps=7, max_epochs=-1, enable_progress_bar=True, num_sanity_val_steps=0)
    config["trainer"]["limit_val_batches"] = 0
    main(["fit", "--config", write_yaml(Path("fit.yaml"), config)])
    assert shown == [("Step", done, 7) for done in range(1, 8)]


def test_the_bar_of_a_fit_counts_batches_where_epochs_end_it(monkeypatch):
    shown = []
    monkeypatch.setattr(StepBar, "_update", lambda self, bar, done, visible=True: shown.append(done))
    config = fit_config(Path("fit"), max_epochs=2, limit_train_batches=2, enable_progress_bar=True)
    config["trainer"] |= {"limit_val_batches": 0}
    main(["fit", "--config", write_yaml(Path("fit.yaml"), config)])
    assert shown == [1, 2, 1, 2]


def test_fit_many_names_the_steps_of_the_fits_that_run():
    fits = make_fits(["a", "b", "c"], {}, ".", [0])
    for fit in fits[:2]:
        fit.folder.mkdir(parents=True)
    (fits[0].folder / "fit.log").write_text("12:00:00 step 10 of 3,000\n12:00:30 step 1,200 of 3,000, loss 0.1\n")
    (fits[1].folder / "fit.log").write_text("loading\n")
    assert _running(fits, {}) == "0 of 3 ended; running: a seed=0 at step 1,200 of 3,000, b seed=0"
    results = {fits[0].folder: Result(fits[0], "done")}
    assert _running(fits, results) == "1 of 3 ended; running: b seed=0"


def test_who_waits_for_other_processes_says_where_they_are(monkeypatch, capsys):
    monkeypatch.setattr(console, "EVERY_S", 0.01)
    with console.reporting(lambda: "1 of 2 ended"):
        for _ in range(6000):
            if "1 of 2 ended" in capsys.readouterr().err:
                return
            time.sleep(0.01)
    raise AssertionError("nothing was said in a minute")


def test_the_edits_of_an_experiment_say_how_many_are_finished(monkeypatch, capsys):
    monkeypatch.setattr(console, "EVERY_S", 0.01)
    seen = []

    class Slow:
        def run(self, function, items):
            for item in items:
                for _ in range(6000):
                    seen.append(capsys.readouterr().err)
                    if f"an experiment: {len(finished)} of 2 edits finished" in "".join(seen):
                        break
                    time.sleep(0.01)
                finished.append(item)
                yield item, Step("an experiment", "edit", item.edit.name, 0, "done", 1.0)

    finished: list = []
    jobs = [SimpleNamespace(edit=SimpleNamespace(name=name, seed=0)) for name in "ab"]
    assert [step.state for step in run_edits("an experiment", jobs, Slow(), redo=False)] == ["done", "done"]
    for count in (0, 1):
        assert f"an experiment: {count} of 2 edits finished" in "".join(seen)


def test_in_a_terminal_there_are_no_lines(hurried, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    console.say_where(lambda: "step 1")
    assert capsys.readouterr().err == ""
