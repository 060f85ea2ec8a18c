"""Groups of examples as the unit of intervals and the gate: by simulation, and through tasks and an edit."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
from scipy import stats
from small_text import make_tokenizer

from tva.data import LanguageTask, TableTask
from tva.data.language_task import owners_of
from tva.edit import notes
from tva.evaluation.bounds import clears, slack
from tva.evaluation.evaluate import groups_of
from tva.evaluation.intervals import by_group, compare, mean_interval, mean_ratio_interval, quick_interval
from tva.evaluation.result import Evaluation


def documents(generator, num, kept=1.0, gained=0.0):
    """Draw right and wrong answers to 5 to 20 blocks of documents, alike within one; and those of an edited model."""
    sizes = generator.integers(5, 21, size=num)
    groups = np.repeat(np.arange(num), sizes)
    easy = generator.beta(4, 1, size=num)[groups]  # 0.8 on average
    base = generator.random(len(groups)) < easy
    survives = (generator.random(num) < kept)[groups]  # a document is kept or lost as a whole
    return np.where(base, survives, generator.random(len(groups)) < gained), base, groups


def test_one_value_a_group_has_the_mean_of_all_and_is_the_groups_mean_where_sizes_are_equal():
    generator = np.random.default_rng(0)
    scores, groups = generator.normal(size=60), np.repeat([7, 3, 9], 20)
    assert by_group(scores, groups) == pytest.approx([scores[groups == label].mean() for label in (3, 7, 9)])
    _, scores, groups = documents(generator, 30)
    values = by_group(scores, groups)
    assert values.shape == (30,)
    assert values.mean() == pytest.approx(scores.mean())
    sizes, sums = np.bincount(groups), np.bincount(groups, weights=scores)  # Cochran's variance of a ratio
    variance = ((sums - scores.mean() * sizes) ** 2).sum() / 29 / 30 / sizes.mean() ** 2
    assert values.var(ddof=1) / 30 == pytest.approx(variance)


def test_groups_of_one_example_change_nothing_but_the_order():
    generator = np.random.default_rng(1)
    scores, base = generator.exponential(size=80), generator.exponential(size=80)
    singles = np.arange(80)
    assert mean_interval(scores, groups=singles) == pytest.approx(mean_interval(scores))
    assert quick_interval(scores, groups=singles) == pytest.approx(quick_interval(scores))
    assert vars(compare(scores, base, groups=singles)) == pytest.approx(vars(compare(scores, base)))
    for guard in (True, False):
        ours, theirs = (slack(scores, base, 1.05, 0.95, False, guard, groups=found) for found in (singles, None))
        assert ours == pytest.approx(theirs)


@pytest.mark.slow
def test_intervals_of_groups_cover_where_those_of_examples_do_not():
    generator, runs, covered, alone = np.random.default_rng(0), 200, np.zeros(3), np.zeros(3)
    true = 0.8, 0.8 * -0.1, 0.9
    for _ in range(runs):
        edited, base, groups = documents(generator, 60, kept=0.9)
        for counts, given in ((covered, groups), (alone, None)):
            found = compare(edited, base, groups=given)
            ends = (
                quick_interval(base, groups=given),
                (found.difference_low, found.difference_high),
                (found.ratio_low, found.ratio_high),
            )
            counts += [low <= value <= high for (low, high), value in zip(ends, true, strict=True)]
    assert (covered / runs > 0.91).all()
    assert (alone / runs < 0.75).all()


def test_an_edit_at_its_bound_passes_at_most_as_often_as_the_confidence_says_where_groups_are_lost_whole():
    generator, passed, alone = np.random.default_rng(0), 0, 0
    for _ in range(300):
        edited, base, groups = documents(generator, 150, kept=0.95)
        passed += clears(edited, base, 0.95, 0.0, 0.95, groups=groups)
        alone += clears(edited, base, 0.95, 0.0, 0.95)
    assert passed / 300 <= stats.binom.ppf(0.99, 300, 0.05) / 300
    assert alone / 300 > 0.15


def test_one_group_shows_nothing():
    right = np.ones(200, dtype=bool)
    assert slack(right, right, 0.95, 0.95, groups=np.zeros(200)) == math.inf
    assert not clears(right, right, 0.95, 0.0, 0.95, groups=np.repeat([0, 1], 100))
    assert clears(right, right, 0.95, 0.0, 0.95, groups=np.repeat(np.arange(100), 2))
    evaluation = Evaluation({"accuracy": 1.0}, 200, {"accuracy": right}, groups=np.zeros(200))
    assert evaluation.compare(evaluation, "accuracy") is None


def test_metrics_of_predictions_are_resampled_by_group():
    import torch

    from tva.evaluation.metrics import compute, find_metric

    generator, metric = np.random.default_rng(0), find_metric("f1_score", 2)
    target = torch.from_numpy(np.repeat(generator.integers(2, size=60), 5))
    wrong = torch.from_numpy(np.repeat(generator.random(60) < 0.2, 5))
    preds, target = torch.where(wrong, 1 - target, target), target
    value = float(compute(metric, preds, target))
    widths = []
    for groups in (None, np.repeat(np.arange(60), 5)):
        given = {"preds": preds, "target": target, "extra": {"f1_score": metric}, "groups": groups}
        low, high = Evaluation({"f1_score": value}, 300, **given).interval("f1_score")
        widths.append(high - low)
    assert widths[1] > 1.8 * widths[0]


def test_a_column_of_a_table_groups_its_examples(tmp_path):
    speakers = [f"s{row // 3}" for row in range(12)]
    table = pandas.DataFrame({"text": ["a"] * 12, "label": [0, 1] * 6, "speaker": speakers})
    for split in ("train", "val", "test"):
        table.to_csv(f"t-{split}.csv", index=False)

    def ready(**options):
        task = TableTask({split: f"{tmp_path}/t-{split}.csv" for split in ("train", "val", "test")}, **options)
        task._select_parts(generates=False)
        return task

    assert groups_of(ready(group="speaker"), "test", 12).tolist() == [row // 3 for row in range(12)]
    assert groups_of(ready(group="speaker", limit_test=5), "test", 5).max() <= 3
    assert groups_of(ready(), "test", 12) is None
    assert groups_of(ready(group="speaker"), "test", 6).tolist() == [0, 0, 0, 1, 1, 1]  # fewer batches
    with pytest.raises(ValueError, match=r"has no column 'sign'; its columns are .*'speaker'. Set group"):
        ready(group="sign")
    with pytest.raises(ValueError, match=r"groups are not known beforehand. Leave group or streaming out"):
        TableTask("x.csv", group="speaker", streaming=True)
    with pytest.raises(ValueError, match=r"must return a label for each of the 13 examples of its loader; found 12"):
        groups_of(ready(group="speaker"), "test", 13)


def speakers(folder, sizes):
    labels = np.random.default_rng(1).permutation(np.repeat([f"s{number}" for number in range(len(sizes))], sizes))
    table = {"text": ["a"] * len(labels), "label": np.arange(len(labels)) % 2, "speaker": labels}
    pandas.DataFrame(table).to_csv(folder / "all.csv", index=False)
    return f"{folder}/all.csv"


@pytest.mark.parametrize("how", [{"val_size": 20}, {}, {"split_fractions": {"val": 0.2, "test": 0.3}}])
def test_a_group_is_never_trained_on_and_evaluated(how):
    path = speakers(Path(), [3, 9, 5, 1, 12, 7, 8, 4, 6, 5, 10, 2, 6, 9, 13])  # 100 rows
    for seed in range(5):
        given = path if how.get("split_fractions") else {"train": path, "test": path}
        task = TableTask(given, group="speaker", seed=seed, **how)
        parts = {part: set(table["speaker"]) for part, table in task._select_parts(generates=False).items()}
        sizes = {part: len(table) for part, table in task._select_parts(generates=False).items()}
        assert not parts["train"] & parts["val"]
        assert len(parts["train"] | parts["val"] | parts["test"]) == 15
        if how.get("split_fractions"):
            assert not parts["test"] & (parts["train"] | parts["val"])
            assert sum(sizes.values()) == 100
            assert 8 <= sizes["val"] <= 33
        else:  # whole groups until there are enough
            assert sum(sizes[part] for part in ("train", "val")) == 100
            assert how.get("val_size", 10) <= sizes["val"] < how.get("val_size", 10) + 13


def test_one_group_cannot_be_held_out_and_few_groups_have_no_interval_and_a_note():
    path = speakers(Path(), [30])
    with pytest.raises(
        ValueError, match="all training examples are of one group of 'speaker', s0, and .* Set val_split"
    ):
        TableTask({"train": path, "test": path}, group="speaker")._select_parts(generates=False)
    groups = np.repeat(np.arange(19), 5)
    few = Evaluation({"accuracy": 0.5}, 95, {"accuracy": np.arange(95) % 2 == 0}, groups=groups)
    assert few.interval("accuracy") is None
    many = Evaluation({"accuracy": 0.5}, 95, {"accuracy": np.arange(95) % 2 == 0}, groups=np.arange(95) // 4)
    assert many.interval("accuracy") is not None
    of_base = {("a", "test"): few, ("a", "val"): few, ("b", "test"): many}
    session = SimpleNamespace(evaluator=SimpleNamespace(of_base=lambda: of_base))
    (note,) = notes._few_groups(SimpleNamespace(split="test", session=session))
    assert note.startswith("The test examples of a are of 19 groups. Below 20 no interval covers")


def test_a_few_large_groups_count_for_few_and_have_no_interval():
    sizes = np.array([400, 300, 200] + [5] * 60)
    groups, generator = np.repeat(np.arange(len(sizes)), sizes), np.random.default_rng(0)
    right, base = generator.random(len(groups)) < 0.8, generator.random(len(groups)) < 0.8
    found = Evaluation({"accuracy": right.mean()}, len(groups), {"accuracy": right}, groups=groups)
    assert found.effective_groups == pytest.approx(1200**2 / (400**2 + 300**2 + 200**2 + 60 * 25))
    assert found.interval("accuracy") is None
    assert found.quick_interval("accuracy") is None
    compared = found.compare(Evaluation({"accuracy": 0.8}, len(groups), {"accuracy": base}, groups=groups), "accuracy")
    assert (compared.difference_low, compared.ratio_high) == (None, None)
    change, numbers = right.astype(float) - base, np.arange(len(sizes))
    without = np.array([change[groups != left_out].mean() for left_out in numbers])
    t = abs(change.mean()) / ((len(sizes) - 1) * without.var()) ** 0.5
    assert compared.p_value == pytest.approx(2 * stats.t.sf(t, found.effective_groups - 1))
    assert mean_ratio_interval([(right, base, groups)]) is None
    session = SimpleNamespace(evaluator=SimpleNamespace(of_base=lambda: {("a", "test"): found}))
    (note,) = notes._few_groups(SimpleNamespace(split="test", session=session))
    assert "of 63 groups, of sizes that make them count as 4.9. Below 20" in note
    equal = slack(right, base, 0.9, 0.95, groups=np.arange(1200) // 20, guard=False)  # 60 groups of one size
    assert slack(right, base, 0.9, 0.95, groups=groups, guard=False) > equal


@pytest.mark.parametrize("num", [2, 5, 19])
def test_fewer_than_20_groups_of_unequal_sizes_have_a_p_value_and_no_interval(num):
    groups, draw = np.repeat(np.arange(num), np.arange(1, num + 1)), np.random.default_rng(0)
    base = draw.gamma(4, size=len(groups))
    found = compare(base + draw.normal(0.5, 1, len(base)), base, groups=groups)
    assert found.difference > 0
    assert 0 < found.p_value < 1
    assert {found.difference_low, found.difference_high, found.ratio_low, found.ratio_high} == {None}


@pytest.mark.parametrize(("sizes", "least"), [("lognormal", 0.9), ("uniform", 0.92)])
def test_intervals_of_unequal_groups_cover(sizes, least):
    generator, inside, given = np.random.default_rng(1), 0, 0
    for _ in range(400):
        if sizes == "lognormal":
            counts = np.ceil(generator.lognormal(1, 1, 60)).astype(int)
        else:
            counts = generator.integers(1, 20, 60)
        groups = np.repeat(np.arange(60), counts)
        scores = generator.normal(0, 0.6, 60)[groups] + generator.normal(0, 0.8, len(groups))
        found = quick_interval(scores, groups=groups)
        given += found is not None
        inside += found is not None and found[0] <= 0 <= found[1]
    assert given > 300
    assert inside / given >= least  # 94 to 95% of 2,500 runs


@pytest.mark.parametrize("column", [None, "article"])
def test_a_language_task_takes_documents_as_the_unit(column):
    rows = {"text": ["the film was good " * 12] * 9, "article": ["a", "a", "b", "b", "b", "c", "c", "d", "d"]}
    paths = {split: f"{split}.csv" for split in ("train", "val", "test")}
    for path in paths.values():
        pandas.DataFrame(rows).to_csv(path, index=False)
    task = LanguageTask(paths, block_length=16, val_split="val", group=column, limit_test=20)
    task.trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=make_tokenizer()), world_size=1)
    task.setup()
    count = len(task.test_dataloader().dataset)
    groups = groups_of(task, "test", count)
    assert count == 20
    assert groups.max() + 1 == (9 if column is None else 4)
    assert (np.diff(groups) >= 0).all()  # in the order of the blocks
    assert len(groups_of(task, "val", len(task.val_dataloader().dataset))) > count


@pytest.mark.parametrize("column", [None, "article"])
def test_blocks_that_are_held_out_are_all_those_of_some_documents(tmp_path, column):
    rows = {"text": ["the film was good " * 12] * 9, "article": ["a", "a", "b", "b", "b", "c", "c", "d", "d"]}
    pandas.DataFrame(rows).to_csv("t.csv", index=False)
    paths = dict.fromkeys(("train", "test"), f"{tmp_path}/t.csv")
    task = LanguageTask(paths, block_length=16, group=column, val_size=2)
    task.trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=make_tokenizer()), world_size=1)
    task.setup()
    held = groups_of(task, "val", len(task.val_dataloader().dataset))
    every = groups_of(task, "test", len(task.test_dataloader().dataset))
    assert len(held) in np.bincount(every)
    assert len(set(held)) == 1


def test_a_document_that_is_more_than_half_of_the_text_is_not_held_out(tmp_path):
    pandas.DataFrame({"text": ["the film was good " * num for num in (12, 400, 12)]}).to_csv("t.csv")
    for seed in range(4):
        task = LanguageTask(dict.fromkeys(("train", "test"), f"{tmp_path}/t.csv"), block_length=16, seed=seed)
        task.trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=make_tokenizer()), world_size=1)
        task.setup()
        assert len(task.val_dataloader().dataset) < 10


def test_blocks_of_one_text_file_are_the_unit(tmp_path):
    Path("prose.txt").write_text("the film was good\n" * 200)
    task = LanguageTask({"train": f"{tmp_path}/prose.txt", "test": f"{tmp_path}/prose.txt"}, block_length=16)
    task.trainer = SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=make_tokenizer()), world_size=1)
    task.setup()
    assert len(task.test_dataloader().dataset) >= 20
    for split, loader in (("val", task.val_dataloader()), ("test", task.test_dataloader())):
        assert groups_of(task, split, len(loader.dataset)) is None


def test_blocks_of_running_text_are_of_the_document_that_most_of_them_is_from():
    assert owners_of(np.array([4, 4, 2]), [3, 6, 7], 4).tolist() == [4, 4, 2, 2]  # two rows of one document
    assert owners_of(np.arange(3), [2, 2, 9], 4).tolist() == [0, 2, 2]
    assert not len(owners_of(np.arange(0), [], 4))
