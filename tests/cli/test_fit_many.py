"""tva fit-many: each fit once, whatever fails, stops or runs beside it. Most tests run a stub instead of tva fit."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from small_cli import fit_config, write_yaml

from tva import TaskVector
from tva.cli.commands.fit_many import CONFIG, DONE, Fit, _at_work, check_fit, fit_many, make_fits, merge, run_fits, show
from tva.cli.main import main
from tva.cli.processes import only_one, run_process
from tva.executors import LocalExecutor
from tva.vectors.header import Origin

ROOT = Path(__file__).parents[2]

STUB = """
import json, os, pathlib, sys, time, yaml
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
config = yaml.safe_load(open(words["--config"]))
folder, do = pathlib.Path(config["trainer"]["default_root_dir"]), config["model"]
seen = {"devices": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": os.environ.get("OMP_NUM_THREADS")}
seen |= {"began": time.time(), "ckpt_path": words.get("--ckpt_path"), "seed": config["seed_everything"]}
(folder / "pid").write_text(str(os.getpid()))
if do.get("checkpoint"):
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "last.ckpt").touch()
until = time.time() + 120
while len(list(folder.parent.parent.glob("*/*/pid"))) < do.get("meet", 0) and time.time() < until:
    time.sleep(0.01)
time.sleep(do.get("sleep", 0))
if do.get("fail"):
    sys.exit("it went wrong: " + do["fail"])
with open(folder / "runs.jsonl", "a") as file:
    file.write(json.dumps(seen | {"ended": time.time()}) + "\\n")
