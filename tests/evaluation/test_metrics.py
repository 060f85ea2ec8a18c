"""Metrics by name: those of torchmetrics, tva's own, an installed package's, and any by its path."""

import functools
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from small_edit import make_trainer
from small_models import Blobs, LinearNet, quiet_trainer
from torch.nn import functional as F

from tva import plugins
from tva.evaluation.evaluate import evaluate
from tva.evaluation.metrics import compute, divergence, find_metric
from tva.search import Constraint, Objective

MODULE = """
import torch
from torchmetrics import Metric

def share_of_class_0(preds, target):
    return (preds.argmax(-1) == 0).float().mean()

def distance(preds, target):
    return (preds.argmax(-1) - target).abs().double()

distance.higher_is_better = False

class Count(Metric):
    higher_is_better = True
    full_state_update = False
    def __init__(self):
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
    def update(self, preds, target):
        self.count += len(target)
    def compute(self):
        return self.count

WRONG = 3

def pairs(preds, target):
    return preds
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    Path("metrics_from_outside.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "metrics_from_outside"
    sys.modules.pop("metrics_from_outside", None)


class Predicting(LinearNet):
    def validation_step(self, batch, batch_idx):
        inputs, labels = batch
        logits = self(inputs)
        self.log("val_loss", torch.nn.functional.cross_entropy(logits, labels))
        return {"preds": logits, "target": labels}


def evaluated(*names):
    trainer = quiet_trainer()
    model, data = Predicting(), Blobs(1)
    with torch.no_grad():
        inputs, labels = data.val_dataloader().dataset.tensors
        logits = model(inputs)
    return evaluate(trainer, model, data, "val", extra=names), logits, labels


def test_a_metric_from_outside_by_its_path(outside):
    names = [f"{outside}.{name}" for name in ("share_of_class_0", "distance", "Count")]
    found, logits, labels = evaluated(*names)
    assert found.metrics[names[0]] == pytest.approx(float((logits.argmax(-1) == 0).float().mean()))
    distances = (logits.argmax(-1) - labels).abs().double().numpy()
    assert np.array_equal(found.scores[names[1]], distances)  # one number per example: the metric is their mean
    assert found.metrics[names[1]] == distances.mean()
    assert found.higher(names[0])
    assert not found.higher(names[1])
    assert found.metrics[names[2]] == 60


def test_a_path_is_a_metric_in_objectives_and_constraints(outside):
    objective = Objective.parse(f"a/{outside}.distance", maximize=False, targets=["a"], tasks=["a"])
    assert objective.terms == (("a", f"{outside}.distance"),)
    over_targets = Objective.parse(f"mean({outside}.distance)", maximize=False, targets=["a", "b"], tasks=["a", "b"])
    assert over_targets.terms == (("a", f"{outside}.distance"), ("b", f"{outside}.distance"))
    constraint = Constraint.parse(f"a/{outside}.distance <= base + 0.1", ["a"])
    assert (constraint.task, constraint.metric) == ("a", f"{outside}.distance")


def test_a_metric_of_an_installed_package_by_the_name_it_has_there(outside, monkeypatch):
    point = EntryPoint("distance", f"{outside}:distance", "tva.metrics")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == "tva.metrics" else [])
    plugins.installed.cache_clear()
    try:
        found, logits, labels = evaluated("distance")
        assert found.metrics["distance"] == (logits.argmax(-1) != labels).double().mean()
    finally:
        plugins.installed.cache_clear()


def test_what_is_not_a_metric_is_refused(outside):
    with pytest.raises(ValueError, match="must be a torchmetrics class or a function of preds and target; found 3"):
        find_metric(f"{outside}.WRONG", 3)
    with pytest.raises(ValueError, match="the module metrics_from_outside has no 'nothing'"):
        find_metric(f"{outside}.nothing", 3)
    with pytest.raises(ValueError, match=r"must be one number, or one an example; of 60 examples .* \[60, 2\]"):
        evaluated(f"{outside}.pairs")
    with pytest.raises(ValueError, match="There is no multi-class metric 'f2'. .* one of .*'brier_score'"):
        find_metric("f2", 3)
    with pytest.raises(ValueError, match=r"metric 'f1_scor'\. Did you mean 'f1_score'\?"):
        find_metric("f1_scor", 3)
    with pytest.raises(ValueError, match="metric 'roc'"):  # torchmetrics' has no single number
        find_metric("roc", 3)


def test_the_brier_score_is_the_squared_distance_from_the_label():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(50, 3)), generator.integers(3, size=50)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    reference = ((shares - np.eye(3)[labels]) ** 2).sum(axis=1)
    metric = find_metric("brier_score", 3)
    for given in (logits, shares):
        found = compute(metric, torch.from_numpy(given), torch.from_numpy(labels))
        np.testing.assert_allclose(found.numpy(), reference, atol=1e-12)
    assert metric.higher_is_better is False


# --- the divergence from the base, which needs no labels


def test_kl_of_classes_is_torchs_for_logits_and_probabilities():
    base, edited = torch.randn(2, 7, 5, dtype=torch.float64)
    expected = F.kl_div(edited.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence({"preds": base}, {"preds": edited}), expected)
    probabilities = divergence({"preds": base.softmax(-1)}, {"preds": edited.softmax(-1)})
    torch.testing.assert_close(probabilities, expected)
    assert divergence({"preds": base}, {"preds": base}).tolist() == [0.0] * 7
    certain = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    even = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert divergence({"preds": certain}, {"preds": even}).tolist() == [pytest.approx(np.log(2)), np.inf]


def test_kl_of_a_language_model_is_the_mean_over_the_positions_that_count():
    base, edited = torch.randn(2, 3, 4, 6)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    per_token = F.kl_div(edited.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    expected = torch.stack([row[kept].mean() for row, kept in zip(per_token, mask, strict=True)])
    found = divergence({"logits": base, "mask": mask}, {"logits": edited, "mask": mask})
    torch.testing.assert_close(found, expected)


def test_kl_of_edits_is_that_of_their_predictions_and_the_bases():
    """A linear network's predictions under each edit, computed here once more without tva."""
    model, data, trainer = Predicting(), Blobs(1), make_trainer()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def put(scale):
        model.load_state_dict({name: value * scale for name, value in before.items()})

    edits = [functools.partial(put, scale) for scale in (1.0, 0.5, -1.0)]
    found = evaluate(trainer, model, data, "val", edits=edits, extra=["kl"], reference=edits[0])
    put(1.0)
    inputs = torch.cat([batch[0] for batch in data.val_dataloader()])
    logits = []
    for edit in edits:
        edit()
        logits.append(model(inputs).detach())
    for evaluation, theirs in zip(found, logits, strict=True):
        wanted = F.kl_div(theirs.log_softmax(-1), logits[0].log_softmax(-1), log_target=True, reduction="none").sum(-1)
        np.testing.assert_allclose(evaluation.scores["kl"], wanted, rtol=1e-5, atol=1e-7)
        assert evaluation.metrics["kl"] == pytest.approx(float(wanted.mean()), abs=1e-6)
        assert not evaluation.higher("kl")
        assert evaluation.compare(found[0], "kl") is not None
    assert not found[0].scores["kl"].any()


def test_kl_needs_a_step_that_returns_predictions():
    with pytest.raises(ValueError, match="validation_step of LinearNet returns none. Return 'preds'"):
        evaluate(make_trainer(), LinearNet(), Blobs(1), "val", extra=["kl"])


@pytest.mark.parametrize("name", ["mean_squared_error", "MeanSquaredError", "SpearmanCorrCoef", "spearman"])
def test_metrics_of_numbers_are_found_by_their_names(name):
    preds, target = torch.tensor([0.1, 0.4, 0.2]), torch.tensor([0.0, 1.0, 0.5])
    expected = 1.0 if "pearman" in name else float((preds - target).square().mean())
    assert float(compute(find_metric(name, 0), preds, target)) == pytest.approx(expected, abs=1e-5)


def test_spearman_is_that_of_scipy_with_ties():
    from scipy.stats import spearmanr

    preds, target = torch.tensor([1.0, 2.0, 2.0, 5.0, 0.0]), torch.tensor([3.0, 3.0, 4.0, 1.0, 0.5])
    expected = spearmanr(preds.numpy(), target.numpy()).statistic
    assert float(compute(find_metric("spearman", 0), preds, target)) == pytest.approx(expected, abs=1e-12)
