"""Metrics of written texts, against scikit-learn and counts by hand; and their intervals."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from tva.evaluation.metrics import find_metric
from tva.evaluation.result import Evaluation
from tva.evaluation.text_metrics import text_f1, text_f1_accuracy, text_matthews, token_f1


@pytest.mark.parametrize("labels", [["yes", "no"], ["a", "b", "c", "not a label"]])
def test_scores_of_labels_are_those_of_scikit_learn(labels):
    random = np.random.default_rng(0)
    target = list(random.choice(labels[:2], 50))
    preds = [text if random.random() < 0.6 else random.choice(labels) for text in target]
    assert text_matthews(preds, target) == pytest.approx(matthews_corrcoef(target, preds))
    f1 = f1_score(target, preds, labels=[labels[0]], average=None)[0]
    assert text_f1(labels[0], preds, target) == pytest.approx(f1)
    expected = (f1 + accuracy_score(target, preds)) / 2
    assert text_f1_accuracy(labels[0], preds, target) == pytest.approx(expected)


def test_one_label_everywhere_is_no_correlation():
    assert text_matthews(["a", "a"], ["a", "b"]) == 0 == matthews_corrcoef(["a", "b"], ["a", "a"])
    assert text_f1("c", ["a"], ["a"]) == 0


def test_words_count_without_case_articles_and_punctuation():
    scores = token_f1(["The Cat, sat!", "", "on a mat", "dog"], ["a cat sat down", "", "mat", "cat"])
    torch.testing.assert_close(scores, torch.tensor([4 / 5, 1.0, 2 / 3, 0.0]))


def test_a_metric_of_texts_is_found_by_name_and_has_an_interval():
    metric = find_metric("text_f1:yes", 0)
    assert metric.higher_is_better
    target = ["yes", "no"] * 30
    preds = ["yes"] * 45 + ["no"] * 15
    value = float(metric.function(preds, target))
    found = Evaluation({"text_f1": value}, 60, preds=preds, target=target, extra={"text_f1": metric})
    low, high = found.interval("text_f1")
    assert low < value < high < 1
    better = Evaluation({"text_f1": 1.0}, 60, preds=target, target=target, extra={"text_f1": metric})
    assert better.compare(found, "text_f1").difference == pytest.approx(1 - value)


def test_a_label_is_needed():
    with pytest.raises(ValueError, match="write text_f1:LABEL"):
        find_metric("text_f1", 0)
