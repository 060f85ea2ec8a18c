"""Any network, measured by anything: `edit_model` from Python, against numbers computed by hand in the test."""

import copy
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_edit import Net
from small_models import Blobs, LinearNet
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy, MulticlassF1Score

from tva import TaskVector, edit_model, open_weights
from tva.search import Grid, Learned, Race


def loaders(seed=1):
    return Blobs(seed).val_dataloader(), Blobs(seed).test_dataloader()


@pytest.fixture(scope="module")
def trained():
    """A plain network, and copies of it that were trained on blobs 1 and 2."""
    base = LinearNet().net
    copies = {}
    for seed in (1, 2):
        copies[seed] = finetuned = copy.deepcopy(base)
        optimizer = torch.optim.Adam(finetuned.parameters(), 0.05)
        inputs, labels = Blobs(seed).train_dataloader().dataset.tensors
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(finetuned(inputs), labels).backward()
            optimizer.step()
    return base, copies


@pytest.fixture
def base(trained):
    return copy.deepcopy(trained[0])


@pytest.fixture(scope="module")
def vector(trained):
    return TaskVector.between(trained[0].state_dict(), trained[1][1].state_dict(), buffers=())


def right(preds, target):
    return preds.argmax(dim=-1) == target


def moved(base, vector, coef, split="test", seed=1):
    """Return the logits of base + coef · vector, in float64, and the labels."""
    network = copy.deepcopy(base).double()
    network.load_state_dict({n: t + coef * vector.deltas[n].double() for n, t in network.state_dict().items()})
    inputs, labels = loaders(seed)[split == "test"].dataset.tensors
    with torch.no_grad():
        return network(inputs.double()), labels


def edit(model, vectors, folder, measure, **options):
    asked = {"scaling_coef": 0.5, "random_seed": None, "targets": {"a": measure}, **options}
    return edit_model(model, vectors=vectors, output=folder / "out", **asked)


METRICS = {
    "right": (right, lambda logits, labels: float((logits.argmax(-1) == labels).double().mean())),
    "f1_score": (MulticlassF1Score(2), lambda p, y: float(MulticlassF1Score(2)(p, y))),
    "accuracy": ("accuracy", lambda p, y: float(MulticlassAccuracy(2)(p, y))),
    "share_of_ones": (
        lambda preds, target: float(preds.argmax(-1).double().mean()),
        lambda p, y: float(p.argmax(-1).double().mean()),
    ),
}


@pytest.mark.parametrize("name", METRICS)
def test_a_network_is_measured_by_a_metric_of_predictions_and_targets(base, vector, name):
    metric, expected = METRICS[name]
    before = copy.deepcopy(base)
    report = edit(base, {"a": vector}, Path(), (*loaders(), {name: metric}))
    found = report.tasks["a"]
    assert (found.metric, found.num_examples) == (name, 60)
    for label, coef in (("base", 0.0), ("edited", 0.5), ("finetuned", 1.0)):
        assert found.scores[label].value == pytest.approx(expected(*moved(before, vector, coef)), abs=1e-6)
    written = open_weights("out/edited.safetensors")  # under the network's own names
    assert {n: tuple(written[n].shape) for n in written} == {n: tuple(t.shape) for n, t in before.state_dict().items()}
    for key, tensor in before.state_dict().items():
        torch.testing.assert_close(written[key], tensor + 0.5 * vector.deltas[key])
    assert report.model == "torch.nn.modules.container.Sequential"
    unknown = name == "share_of_ones"  # one number of all examples, by a function that nothing is known of
    assert (found.scores["base"].low is None) == unknown
    assert any("a/share_of_ones has no interval" in note for note in report.notes) == unknown


def test_a_mean_over_examples_has_an_interval_and_is_raced(base, vector):
    options = {"maximize": "a/right", "scaling_coef": None, "search": Race(num=5, first=10)}
    report = edit(base, {"a": vector}, Path(), (*loaders(), right), **options)
    score = report.tasks["a"].scores["base"]
    assert score.low < score.value < score.high


def evaluate_blobs(model, split, by_example=True):
    assert not model.training
    assert not torch.is_grad_enabled()
    inputs, labels = loaders()[split == "test"].dataset.tensors
    correct = model(inputs).argmax(-1) == labels
    return correct if by_example else float(correct.double().mean())


