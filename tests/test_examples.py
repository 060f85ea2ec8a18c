"""Every example runs and leaves a right task vector."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from small_models import free_port

from tva import TaskVector, fingerprint, open_weights

EXAMPLES = Path(__file__).parent.parent / "examples"
RANKS = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"}


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what the examples set is undone after them
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_has_a_test_and_says_how_to_run_it():
    tests = Path(__file__).read_text()
    for example in EXAMPLES.glob("*.py"):
        if example.name == "demo.py":  # has a test file of its own
            continue
        assert f'"{example.name}"' in tests
        assert f"python examples/{example.name}" in example.read_text()


def test_a_bare_loop(tmp_path, monkeypatch):
    run(monkeypatch, "bare_loop.py", "--folder", tmp_path)
    vector = TaskVector.load(tmp_path / "copy_first_input.tv.safetensors")
    assert vector.origin.base == fingerprint(open_weights(tmp_path / "base.safetensors"))
    assert set(vector.buffers) == {"1.running_mean", "1.running_var"}


def test_plain_lightning(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "plain_lightning.py", "--folder", tmp_path)
    shown = dict(re.findall(r"^(new|old) digits ([0-9.]+)$", capsys.readouterr().out, flags=re.MULTILINE))
    assert float(shown["new"]) > 0.8
    assert float(shown["old"]) < 0.8  # forgotten, as the control shows
    vector = TaskVector.load(tmp_path / "final.tv.safetensors")
    assert vector.origin.task == "digits 5-9"
    assert vector.origin.base == fingerprint(open_weights(next(tmp_path.glob("base-*"))))


def test_lightning_cli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "lightning_cli.py", "fit", "--config", EXAMPLES / "lightning_cli.yaml")
    base, tuned = open_weights(next(Path("runs/cli").glob("base-*"))), open_weights("runs/cli/last.ckpt")
    vector = TaskVector.load("runs/cli/last.tv.safetensors")
    assert vector.origin.finetuned == fingerprint(tuned).digest
    for name, delta in vector.deltas.items():
        assert torch.equal(delta, (tuned[name] - base[name]).bfloat16().float())
    assert len(list(Path("runs/cli/trajectory").glob("*.tv.safetensors"))) >= 3


@pytest.mark.slow
def test_fsdp2_on_two_processes(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in RANKS}
    environment["MASTER_PORT"] = str(free_port())
    command = [sys.executable, EXAMPLES / "fsdp2.py", "--folder", tmp_path, "--accelerator", "cpu", "--devices", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    base, tuned = open_weights(next(tmp_path.glob("base-*"))), open_weights(tmp_path / "last.ckpt", prefix="net.")
    vector = TaskVector.load(tmp_path / "last.tv.safetensors")
    assert vector.names == set(tuned)  # the network's own names
    for name, delta in vector.deltas.items():
        assert torch.equal(delta, tuned[name] - base[name])


@pytest.mark.slow
def test_hugging_face_trainer(tmp_path):
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package)
    command = [sys.executable, EXAMPLES / "hugging_face_trainer.py", "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for step in (4, 8):
        vector = TaskVector.load(tmp_path / f"checkpoint-{step}/task_vector.tv.safetensors")
        base, tuned = open_weights(tmp_path / "base"), open_weights(tmp_path / f"checkpoint-{step}")
        assert vector.origin.step == step
        assert vector.origin.base == fingerprint(base)
        for name, delta in vector.deltas.items():
            assert torch.equal(delta, tuned[name] - base[name])


def test_fetched_data_are_what_the_configs_name(tmp_path, monkeypatch):
    """The hub is replaced by rows of its form; that the repositories exist is not tested."""

    def load(repository, subset, revision):
        texts = {"tweet" if "hate" in repository else "text": [f"text {row}\n" for row in range(20)]}
        label = {"CogComp/trec": "coarse_label", "tdavidson/hate_speech_offensive": "class"}.get(repository, "label")
        rows = datasets.Dataset.from_dict({**texts, label: [row % 2 for row in range(20)]})
        return {"train": rows} if "hate" in repository else {"train": rows, "test": rows}

    monkeypatch.setattr(datasets, "load_dataset", load)
    names = ["trec6", "ag_news", "toxicity", "sentence_polarity", "wikitext2"]
    run(monkeypatch, "fetch_data.py", *names, "--folder", tmp_path)
    configs = "".join(path.read_text() for path in (EXAMPLES.parent / "configs").rglob("*.yaml"))
    used = set(re.findall(r"\bdata/([\w-]+\{split\}[.\w]+)", configs))
    assert len(used) == 5
    for name in used:
        assert (tmp_path / name.replace("{split}", "test")).exists()
    read = datasets.Dataset.from_parquet(str(tmp_path / "toxicity-test.parquet"), cache_dir=str(tmp_path / "cache"))
    assert read.features["label"].names == ["hate speech", "offensive language", "neither"]
    assert read["text"][:2] == ["text 0\n", "text 10\n"]
