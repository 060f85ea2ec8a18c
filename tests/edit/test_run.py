"""Edits from end to end on a tiny model: one pass for many coefficients, the log, the gate, what explains an edit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_edit import LateNet, Net, Task, edit, make_trainer
from torch.utils.data import DataLoader

from tva import TaskVector
from tva.data import ImageTask, TableTask
from tva.edit.outcome import reported_metric
from tva.edit.trainer import Trainer
from tva.errors import HarnessError
from tva.evaluation.batch_cache import BatchCache
from tva.evaluation.evaluate import evaluate
from tva.evaluation.result import Evaluation
from tva.layers import block_of
from tva.search import Grid, Learned, Race, learned
from tva.vectors.geometry import blocks


class ForgetfulNet(Net):
    """Has a state outside the state dict: the more it is used, the worse it gets."""

    def __init__(self):
        super().__init__()
        self.uses = 0

    def forward(self, inputs):
        self.uses += 1
        return super().forward(inputs) * torch.tensor([1.0, 1.0 + 0.05 * self.uses])


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (TableTask("nowhere.csv", text_column="t"), "expected at nowhere.csv, but nothing is there"),
        (ImageTask("none-{split}.parquet"), "expected at none-{split}.parquet, but none is there"),
        (ImageTask({"train": "a.parquet", "test": "b.parquet"}), "expected at a.parquet, but nothing is there"),
        (ImageTask("builtin:digitz"), "Did you mean 'digits'"),
    ],
)
def test_data_that_are_missing_are_reported_before_anything_is_evaluated(vectors, missing, message):
    task = Task(1)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        edit(vectors, targets={"a": task}, controls={"other": missing})
    assert task.reads == {"val": [], "test": []}
    assert not list(Path().iterdir())


def test_an_output_that_cannot_be_written_is_reported_before_anything_is_evaluated(vectors):
    Path("file").touch()
    task = Task(1)
    with pytest.raises(OSError, match="out cannot be written: Not a directory .*Give an output in a folder"):
        edit(vectors, targets={"a": task}, folder="file")
    assert task.reads == {"val": [], "test": []}


# --- one pass


def test_a_grid_reads_each_example_once_and_gives_what_separate_passes_give(vectors):
    task, other = Task(1), Task(2)
    shared = edit(vectors, targets={"a": task, "b": other}, folder="x")
    assert sorted(task.reads["val"]) == list(range(200))
    assert sorted(task.reads["test"]) == list(range(200))
    late = edit(vectors, LateNet(), folder="y")
    kept = [[e for e in report.evaluations if e["metric"] != "late"] for report in (shared, late)]
    assert len(kept[0]) > 40
    for left, right in zip(*kept, strict=True):
        for key in ("value", *({"low", "high"} & left.keys())):
            assert left.pop(key) == pytest.approx(right.pop(key), rel=1e-6)
        assert left == right
    assert shared.coefficients == late.coefficients


@pytest.mark.parametrize(("place", "size", "reads"), [("memory", 10**6, 4), ("disk", 10**6, 4), ("memory", 2100, 6)])
def test_the_cache_keeps_what_fits_and_changes_no_number(place, size, reads):
    model, task = Net(), Task(1)
    plain = evaluate(make_trainer(), model, task, "val")
    cache = BatchCache(size, place)  # a batch takes 50 * (4 * 4 + 8) = 1200 bytes
    for _ in range(2):
        assert evaluate(make_trainer(), model, task, "val", cache=cache).same_as(plain)
    assert cache.num_read == (4 if reads == 4 else 7)


def test_parts_of_one_order_are_nested_and_make_up_the_whole():
    model, task = Net(), Task(1)
    whole = evaluate(make_trainer(), model, task, "val").scores["accuracy"]
    first, rest = (
        evaluate(make_trainer(), model, task, "val", part=(window, 7)).scores["accuracy"]
        for window in ((0, 60), (60, 200))
    )
    order = torch.randperm(200, generator=torch.Generator().manual_seed(7)).numpy()
    assert (whole[order[:60]] == first).all()
    assert (whole[order[60:]] == rest).all()


def test_a_loader_that_shuffles_is_refused(vectors):
    with pytest.raises(ValueError, match="val_dataloader shuffles"):
        edit(vectors, controls={}, targets={"a": Task(1, shuffle=True), "b": Task(2)})


def test_scores_that_contradict_the_metric_are_refused():
    class Odd(Net):
        def validation_step(self, batch, batch_idx):
            return {**super().validation_step(batch, batch_idx), "correct": batch[1] == 0}

    with pytest.raises(ValueError, match="its scores by example average 0.5: intervals would be those of another"):
        evaluate(make_trainer(), Odd(), Task(1), "val")


# --- identity


def test_an_edit_of_zero_must_reproduce_the_base_or_the_run_stops(vectors):
    with pytest.raises(HarnessError, match=r"coefficient 0 must score exactly as the base, but on a \(val\)"):
        edit(vectors, ForgetfulNet())
    assert not Path("out").exists()
    with pytest.raises(HarnessError, match=r"\(test\)"):
        edit(vectors, ForgetfulNet(), scaling_coef=0.5)


# --- the log


def test_the_next_run_evaluates_only_the_base_and_reports_the_same(vectors):
    first = edit(vectors)
    again = edit(vectors)
    assert again.search["num_reused"] > 10
    assert again.search["num_forward"] == 2 * 200 + 3 * 200  # the base, to choose and to report
    assert again.tasks == first.tasks
    assert again.coefficients == first.coefficients
    finer = edit(vectors, search=Grid(num=9))  # every second coefficient is there
    assert finer.search["num_reused"] >= 8
    lines = Path("log.jsonl").read_text().splitlines()
    entry = json.loads(lines[0])
    assert {"recipe", "coefficients", "base", "vectors", "data", "split", "range", "scores"} <= entry.keys()
    Path("log.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:50])  # stopped while writing
    assert edit(vectors, search=Grid(num=9)).tasks == finer.tasks


@pytest.mark.parametrize("change", ["data", "vector", "recipe", "base"])
def test_what_was_evaluated_on_other_things_is_not_reused(vectors, change):
    edit(vectors, scaling_coef=0.5)
    changes, model = {"scaling_coef": 0.5, "vectors": vectors}, None
    if change == "data":
        changes |= {"targets": {"a": Task(5), "b": Task(6)}, "controls": {"other": Task(7)}}
    elif change == "vector":
        TaskVector.load(vectors["a"]).__mul__(0.5).save("half.tv.safetensors")
        changes["vectors"] = {**vectors, "a": "half.tv.safetensors"}
    elif change == "recipe":
        changes |= {"recipe": "a - b", "maximize": "mean(accuracy)", "controls": {}}
        changes["targets"] = {"other": Task(3)}
    else:
        model = Net()
        with torch.no_grad():
            model.net[0].bias += 1
        changes |= {"allow_other_base": True}
    given = changes.pop("vectors")
    assert edit(given, model, **changes).search["num_reused"] == 0


# --- statistics in the report


def test_every_number_has_an_interval_and_the_sizes_of_both_splits_are_reported(vectors, capsys):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    report = trainer.edit(
        Net(),
        vectors=vectors,
        recipe="a + b",
        output="out",
        targets={"a": Task(1), "b": Task(2, 100)},
        controls={"other": Task(3)},
        maximize="mean(normalized_accuracy)",
        search=Grid(num=3),
    )
    for task in report.tasks.values():
        for score in task.scores.values():
            assert score.low <= score.value <= score.high
        assert task.comparison.difference_low <= task.comparison.difference <= task.comparison.difference_high
        if task.scores["base"].value > 0.1:
            assert task.comparison.ratio_low <= task.comparison.ratio <= task.comparison.ratio_high
        assert 0 <= task.comparison.p_value <= 1
    assert report.sizes == {"a": {"val": 200, "test": 200}, "b": {"val": 100, "test": 100}, "other": {"test": 200}}
    printed = capsys.readouterr().out
    assert "b 100 / 100" in printed
    assert "other 0 / 200" in printed
    assert json.loads(Path("out/edit.json").read_text())["tasks"]["a"]["comparison"]["p_value"] >= 0
    assert Path("out.evaluations.jsonl").exists()


def test_a_confidence_demands_the_limit_and_not_the_point_estimate_on_test_data(vectors):
    plain = edit(vectors, scaling_coef=0.5)
    value, base = (plain.tasks["a"].scores[label].value for label in ("edited", "base"))
    bound = f"a/accuracy >= {(value - 0.01) / base} * base"
    assert edit(vectors, scaling_coef=0.5, subject_to=[bound]).holds
    sure = edit(vectors, scaling_coef=0.5, subject_to=[bound], confidence=0.95)
    assert not sure.holds
    assert sure.constraints[0].limit < sure.constraints[0].bound < sure.constraints[0].value
    assert "at the confidence limit" in sure.verdict
    with pytest.raises(ValueError, match="confidence needs a bound of the form"):
        edit(vectors, subject_to=["a/accuracy >= base * base"], confidence=0.95)


def test_a_test_part_too_small_to_prove_anything_is_said_before_the_search(vectors):
    class FewTests(Task):
        def test_dataloader(self):
            return DataLoader(torch.utils.data.Subset(super().test_dataloader().dataset, range(20)), 20)

    tasks = {"targets": {"a": Task(1)}, "controls": {"other": FewTests(1)}, "maximize": "a/accuracy"}
    said = "(?s)With 20 test examples at accuracy .* needed even if nothing is lost; test other on more"
    asked = {"recipe": "a", "subject_to": ["other/accuracy >= 0.9 * base"], "confidence": 0.95}
    with pytest.warns(UserWarning, match=said):
        report = edit(vectors, **asked, **tasks)
    (note,) = report.notes
    assert note.startswith("With 20 test examples")
    assert "20 test examples at accuracy" in Path("out/report.html").read_text()


def test_a_metric_that_the_model_does_not_log_is_computed_from_its_predictions(vectors):
    report = edit(vectors, maximize="mean(f1_score)", subject_to=["other/loss <= base + 5"])
    task = report.tasks["a"]
    assert task.metric == "f1_score"
    assert task.scores["edited"].value > 0.97
    low, high = task.scores["edited"].low, task.scores["edited"].high
    assert low < 0.96 < task.scores["edited"].value < high < 1  # of one error in 200 the interval is wide
    assert report.tasks["other"].metric == "loss"
    assert not report.tasks["other"].higher_is_better
    with pytest.raises(ValueError, match="There is no multi-class metric 'f2'"):
        edit(vectors, maximize="mean(f2)")


def test_the_divergence_from_the_base_is_a_constraint_that_needs_no_labels(vectors):
    """The largest coefficient whose predictions stay near the base's; at the base the divergence is 0."""
    report = edit(vectors, subject_to=["other/kl <= 0.5"], rule="largest", maximize="mean(loss)")
    task = report.tasks["other"]
    assert (task.metric, task.higher_is_better, task.scores["base"].value) == ("kl", False, 0)
    assert 0.1 < task.scores["edited"].value <= 0.5
    tried = {e["coefficients"]["scaling_coef"]: e["value"] for e in report.evaluations if e["metric"] == "kl"}
    assert [tried[x] for x in sorted(tried)] == sorted(tried.values()), tried
    assert max(tried.values()) > 0.5
    again = edit(vectors, subject_to=["other/kl <= 0.5"], rule="largest", maximize="mean(loss)")
    assert again.search["num_forward"] == 2 * 3 * 200  # of the base, on three tasks of two splits
    assert again.tasks["other"] == task


