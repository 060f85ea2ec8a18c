"""The ledger of results, and benchmarks in small: every line that a CPU reaches of those that need a GPU, or hours."""

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import run_ranks

from benchmarks import __main__ as commands
from benchmarks import ledger

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


def _sharded(folder):
    small = ["--width", "16", "--layers", "2", "--steps", "2", "--every", "1", "--repeats", "1"]
    with open(folder / os.environ["LOCAL_RANK"], "w") as said, contextlib.redirect_stdout(said):
        load("sharded").main(small)


@pytest.mark.slow
def test_the_benchmark_of_a_sharded_fit_says_what_a_vector_takes(tmp_path):
    run_ranks(_sharded, tmp_path)
    assert "2 processes, model of 0.0 MiB: 2 steps take" in (tmp_path / "0").read_text()
    assert (tmp_path / "1").read_text() == ""


def test_the_benchmark_of_adapters_runs_and_the_core_space_is_cheaper(capsys):
    found = load("adapters").main(["--size", "512", "--layers", "2", "--rank", "4"])
    assert len(capsys.readouterr().out.splitlines()) == len(found) == 4
    dense, adapter = found["tsv(a, b, c, d)"]
    assert adapter < dense


@pytest.mark.parametrize("page", ledger.pages(), ids=lambda page: page.stem)
def test_every_table_of_the_ledger_is_what_its_values_give(page):
    assert ledger.rewrite(page.read_text()) == page.read_text(), "run python -m benchmarks tables"
    assert not list(ledger.unmarked(page.read_text()))  # every other table says that it is older


@pytest.fixture
def small(monkeypatch):
    """A benchmark whose values are its seed and an option."""
    module = types.SimpleNamespace(
        OPTIONS={"factor": 1.0},
        DEPENDS=("tva",),
        measure=lambda seed, factor: {"value": seed * factor / 3},
        tables=lambda runs: {"values": "\n".join(f"{seed}: {run['value']}" for seed, run in runs.items())},
    )
    monkeypatch.setattr(ledger, "benchmark", lambda name: module)
    return module


def test_a_run_keeps_each_seeds_values_and_how_they_were_made(small, tmp_path):
    ledger.run("small", [0, 2], {}, "python -m benchmarks run small --seeds 0 2", tmp_path)
    entry = ledger.run("small", [1, 2], {"factor": 2.0}, "again", tmp_path)
    assert entry == json.loads((tmp_path / "small.json").read_text()) == ledger.load("small", tmp_path)
    assert entry["seeds"] == {"0": {"value": 0.0}, "1": {"value": 0.666667}, "2": {"value": 1.33333}}
    assert [made["seeds"] for made in entry["made"]] == [[0], [1, 2]]  # of the second run of seed 2, not the first
    assert entry["made"][0]["command"] == "python -m benchmarks run small --seeds 0 2"
    assert {"commit", "date", "machine", "versions", "seconds"} < entry["made"][1].keys()
    with pytest.raises(ValueError, match="small has no option other; its options are factor"):
        ledger.run("small", [0], {"other": 1}, "", tmp_path)


def test_tables_are_rewritten_between_their_markers(small, tmp_path):
    ledger.run("small", [1, 2], {}, "python", tmp_path)
    text = "before <!-- ledger: small/made -->old<!-- end -->\n<!-- ledger: small/values -->\nold\n<!-- end -->\nafter"
    made = ledger.rewrite(text, tmp_path)
    assert made.startswith("before <!-- ledger: small/made -->`python` (seeds 1, 2; commit ")
    assert "<!-- ledger: small/values -->\n\n1: 0.333333\n2: 0.666667\n\n<!-- end -->\nafter" in made
    assert ledger.rewrite(made, tmp_path) == made
    with pytest.raises(ValueError, match="small makes no table 'none'; it makes values, made"):
        ledger.rewrite("<!-- ledger: small/none --><!-- end -->", tmp_path)
    with pytest.raises(FileNotFoundError, match="run python -m benchmarks run large --seeds"):
        ledger.rewrite("<!-- ledger: large/values --><!-- end -->", tmp_path)


def test_results_are_older_where_the_code_they_depend_on_has_later_commits(small, tmp_path, monkeypatch):
    ledger.run("small", [0], {}, "python", tmp_path)
    for commit, log, expected in (
        ("abc", "def Faster\nghi Right", "2 later commits"),
        ("abc", "", None),
        ("no", None, "not in"),
    ):
        ledger.write({"made": [{"commit": commit, "seeds": [0]}], "seeds": {"0": {}}}, tmp_path / "small.json")
        answers = {"rev-parse": "abc", "log": log}
        monkeypatch.setattr(ledger, "_git", lambda *words, answers=answers: answers[words[0]])
        found = list(ledger.older(tmp_path))
        assert (expected in found[0]) if expected else not found
    monkeypatch.setattr(ledger, "_git", lambda *words: None)  # without git nothing is known
    assert not list(ledger.older(tmp_path))


