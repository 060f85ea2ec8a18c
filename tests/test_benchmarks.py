"""The ledger of results, and benchmarks in small: every line that a CPU reaches of those that need a GPU, or hours."""

import copy
import functools
import importlib
import importlib.util
import json
import re
import types
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import __main__ as commands
from benchmarks import compose, early_stop, learned, ledger, merge_models, methods

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ledger.pages(), ids=lambda page: page.stem)
def test_every_table_of_the_ledger_is_what_its_values_give(page):
    assert ledger.rewrite(page.read_text()) == page.read_text(), "run python -m benchmarks tables"
    assert not list(ledger.unmarked(page.read_text()))  # every other table says that it is older


def test_every_entry_is_on_a_page_with_how_it_was_made():
    found = {
        match[1] for page in ledger.pages() for match in ledger.MARKED.finditer(page.read_text()) if match[2] == "made"
    }
    entries = [file.stem for file in ledger.DATA.glob("*.json")]
    assert [name for name in entries if not any(fnmatch(name, pattern) for pattern in found)] == []
    assert len(entries) > 20


def test_a_digit_that_is_changed_by_hand_fails_the_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    monkeypatch.setattr(ledger, "rendered", functools.cache(ledger.rendered))
    changed = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs" / "results").glob("*.md"))):
        text = page.read_text()
        for match in ledger.MARKED.finditer(text):
            digit = re.search(r"\d", match[3])
            if digit is None:  # a sentence without a number
                continue
            place = match.start(3) + digit.start()
            copy = tmp_path / page.name
            copy.write_text(f"{text[:place]}{(int(digit[0]) + 1) % 10}{text[place + 1 :]}")
            monkeypatch.setattr(ledger, "pages", lambda copy=copy: [copy])
            assert commands.check() == 1
            assert f"{page.name} is not what the ledger gives: python -m benchmarks tables" in capsys.readouterr().out
            changed += 1
    assert changed >= 3


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
    assert entry == ledger.load("small", tmp_path)
    file = json.loads((tmp_path / "small.json").read_text())
    assert (file["seeds"], file["values"]) == ([0, 1, 2], {"value": [0.0, 0.666667, 1.33333]})
    assert entry["seeds"] == {"0": {"value": 0.0}, "1": {"value": 0.666667}, "2": {"value": 1.33333}}
    assert [made["seeds"] for made in entry["made"]] == [[0], [1, 2]]  # of the second run of seed 2, not the first
    assert entry["made"][0]["command"] == "python -m benchmarks run small --seeds 0 2"
    assert {"commit", "date", "machine", "versions", "seconds"} < entry["made"][1].keys()
    with pytest.raises(ValueError, match="small has no option other; its options are factor"):
        ledger.run("small", [0], {"other": 1}, "", tmp_path)
    small.measure = lambda seed, factor: {"another": seed}
    entry = ledger.run("small", [1], {}, "of another form", tmp_path)
    assert entry == ledger.load("small", tmp_path)
    assert entry["seeds"]["0"] == {"value": 0.0}
    assert entry["seeds"]["1"] == {"another": 1}


def test_runs_that_differ_only_in_their_seeds_are_shown_as_one(small, tmp_path):
    for seeds in ([0, 1], [3]):
        words = f"python -m benchmarks run small --seeds {' '.join(map(str, seeds))}"
        entry = ledger.run("small", seeds, {}, words, tmp_path)
    entry["made"][1]["machine"] = entry["made"][0]["machine"].partition(", load")[0] + ", load 99.0 at the start"
    ledger.write(entry, tmp_path / "small.json")
    made = ledger.rendered("small", tmp_path)["made"]
    assert made.count("--seeds") == 1
    assert "`python -m benchmarks run small --seeds 0 1 3` (seeds 0, 1, 3; " in made
    assert " to 99.0 at the start" in made


def test_seeds_that_are_measured_at_the_same_time_are_all_kept(small, tmp_path):
    measure = small.measure

    def slow(seed, factor):
        if seed in (0, 1):  # another process has measured seeds 4 and 5 meanwhile
            small.measure = measure
            ledger.run("small", [seed + 4], {}, "other", tmp_path)
            small.measure = slow
        return measure(seed, factor)

    small.measure = slow
    entry = ledger.run("small", [0, 1], {}, "first", tmp_path)
    assert sorted(entry["seeds"]) == ["0", "1", "4", "5"]
    assert sorted(seed for made in entry["made"] for seed in made["seeds"]) == [0, 1, 4, 5]
    assert [made["seeds"] for made in entry["made"] if made["command"] == "first"] == [[0, 1]]


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