def test_a_task_that_nothing_names_is_reported_by_accuracy_or_else_by_the_metric_of_the_others():
    logged = Evaluation({"loss": 1.0, "perplexity": 2.7}, 10)
    assert reported_metric(logged, {"a": ["perplexity"]}, "other") == "perplexity"
    assert reported_metric(logged, {"a": ["f1_score"]}, "other") == "loss"
    assert reported_metric(logged, {"other": ["loss"], "a": ["perplexity"]}, "other") == "loss"
    asked = Evaluation({"loss": 1.0, "exact_match": 0.5}, 10)  # a language model logs what the data ask for
    assert reported_metric(asked, {"a": ["perplexity"]}, "other", ["exact_match"]) == "exact_match"
    classified = Evaluation({"loss": 1.0, "accuracy": 0.5}, 10)
    assert reported_metric(classified, {"a": ["loss"]}, "other") == "accuracy"


# --- other coefficients


def test_coefficients_named_in_the_recipe_are_searched_together(vectors):
    ranges = {"s": [0, 1], "l": [0, 1]}
    joint = edit(vectors, recipe="s * a + l * b", search=Grid(num=3, ranges=ranges))
    tried = {tuple(e["coefficients"].get(n) for n in "sl") for e in joint.evaluations if e["model"] == "edited"}
    assert len(tried) == 9
    assert (joint.coefficients["s"], joint.coefficients["l"]) != (0, 0)
    shared = edit(vectors, recipe="s * a + l * b", search=Grid(num=5, ranges=ranges, shared=True))
    assert shared.coefficients["s"] == shared.coefficients["l"]
    alone = edit(vectors)
    assert shared.coefficients["s"] == alone.coefficients["scaling_coef"]
    with pytest.raises(ValueError, match="a range for 't', which the recipe"):
        edit(vectors, search=Grid(num=3, ranges={"t": [0, 1]}))
    with pytest.raises(ValueError, match="'s' has a value in coefs and a range"):
        edit(vectors, recipe="s * a", coefs={"s": 1.0}, search=Grid(num=3, ranges={"s": [0, 1]}))


