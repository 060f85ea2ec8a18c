"""Evaluation and its intervals, against scipy, by simulation, and with modules that know nothing of tva."""

import pytest
import torch
from small_models import Blobs, LinearNet, quiet_trainer
from torch import nn

from tva.evaluation.evaluate import evaluate


def trainer():
    return quiet_trainer()


def test_evaluate_counts_examples_and_reads_each_split():
    model, data = LinearNet(), Blobs(1)
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        inputs, labels = loader.dataset.tensors
        expected = (model(inputs).argmax(-1) == labels).float().mean()
        evaluation = evaluate(trainer(), model, data, split)
        assert evaluation.metrics["accuracy"] == pytest.approx(float(expected))
        assert evaluation.num_examples == 60
        assert not evaluation.scores  # this module does not return it


def test_two_data_modules_in_one_trainer_give_two_results():
    one, model = trainer(), LinearNet()
    first, second = (evaluate(one, model, Blobs(seed), "test").metrics for seed in (1, 2))
    assert first != second
    assert evaluate(one, model, Blobs(1), "test").metrics == first
    assert "log" not in vars(model)
    assert "test_step" not in vars(model)


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


def test_train_mode_is_left_as_it_was():
    model = LinearNet()
    model.net.add_module("bn", nn.BatchNorm1d(2))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(trainer(), model, Blobs(1), "val")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