def test_results_are_older_where_code_that_they_depend_on_has_changed_and_not_its_words(small, tmp_path, monkeypatch):
    ledger.run("small", [0], {}, "python", tmp_path)
    texts = {
        "abc:a.py": 'from __future__ import annotations\ndef f():\n    """Say."""\n    raise ValueError("no")  # why\n',
        "HEAD:a.py": 'def f():\n    """Return."""\n    raise ValueError(\n        f"found {1}"\n    )\n',
        "abc:b.py": "x = 1\n",
        "HEAD:b.py": "x = 2\n",
        "abc:c.yaml": "a: 1  # one\n",
        "HEAD:c.yaml": "a: 1\n",
        "HEAD:d.py": "",
    }
    for commit, names, expected in (
        ("abc", "a.py\nc.yaml", None),
        ("abc", "a.py\nb.py\nd.py", r"since abc, b\.py, d\.py changed"),
        ("no", None, "is not in this history"),
    ):
        ledger.write({"made": [{"commit": commit, "seeds": [0]}], "seeds": {"0": {}}}, tmp_path / "small.json")
        answers = {"rev-parse": "abc", "diff": names}
        monkeypatch.setattr(
            ledger, "_git", lambda *words, answers=answers: {**answers, "show": texts.get(words[1])}[words[0]]
        )
        ledger.code_of.cache_clear()
        found = list(ledger.older(tmp_path))
        assert re.search(expected, found[0]) if expected else not found
    monkeypatch.setattr(ledger, "_git", lambda *words: None)  # without git nothing is known
    assert not list(ledger.older(tmp_path))
    ledger.code_of.cache_clear()


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


def test_methods_that_tune_nothing_stand_apart_and_the_others_are_tested_against_the_sum():
    runs = {}
    for seed in range(3):
        rows = {"sum": [0.5, 0, 80, 80], "mean, λ = 1": [1.0, 0, 70, 70], "tsv": [0.5, 1, 81 + 3 * (seed - 1), 81]}
        rows |= {"ties": [1.0, 0, 88 + (seed == 1), 90], "wudi": [1.0, 0, 85, 85], "tall": [1.0, 0, 90, 90]}
        rows["wudi, filtered at 50"] = [1.0, 0, 85, 87 + seed]
        cost = {"sum": [1.0, 3], "wudi": [60.0, 5], "wudi, filtered at 50": [2.0, 9]}
        tasks = {"a": 100, "b": 100}
        runs[seed] = {"tasks": tasks, "base": [50, 40], "alone": [90, 100], "rows": rows, "cost": cost}
    assert methods.tables(runs)["tasks"] == "a 50.0% → 90.0%, b 40.0% → 100.0%"
    made = methods.joined({"methods-tiny-2": runs})
    tuned = {line.split(" | ")[0][2:]: line.strip("| ").split(" | ") for line in made["tuned"].splitlines()[2:]}
    assert list(tuned) == ["ties", "wudi, filtered at 50", "wudi", "tsv", "sum"]
    assert tuned["sum"][1:4] == ["0.844", "0.800", "0.844 ± 0.000"]
    assert tuned["tsv"][3].endswith("†")
    assert tuned["ties"][3].endswith("**")
    assert float(tuned["ties"][4]) < 0.01 < 0.1 < float(tuned["tsv"][4])
    assert tuned["sum"][4] == ""
    assert "mean, λ = 1" in made["untuned"]
    assert "base" in made["untuned"]
    assert "tall" in made["known"]


def test_every_row_is_tuned_alike_and_an_end_is_flagged():
    tried = []

    def score(x):
        tried.append(x)
        return -abs(x - 0.6)

    assert methods.choose(score, 1.0) == (0.5, False)
    assert tried == [0.25, 0.5, 1.0, 0.7071, 0.3536]
    assert methods.choose(lambda x: x, 1.0) == (pytest.approx(11.31), True)
    assert methods.choose(lambda x: -x, 1.0) == (pytest.approx(0.0221, abs=1e-4), True)
    assert methods.choose(lambda x: 1.0, 2.0)[1]  # nothing to choose by: the smallest