def test_a_race_is_run_like_any_other_search(vectors):
    report = edit(vectors, search=Race(num=11))
    assert report.search["rounds"][0]["candidates"] == 10
    assert report.holds


@pytest.mark.parametrize(
    ("loss", "per", "num"), [("entropy", "tensor", 4), ("cross_entropy", "vector", 1), ("expert", "layer", 2)]
)
def test_learned_coefficients_are_what_is_applied(vectors, loss, per, num):
    search = Learned(loss=loss, per=per, num_steps=40, learning_rate=0.02)
    model = Net()
    start = edit(vectors, scaling_coef=0.3)
    report = edit(vectors, model, search=search)
    coefs = report.search["coefficients"]
    assert {name: len(row) for name, row in coefs.items()} == {"a": num, "b": num}
    base, loaded = Net().state_dict(), {name: TaskVector.load(path) for name, path in vectors.items()}
    for name, tensor in model.state_dict().items():
        rows = {v: row.get(name, row.get("all", row.get(block_of(name)))) for v, row in coefs.items()}
        expected = base[name] + sum(rows[v] * loaded[v].deltas[name] for v in rows)
        torch.testing.assert_close(tensor, expected)
    losses = report.search["loss"]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(value.requires_grad for value in model.parameters())
    means = [sum(r.tasks[t].normalized for t in "ab") / 2 for r in (start, report)]
    assert means[1] > means[0] - 0.02


