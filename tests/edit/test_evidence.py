"""What an edit says of its own evidence: intervals, what its examples suffice for, earlier decisions, baselines."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_edit import Net, Task, edit, make_trainer

from tva import TaskVector
from tva.edit import run
from tva.edit.notes import shown_on_test
from tva.edit.options import EditOptions
from tva.evaluation.bounds import allowed_loss, clears
from tva.evaluation.intervals import compare, mean_ratio_interval
from tva.evaluation.log import decode
from tva.report.model_card import model_card
from tva.search import Bisect, Grid


@pytest.fixture(scope="module")
def sum_of_two(vectors, tmp_path_factory):
    """An edit with two targets, of which both have a fine-tuned model, and one control."""
    folder = tmp_path_factory.mktemp("sum")
    options = {"search": Grid(num=3), "subject_to": ["a/accuracy >= 0.7 * base"], "confidence": 0.8}
    return folder, edit(vectors, **options, folder=folder), options


def scores_of(folder, label):
    """Return the test scores of both targets under the model of that recipe, from the log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = {entry["task"]: entry for entry in lines if entry.get("split") == "test" and entry["recipe"] == label}
    return {task: decode(entry["scores"]["accuracy"]) for task, entry in found.items()}


def test_a_normalized_score_and_their_mean_have_intervals_from_the_same_examples(sum_of_two):
    folder, report, _ = sum_of_two
    edited = scores_of(folder, "a + b")
    finetuned = {task: scores_of(folder, task)[task] for task in "ab"}
    for task in "ab":
        expected = compare(edited[task], finetuned[task])
        entry = report.tasks[task]
        assert (entry.normalized_low, entry.normalized_high) == (expected.ratio_low, expected.ratio_high)
        assert entry.normalized_low <= entry.normalized <= entry.normalized_high
    mean = report.means["normalized"]
    assert mean["value"] == pytest.approx(sum(report.tasks[task].normalized for task in "ab") / 2)
    pairs = [(edited[task], finetuned[task], None) for task in "ab"]
    assert (mean["low"], mean["high"]) == mean_ratio_interval(pairs)
    assert mean["low"] < mean["value"] < mean["high"]
    content = json.loads((folder / "out/edit.json").read_text())
    assert content["means"]["normalized"]["tasks"] == ["a", "b"]
    assert "normalized, mean of a, b: " in (folder / "out/report.html").read_text()
    assert type(report).load(folder / "out").means == content["means"]


@pytest.mark.slow
@pytest.mark.parametrize("binary", [True, False])
def test_the_interval_of_a_mean_of_ratios_covers(binary):
    generator, covered, runs = np.random.default_rng(0), 0, 100
    for _ in range(runs):
        pairs = []
        for count, kept in ((100, 0.8), (200, 0.9)):
            below = generator.random(count) < 0.9 if binary else generator.gamma(4, 0.25, count)
            above = below & (generator.random(count) < kept) if binary else below * generator.gamma(9, kept / 9, count)
            pairs.append((above, below, None))
        low, high = mean_ratio_interval(pairs)
        covered += low <= 0.85 <= high
    assert 0.9 <= covered / runs <= 0.99