class TwoLayers(merge_models.Model):
    """A random network on random classes."""

    name, title, timed, epochs, rate, num_train, num_val, num_test = "two", "Two", True, 2, 1e-2, 64, 20, 30
    all_tasks = ("a", "b", "c", "d")

    def load(self):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))

    def prepare(self, task):
        draw = torch.Generator().manual_seed(ord(task))
        turn, head = torch.randn(6, 4, generator=draw), torch.randn(4, 4, generator=draw)
        found = {}
        for split, places in zip(("train", "test"), self.chosen(200, 40), strict=True):
            inputs = torch.randn(len(places), 6, generator=draw)
            found[split] = merge_models.Examples(inputs, (inputs @ turn).argmax(dim=-1))
        return found, head

    def features(self, examples):
        return self.module(examples.inputs)


def test_every_method_is_measured_and_what_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(merge_models.MODELS, "two", TwoLayers)
    options = {"models": "two", "num_tasks": 4, "data": "", "output": str(tmp_path)}
    found = methods.measure(1, **options)
    assert found["rows"].keys() == {row.name for row in methods.ROWS}
    assert all(len(row) == 6 and max(row[2:]) <= 30 for row in found["rows"].values())
    assert found["cost"].keys() == {row.name for row in methods.ROWS if not row.name.endswith(", λ = 1")} | {
        "mean, λ = 1"
    }
    assert found["tasks"] == dict.fromkeys("abcd", 30)
    assert sum(found["alone"]) > sum(found["base"])
    assert methods.joined({"methods-two-4": {1: found}})["pairs"].count("slerp of pairs") == 1
    assert capsys.readouterr().out.count("two 1: ") == 4 + len(methods.ROWS)
    assert methods.measure(1, **options) == found
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match=r"two has 4 tasks; found --num_tasks 8\."):
        methods.measure(1, **options | {"num_tasks": 8})


def test_networks_stand_side_by_side_and_their_mean_is_tested_within_each(monkeypatch):
    monkeypatch.setitem(merge_models.MODELS, "two", TwoLayers)
    names = ["sum", "tsv", "ties", "mean, λ = 1", "emr"]

    def run(**right):
        rows = {name: [1.0, int(name == "ties"), right.get(name, 50)] for name in names}
        return {"rows": rows, "base": [40], "alone": [100], "tasks": {"a": 100}, "cost": {"tsv": [1200.0, 7]}}

    gains = {"tiny": (10, 12, 11), "two": (1, 5, 3)}
    parts = {f"methods-{name}-1": {s: run(tsv=50 + g) for s, g in enumerate(gains[name])} for name in ("two", "tiny")}
    made = methods.joined(parts)
    heads, _, tsv, *others = made["tuned"].splitlines()
    assert heads == "| method | mean | worst task | tva-tiny | Two | p | ms | MiB |"
    # no change in the mean of both: t = 7 / sqrt((1/3 + 4/3) / 4), and 2.94 degrees of freedom
    freedom = (1 / 3 + 4 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)
    p_value = 2 * 2 * stats.t.sf(7 / ((1 / 3 + 4 / 3) ** 0.5 / 2), freedom)  # the smaller of two, by Holm
    assert tsv == f"| tsv | 0.570 | 0.570 | **0.610 ± 0.025** | 0.530 ± 0.050 | {p_value:.2g} | 1,200 | 7 |"
    assert "| ties | 0.500 | 0.500 | 0.500 ± 0.000† | 0.500 ± 0.000† | 1 |  |  |" in others
    assert "| base | 0.400 | 0.400 | 0.400 ± 0.000 | 0.400 ± 0.000 |" in made["untuned"].splitlines()
    assert made["known"].count("emr") == 1


def test_the_early_stop_of_wudi_is_compared_with_adam_by_task_and_time(tmp_path, monkeypatch):
    monkeypatch.setitem(merge_models.MODELS, "two", TwoLayers)
    found = early_stop.measure(1, **early_stop.OPTIONS | {"models": "two", "output": str(tmp_path)})
    found["alone"], found["ways"] = (
        [100, 50, 50, 50],
        {
            way: {"time": "50", "scaling_coef": 1.0, "ms": ms, "right": [90 + plus, 50, 50, 50]}
            for (way, each), ms, plus in zip(found["ways"].items(), (100.0, 4.0, 5.0), (0, 2, -4), strict=True)
            if len(each["right"]) == 4 and each["ms"] > 0
        },
    )
    runs = {seed: copy.deepcopy(found) for seed in range(4)}
    for seed, of_seed in runs.items():
        of_seed["ways"]["filtered"]["right"][1] += 2 * (seed % 2) - 1  # a spread around no difference
        of_seed["ways"]["filtered"]["right"][2] -= 10 - seed % 2  # a difference that all seeds show
    _, _, adam, filtered, participation = early_stop.tables(runs)["against"].splitlines()
    assert adam.count("|") == filtered.count("|") == participation.count("|")
    tasks = filtered.split("|")[-3].strip()
    assert tasks == "+2.0 ± 0.0, +0.0 ± 3.7, **-19.0 ± 1.8**, +0.0 ± 0.0"
    assert filtered.endswith("| 25 × |")