def test_masks_of_singular_components_are_learned_straight_through(vectors):
    model = Net()
    search = Learned(loss="expert", per="component", start=0.7, num_steps=30, learning_rate=0.02)
    report = edit(vectors, model, search=search)
    kept = report.search["coefficients"]
    assert all(sorted(kept[name]) == ["net.0.weight", "net.2.weight"] for name in "ab")
    counts = [count for row in kept.values() for count in row.values()]
    assert 0 < sum(counts) < 2 * (4 + 2)  # of the ranks
    moved = model.state_dict()["net.0.bias"] - Net().state_dict()["net.0.bias"]
    expected = sum(TaskVector.load(path).deltas["net.0.bias"] for path in vectors.values())
    torch.testing.assert_close(moved / 0.7, expected, rtol=1e-4, atol=1e-6)


def test_the_experts_labels_are_the_predictions_of_the_finetuned_models(vectors):
    """With one vector at coefficient 1 the loss is the entropy of the fine-tuned model's own predictions."""
    only = {"recipe": "a", "targets": {"a": Task(1)}, "maximize": "a/accuracy"}
    search = Learned(loss="expert", start=1.0, num_steps=1, learning_rate=1e-9, batch_size=200, per="vector")
    report = edit({"a": vectors["a"]}, **only, search=search)
    model = Net()
    model.load_state_dict(TaskVector.load(vectors["a"]).apply_to(model.state_dict(), allow_other_base=True))
    task = Task(1)
    inputs = torch.cat([batch[0] for batch in task.val_dataloader()])
    entropy = torch.special.entr(model(inputs).softmax(-1)).sum(-1).mean()
    assert report.search["loss"] == [pytest.approx(float(entropy.detach()), rel=1e-5)]
    with pytest.raises(ValueError, match="a vector of its name; there is none for 'c'"):
        edit(vectors, targets={"a": Task(1), "c": Task(2)}, maximize="mean(accuracy)", search=search)


