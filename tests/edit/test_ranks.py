"""`tva edit` with a Trainer of two processes: the same choice, scores and weights as one, each example counted once."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from lightning.pytorch.strategies import DeepSpeedStrategy
from small_edit import LateNet, Net
from small_models import Blobs, free_port, run_ranks
from torch.utils.data import DataLoader

from tva import fingerprint, open_weights
from tva.cli.main import main
from tva.edit.options import EditOptions
from tva.edit.play.model import Playground
from tva.edit.run import run_edit
from tva.edit.trainer import Trainer
from tva.evaluation.batch_cache import through_cache
from tva.evaluation.evaluate import evaluate
from tva.evaluation.ranks import check_strategy
from tva.report import page
from tva.search import Bisect, Grid, Learned, Optuna, Race

pytestmark = pytest.mark.slow
NUM = {"a": 201, "b": 130, "other": 30}  # batches of 20: odd numbers of them, and last ones that are not full


def make_trainer(devices, kind=Trainer, **options):
    return kind(
        accelerator="cpu",
        devices=devices,
        strategy=options.pop("strategy", "ddp" if devices > 1 else "auto"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _draw_nothing():
    """In a fork of a process that has drawn, vl-convert waits for threads that stayed behind."""
    page.library = lambda: ""


def _edit(folder, vectors, devices, changes):
    _draw_nothing()
    model, trainer = Net(), make_trainer(devices)
    options = EditOptions(
        vectors=vectors,
        output=str(folder / "out"),
        **{
            "recipe": "a + b",
            "targets": {"a": Blobs(1, NUM["a"]), "b": Blobs(2, NUM["b"])},
            "controls": {"other": Blobs(3, NUM["other"])},
            "maximize": "mean(normalized_accuracy)",
            "search": Grid(num=5),
            **changes,
        },
    )
    report = run_edit(trainer, model, options)
    content = {**report.to_json(), "weights": fingerprint(model.state_dict()).digest}
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(content))


def _alone(rank, folder, vectors, changes):
    torch.set_num_threads(1)
    _edit(folder, vectors, 1, changes)


def both(vectors, **changes):
    """Edit with one process, and with two; give the reports of the one and of each of the two."""
    for name in ("one", "two"):
        Path(name).mkdir()
    mp.start_processes(_alone, (Path("one"), vectors, changes), nprocs=1, start_method="fork")
    run_ranks(_edit, Path("two"), vectors, 2, changes)
    return [json.loads(Path(name).read_text()) for name in ("one/rank0.json", "two/rank0.json", "two/rank1.json")]


def assert_same(one, *others):
    for other in others:
        for key in ("tasks", "coefficients", "constraints", "holds", "sizes", "data", "weights", "evaluations"):
            assert other[key] == one[key], key


@pytest.mark.parametrize(
    ("search", "more"),
    [
        (Grid(num=5), {"baselines": ["average", "gradient_ascent"], "diagnostics": ["blame", "disentanglement"]}),
        (Bisect(num=9), {"rule": "largest", "subject_to": ["b/accuracy >= 0.7 * base"], "confidence": 0.9}),
        (Optuna({"s": [0, 1], "l": [0, 1]}, num_trials=6), {"recipe": "s * a + l * b"}),
    ],
    ids=["grid", "bisect", "optuna"],
)
def test_two_processes_give_what_one_gives(vectors, search, more):
    one, *two = both(vectors, search=search, **more)
    assert_same(one, *two)
    assert two[0]["baselines"] == one["baselines"]
    assert two[0]["diagnostics"] == one["diagnostics"]
    assert one["sizes"]["a"]["test"] == NUM["a"]
    written = [fingerprint(open_weights(f"{name}/out/edited.safetensors")) for name in ("one", "two")]
    assert written[0] == written[1]
    logs = [Path(f"{name}/out.evaluations.jsonl").read_text().splitlines() for name in ("one", "two")]
    entries = [[{k: v for k, v in json.loads(line).items() if k != "time"} for line in log] for log in logs]
    assert entries[1] == entries[0]


def test_a_log_of_one_process_is_used_by_two(vectors):
    changes = {"log": "log.jsonl"}
    one, *two = both(vectors, **changes)
    assert_same(one, *two)
    assert two[0]["search"]["num_reused"] == two[1]["search"]["num_reused"] > 10
    lines = Path("log.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines)


def test_a_race_of_two_processes_takes_parts_of_one_order(vectors):
    one, *two = both(vectors, search=Race(num=11, first=7))
    assert two[0]["coefficients"] == two[1]["coefficients"]
    # batches of a few examples are cut smaller for two processes, so that a loss may differ in its last bit
    assert one["coefficients"] == two[0]["coefficients"]
    assert [r["left"] for r in two[0]["search"]["rounds"]] == [r["left"] for r in one["search"]["rounds"]]


@pytest.mark.parametrize("loss", ["entropy", "cross_entropy", "expert"])
def test_learned_coefficients_are_those_of_one_process(vectors, loss):
    search = Learned(loss=loss, num_steps=25, learning_rate=0.02, batch_size=15)  # 8 and 7 examples
    one, *two = both(vectors, search=search)
    tables = [report["search"]["coefficients"] for report in (one, *two)]
    assert tables[1] == tables[2]
    for name, row in tables[0].items():
        assert tables[1][name] == pytest.approx(row, abs=1e-5)
        assert any(abs(value - 0.3) > 0.02 for value in row.values())
    assert two[0]["search"]["loss"] == pytest.approx(one["search"]["loss"], abs=1e-5)
    assert two[0]["tasks"] == one["tasks"]
    assert two[0]["weights"] == two[1]["weights"]


def _refused(folder):
    trainer, task = make_trainer(2), Blobs(1, 1)
    with pytest.raises(ValueError, match="Each process must have an example, but 2 processes have 1"):
        evaluate(trainer, Net(), task, "val")
    with pytest.raises(ValueError, match="LateNet logs 'val/late' outside its validation_step, where 2 processes"):
        evaluate(trainer, LateNet(), Blobs(1, 50), "val")
    iterable = Blobs(1, 50)
    iterable.val_dataloader = lambda: DataLoader(list(iterable._loader(1).dataset), batch_sampler=[[0, 1], [2]])
    with pytest.raises(ValueError, match="must give one DataLoader over a map-style data set.*devices=1"):
        evaluate(trainer, Net(), iterable, "val")
    with pytest.raises(ValueError, match="Each of 2 processes must have an example of every task in a step"):
        Learned(batch_size=1)._loader(Blobs(1, 50), trainer)
    with pytest.raises(ValueError, match="Sliders are answered by one process, and the edit's trainer has 2"):
        Playground(trainer, Net(), {}, EditOptions(output="out", vectors={}, recipe=""))
    with pytest.raises(ValueError, match="DeepSpeedStrategy holds neither.*--trainer.strategy fsdp"):
        check_strategy(type("Sharded", (), {"strategy": DeepSpeedStrategy.__new__(DeepSpeedStrategy)})())
    with pytest.raises(ValueError, match="this strategy starts new ones each time"):
        check_strategy(make_trainer(2, strategy="ddp_fork"))


def test_what_several_processes_cannot_do_is_said():
    run_ranks(_refused, Path())


@pytest.mark.parametrize("num", [1, 2, 3, 5, 7, 40])
def test_every_example_is_in_one_share(num):
    task = Blobs(1, num)
    for ranks in range(1, min(num, 4) + 1):
        rows = []
        for rank in range(ranks):
            with through_cache(task, "val", None, torch.device("cpu"), ((0, num), 3), rank, ranks):
                rows += [row for batch in task.val_dataloader().rows for row in batch]
        assert sorted(rows) == list(range(num))


def write_config(vectors, folder):
    task = {"class_path": "small_models.Blobs", "init_args": {"seed": 1, "num_examples": 50}}
    config = {
        "trainer": {"accelerator": "cpu", "devices": 2, "strategy": "ddp"},
        "model": {"class_path": "small_edit.Net"},
        "vectors": vectors,
        "recipe": "a",
        "targets": {"a": task},
        "maximize": "a/accuracy",
        "output": str(folder / "out"),
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "c.yaml")


@pytest.mark.slow
def test_the_command_line_edits_with_two_devices(vectors):
    config = write_config(vectors, Path())
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])), "OMP_NUM_THREADS": "1"}
    environment["MASTER_PORT"] = str(free_port())
    command = [sys.executable, "-m", "tva", "edit", "--config", config]
    done = subprocess.run(command, env=environment, timeout=600, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("base + scaling_coef") == 1  # one process tells
    report = json.loads(Path("out/edit.json").read_text())
    assert report["sizes"] == {"a": {"val": 50, "test": 50}}
    assert report["edited"]["fingerprint"] == fingerprint(open_weights("out/edited.safetensors")).digest


def _command(words, folder):
    _draw_nothing()
    status = 0
    with open(folder / os.environ["LOCAL_RANK"], "w") as said, contextlib.redirect_stdout(said):
        try:
            main(words)
        except SystemExit as stop:
            status = stop.code
    (folder / f"{os.environ['LOCAL_RANK']}.status").write_text(str(status))


def test_the_command_line_refuses_with_two_devices(vectors):
    config = write_config(vectors, Path())
    run_ranks(_command, ["edit", "--config", config, "--subject_to", '["a/accuracy > base + 2"]'], Path())
    assert [Path(f"{rank}.status").read_text() for rank in (0, 1)] == ["1", "1"]
    assert "coefficients tried meets" in Path("0").read_text()
    assert "coefficients tried meets" not in Path("1").read_text()
    assert not list(Path("out").glob("*.safetensors"))


@pytest.mark.slow
def test_the_status_of_a_refused_edit_is_not_that_of_a_process_that_was_killed(vectors):
    config = write_config(vectors, Path())
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])), "OMP_NUM_THREADS": "1"}
    environment["MASTER_PORT"] = str(free_port())
    command = [sys.executable, "-m", "tva", "edit", "--config", config, "--subject_to", '["a/accuracy > base + 2"]']
    done = subprocess.run(command, env=environment, timeout=600, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert Path("out/edit.json").exists()
