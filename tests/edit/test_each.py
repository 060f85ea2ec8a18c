"""Pairs and subsets of a sum's vectors as edits of their own, and the ensemble of outputs."""

import pytest
import torch
from small_edit import Net, Task, edit, make_trainer, vectors  # noqa: F401 (a fixture)
from torch import nn

from tva import TaskVector
from tva.edit.options import EditOptions
from tva.edit.run import run_edit
from tva.search import Bisect, Grid


@pytest.fixture
def three(vectors):  # noqa: F811
    """Two vectors of blob tasks, and the mean of both as a third."""
    both = TaskVector.load(vectors["a"]) * 0.5 + TaskVector.load(vectors["b"]) * 0.5
    both.save("c.tv.safetensors")
    return {**vectors, "c": "c.tv.safetensors"}


def run(three, tasks=None, folder=".", **changes):
    options = {
        "recipe": "a + b + c",
        "targets": tasks or {name: Task(seed) for seed, name in enumerate("abc", 1)},
        "maximize": "mean(normalized_accuracy)",
        "search": Grid(num=5),
        **changes,
    }
    return run_edit(make_trainer(), Net(), EditOptions(vectors=three, output=f"{folder}/out", **options))


@pytest.mark.parametrize("pair", ["a + b", "b + c"])
def test_a_pair_is_what_an_edit_of_its_sum_is(pair, three):
    report = run(three, each="pairs")
    rows = report.diagnostics["pairs"]["rows"]
    assert list(rows) == ["a + b", "a + c", "b + c"]
    first, second = pair.split(" + ")
    maximize = f"mean({first}/normalized_accuracy, {second}/normalized_accuracy)"
    alone = run(three, folder="alone", recipe=pair, maximize=maximize)
    assert rows[pair]["λ"] == alone.coefficients["scaling_coef"]
    for task in "abc":
        assert rows[pair][task] == alone.tasks[task].scores["edited"].value
    own = [alone.tasks[task].normalized for task in (first, second)]
    assert rows[pair]["normalized"] == pytest.approx(sum(own) / 2)
    assert report.tasks["a"].scores["edited"].value == run(three, folder="whole").tasks["a"].scores["edited"].value


def test_every_subset_is_reported_and_the_whole_is_the_edit_itself(three):
    report = run(three, each="subsets")
    rows = report.diagnostics["subsets"]["rows"]
    assert len(rows) == 7
    assert rows["a + b + c"]["λ"] == report.coefficients["scaling_coef"]
    assert rows["a + b + c"]["b"] == report.tasks["b"].scores["edited"].value
    assert rows["a"]["normalized"] >= 0.95  # λ = 1 is the fine-tuned model


def test_more_subsets_read_no_example_more_often(three):
    reads = {}
    for each in ("pairs", "subsets"):
        tasks = {name: Task(seed) for seed, name in enumerate("abc", 1)}
        run(three, tasks, each, each=each, cache="0B")
        reads[each] = [len(task.reads[split]) for task in tasks.values() for split in ("val", "test")]
    assert reads["subsets"] == reads["pairs"]


def test_a_given_coefficient_is_that_of_every_pair(three):
    rows = run(three, each="pairs", scaling_coef=0.25, maximize=None).diagnostics["pairs"]["rows"]
    assert {row["λ"] for row in rows.values()} == {0.25}


def test_a_subset_that_misses_the_constraints_has_no_numbers(three):
    harmless = Grid(stop=1e-6, num=2)
    report = run(three, each="subsets", subject_to=["a/accuracy >= 0.999 * base"], search=harmless)
    assert all(row["λ"] is not None for row in report.diagnostics["subsets"]["rows"].values())
    report = run(three, folder="b", each="pairs", subject_to=["a/accuracy >= base + 0.0"], search=Grid(num=3))
    pairs = report.diagnostics.get("pairs", {"rows": {}})
    for row in pairs["rows"].values():
        assert (row["λ"] is None) == (row["normalized"] is None)
    assert ("reason" in pairs) == any(row["λ"] is None for row in pairs["rows"].values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "a + 2 * b"}, "takes the vectors of a plain sum"),
        ({"recipe": "-a"}, "takes the vectors of a plain sum"),
        ({"search": Bisect(), "rule": "largest", "subject_to": ["a/accuracy >= 0"]}, "use the search Grid"),
        ({"targets": {"a": Task(1)}}, "'b', 'c' has none"),
    ],
)
def test_what_subsets_cannot_share_is_refused(changes, message, three):
    with pytest.raises(ValueError, match=message):
        run(three, **{"each": "pairs", "maximize": "mean(accuracy)", **changes})


def test_the_ensemble_averages_the_logits_of_the_fine_tuned_models(vectors):  # noqa: F811
    report = edit(vectors, scaling_coef=0.5, maximize=None, baselines=["ensemble"])
    rows = report.baselines["ensemble"]["rows"]
    for task, seed in (("a", 1), ("b", 2), ("other", 3)):
        inputs, labels = Task(seed)._loader(2).dataset.tensors
        logits = []
        for path in vectors.values():
            model = Net()
            model.load_state_dict(TaskVector.load(path).apply_to(model.state_dict()))
            logits.append(model(inputs))
        right = (torch.stack(logits).mean(0).argmax(-1) == labels).float().mean()
        assert rows["ensemble of 2"][task] == pytest.approx(float(right))


class Mute(Net):
    """Returns no predictions."""

    def _step(self, batch, stage):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log(f"{stage}/loss", loss)
        return {"loss": loss}


def test_an_ensemble_needs_predictions(vectors):  # noqa: F811
    with pytest.raises(ValueError, match="averages predictions, and the steps of Mute return"):
        edit(vectors, Mute(), scaling_coef=0.5, maximize=None, baselines=["ensemble"])