def test_a_training_that_was_cut_off_goes_on_to_the_same_coefficients(vectors, monkeypatch):
    monkeypatch.setattr(learned, "KEEP_EVERY", 8)
    search = Learned(num_steps=20, learning_rate=0.02, batch_size=64)
    straight = edit(vectors, search=search, folder="x").search
    step, steps = learned.CoefficientLearner.training_step, []

    def stopped(self, *args):
        steps.append(1)
        if len(steps) == 13:
            raise RuntimeError("the machine went down")
        return step(self, *args)

    monkeypatch.setattr(learned.CoefficientLearner, "training_step", stopped)
    with pytest.raises(RuntimeError, match="went down"):
        edit(vectors, search=search, folder="y")
    resumed = edit(vectors, search=search, folder="y").search
    assert (straight["steps_kept"], resumed["steps_kept"], len(steps)) == (0, 8, 13 + 12)
    assert resumed["coefficients"] == straight["coefficients"]
    assert resumed["loss"] == straight["loss"]
    again = edit(vectors, search=search, folder="y").search
    assert (again["steps_kept"], again["coefficients"], len(steps)) == (20, straight["coefficients"], 25)
    other = Learned(num_steps=20, learning_rate=0.03, batch_size=64)
    assert edit(vectors, search=other, folder="y").search["steps_kept"] == 0


def test_learned_coefficients_forget_under_a_constraint(vectors):
    wanted = {"recipe": "-a", "targets": {"a": Task(1)}, "maximize": None, "minimize": "a/accuracy"}
    search = Learned(loss="cross_entropy", num_steps=30, learning_rate=0.05, start=0.1)
    report = edit(vectors, **wanted, search=search, subject_to=["other/accuracy >= 0.2 * base"])
    assert report.tasks["a"].scores["edited"].value < report.tasks["a"].scores["base"].value
    by_loss = {**wanted, "minimize": None, "maximize": "a/loss"}
    same = edit(vectors, **by_loss, search=search, subject_to=["other/accuracy >= 0.2 * base"])
    assert same.search["coefficients"] == report.search["coefficients"]
    better = {**wanted, "recipe": "a", "minimize": "a/loss"}
    learned = edit(vectors, **better, search=search).tasks["a"].scores
    assert learned["edited"].value < learned["base"].value
    with pytest.raises(ValueError, match="it does not forget"):
        edit(vectors, **wanted, search=Learned())


# --- baselines and diagnostics


