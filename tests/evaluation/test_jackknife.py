"""Intervals of metrics that are no mean over examples: against formulas written out here, and by simulation."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics.classification import MulticlassF1Score, MulticlassRecallAtFixedPrecision

from tva.evaluation.jackknife import Jackknife, compare_jackknives, jackknife
from tva.evaluation.metrics import FunctionMetric, compute, find_metric, has_ground
from tva.evaluation.result import Evaluation


def predictions(generator, num, separation=1.2, classes=3):
    labels = generator.integers(classes, size=num)
    logits = generator.normal(size=(num, classes))
    logits[np.arange(num), labels] += separation
    return torch.from_numpy(logits * separation).softmax(-1), torch.from_numpy(labels)


def evaluated(name, preds, target):
    metric = find_metric(name, preds.shape[-1])
    value = float(compute(metric, preds, target))
    return Evaluation({name: value}, len(target), preds=preds, target=target, extra={name: metric})


def test_a_calibration_error_has_no_interval_for_a_bootstrap_does_not_see_its_bias():
    generator = np.random.default_rng(0)
    found = [evaluated("calibration_error", *predictions(generator, num)) for num in (50, 200) for _ in range(3)]
    assert [each.interval("calibration_error") for each in found] == [None] * 6
    compared = found[0].compare(found[1], "calibration_error")
    assert (compared.difference_low, compared.ratio_low) == (None, None)
    assert compared.difference == pytest.approx(
        found[0].metrics["calibration_error"] - found[1].metrics["calibration_error"]
    )


def test_what_is_left_out_is_one_example_or_a_200th_or_a_group():
    seen = []
    jackknife(0.5, lambda rows: seen.append(rows) or 0.5, 60)
    assert sorted(min(set(range(60)) - set(rows)) for rows in seen[:60]) == list(range(60))
    assert {len(rows) for rows in seen[:60]} == {59}
    assert all(len(one) + len(other) == 60 for one, other in zip(seen[60::2], seen[61::2], strict=True))
    seen.clear()
    jackknife(0.5, lambda rows: seen.append(rows) or 0.5, 500)
    assert {len(rows) for rows in seen[:200]} == {497, 498}
    groups = np.repeat(np.arange(70), 3)
    seen.clear()
    jackknife(0.5, lambda rows: seen.append(rows) or 0.5, 210, groups=groups)
    assert all(len(rows) == 207 and len(set(groups[rows])) == 69 for rows in seen[:70])


def test_the_interval_of_a_mean_by_the_jackknife_is_that_of_its_standard_error():
    scores = np.random.default_rng(0).normal(3, 1, 100)
    found = jackknife(float(scores.mean()), lambda rows: float(scores[rows].mean()), 100)
    half = stats.t.ppf(0.975, 99) * scores.std(ddof=1) / 10
    assert found.interval() == pytest.approx((scores.mean() - half, scores.mean() + half))
    right = np.arange(100) < 80  # of a share, on the scale of the logit
    found = jackknife(0.8, lambda rows: float(right[rows].mean()), 100)
    half = 1.96 * (0.8 * 0.2 / 99) ** 0.5 / (0.8 * 0.2)
    expected = [1 / (1 + math.exp(-step) / 4) for step in (-half, half)]
    assert found.interval() == pytest.approx(expected, abs=2e-3)  # which is curved


def test_the_standard_error_of_auroc_is_delongs():
    generator = np.random.default_rng(0)
    target, preds = generator.integers(2, size=150), generator.normal(size=150)
    preds = torch.from_numpy(1 / (1 + np.exp(-preds - target)))
    positive, negative = preds[target == 1].numpy(), preds[target == 0].numpy()
    wins = positive[:, None] > negative[None]
    error = (wins.mean(1).var(ddof=1) / len(positive) + wins.mean(0).var(ddof=1) / len(negative)) ** 0.5
    from torchmetrics.classification import BinaryAUROC

    metric, labels = BinaryAUROC(), torch.from_numpy(target)
    found = Evaluation({"auroc": wins.mean()}, 150, preds=preds, target=labels, extra={"auroc": metric})
    low, high = found.interval("auroc")
    width = np.log(high / (1 - high)) - np.log(low / (1 - low))
    assert width / (2 * 1.96) == pytest.approx(error / (wins.mean() * (1 - wins.mean())), rel=0.02)


def test_metrics_of_predictions_have_no_interval_where_it_would_not_cover():
    without = 0.8 + 0.001 * np.random.default_rng(0).normal(size=200)
    assert Jackknife(0.8, without, 0.8, enough=True).interval() is not None
    assert Jackknife(0.8, without, 0.8, enough=False).interval() is None
    assert Jackknife(0.8, without, 0.806, enough=True).interval() is None  # biased
    assert Jackknife(1.0, np.append(without, 1.0), 1.0, enough=True).interval() is None
    assert Jackknife(0.8, np.full(200, 0.8), 0.8, enough=True).interval() is None  # no spread
    assert Jackknife(math.nan, without, math.nan, enough=True).interval() is None
    for labels, enough in (([53, 7], False), ([52, 8], True), ([49], False)):
        labels = np.repeat(np.arange(len(labels)), labels)
        assert jackknife(0.5, lambda rows: 0.5, len(labels), labels).enough is enough


def test_a_metric_of_ones_own_has_no_interval_unless_it_says_so():
    def spread(preds, target):  # the best class's accuracy minus the worst's
        right = torch.stack([(preds.argmax(dim=1)[target == c] == c).double().mean() for c in range(3)])
        return right.max() - right.min()

    class Own(MulticlassF1Score):  # which may compute anything
        pass

    preds, target = predictions(np.random.default_rng(3), 200)  # true is 0, and halves do not show the bias here
    for metric in (FunctionMetric(spread), Own(num_classes=3)):
        found = evaluation(metric, preds, target)
        assert found.interval("own") is None
        assert found.compare(evaluation(metric, preds.flip(1), target), "own").difference_low is None
    f1.has_interval = False
    try:
        assert evaluation(FunctionMetric(f1), preds, target).interval("own") is None
    finally:
        f1.has_interval = True
    assert evaluation(FunctionMetric(f1), preds, target).interval("own") is not None
    fixed = MulticlassRecallAtFixedPrecision(num_classes=3, min_precision=0.5)
    assert not has_ground(fixed)
    assert has_ground(find_metric("text_f1:yes", 0))


def evaluation(metric, preds, target):
    own = {"own": float(compute(metric, preds, target))}
    return Evaluation(own, len(target), preds=preds, target=target, extra={"own": metric})


def test_a_paired_comparison_is_narrower_than_two_intervals_and_of_the_same_predictions_there_is_none():
    generator = np.random.default_rng(0)
    preds, target = predictions(generator, 300)
    worse = (preds + 0.2 * torch.from_numpy(generator.random(preds.shape))) / (1 + 0.2 * 3 / 2)
    base, edited = evaluated("f1_score", preds, target), evaluated("f1_score", worse, target)
    found = edited.compare(base, "f1_score")
    ours, theirs = edited.interval("f1_score"), base.interval("f1_score")
    alone = math.hypot(ours[1] - ours[0], theirs[1] - theirs[0])
    assert found.difference_high - found.difference_low < 0.7 * alone
    assert found.difference_low < found.difference < found.difference_high
    assert found.ratio_low < found.ratio < found.ratio_high
    same = base.compare(base, "f1_score")
    assert (same.difference, same.difference_low, same.ratio_high) == (0, None, None)
    wide = [Jackknife(v, v + s * np.arange(-1, 2) / 100, v, enough=True) for v, s in ((5.0, 1), (4.0, 2))]
    half = stats.t.ppf(0.975, 2) * (2 * np.var([-0.01, 0, 0.01])) ** 0.5  # no shares: the jackknife's own
    found = compare_jackknives(*wide)
    assert (found.difference_low, found.difference_high) == pytest.approx((1 - half, 1 + half))
    assert found.ratio_low < 1.25 < found.ratio_high


def f1(preds, target):
    """Return the mean F1 of the classes."""
    classes = preds.shape[1]
    cells = torch.bincount(target * classes + preds.argmax(1), minlength=classes**2).view(classes, classes)
    return (2 * cells.diagonal() / (cells.sum(0) + cells.sum(1))).mean()


f1.has_interval = True


@pytest.mark.slow
@pytest.mark.parametrize("num", [50, 200, 1000])
def test_intervals_of_f1_and_of_its_difference_and_ratio_cover_them_19_times_in_20(num):
    generator, runs, metric = np.random.default_rng(0), 300, FunctionMetric(f1)

    def both(count):
        preds, target = predictions(generator, count)
        other = (preds + 0.3 * torch.from_numpy(generator.random(preds.shape))) / (1 + 0.45)
        values = float(f1(preds, target)), float(f1(other, target))
        return [
            Evaluation({"f1": value}, count, preds=side, target=target, extra={"f1": metric})
            for value, side in zip(values, (preds, other), strict=True)
        ]

    assert both(200)[0].metrics["f1"] == pytest.approx(
        evaluated("f1_score", *predictions(generator, 200)).metrics["f1_score"], abs=0.2
    )
    base, edited = (each.metrics["f1"] for each in both(200_000))
    covered = []
    for _ in range(runs):
        ours, theirs = both(num)
        ends, found = ours.interval("f1"), theirs.compare(ours, "f1")
        if ends is None or found.difference_low is None:
            continue
        covered.append(
            [
                ends[0] <= base <= ends[1],
                found.difference_low <= edited - base <= found.difference_high,
                found.ratio_low <= edited / base <= found.ratio_high,
            ]
        )
    assert len(covered) > 0.8 * runs
    assert (np.mean(covered, axis=0) > 0.95 - 3 * (0.05 * 0.95 / len(covered)) ** 0.5).all()