@pytest.mark.parametrize("kind", [torch.Tensor, list, np.ndarray])
def test_a_function_returns_one_score_an_example(base, vector, kind):
    def evaluate(model, split):
        found = evaluate_blobs(model, split)
        return {list: found.tolist(), np.ndarray: found.numpy()}.get(kind, found)

    expected = float(right(*moved(base, vector, 0.5)).double().mean())
    report = edit(base, {"a": vector}, Path(), evaluate, subject_to=["a/score >= 0.5 * base"], confidence=0.9)
    score = report.tasks["a"].scores["edited"]
    assert (score.value, report.tasks["a"].num_examples) == (pytest.approx(expected), 60)
    assert score.low < score.value <= score.high


def test_one_number_has_no_interval_and_the_report_says_so(base, trained, vector, capsys):
    evaluate = functools.partial(evaluate_blobs, by_example=False)
    report = edit(base, {"a": vector}, Path(), evaluate, subject_to=["a/score >= 0.5 * base"])
    score = report.tasks["a"].scores["edited"]
    assert (score.low, score.high, report.tasks["a"].num_examples) == (None, None, 0)
    assert report.verdict.endswith("'a': one number, for which no interval is claimed")
    report.show()
    assert "no interval is claimed" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="a function that evaluates must return one number per example"):
        edit(copy.deepcopy(trained[0]), {"a": vector}, Path(), evaluate, subject_to=["a/score >= 0"], confidence=0.9)


def test_a_function_may_return_several_metrics_by_name(base, vector):
    def evaluate(model, split):
        inputs, labels = loaders()[split == "test"].dataset.tensors
        return {"loss": nn.functional.cross_entropy(model(inputs), labels, reduction="none"), "size": 60.0}

    options = {"minimize": "a/loss", "scaling_coef": None, "search": Grid(num=3)}
    before = copy.deepcopy(base)
    report = edit(base, {"a": vector}, Path(), evaluate, **options)
    found, coef = report.tasks["a"], report.coefficients["scaling_coef"]
    assert not found.higher_is_better
    expected = nn.functional.cross_entropy(*moved(before, vector, coef))
    assert found.scores["edited"].value == pytest.approx(float(expected), abs=1e-6)


def test_a_function_that_draws_at_random_is_found_out(base, vector):
    with pytest.raises(ValueError, match="coefficient 0 must score exactly as the base.*the function that evaluates"):
        edit(base, {"a": vector}, Path(), lambda model, split: float(torch.rand(())))
    assert not Path("out").exists()


def test_a_lightning_module_is_measured_by_its_steps_or_by_a_metric_of_its_forward():
    model, own = Net(), Net()
    delta = {name: torch.full_like(tensor, 0.1) for name, tensor in model.state_dict().items()}
    vector, data = TaskVector(delta), Blobs(1)
    steps = edit(model, {"a": vector}, Path(), loaders())
    forward = edit(own, {"a": vector}, Path(), (data, right), controls={"plain": Blobs(2)})
    one, other = steps.tasks["a"], forward.tasks["a"]
    assert (one.metric, other.metric) == ("accuracy", "right")
    for label in ("base", "edited"):
        assert one.scores[label].value == other.scores[label].value
    assert forward.tasks["plain"].metric == "accuracy"
    assert not hasattr(data, "tva_metrics")


def test_vectors_are_in_memory_or_on_disk_and_get_names_from_their_paths(base, trained, vector):
    torch.save(trained[1][2].state_dict(), "blobs-2.pt")
    expected = {
        name: tensor + 0.5 * (vector.deltas[name] + trained[1][2].state_dict()[name] - tensor)
        for name, tensor in base.state_dict().items()
    }
    report = edit(base, [vector, Path("blobs-2.pt")], Path(), (*loaders(), right))
    assert (report.recipe, report.vectors["vector1"]["path"]) == ("vector1 + blobs_2", "in memory")
    for name, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def mapping_batch(rows):
    inputs, labels = (torch.stack(part) for part in zip(*rows, strict=True))
    return {"inputs": inputs, "labels": labels}


