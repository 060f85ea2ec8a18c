"""Examples that choice and proof share, and accuracy below chance, on modules that know nothing of tva."""

import lightning as L
import numpy as np
import pytest
import torch
from small_models import Blobs, LinearNet, quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from tva.evaluation.evaluate import evaluate
from tva.evaluation.leaks import (
    SAMPLE,
    chance_accuracy,
    check_shared,
    num_shared,
    num_trained_on,
    row_digests,
    sample_rows,
)
from tva.evaluation.result import Evaluation


class Splits(L.LightningDataModule):
    """Validation and test data from given rows."""

    def __init__(self, val, test):
        super().__init__()
        self.val, self.test = val, test

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.val, torch.zeros(len(self.val), dtype=torch.int64)), batch_size=32)

    def test_dataloader(self):
        return DataLoader(TensorDataset(self.test, torch.zeros(len(self.test), dtype=torch.int64)), batch_size=20)


def trainer():
    return quiet_trainer()


def both(val, test):
    data = Splits(val, test)
    found = [evaluate(trainer(), LinearNet(), data, split) for split in ("val", "test")]
    return {"a": found[0]}, {"a": found[1]}


def rows(seed, num=200):
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(seed))


def test_the_same_data_for_choice_and_proof_is_refused():
    val, test = both(rows(0), rows(0))
    with pytest.raises(ValueError, match=r"of the 200 test examples of a 200 are among its .*allow_shared_examples"):
        check_shared(val, test)
    assert check_shared(val, test, allowed=True) == {"a": 200}


def test_half_of_the_test_data_from_validation_is_refused_in_any_order():
    mixed = torch.cat([rows(1, 100), rows(0)[::2]])[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    val, test = both(rows(0), mixed)
    assert num_shared(val["a"], test["a"]) == 100
    with pytest.raises(ValueError, match="of the 200 test examples of a 100 are among its validation examples"):
        check_shared(val, test)


def test_some_copies_as_real_data_has_them_are_counted():
    val, test = both(rows(0), torch.cat([rows(1, 195), rows(0)[:5]]))
    assert check_shared(val, test) == {"a": 5}
    assert check_shared(*both(rows(0), rows(1))) == {}


def test_inputs_that_do_not_tell_examples_apart_are_not_counted():
    generator = torch.Generator().manual_seed(0)
    planted = [torch.randint(0, 2, (200, 4), generator=generator).float() for _ in range(2)]
    assert check_shared(*both(*planted)) == {}


def test_a_task_without_example_digests_is_not_checked():
    known = Evaluation({"accuracy": 0.5}, 3, row_digests=np.arange(3))
    unknown = Evaluation({"accuracy": 0.5}, 3)
    assert num_shared(known, unknown) is None
    assert check_shared({"a": unknown}, {"a": known}) == {}
    assert check_shared({"a": known}, {"b": known}) == {}


def test_tokens_are_the_same_example_whatever_the_padding():
    narrow = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    wide = {"input_ids": torch.tensor([[5, 6, 0, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0, 0, 0]])}
    other = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 1]])}
    assert row_digests(narrow) == row_digests(wide) != row_digests(other)


def test_token_ids_are_the_same_example_however_long_their_padding():
    narrow, wide = torch.tensor([[5, 6, -1], [7, -1, -1]]), torch.tensor([[5, 6, -1, -1], [7, -1, -1, -1]])
    assert row_digests((narrow, 0)) == row_digests((wide, 0)) == row_digests({"tokens": wide, "targets": wide})
    assert row_digests((torch.tensor([[5, 6]]), 0)) == row_digests((narrow, 0))[:1]
    assert len({*row_digests((wide, 0)), *row_digests((torch.tensor([[5, 7, -1]]), 0))}) == 3


class Sampled:
    """A data module of given training rows that can be sampled."""

    def __init__(self, rows):
        self.rows = rows

    def training_sample(self, most):
        order = np.random.default_rng(0).permutation(len(self.rows))[:most]
        return len(self.rows), ((self.rows[part], 0) for part in np.array_split(order, 5))


def test_examples_that_were_trained_on_are_counted_exactly_of_few_and_estimated_of_many():
    few, many = rows(0, 300), rows(1, 30_000)

    def evaluated(inputs):
        return Evaluation({}, len(inputs), row_digests=np.array(row_digests(inputs), dtype=np.uint64))

    assert num_trained_on(*sample_rows(Sampled(few)), evaluated(torch.cat([few[:37], rows(2, 100)]))) == 37
    num_examples, sample = sample_rows(Sampled(many))
    assert (num_examples, len(sample)) == (30_000, 16 * SAMPLE)
    found = num_trained_on(num_examples, sample, evaluated(torch.cat([many[:4000], rows(2, 2000)])))
    assert found == pytest.approx(4000, rel=0.35)  # of 137 in the sample: four standard deviations
    assert num_trained_on(num_examples, sample, evaluated(rows(2, 2000))) == 0
    assert num_trained_on(num_examples, sample, Evaluation({}, 3)) is None
    assert sample_rows(object()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
def test_rows_of_any_dtype_are_hashed(dtype):
    images = (torch.arange(24).reshape(3, 2, 4) % 5).to(dtype)
    found = row_digests((images, torch.zeros(3)))
    assert len(found) == 3
    assert row_digests((images[1:2], torch.ones(1))) == found[1:2]
    assert row_digests(torch.arange(3)) != row_digests(torch.arange(1, 4))
    assert row_digests(["text"]) == []


def test_chance_is_what_predictions_would_score_if_they_did_not_depend_on_the_input():
    def evaluation(predicted, labels=None):
        return Evaluation({"accuracy": 0.0}, 100, predicted=np.array(predicted), labels=labels)

    labels = np.arange(100) % 2
    base = evaluation(labels, labels)
    inverted = evaluation(1 - labels)
    assert chance_accuracy(inverted, base) == pytest.approx(0.5)
    always = evaluation(np.zeros(100, dtype=int))
    assert chance_accuracy(always, base) == pytest.approx(0.5)
    rare = (np.arange(100) < 10).astype(int)
    assert chance_accuracy(evaluation(np.ones(100, dtype=int)), evaluation(rare, rare)) == pytest.approx(0.1)
    drawn = np.random.default_rng(0).integers(4, size=100)
    shuffled = [np.random.default_rng(seed).permutation(drawn) == labels for seed in range(4000)]
    assert chance_accuracy(evaluation(drawn), base) == pytest.approx(np.mean(shuffled), abs=0.002)
    assert chance_accuracy(evaluation(drawn), Evaluation({"accuracy": 0.5}, 100)) is None


def test_labels_are_kept_where_a_step_returns_them():
    class Predicting(LinearNet):
        def test_step(self, batch, batch_idx):
            super().test_step(batch, batch_idx)
            return {"preds": self(batch[0]), "target": batch[1]}

    found = evaluate(trainer(), Predicting(), Blobs(1), "test")
    assert found.labels.tolist() == (torch.arange(60) % 2).tolist()
    assert chance_accuracy(found, found) == pytest.approx(0.5)


def test_pairs_have_one_digest_whatever_the_padding():
    short = torch.tensor([[[5, 6], [7, -1]]])
    padded = torch.tensor([[[5, 6, -1], [7, -1, -1]], [[5, -1, -1], [7, 8, 9]]])
    one, other = row_digests((padded, torch.zeros(2)))
    assert row_digests((short, torch.zeros(1))) == [one] != [other]