def test_losing_more_than_what_is_allowed_is_not_shown_to_hold():
    right = np.arange(400) < 360
    allowed = allowed_loss(right, 0.95, 0.0, 0.95)
    rows = np.flatnonzero(right)
    for lost, shown in ((round(400 * allowed), True), (round(400 * allowed) + 1, False)):
        edited = right.copy()
        edited[rows[np.arange(lost) * len(rows) // max(1, lost)]] = False
        assert clears(edited, right, 0.95, 0.0, 0.95) is shown
    assert 0 < allowed < 0.05 * 0.9
    assert allowed_loss(right[:50], 0.95, 0.0, 0.95) is None  # not even if nothing is lost
    losses = np.random.default_rng(0).gamma(9, 1 / 9, 2000)
    assert 0 < allowed_loss(losses, 1.5, 0.0, 0.95, above=False) < 0.5 * losses.mean()
    grouped = allowed_loss(right, 0.95, 0.0, 0.95, groups=np.random.default_rng(0).permutation(400) // 2)
    assert grouped is None or grouped <= allowed + 0.005


def test_the_notes_say_what_the_examples_suffice_for_and_that_the_end_was_chosen(sum_of_two, vectors):
    _, report, _ = sum_of_two
    (constraint,) = report.constraints
    assert constraint.needed > 1
    assert 0 <= constraint.allowed_loss < 0.3
    power = "with these 200 test examples, a/accuracy >= 0.7 * base can be shown at 80% confidence if at most "
    power += f"{constraint.allowed_loss:.3g} of accuracy is lost"
    assert any(note.startswith(power) for note in report.notes)
    assert f"If nothing is lost, {constraint.needed} are enough." in " ".join(report.notes)
    shown = shown_on_test(
        SimpleNamespace(options=SimpleNamespace(confidence=None), goal=SimpleNamespace(constraints=[0]))
    )
    assert not shown  # of a point estimate nothing is said
    end = "scaling_coef = 0.25 is an end of what was searched, 0 to 0.25: another may be better beyond it."
    keep = {"rule": "largest", "subject_to": ["a/accuracy >= 0.5 * base"]}
    found = edit(vectors, search=Bisect(stop=0.25, num=3), **keep)
    assert found.coefficients["scaling_coef"] == 0.25
    assert any(note.startswith(end) for note in found.notes)
    assert end in model_card(found.to_json())


def test_a_command_says_before_the_search_what_the_test_data_suffice_for(vectors, capsys, monkeypatch):
    asked = EditOptions(
        vectors=vectors,
        output="out",
        recipe="a",
        targets={"a": Task(1)},
        subject_to=["a/accuracy >= 0.7 * base"],
        confidence=0.8,
        scaling_coef=0.0,
    )
    trainer = make_trainer()
    trainer.command = "tva edit"
    monkeypatch.setattr(run, "choose", lambda session: pytest.fail(capsys.readouterr().err))  # nothing was searched yet
    with pytest.raises(
        pytest.fail.Exception,
        match=r"tva: with these 200 test examples, a/accuracy >= 0.7 \* base can be shown at 80% confidence",
    ):
        run.run_edit(trainer, Net(), asked)


def test_a_test_part_counts_the_different_edits_that_it_has_decided(sum_of_two, vectors):
    folder, report, options = sum_of_two
    shutil.copy(folder / "log.jsonl", "log.jsonl")
    assert "decided" not in report.sizes["a"]
    again = edit(vectors, **options)
    assert "decided" not in again.sizes["a"]  # the same edit decides nothing new
    Path("log.jsonl").rename("other.jsonl")  # a run beside this one
    second = edit(vectors, recipe="a - b", maximize="a/accuracy", **options)
    assert second.sizes["a"]["decided"] == 2
    third = edit(vectors, recipe="a", maximize="a/accuracy", **options)
    assert third.sizes["a"]["decided"] == 3
    assert "decided" not in third.sizes["b"]  # no constraint is on it
    assert any(note.startswith("The test part of a has decided 3 different edits by now") for note in third.notes)
    assert "has decided 3 different edits" in Path("out/report.html").read_text()


def test_an_analogy_has_its_parts_and_any_edit_five_random_vectors_and_another_task_beside_it(vectors):
    paths = dict(vectors)
    for name, source, factor in (("c", "a", 0.5), ("d", "b", -2.0)):
        paths[name] = f"{name}.tv.safetensors"
        (factor * TaskVector.load(vectors[source])).save(paths[name])
    found = edit(
        paths,
        recipe="analogy(a, b, c)",
        targets={"a": Task(1)},
        maximize="a/accuracy",
        search=Grid(num=3),
        baselines=["parts", "random", "other_task"],
    )
    parts = found.baselines["parts"]["rows"]
    assert [name.split(",")[0] for name in parts] == ["c", "b − a", "b + c"]
    for name, row in parts.items():  # each at the best of its own coefficients
        assert name.split("λ = ")[1] in ("0", "0.5", "1")
        assert 0 <= row["a"] <= 1
    random = found.baselines["random"]["rows"]
    assert list(random) == [f"random, seed {seed}" for seed in range(5)]
    assert random["random, seed 0"]["a"] == found.tasks["a"].scores["random"].value
    assert len({json.dumps(row) for row in random.values()}) > 1
    others = found.baselines["other_task"]
    assert list(others["rows"]) == ["+ d", "− d"]
    assert "that of the edit" in others["reason"]


def test_baselines_that_an_edit_cannot_have_are_refused(vectors):
    with pytest.raises(ValueError, match=r"the recipe must be analogy\(a, b, c\), .*; found 'a \+ b'"):
        edit(vectors, baselines=["parts"])
    with pytest.raises(ValueError, match=r"needs a vector that the recipe does not use; 'a \+ b' uses 'a', 'b'"):
        edit(vectors, baselines=["other_task"])