def test_coefficients_are_learned_by_both_losses_from_the_same_inputs(tmp_path, monkeypatch):
    monkeypatch.setitem(merge_models.MODELS, "two", TwoLayers)
    options = learned.OPTIONS | {"models": "two", "output": str(tmp_path), "steps": 10, "rate": 0.05}
    found = learned.measure(0, **options)
    assert {name: len(right) for name, right in found["right"].items()} == {
        "sum, best λ": 4,
        "entropy": 4,
        "expert": 4,
    }
    runs = {seed: {"alone": [50, 50], "right": {"entropy": [20, 30], "expert": [22 + seed, 30]}} for seed in range(3)}
    made = learned.tables(runs)
    assert made["gain"] == "+0.030 [+0.005, +0.055], above 0 in 3 of 3"
    assert "| expert | 0.530 [0.505, 0.555] | 0.520, 0.530, 0.540 | +0.030 [+0.005, +0.055] |" in made["losses"]


def test_texts_are_batched_by_length_without_the_padding_that_all_have():
    lengths = torch.tensor([3, 1, 2, 1])
    examples = merge_models.Examples(torch.arange(4.0)[:, None, None].expand(4, 5, 1), torch.arange(4), lengths)
    first, second = merge_models._by_length(examples, 2)
    assert (first.labels.tolist(), first.inputs.shape) == ([1, 3], (2, 1, 1))
    assert (second.labels.tolist(), second.inputs.shape) == ([2, 0], (2, 3, 1))


def test_the_ledger_has_a_file_for_each_part(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "measure", lambda seed, **options: options)
    ledger.run("methods", [0], {"num_tasks": 8}, "run", tmp_path)
    ledger.run("methods", [0], {"models": "texts"}, "run", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["methods-texts-4.json", "methods-tiny-8.json"]
    assert ledger.benchmark("methods-tiny-8") is methods


def test_an_interval_over_seeds_covers_where_all_seeds_share_their_test_examples():
    generator, covered, runs, true = np.random.default_rng(0), 0, 2000, 0.8
    for _ in range(runs):
        hard = generator.normal(size=100)  # of an example, for every seed
        shift = 0.3 * generator.normal(size=5)
        right = hard + shift[:, None] + 0.5 * generator.normal(size=(5, 100)) < 0.8416 * (1 + 0.3**2 + 0.5**2) ** 0.5
        low, high = ledger.over_seeds([float(mean) for mean in right.mean(axis=1)], 100)
        covered += low <= true <= high
    assert covered / runs > 0.94  # 89% without the variance of the examples
    assert ledger.over_seeds([0.5, 0.5, 0.5], 100) == pytest.approx((0.402, 0.598), abs=1e-3)  # that of examples only
    assert ledger.over_seeds([1.0, 2.0, 3.0]) == pytest.approx((-0.484, 4.484), abs=1e-3)


@pytest.mark.slow
def test_the_guides_errors_of_encodings_on_noise_are_those_that_are_measured(tmp_path):
    page = (ROOT / "docs" / "howto" / "compress.md").read_text()
    for encoding, (_, error) in compose.compressed(tmp_path, 0, "")["noise"].items():
        (stated,) = re.findall(rf"\| `{re.escape(encoding)}` \|.* \| (\S+) \|\n", page)
        assert float(stated) == float(f"{error:.2g}"), encoding


@pytest.mark.slow
def test_memory_files_and_threads_stay_over_many_calls():
    """The benchmark of long runs in small: caches fill in few calls, so that memory has room here."""
    for name, grown in importlib.import_module("benchmarks.long").measure(0, 0.01).items():
        assert grown["files"] <= 0, name
        assert grown["threads"] <= 0, name
        assert grown["mib"] <= 64, name
