"""The command line as people type it: fit, edit, the gate's exit status, and the mistakes of a newcomer."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from small_cli import blobs, edit_config, fit_config, write_yaml
from small_models import Blobs, ControlCallback, LinearNet, free_port

from tva import TaskVector, fingerprint, open_weights, save_weights
from tva.cli.main import Terminated, main, run

ROOT = Path(__file__).parents[2]
PLACES = ("configs/**/*.yaml", "tva/cli/templates/*.yaml")
CONFIGS = [config for place in PLACES for config in sorted(ROOT.glob(place))]


def edit(runs, *arguments, **changes):
    config = write_yaml(Path("edit.yaml"), edit_config(runs, "out", **changes))
    main(["edit", "--config", config, *arguments])
    return json.loads(Path("out/edit.json").read_text())


def status_and_message(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code, capsys.readouterr().err


# --- fit


def test_fit_writes_a_task_vector_with_the_runs_facts(runs):
    vector = TaskVector.load(runs / "blobs1/last.tv.safetensors")
    assert vector.origin.base == fingerprint(LinearNet().net.state_dict())  # the network's own names
    assert vector.origin.task == "blobs1"
    assert vector.origin.step == 9
    assert vector.origin.hyperparameters["width"] == 8
    assert set(vector.deltas) == set(LinearNet().net.state_dict())


def test_every_data_module_keeps_its_own_hyperparameters_in_fit():
    callback = {"class_path": "small_models.ControlCallback", "init_args": {"control": blobs(7)}}
    main(["fit", "--config", write_yaml(Path("c.yaml"), fit_config(Path(), 5, [callback], fast_dev_run=True))])
    assert ControlCallback.seen == {"control": 7, "data": 5}


def test_fit_resumed_on_the_command_line_ends_where_one_run_ends(runs):
    config = write_yaml(Path("c.yaml"), fit_config(Path("run"), 1))
    main(["fit", "--config", config, "--trainer.max_epochs", "1"])
    main(["fit", "--config", config, "--ckpt_path", "run/last.ckpt"])
    resumed, whole = (TaskVector.load(folder / "last.tv.safetensors") for folder in (Path("run"), runs / "blobs1"))
    assert resumed.origin.base == whole.origin.base
    assert resumed.origin.finetuned == whole.origin.finetuned


# --- edit


def test_edit_adds_two_tasks_and_writes_what_it_reports(runs, capsys):
    report = edit(runs, subject_to=["other/accuracy >= 0.1 * base"])
    assert report["holds"] is True
    assert {name: task["role"] for name, task in report["tasks"].items()} == {
        "blobs1": "target",
        "blobs2": "target",
        "other": "control",
    }
    for task in report["tasks"].values():
        assert task["split"] == "test"
        assert task["num_examples"] == 60
        assert task["edited"]["low"] is None  # this module logs plain numbers, without scores by example
    for name in ("blobs1", "blobs2"):
        task = report["tasks"][name]
        assert task["edited"]["value"] > task["base"]["value"]
        assert task["normalized"] == pytest.approx(task["edited"]["value"] / task["finetuned"]["value"])
    # the weights are base + λ (a + b), bit for bit
    a, b = (TaskVector.load(runs / name / "last.tv.safetensors") for name in ("blobs1", "blobs2"))
    expected = (a + b).apply_to(LinearNet().state_dict(), report["coefficients"]["scaling_coef"])
    assert fingerprint(open_weights("out/edited.safetensors")) == fingerprint(expected)
    out = capsys.readouterr().out
    assert "all constraints hold on test data" in out
    assert "fine-tuned" in out


def test_choice_uses_validation_data_and_every_evaluation_is_recorded(runs):
    report = edit(runs, "--search", "Grid", "--search.num", "5")
    tried = {(e["coefficients"]["scaling_coef"], e["task"], e["split"]) for e in report["evaluations"]}
    assert {(coef, task, "val") for coef in (0, 0.25, 0.5, 0.75, 1) for task in ("blobs1", "blobs2")} <= tried
    assert not {entry for entry in tried if entry[1] == "other" and entry[2] == "val"}  # not asked for: not looked at
    values = {
        (e["coefficients"]["scaling_coef"], e["task"]): e["value"]
        for e in report["evaluations"]
        if e["split"] == "val" and e["model"] in ("base", "edited")
    }
    ceiling = {
        e["task"]: e["value"]
        for e in report["evaluations"]
        if e["model"].startswith("fine-tuned") and e["split"] == "val"
    }
    means = {c: sum(values[c, t] / ceiling[t] for t in ceiling) for c in (0.25, 0.5, 0.75, 1.0)}
    best = max(means.values())
    assert report["coefficients"]["scaling_coef"] == min(c for c, mean in means.items() if mean == best)


def test_every_data_module_keeps_its_own_hyperparameters_in_edit(runs):
    sizes = {"blobs1": 20, "blobs2": 40, "other": 80}
    report = edit(
        runs,
        scaling_coef=0.5,
        targets={"blobs1": blobs(1, num_examples=20), "blobs2": blobs(2, num_examples=40)},
        controls={"other": blobs(3, num_examples=80)},
    )
    assert {name: task["num_examples"] for name, task in report["tasks"].items()} == sizes


def test_a_failing_gate_exits_with_1_and_writes_no_weights(runs, capsys):
    edit(runs, scaling_coef=0.5)
    assert Path("out/edited.safetensors").exists()
    with pytest.raises(SystemExit) as stop:
        edit(runs, scaling_coef=0.5, subject_to=["other/accuracy >= base + 1"])
    assert stop.value.code == 1
    report = json.loads(Path("out/edit.json").read_text())
    assert report["holds"] is False
    assert report["constraints"][0]["holds"] is False
    assert not Path("out/edited.safetensors").exists()  # nor those of the run before
    assert "FAILS on test data: other/accuracy >= base + 1" in capsys.readouterr().out


def test_no_feasible_coefficient_shows_the_closest_and_writes_a_page_and_no_weights(runs, capsys):
    edit(runs, scaling_coef=0.5)
    assert Path("out/edited.safetensors").exists()
    with pytest.raises(SystemExit) as stop:
        edit(runs, rule="largest", subject_to=["blobs1/accuracy >= 1.5"])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "coefficients tried meets 'blobs1/accuracy >= 1.5'" in printed
    # what is shown is the closest coefficient, on the validation data that it was judged on
    closest = float(re.search(r"the closest is ([\d.]+)", printed)[1])
    loaded = TaskVector.load(runs / "blobs1/last.tv.safetensors") + TaskVector.load(runs / "blobs2/last.tv.safetensors")
    model = LinearNet()
    model.load_state_dict(loaded.apply_to(model.state_dict(), closest))
    inputs, labels = Blobs(1).val_dataloader().dataset.tensors
    accuracy = float((model(inputs).argmax(-1) == labels).float().mean())
    assert re.search(rf"blobs1 +target +val +\S+% +{accuracy:.1%} ", printed)
    names = ["config.yaml", "edit.json", "report.html"]
    kept, *written = sorted(file.name for file in Path("out").iterdir())
    assert written == names  # and not the weights of the run before, which stand aside
    assert kept.startswith("accepted-")
    main(["report", "out"])
    assert "no feasible coefficient" in capsys.readouterr().out
    status, message = status_and_message(capsys, "push", Path("out"), "me/x")
    assert status == 2
    assert "has no edited weights to push, for its constraints do not hold: NO EDIT: none of the " in message


def test_scaling_coef_zero_gives_the_base_and_its_scores(runs):
    report = edit(runs, scaling_coef=0.0)
    assert fingerprint(open_weights("out/edited.safetensors")) == fingerprint(LinearNet().state_dict())
    for task in report["tasks"].values():
        assert task["edited"] == task["base"]


def test_a_finetuned_checkpoint_stands_for_its_task_vector(runs):
    by_vector = edit(runs, scaling_coef=0.5)
    checkpoints = {name: str(runs / name / "last.ckpt") for name in ("blobs1", "blobs2")}
    by_checkpoint = edit(runs, scaling_coef=0.5, vectors=checkpoints)
    assert by_vector["tasks"] == by_checkpoint["tasks"]


def test_base_given_as_a_checkpoint(runs):
    other = {name: value + 1 for name, value in LinearNet().state_dict().items()}
    save_weights(other, "other.safetensors")
    own = next((runs / "blobs1").glob("base-*.safetensors"))
    assert edit(runs, "--base", str(own), scaling_coef=0.5)["base"]["path"] == str(own)


def test_coefficients_in_the_recipe(runs):
    report = edit(runs, "--coefs.s", "0.25", recipe="s * blobs1 - blobs2", scaling_coef=1.0)
    assert report["coefficients"] == {"scaling_coef": 1.0, "s": 0.25}
    a, b = (TaskVector.load(runs / name / "last.tv.safetensors") for name in ("blobs1", "blobs2"))
    expected = (0.25 * a - b).apply_to(LinearNet().state_dict())
    assert fingerprint(open_weights("out/edited.safetensors")) == fingerprint(expected)


# --- mistakes of a newcomer: status 2 and a message that helps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "-blosb1"}, "'blosb1' is unknown; .*Did you mean 'blobs1'?"),
        (
            {"vectors": {"blobs1": "nowhere/last.tv.safetensors"}, "recipe": "blobs1", "maximize": "blobs1/accuracy"},
            "nothing is there",
        ),
        (
            {"controls": {}, "subject_to": ["imagenet/accuracy >= 0.95 * base"]},
            "Add a data module under controls.imagenet",
        ),
        ({"subject_to": ["other/accuracy = 1"]}, "must read like 'imagenet/accuracy >= 0.95"),
        ({"maximize": None}, "say what is best"),
        ({"maximize": None, "rule": "largest"}, "needs a constraint"),
        ({"minimize": "other/accuracy"}, "Give one objective"),
        ({"targets": {}, "controls": {}, "maximize": None}, "at least one task"),
        ({"controls": {"blobs1": blobs(3)}}, "a target or a control, not both: 'blobs1'"),
        ({"targets": {"blobs9": blobs(1)}}, "'blobs9' has none: name its task vector like the task"),
        ({"model": {"class_path": "small_models.LinearNet", "init_args": {"width": 9}}}, r"lives in|\[8, 4\]|is \[9"),
        ({"subject_to": ["other/f1 >= 0.5"], "scaling_coef": 0.5}, "other has no metric 'f1'; it has 'accuracy'"),
    ],
)
def test_mistakes_end_with_status_2(runs, capsys, changes, message):
    config = write_yaml(Path("edit.yaml"), edit_config(runs, Path("out"), **changes))
    status, text = status_and_message(capsys, "edit", "--config", config)
    assert status == 2
    assert re.search(message, text), text
    assert text.startswith("tva edit: loading …\ntva: error: ") or text.startswith("tva: error: ")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("error", "ended"), [(KeyboardInterrupt, (130, "interrupted")), (Terminated, (143, "terminated"))]
)
def test_an_evaluation_that_is_interrupted_says_so(runs, capsys, monkeypatch, error, ended):
    def interrupted(*_):
        raise error

    monkeypatch.setattr(LinearNet, "validation_step", interrupted)
    config, before = write_yaml(Path("edit.yaml"), edit_config(runs, Path("out"))), signal.getsignal(signal.SIGINT)
    try:
        status, text = status_and_message(capsys, "edit", "--config", config)
    finally:
        signal.signal(signal.SIGINT, before)  # which the Trainer ignores from then on
    assert (status, text.splitlines()[-1]) == (ended[0], f"tva: {ended[1]}. Evaluations are kept in its log: the same "
                                               "command continues.")  # fmt: skip


def test_a_vector_from_another_base_names_both_and_what_to_do(runs, capsys):
    base = {name: value + (1 if name.endswith("bias") else 0) for name, value in LinearNet().state_dict().items()}
    save_weights(base, "other.safetensors")
    config = write_yaml(Path("edit.yaml"), edit_config(runs, Path("out"), scaling_coef=0.5))
    status, text = status_and_message(capsys, "edit", "--config", config, "--base", Path("other.safetensors"))
    assert status == 2
    assert fingerprint(base).digest in text
    assert fingerprint(LinearNet().state_dict()).digest in text
    assert "2 of 4 tensors differ" in text
    main(["edit", "--config", config, "--base", "other.safetensors", "--allow_other_base", "true"])
    assert Path("out/edited.safetensors").exists()


def test_a_checkpoint_that_is_no_checkpoint(runs, capsys):
    Path("notes.safetensors").write_text("not weights")
    vectors = {"blobs1": "notes.safetensors"}
    changes = {"vectors": vectors, "recipe": "blobs1", "targets": {"blobs1": blobs(1)}}
    config = write_yaml(Path("edit.yaml"), edit_config(runs, Path("out"), **changes))
    status, text = status_and_message(capsys, "edit", "--config", config)
    assert (status, "not a safetensors file" in text) == (2, True)


def test_an_option_that_does_not_exist_is_refused_by_the_parser(runs, capsys):
    config = write_yaml(Path("edit.yaml"), edit_config(runs, Path("out")))
    status, text = status_and_message(capsys, "edit", "--config", config, "--recipee", "x")
    assert status == 2
    assert "recipee" in text
    assert len(text.splitlines()) < 10  # not a page of usage


def test_an_unknown_command_names_the_nearest(capsys):
    status, text = status_and_message(capsys, "edti")
    assert (status, "Did you mean 'edit'?" in text) == (2, True)


# --- help and configs


def test_help_needs_no_heavy_import():
    code = "import sys; from tva.cli.main import main; main(['--help']); "
    code += "assert not {'torch', 'lightning'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "edit" in done.stdout
    assert "fit" in done.stdout


@pytest.mark.parametrize(("command", "own"), [("edit", "--recipe"), ("fit", "--ckpt_path")])
def test_help_begins_with_the_commands_own_options(command, own, capsys):
    main([command, "--help"])
    shown = capsys.readouterr().out
    assert 0 < shown.index(f"\n  {own} ") < shown.index("\n  --model ") < shown.index("\n  --trainer.devices ")
    assert "<class" not in shown


def test_python_dash_m_tva_and_version():
    done = subprocess.run([sys.executable, "-m", "tva", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("tva 0.")


@pytest.mark.parametrize("config", CONFIGS, ids=[str(config.relative_to(ROOT)) for config in CONFIGS])
def test_every_config_parses(config, capsys, monkeypatch):
    monkeypatch.setenv("TVA_DATA", "data")
    common = config.parent / "common.yaml"  # what the configs of one folder share stands there
    files = [common, config] if common.exists() and config != common else [config]
    command = re.search(r"# tva (fit-many|fit|edit|compose) --config", config.read_text())[1]
    with pytest.raises(SystemExit) as stop:
        main([command, *(word for file in files for word in ("--config", str(file))), "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)


def test_configs_exist():
    assert len(CONFIGS) >= 8


@pytest.mark.slow
def test_fit_and_edit_under_ddp_with_two_processes():
    config = write_yaml(Path("c.yaml"), fit_config(Path("run"), 1, devices=2, strategy="ddp"))
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "MASTER_PORT": str(free_port())}
    subprocess.run([sys.executable, "-m", "tva", "fit", "--config", config], check=True, env=environment, timeout=600)
    base, tuned = (open_weights(path) for path in (next(Path("run").glob("base-*")), Path("run/last.ckpt")))
    vector = TaskVector.load("run/last.tv.safetensors")
    assert all(torch.equal(delta, tuned[f"net.{name}"] - base[name]) for name, delta in vector.deltas.items())


# --- compose


def test_compose_on_the_command_line_and_from_yaml(runs, capsys):
    base = next((runs / "blobs1").glob("base-*.safetensors"))
    checkpoints = {name: str(runs / name / "last.ckpt") for name in ("blobs1", "blobs2")}
    options = [f"--vectors.{name}={path}" for name, path in checkpoints.items()]
    main(
        [
            *["compose", "--base", str(base), *options, "--recipe", "-0.5 * (blobs1 + blobs2)"],
            *["--output", "one.safetensors", "--scaling_coef", "0.5"],
        ]
    )
    assert "lost in rounding" in capsys.readouterr().out
    content = {"base": str(base), "vectors": checkpoints, "recipe": "-0.5 * (blobs1 + blobs2)", "scaling_coef": 0.5}
    config = write_yaml(Path("c.yaml"), {**content, "output": "two.safetensors"})
    main(["compose", "--config", config])
    a, b = (TaskVector.load(runs / name / "last.tv.safetensors") for name in ("blobs1", "blobs2"))
    expected = fingerprint((-0.5 * (a + b)).apply_to(LinearNet().net.state_dict(), 0.5))
    for name in ("one", "two"):
        assert fingerprint(open_weights(f"{name}.safetensors")) == expected
    status, text = status_and_message(capsys, "compose", "--config", config, "--recipe", "blobs1 + blobs3")
    assert (status, "Did you mean 'blobs1'" in text or "Did you mean 'blobs2'" in text) == (2, True)


def test_a_plan_is_printed_and_nothing_written(capsys):
    for name, value in (("base", 1.0), ("a", 2.0)):
        save_weights({f"h.{i}.w": torch.full((2, 3), value) for i in range(3)}, f"{name}.safetensors")
    words = ["compose", "--base", "base.safetensors", "--vectors.a", "a.safetensors"]
    words += ["--recipe", "-s * a", "--coefs", '{"s": {"layer": [0, 1]}}', "--output", "out"]
    main([*words, "--plan", "--scaling_coef", "0.5"])
    printed = capsys.readouterr().out
    assert "base + 0.5 · (-s * a)" in printed
    assert re.search(r"h\.\*\.w +3 +-?0 … -0.5 +\[2, 3\] +float32", printed)
    assert "Nothing was written." in printed
    assert sorted(path.name for path in Path().iterdir()) == ["a.safetensors", "base.safetensors"]
    main(words)
    assert torch.equal(open_weights("out")["h.1.w"], torch.full((2, 3), 0.5))


def test_a_command_that_ends_well_leaves_the_process_group_before_the_interpreter_is_gone(monkeypatch, capsys):
    """Else a thread of gloo may ask for the interpreter as it unloads, which aborts the process after all its work."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["tva", "--version"])
    run()
    assert capsys.readouterr().out.startswith("tva ")
    assert not dist.is_initialized()