def test_a_table_is_of_the_ledger_or_said_to_be_older():
    table = "| a |\n| --- |\n| 1.5 |\n"
    marked = f"<!-- ledger: a/b -->\n\n{table}\n<!-- end -->"
    assert list(
        ledger.unmarked(f"# One\n{table}\n## Two\n{marked}\n## Three\nolder than the [ledger](x): y\n{table}")
    ) == ["# One"]


def test_benchmarks_of_the_command_line_are_named_and_their_options_checked(capsys):
    for words, message in (
        (["run", "nothing", "--seeds", "0"], "There is no benchmark 'nothing' in the ledger; there are callback, "),
        (["run", "gate", "--seeds", "0", "--runs", "x"], "argument --runs: invalid int value: 'x'"),
        (["tables", "x"], "unexpected argument 'x'"),
    ):
        with pytest.raises(SystemExit) as stop:
            commands.main(words)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_p_values_of_several_tests_are_corrected_in_order():
    p_values = [0.2, 0.001, 0.04, 0.013]
    assert ledger.holm(p_values) == pytest.approx([0.2, 0.004, 0.08, 0.039])
    assert all(np.array(ledger.holm(p_values)) >= p_values)
    assert ledger.holm([]) == []


def test_methods_that_tune_nothing_stand_apart_and_the_others_are_tested_against_the_sum(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    methods = importlib.import_module("methods")  # as `python benchmarks/methods.py` imports it
    model = types.SimpleNamespace(name="small", tasks=["a", "b"], output=tmp_path)
    for seed in range(3):
        results = {"accuracy": {task: [0.5, 0.9] for task in "ab"}, "base": {"a": 0.5, "b": 0.5}}
        for name, value in (("sum", 0.8), ("ties", 0.9), ("tsv", 0.81), ("mean, λ = 1", 0.7)):
            moved = value + 0.001 * seed * (name == "ties") + 0.02 * (seed - 1) * (name == "tsv")
            results[name] = {"a": moved, "b": moved, "best": None if "mean" in name else 0.5, "edge": name == "tsv"}
        folder = tmp_path / f"evaluations/seed={seed}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
    text = methods.table(model, [0, 1, 2])
    tuned, others = text.split("untuned, or knowing the task")
    assert [line.split(" | ")[0] for line in tuned.splitlines() if line.startswith("| t")] == ["| ties", "| tsv"]
    assert "mean, λ = 1" not in tuned
    assert "base" in others
    assert "0.50 *" in next(line for line in tuned.splitlines() if line.startswith("| tsv"))
    cells = [line.split(" | ") for line in tuned.splitlines() if "0.50" in line]
    p_values = {name[2:]: last.strip("| ") for name, *_, last in cells}
    assert float(p_values["ties"]) < 0.001 < 0.1 < float(p_values["tsv"])
    assert not p_values["sum"]


def test_an_interval_over_seeds_covers_where_all_seeds_share_their_test_examples():
    generator, covered, runs, true = np.random.default_rng(0), 0, 2000, 0.8
    for _ in range(runs):
        hard = generator.normal(size=100)  # of an example, for every seed
        shift = 0.3 * generator.normal(size=5)
        right = hard + shift[:, None] + 0.5 * generator.normal(size=(5, 100)) < 0.8416 * (1 + 0.3**2 + 0.5**2) ** 0.5
        low, high = ledger.over_seeds([float(mean) for mean in right.mean(axis=1)], 100)
        covered += low <= true <= high
    assert covered / runs > 0.94  # 89 % without the variance of the examples
    assert ledger.over_seeds([0.5, 0.5, 0.5], 100) == pytest.approx((0.402, 0.598), abs=1e-3)  # that of examples only
    assert ledger.over_seeds([1.0, 2.0, 3.0]) == pytest.approx((-0.484, 4.484), abs=1e-3)


def test_a_simulated_cluster_keeps_to_its_workers_its_disk_and_its_first_process():
    simulate = load("scale").simulate
    assert simulate([(0, 2.0)] * 6, 1) == 12.0
    assert simulate([(0, 2.0)] * 6, 2) == simulate([(0, 2.0)] * 6, 1, slots=2) == 6.0
    assert simulate([(0, 2.0)] * 4, 4, message=1.0) == 5.0  # the last is handed out after three seconds
    assert simulate([(10, 1.0)] * 4, 4, nic=5.0) == 3.0
    assert simulate([(10, 1.0)] * 4, 4, nic=5.0, disk=10.0) == 5.0
    assert simulate([(10, 0.0)] * 4, 1, slots=4, nic=5.0) == 8.0
