"""Evaluation and its intervals, against scipy, by simulation, and with modules that know nothing of tva."""

import lightning as L
import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from small_models import Blobs, LinearNet
from torch import nn

from tva.search import Constraint, choose
from tva.validate import Evaluation, evaluate, paired_slack, wilson_interval


def trainer():
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


@pytest.mark.parametrize(("correct", "count"), [(0, 1), (1, 1), (0, 50), (50, 50), (17, 60), (1999, 2000), (3, 7)])
def test_wilson_interval_is_scipys_and_holds_the_proportion(correct, count):
    low, high = wilson_interval(correct / count, count)
    reference = binomtest(correct, count).proportion_ci(method="wilson")
    assert low == pytest.approx(reference.low, abs=1e-12)
    assert high == pytest.approx(reference.high, abs=1e-12)
    assert low <= correct / count <= high


def test_evaluate_counts_examples_and_reads_each_split():
    model, data = LinearNet(), Blobs(1)
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        inputs, labels = loader.dataset.tensors
        expected = (model(inputs).argmax(-1) == labels).float().mean()
        evaluation = evaluate(trainer(), model, data, split)
        assert evaluation.metrics["accuracy"] == pytest.approx(float(expected))
        assert evaluation.num_examples == 60
        assert evaluation.correct is None  # this module does not return it


def test_two_data_modules_in_one_trainer_give_two_results():
    one, model = trainer(), LinearNet()
    first, second = (evaluate(one, model, Blobs(seed), "test").metrics for seed in (1, 2))
    assert first != second
    assert evaluate(one, model, Blobs(1), "test").metrics == first
    assert not [callback for callback in one.callbacks if type(callback).__name__ == "_Scores"]


def test_a_module_that_logs_nothing_or_two_metrics_of_one_name_is_refused():
    class Silent(LinearNet):
        def validation_step(self, batch, batch_idx):
            pass

    class Twice(LinearNet):
        def validation_step(self, batch, batch_idx):
            self.log("val/a/accuracy", 0.5)
            self.log("val/b/accuracy", 0.5)

    with pytest.raises(ValueError, match=r"logged no metric on the val split; its validation_step"):
        evaluate(trainer(), Silent(), Blobs(1), "val")
    with pytest.raises(ValueError, match="two metrics called 'accuracy'"):
        evaluate(trainer(), Twice(), Blobs(1), "val")


def as_evaluation(correct):
    return Evaluation({"accuracy": float(correct.double().mean())}, len(correct), correct)


def test_slack_is_the_half_width_of_paired_differences_with_its_skewness_corrected():
    edited, base = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1]).bool(), torch.tensor([1, 1, 1, 1, 0, 1, 1, 1]).bool()
    differences = np.array([1, 1, 0, 1, 0, 1, 1, 1]) - 0.95 * np.array([1, 1, 1, 1, 0, 1, 1, 1])
    deviation = differences.std(ddof=1)
    skewness = (((differences - differences.mean()) / deviation) ** 3).mean()
    assert skewness < 0
    cutoff = 1.6448536 - skewness * (2 * 1.6448536**2 + 1) / (6 * 8**0.5)
    expected = cutoff * deviation / 8**0.5
    assert paired_slack(as_evaluation(edited), as_evaluation(base), 0.95, 0.95) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="per-example scores"):
        paired_slack(Evaluation({"accuracy": 0.5}, 8, None), as_evaluation(base), 0.95, 0.95)


def test_at_95_percent_confidence_an_edit_at_the_bound_passes_one_time_in_twenty():
    generator = torch.Generator().manual_seed(0)
    keep = Constraint.parse("c/accuracy >= 0.95 * base", ["c"])
    runs, count, passed, believed = 4000, 400, 0, 0
    for _ in range(runs):
        base = torch.rand(count, generator=generator) < 0.9
        kept = torch.rand(count, generator=generator) < 0.95  # the edit truly keeps 95 %: exactly at the bound
        edited = base & kept
        scores = {"c": as_evaluation(edited).metrics}, {"c": as_evaluation(base).metrics}
        slack = paired_slack(as_evaluation(edited), as_evaluation(base), keep.slope, 0.95)
        believed += keep.holds(*scores)
        passed += keep.holds(*scores, slack=slack)
    error = 3 * (0.05 * 0.95 / runs) ** 0.5
    assert passed / runs <= 0.05 + error
    assert passed / runs >= 0.03  # and it is not merely refusing everything
    assert believed / runs > 0.4  # the point estimate passes every other time


def test_slack_moves_the_choice_to_a_smaller_edit():
    keep = Constraint.parse("c/accuracy >= 0.95 * base", ["c"])
    tried = {coef: {"c": {"accuracy": 0.8 - 0.05 * coef}} for coef in (0.0, 0.4, 0.8)}
    assert choose(tried, tried[0.0], [keep], None, "largest").scaling_coef == 0.8
    slack = {(coef, keep.text): 0.01 for coef in tried}
    assert choose(tried, tried[0.0], [keep], None, "largest", slack).scaling_coef == 0.4


def test_train_mode_is_left_as_it_was():
    model = LinearNet()
    model.net.add_module("bn", nn.BatchNorm1d(2))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(trainer(), model, Blobs(1), "val")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