def test_what_explains_an_edit(vectors):
    everything = ["cosine", "signs", "norms", "linearity", "disentanglement", "blame"]
    report = edit(vectors, scaling_coef=0.5, diagnostics=everything, baselines=["average", "endpoints"])
    found = {name: part["rows"] for name, part in report.diagnostics.items()}
    a, b = (TaskVector.load(vectors[name]) for name in "ab")
    assert found["cosine"]["a"]["b"] == pytest.approx(a.cosine(b))
    assert 0 < found["signs"]["a"]["b"] < 1
    assert found["norms"]["net.0"]["the edit"] == pytest.approx(
        float(sum((0.5 * (a + b)).deltas[n].square().sum() for n in ("net.0.weight", "net.0.bias"))) ** 0.5
    )

    def accuracy(task, *parts):
        model = Net()
        for name, tensor in model.state_dict().items():
            tensor += sum(part.deltas[name] * coef for part, coef in parts)
        return evaluate(make_trainer(), model, task, "test").metrics["accuracy"]

    task = Task(1)
    alone = [accuracy(task, (vector, 0.5)) for vector in (a, b)]
    predicted = sum(alone) - accuracy(task)
    row = found["linearity"]["a"]
    assert row["predicted"] == pytest.approx(predicted)
    assert row["gap"] == pytest.approx(accuracy(task, (a, 0.5), (b, 0.5)) - predicted)
    assert found["disentanglement"]["a 0"]["b 0"] == 0
    assert max(max(row.values()) for row in found["disentanglement"].values()) > 0
    assert set(found["blame"]) == set(blocks(a.deltas))
    assert report.baselines["endpoints"]["rows"]["a"]["a"] == report.tasks["a"].scores["finetuned"].value
    average = report.baselines["average"]["rows"]["average of 2"]
    assert average["a"] == pytest.approx(accuracy(task, (a, 0.5), (b, 0.5)))
    with pytest.raises(ValueError, match="needs an edit that is a sum"):
        edit(vectors, recipe="ties(a, b, density=0.2)", scaling_coef=0.5, diagnostics=["linearity"])


def test_gradient_ascent_stops_where_the_control_would_fail(vectors):
    model = Net()
    report = edit(
        vectors,
        model,
        recipe="-a",
        targets={"a": Task(1)},
        maximize=None,
        minimize="a/accuracy",
        subject_to=["other/accuracy >= 0.7 * base"],
        baselines=["gradient_ascent"],
        search=Grid(num=11),
    )
    rows = report.baselines["gradient_ascent"]["rows"]
    assert [name.split(",")[1].split()[0] for name in rows] == ["stopped", "interpolated"]
    stopped = rows["ascent on a, stopped"]
    assert stopped["a"] < report.tasks["a"].scores["base"].value
    assert "of 100 (a)" in report.baselines["gradient_ascent"]["reason"]
    assert "training_step" not in vars(model)
    expected = TaskVector.load(vectors["a"]).apply_to(Net().state_dict(), -report.coefficients["scaling_coef"])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_joint_fine_tuning_needs_its_checkpoint(vectors):
    with pytest.raises(ValueError, match="'joint' and the checkpoint joint= go together"):
        edit(vectors, baselines=["joint"])
    torch.save({"state_dict": Net().state_dict()}, "joint.ckpt")
    report = edit(vectors, scaling_coef=0.5, baselines=["joint"], joint="joint.ckpt")
    assert report.baselines["joint"]["rows"]["joint fine-tuning"]["a"] == report.tasks["a"].scores["base"].value


class Grouped(Task):
    """A task whose examples come in tens."""

    def example_groups(self, split):
        return np.arange(200) // 10


def test_an_edit_takes_the_groups_of_its_tasks_as_the_unit(vectors):
    alone = edit(vectors, subject_to=["a/accuracy >= 0.5 * base"], confidence=0.8, folder="alone")
    tasks = {"a": Grouped(1), "b": Task(2)}
    report = edit(
        vectors, targets=tasks, controls={"other": Grouped(3)}, subject_to=["a/accuracy >= 0.5 * base"], confidence=0.8
    )
    assert (report.tasks["a"].num_groups, report.tasks["b"].num_groups) == (20, None)
    assert report.tasks["a"].scores["edited"].value == alone.tasks["a"].scores["edited"].value
    assert report.constraints[0].limit < alone.constraints[0].limit
    content = json.loads(Path("out/edit.json").read_text())
    assert content["tasks"]["a"]["num_groups"] == 20
    assert "num_groups" not in content["tasks"]["b"]
    assert "200 in 20 groups" in Path("out/report.html").read_text()
    assert type(report).load("out").tasks["a"].num_groups == 20