class Named(nn.Module):
    """Takes its inputs by name and returns an output with logits, as networks of transformers do."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, inputs):
        return {"logits": self.net(inputs)}


def test_batches_may_be_mappings_as_networks_of_transformers_take_them(base, vector):
    named = TaskVector({f"net.{name}": delta for name, delta in vector.deltas.items()})
    val, test = (DataLoader(loader.dataset, 20, collate_fn=mapping_batch) for loader in loaders())
    expected = float(right(*moved(base, vector, 0.5)).double().mean())
    report = edit(Named(base), {"a": named}, Path(), (val, test, right))
    assert report.tasks["a"].scores["edited"].value == pytest.approx(expected)


def test_texts_without_labels_can_constrain_an_edit_by_kl(base, vector):
    unlabeled = [DataLoader([{"inputs": row[0]} for row in loader.dataset], 20) for loader in loaders(2)]
    named = TaskVector({f"net.{name}": delta for name, delta in vector.deltas.items()})
    before = copy.deepcopy(base)
    labeled = [DataLoader(loader.dataset, 20, collate_fn=mapping_batch) for loader in loaders()]
    options = {"controls": {"b": tuple(unlabeled)}, "subject_to": ["b/kl <= 100"]}
    report = edit(Named(base), {"a": named}, Path(), (*labeled, right), **options)
    (old, _), (new, _) = (moved(before, vector, coef, seed=2) for coef in (0.0, 0.5))
    expected = nn.functional.kl_div(new.log_softmax(-1), old.log_softmax(-1), log_target=True, reduction="batchmean")
    assert report.tasks["b"].scores["edited"].value == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(ValueError, match="must have its targets under one of 'labels'.*its keys are 'inputs'"):
        edit(Named(copy.deepcopy(before)), {"a": named}, Path(), (*unlabeled, right))


WRONG = {
    "model": (lambda: {"model": 3}, "The model must be .*; found 3"),
    "class": (lambda: {"model": LinearNet}, "found the class LinearNet: make an instance"),
    "one loader": (lambda: {"measure": loaders()[0]}, "The task 'a' must be a LightningDataModule; .*a DataLoader"),
    "metric class": (lambda: {"measure": (*loaders(), BinaryAccuracy)}, "found the class BinaryAccuracy"),
    "no metric": (lambda: {"measure": (*loaders(), 5)}, "a function of preds and target; found 5"),
    "two arguments": (lambda: {"measure": lambda model: 0.0}, "must take \\(model, split\\)"),
    "data class": (lambda: {"measure": Blobs}, "found the class Blobs: make an instance|must take|the class Blobs"),
    "task list": (lambda: {"targets": [loaders()]}, "Tasks must be given by name"),
    "vectors": (lambda: {"vectors": {"a": LinearNet()}}, "'a' is a LinearNet. Of two models in memory take"),
    "no steps": (lambda: {"measure": loaders()}, "is a plain network, so a task must say how it is measured"),
    "no steps, data": (lambda: {"measure": Blobs(1)}, "is a plain network, so a task must say how it is measured"),
    "binary": (lambda: {"measure": (*loaders(), BinaryAccuracy())}, r"'accuracy' cannot be computed from .*\[60, 2\]"),
    "returns": (lambda: {"measure": lambda model, split: "good"}, "must return one number, one number per example"),
    "metric name": (lambda: {"measure": (*loaders(), "acuracy")}, "There is no multi-class metric 'acuracy'"),
    "objective": (lambda: {"maximize": "a/acc"}, "There is no multi-class metric 'acc'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_none_of_these_is_refused_with_what_would_do(base, vector, name):
    make, message = WRONG[name]
    given = {"model": base, "vectors": {"a": vector}, "measure": (*loaders(), right), **make()}
    if "maximize" in given:
        given |= {"scaling_coef": None, "search": Grid(num=2)}
    with pytest.raises((TypeError, ValueError), match=message):
        edit(given.pop("model"), given.pop("vectors"), Path(), given.pop("measure"), **given)
    assert not Path("out").exists()


@pytest.mark.parametrize("loss", ["entropy", "expert", "cross_entropy"])
def test_coefficients_are_learned_of_any_network(trained, base, loss):
    vectors = {f"blobs{s}": TaskVector.between(base.state_dict(), trained[1][s].state_dict()) for s in (1, 2)}
    targets = {f"blobs{s}": (*loaders(s), right) for s in (1, 2)}
    search = Learned(loss=loss, num_steps=20, learning_rate=0.05, start=0.1)
    edit_model(base, vectors=vectors, output=Path("e"), targets=targets, search=search, maximize="mean(right)")
    content = json.loads(Path("e/edit.json").read_text())
    losses = content["search"]["loss"]
    assert losses[-1] < losses[0]
    assert not torch.equal(base.state_dict()["0.weight"], trained[0].state_dict()["0.weight"])