"""


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "stub.py"
    path.write_text(STUB)
    return [sys.executable, str(path)]


def run(stub, tmp_path, tasks, shared=None, seeds=(0,), executor=None, **options):
    fits = make_fits(tasks, {"model": {}, **(shared or {})}, str(tmp_path / "out"), seeds)
    results = run_fits(fits, executor or LocalExecutor(1, "cpu"), command=stub, **options)
    return {(result.fit.task, result.fit.seed): result for result in results}


def runs(tmp_path, task, seed=0):
    file = tmp_path / "out" / task / f"seed={seed}" / "runs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# --- what is fitted


def test_a_grid_of_tasks_and_seeds_fills_names_in_and_takes_what_differs():
    shared = {"trainer": {"max_steps": 5, "callbacks": [1]}, "data": {"path": "preset:{task}", "note": "{split} {}"}}
    fits = make_fits({"a": None, "b": {"trainer.max_steps": 9, "trainer.callbacks": [2]}}, shared, "out", [0, 1])
    assert [(fit.task, fit.seed, str(fit.folder)) for fit in fits] == [
        ("a", 0, "out/a/seed=0"),
        ("a", 1, "out/a/seed=1"),
        ("b", 0, "out/b/seed=0"),
        ("b", 1, "out/b/seed=1"),
    ]
    assert fits[0].config["data"] == {"path": "preset:a", "note": "{split} {}"}
    assert fits[3].config["trainer"] == {"max_steps": 9, "callbacks": [2], "default_root_dir": "out/b/seed=1"}
    assert fits[3].config["seed_everything"] == 1
    assert shared["trainer"] == {"max_steps": 5, "callbacks": [1]}
    assert len({fit.digest for fit in fits}) == 4


def test_another_class_drops_the_arguments_of_the_one_before():
    below = {"model": {"class_path": "A", "init_args": {"x": 1}}}
    assert merge(below, {"model": {"class_path": "B"}}) == {"model": {"class_path": "B"}}
    assert merge(below, {"model": {"init_args": {"y": 2}}})["model"]["init_args"] == {"x": 1, "y": 2}


def test_the_lists_of_the_literature_are_tasks_by_name():
    assert [fit.task for fit in make_fits("preset:8", {}, "out", [0])][:2] == ["cars", "dtd"]
    assert len(make_fits("preset:20", {}, "out", [0, 1, 2])) == 60


def test_an_option_on_the_command_line_changes_nothing_else_in_shared(tmp_path, capsys, monkeypatch):
    shared = {"trainer": {"max_steps": 5, "accelerator": "cpu"}, "model": {"class_path": "A", "init_args": {"x": 1}}}
    config = write_yaml(tmp_path / "c.yaml", {"tasks": ["a"], "shared": shared, "output": str(tmp_path / "out")})
    seen = []
    monkeypatch.setattr("tva.cli.commands.fit_many.run_fits", lambda fits, executor, redo: seen.extend(fits) or [])
    words = ["--shared.trainer.max_steps", "9", "--shared.model.init_args.y=[1]", "--jobs=1"]
    main(["fit-many", "--config", config, *words])
    assert seen[0].config["trainer"] == {
        **shared["trainer"],
        "max_steps": 9,
        "default_root_dir": f"{tmp_path}/out/a/seed=0",
    }
    assert seen[0].config["model"] == {"class_path": "A", "init_args": {"x": 1, "y": [1]}}
    with pytest.raises(SystemExit):
        main(["fit-many", "--config", config, "--shared.trainer.max_steps"])
    assert "--shared.trainer.max_steps must be followed by a value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["a", "a"]}, "tasks and seeds must be given, each once; found tasks 'a', 'a'"),
        ({"tasks": []}, "tasks and seeds must be given"),
        ({"seeds": [1, 1]}, r"each once; found tasks 'a' and seeds \[1, 1\]"),
        ({"tasks": "mnist"}, "tasks must be names, or preset:8, preset:14 or preset:20; found 'mnist'"),
        ({"tasks": {"a": 3}}, "each with options of tva fit; found a: 3"),
        ({"tasks": ["a/b"]}, "names without '/'"),
        ({"shared": {"seed_everything": 3}}, "a: seed_everything and trainer.default_root_dir follow from seeds"),
        ({"jobs": 0, "plan": False}, "jobs must be at least 1; found 0"),
        ({"devices": "0,,1", "plan": False}, "devices must read like '0,1', '0\\+1,2\\+3' or 'cpu'; found '0,,1'"),
    ],
)
def test_mistakes_in_the_list_are_reported_before_anything_runs(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        fit_many(**{"tasks": ["a"], "shared": {}, "output": str(tmp_path / "out"), "plan": True, **options})
    assert not (tmp_path / "out").exists()


# --- once, and again only where it must be


def test_what_is_finished_is_skipped_and_a_changed_config_is_not(stub, tmp_path, capsys):
    assert run(stub, tmp_path, ["a", "b"])[("a", 0)].state == "done"
    again = run(stub, tmp_path, ["a", "b", "c"])
    assert [again[task, 0].state for task in "abc"] == ["skipped", "skipped", "done"]
    changed = run(stub, tmp_path, ["a", "b"], {"model": {"size": 2}})
    assert changed["a", 0].state == "changed"
    assert "model.size: None -> 2. Pass --redo" in changed["a", 0].message
    assert len(runs(tmp_path, "a")) == 1
    redone = run(stub, tmp_path, ["a"], {"model": {"size": 2}}, redo=True)
    assert redone["a", 0].state == "done"
    assert (tmp_path / "out/a/seed=0.replaced-1" / DONE).exists()
    show(list(changed.values()))
    assert "a seed=0 (changed): model.size" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("fit.yaml", "a: &a [" + "[" * 200, "nested more than 100 deep"),
        ("fit.yaml", "a: [", "not YAML that can be read"),
        ("done.json", '{"config": 5}', "done.json: 'config' must be text"),
        ("done.json", "[" * 200, "done.json is "),
    ],
)
def test_what_an_earlier_run_left_is_read_within_limits(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(ValueError, match=message):
        check_fit(Fit("t", 0, tmp_path, {}))


def test_what_was_interrupted_goes_on_from_its_last_checkpoint(stub, tmp_path):
    shared = {"model": {"checkpoint": True, "fail": "disk"}}
    first = run(stub, tmp_path, ["a"], shared)["a", 0]
    assert first.state == "failed"
    assert "exit status 1: it went wrong: disk" in first.message
    config = tmp_path / "out/a/seed=0" / CONFIG
    assert yaml.safe_load(config.read_text())["model"] == shared["model"]
    assert run(stub, tmp_path, ["a"], {"model": {}})["a", 0].state == "changed", "another config must not go on from it"
    mended = [stub[0], str(tmp_path / "mended.py")]
    Path(mended[1]).write_text(STUB.replace('if do.get("fail")', "if False"))
    assert run(mended, tmp_path, ["a"], shared)["a", 0].state == "done"
    assert runs(tmp_path, "a")[0]["ckpt_path"].endswith("out/a/seed=0/checkpoints/last.ckpt")


def test_a_failing_task_stops_no_other_and_is_tried_again(stub, tmp_path):
    tasks = {"a": {"model.fail": "no such column"}, "b": {}, "c": {}}
    results = run(stub, tmp_path, tasks)
    assert [results[task, 0].state for task in "abc"] == ["failed", "done", "done"]
    assert "no such column" in results["a", 0].message
    again = run(stub, tmp_path, tasks)
    assert [again[task, 0].state for task in "abc"] == ["failed", "skipped", "skipped"]
    assert (tmp_path / "out/a/seed=0/fit.log").read_text().count("$ ") == 2


# --- devices


def test_fits_run_side_by_side_each_on_its_device(stub, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    results = run(
        stub, tmp_path, list("abcd"), {"model": {"meet": 2, "sleep": 0.1}}, executor=LocalExecutor(None, "0,2+3")
    )
    assert {result.state for result in results.values()} == {"done"}
    seen = {task: runs(tmp_path, task)[0] for task in "abcd"}
    assert {entry["devices"] for entry in seen.values()} == {"0", "2,3"}
    assert all(int(entry["threads"]) >= 1 for entry in seen.values())
    for device in ("0", "2,3"):
        spans = sorted((e["began"], e["ended"]) for e in seen.values() if e["devices"] == device)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "one at a time"
    first, second = seen["a"], seen["b"]  # they waited for each other
    assert first["devices"] != second["devices"]
    assert first["began"] < second["ended"]
    assert second["began"] < first["ended"]


def test_local_workers_share_the_devices_and_cores_there_are(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    devices = [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in LocalExecutor(None, None).workers]
    assert devices == ["5", "7"]
    assert [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in LocalExecutor(1, 3).workers] == ["3"]
    assert LocalExecutor(None, "cpu").workers[0].environment == {"CUDA_VISIBLE_DEVICES": ""}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert len(LocalExecutor(None, None).workers) == 1
    assert "OMP_NUM_THREADS" in LocalExecutor(2, None).workers[0].environment


@pytest.mark.parametrize(
    ("engine", "jobs", "per_fit", "message"),
    [
        ("local", None, {"gpus": 1}, "'gpus'.*belong to the engine 'ray'"),
        ("slurm", None, {}, "engine must be 'local', 'local:N', 'ray' or 'ray:ADDRESS'; found 'slurm'"),
        ("local:two", None, {}, "engine must be .*; found 'local:two'"),
        ("local:2", 2, {}, "jobs=2 too. Leave one out"),
        ("ray", 2, {}, "leave jobs and devices out"),
        ("ray", None, {"gpu": 1}, r"cpus, gpus and memory; found \['gpu'\]"),
    ],
)
def test_an_engine_takes_its_own_options_only(engine, jobs, per_fit, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit_many(["a"], {}, str(tmp_path), engine=engine, jobs=jobs, per_fit=per_fit)
    assert not list(tmp_path.iterdir())


def test_without_ray_the_engine_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'tva\[cluster\]'"):
        fit_many(["a"], {}, str(tmp_path), engine="ray")


def test_an_error_of_one_call_stops_no_other():
    def call(item, worker):
        if item == 2:
            raise OSError("disk")
        return item

    found = dict(LocalExecutor(2, "cpu").run(call, [1, 2, 3]))
    assert (found[1], found[3], str(found[2])) == (1, 3, "disk")


def test_closing_a_run_ends_its_calls_and_begins_no_more(tmp_path):
    began = []

    def call(item, worker):
        began.append(item)
        if item:
            run_process(["sleep", "600"], tmp_path / "log", worker)

    started = time.monotonic()
    run = LocalExecutor(2, "cpu").run(call, [0, 1, 2, 3, 4])
    next(run)
    run.close()
    assert time.monotonic() - started < 300
    assert len(began) <= 3


# --- two commands on one list


def test_a_second_command_on_one_output_is_refused_while_the_first_runs(tmp_path):
    with (
        only_one(tmp_path / "out", "fit-many"),
        pytest.raises(ValueError, match=rf"Process {os.getpid()} on .* runs tva fit-many in .*out"),
    ):
        fit_many(["a"], {}, str(tmp_path / "out"), devices="cpu")
    with only_one(tmp_path / "out", "fit-many"):
        pass


def test_what_runs_is_named_whichever_node_it_is_on(tmp_path):
    (fit,) = make_fits(["a"], {}, str(tmp_path), [0])
    assert not _at_work(fit, 0)
    fit.folder.mkdir(parents=True)
    (fit.folder / "fit.log").write_text("$ tva fit")
    assert _at_work(fit, time.time() - 60)
    assert not _at_work(fit, time.time() + 60)  # of an earlier run
    (fit.folder / DONE).write_text("{}")
    assert not _at_work(fit, time.time() - 60)


# --- Ctrl-C


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_children_and_the_same_command_goes_on(stub, tmp_path, number):
    config = {
        "tasks": ["a", "b"],
        "shared": {"model": {"sleep": 600, "checkpoint": True}},
        "output": str(tmp_path / "out"),
    }
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored in the background
        f"import sys, tva.cli.commands.fit_many as m; m.run_fits.__defaults__ = ({stub!r}, False); "
        f"from tva.cli.main import main; main(['fit-many', '--config', {write_yaml(tmp_path / 'c.yaml', config)!r}])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    checkpoint, pid = tmp_path / "out/a/seed=0/checkpoints/last.ckpt", tmp_path / "out/a/seed=0/pid"
    until = time.monotonic() + 300
    while not checkpoint.exists() and parent.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    parent.send_signal(number)
    printed = parent.communicate(timeout=300)[0]
    assert parent.returncode == 130, printed
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert "a seed=0 (interrupted): the same command resumes it" in printed
    assert not (tmp_path / "out/b").exists() or not runs(tmp_path, "b")
    plan = fit_many(config["tasks"], config["shared"], config["output"], plan=True)
    assert [result.state for result in plan] == ["interrupted", "new"]


# --- the real thing


def test_the_table_has_what_the_vectors_header_says(stub, tmp_path, capsys):
    vector = TaskVector({"w": torch.ones(2)}, origin=Origin(metrics={"loss": 0.5, "val/a/accuracy": 0.75}))
    vector.save(tmp_path / "v.tv.safetensors")
    script = tmp_path / "stub.py"
    script.write_text(
        STUB + f"import shutil; shutil.copy({str(tmp_path / 'v.tv.safetensors')!r}, folder / 'last.tv.safetensors')"
    )
    result = run(stub, tmp_path, ["a"])["a", 0]
    assert (result.metric, result.vector.name) == (("val/a/accuracy", 0.75), "last.tv.safetensors")
    again = run(stub, tmp_path, ["a"])["a", 0]
    assert (again.metric, again.vector, again.state) == (result.metric, result.vector, "skipped")
    show([again])
    assert "val/a/accuracy 0.7500" in capsys.readouterr().out


def test_every_fit_of_the_configs_is_one_that_tva_fit_takes(capsys, tmp_path, monkeypatch):
    content = yaml.safe_load((ROOT / "configs/fit/all.yaml").read_text())
    fit = make_fits(content["tasks"], content["shared"], str(tmp_path), content.get("seeds", [0]))[-1]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", write_yaml(tmp_path / "fit.yaml", fit.config), "--print_config"])
    assert stop.value.code == 0
    assert f"seed_everything: {fit.seed}" in capsys.readouterr().out


@pytest.mark.slow
def test_fit_many_makes_the_vectors_that_tva_fit_makes_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    shared = fit_config("unused", 1)
    folder = shared["trainer"].pop("default_root_dir") and shared["trainer"]["callbacks"][1]["init_args"].pop("dirpath")
    assert folder == "unused"
    shared["data"]["init_args"]["seed"] = "{seed}"
    config = {"tasks": ["blobs"], "seeds": [1], "shared": shared, "output": str(tmp_path / "out")}
    path = write_yaml(tmp_path / "c.yaml", config)
    main(["fit-many", "--config", path, "--devices", "cpu"])
    vector = TaskVector.load(next((tmp_path / "out/blobs/seed=1").rglob("last.tv.safetensors")))
    one = write_yaml(tmp_path / "one.yaml", fit_config(tmp_path / "one", 1))
    main(["fit", "--config", one, "--seed_everything", "1"])
    assert vector.origin.finetuned == TaskVector.load(tmp_path / "one/last.tv.safetensors").origin.finetuned
    with pytest.raises(SystemExit) as stop:
        main(["fit-many", "--config", path, "--devices", "cpu", "--shared.trainer.max_epochs", "4"])
    assert stop.value.code == 1
    (tmp_path / "out/blobs/seed=1" / DONE).unlink()  # as if it had been killed at its last checkpoint
    main(["fit-many", "--config", path, "--devices", "cpu"])
    assert "--ckpt_path" in (tmp_path / "out/blobs/seed=1/fit.log").read_text()


def test_every_fit_of_the_guide_leaves_a_task_vector():
    blocks = (ROOT / "docs/howto/fit-many.md").read_text().split("```yaml\n")[1:]
    found = [yaml.safe_load(block.split("```")[0]) for block in blocks]
    for shared in [config["shared"] for config in found if "tasks" in config]:
        (callback,) = shared["trainer"]["callbacks"]
        assert callback["class_path"] == "tva.callbacks.TaskVectorCallback"
        assert callback["init_args"] == {"at_train_end": True}
