"""Benchmarks that need a GPU, or hours, run here in small: every line of them that a CPU reaches."""

import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_fit(tmp_path, *options):
    load("fit").main([*options, "--steps", "2", "--warmup", "2", "--batch_size", "8", "--output", f"{tmp_path}/o.json"])
    return json.loads((tmp_path / "o.json").read_text())["tva-tiny"]


@pytest.mark.slow
def test_the_trainer_and_the_plain_loop_do_the_same_work(tmp_path, capsys):
    found = run_fit(tmp_path, "--repeats", "2", "--turn", "1")  # or it stops, as the two end at different weights
    assert len(found["ratios"]) == len(found["added_ms_per_step"]) == 2
    assert all(0 < ratio < 10 for ratio in found["ratios"])
    assert "x the recipe (paired;" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_best_settings_that_are_meant_for_a_gpu_run(tmp_path, capsys, monkeypatch):
    # traced and differentiated as ever; the kernels, which take a minute, are a test's in tests/models/test_optim.py
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = run_fit(tmp_path, "--settings", "best", "--repeats", "1", "--turn", "2", "--peak_tflops", "1")
    assert found["peak"] == 1e12
    assert found["flops_per_image"] == 83613696.0
    assert found["accuracy"].keys() == found["images_per_s"].keys() == {"recipe", "tva fit"}
    assert abs(found["accuracy"]["recipe"] - found["accuracy"]["tva fit"]) < 0.02  # four steps at 1e-5 move nothing
    printed = capsys.readouterr().out
    assert "% of 1, validation accuracy" in printed


def test_the_benchmark_of_adapters_runs_and_the_core_space_is_cheaper(capsys):
    found = load("adapters").main(["--size", "512", "--layers", "2", "--rank", "4"])
    assert len(capsys.readouterr().out.splitlines()) == len(found) == 4
    dense, adapter = found["tsv(a, b, c, d)"]
    assert adapter < dense
