"""Tables of every kind as tasks: columns, splits, classes and metrics, and a newcomer's mistakes."""

from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from small_text import make_tokenizer, reviews

from tva.data import TableTask
from tva.data.task import Task

NAMES = ["negative", "positive"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    found = reviews(40)
    table = pandas.DataFrame({"text": found["text"], "label": [NAMES[label] for label in found["label"]]})
    table["number"] = found["label"]
    table["value"] = np.arange(40) / 40
    table["part"] = ["train"] * 20 + ["dev"] * 10 + ["test"] * 10
    table["other"] = found["text"][::-1]
    table.to_csv(folder / "table.csv", index=False)
    table.to_csv(folder / "table.tsv", index=False, sep="\t")
    table.to_parquet(folder / "table.parquet")
    table.to_json(folder / "table.jsonl", orient="records", lines=True)
    for name in ("train", "validation", "test"):
        table.to_csv(folder / f"part-{name}.csv", index=False)
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (9, 4, 4, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"images/{index}.png")
    files = [f"images/{index}.png" for index in range(9)]
    pandas.DataFrame({"file": files, "label": np.arange(9) % 3}).to_csv(folder / "images.csv", index=False)
    return folder


def model(**options):
    return SimpleNamespace(**{"tokenizer": make_tokenizer(), "max_length": 64, "label_names": NAMES, **options})


def ready(task, **options):
    task.trainer = SimpleNamespace(lightning_module=model(**options), world_size=1, global_rank=0)
    task.setup()
    return task


def batches(loader):
    inputs, targets = zip(*loader, strict=True)
    return list(inputs), torch.cat(targets)


@pytest.mark.parametrize("name", ["table.csv", "table.tsv", "table.parquet", "table.jsonl"])
def test_a_file_of_any_format_is_split_by_a_column(folder, name):
    task = ready(TableTask(str(folder / name), split_column="part", batch_size=20))
    assert [len(batches(loader())[1]) for loader in (task.val_dataloader, task.test_dataloader)] == [10, 10]
    (tokens,), labels = batches(task.val_dataloader())
    assert labels.tolist() == reviews(40)["label"][20:30]
    text = reviews(40)["text"][20]
    assert tokens[0][tokens[0] >= 0].tolist() == make_tokenizer()(text)["input_ids"]


def test_fractions_are_drawn_by_the_seed_and_share_no_row(folder):
    def drawn(seed):
        options = {"split_fractions": {"val": 0.25, "test": 0.25}, "target_column": "value", "batch_size": 40}
        task = ready(TableTask(str(folder / "table.csv"), seed=seed, **options))
        loaders = (task.train_dataloader(), task.val_dataloader(), task.test_dataloader())
        return [sorted(batches(loader)[1].tolist()) for loader in loaders]

    train, val, test = drawn(0)
    assert (len(train), len(val), len(test)) == (20, 10, 10)
    assert sorted(train + val + test) == pytest.approx((np.arange(40) / 40).tolist())
    assert drawn(0) == [train, val, test] != drawn(1)


@pytest.mark.parametrize("kind", ["pattern", "mapping"])
def test_files_are_splits_and_training_data_are_not_needed_to_edit(folder, kind):
    mapping = {name: str(folder / f"part-{name}.csv") for name in ("validation", "test")}
    task = ready(TableTask(mapping if kind == "mapping" else str(folder / "part-{split}.csv")))
    assert len(task.val_dataloader().dataset) == 40
    if kind == "mapping":
        with pytest.raises(ValueError, match="no split 'train' to train on"):
            task._made_for = None
            task.setup("fit")


def test_classes_are_in_the_order_of_the_models_head(folder):
    options = {"split_column": "part", "batch_size": 40}
    labels = torch.tensor(reviews(40)["label"][30:])
    for head, expected in ((NAMES, labels), (["Positive", "Negative"], 1 - labels)):
        task = ready(TableTask(str(folder / "table.csv"), **options), label_names=head)
        assert batches(task.test_dataloader())[1].tolist() == expected.tolist()
    task = ready(TableTask(str(folder / "table.csv"), class_names=NAMES[::-1], **options), label_names=None)
    assert batches(task.test_dataloader())[1].tolist() == (1 - labels).tolist()
    task = ready(TableTask(str(folder / "table.csv"), label_column="number", **options), label_names=None)
    assert batches(task.test_dataloader())[1].tolist() == labels.tolist()


def test_class_indices_that_the_table_names_mean_these_names(folder):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
    found = datasets.Dataset.from_dict(reviews(10), features=features)
    found.to_parquet("named.parquet")
    options = {"split_fractions": {"test": 0.5}, "batch_size": 10}
    same, other = (
        batches(ready(TableTask("named.parquet", **options), label_names=head).test_dataloader())[1]
        for head in (NAMES, NAMES[::-1])
    )
    assert same.tolist() == (1 - other).tolist()


def test_a_pair_is_one_text_with_types_or_two_apart(folder):
    options = {"text_column": ["text", "other"], "target_column": "value", "split_column": "part", "batch_size": 3}
    texts = reviews(40)["text"]
    (inputs, *_), values = batches(ready(TableTask(str(folder / "table.csv"), **options)).test_dataloader())
    expected = make_tokenizer()(texts[30], texts[::-1][30])
    assert inputs[0, 0][inputs[0, 0] >= 0].tolist() == expected["input_ids"]
    assert values.tolist() == pytest.approx([index / 40 for index in range(30, 40)])
    apart = ready(TableTask(str(folder / "table.csv"), **options), encodes_apart=True)
    (inputs, *_), _ = batches(apart.test_dataloader())
    for row, text in zip(inputs[0], (texts[30], texts[::-1][30]), strict=True):
        assert row[row >= 0].tolist() == make_tokenizer()(text)["input_ids"]


def test_image_files_are_relative_to_the_table(folder):
    def transform(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    options = {"image_column": "file", "split_fractions": {"val": 0.3, "test": 0.3}, "batch_size": 9}
    task = ready(TableTask(str(folder / "images.csv"), **options), image_transform=transform, label_names=list("abc"))
    (images,), labels = batches(task.test_dataloader())
    assert (images.shape, len(labels)) == ((3, 3, 4, 4), 3)


PLAIN = {"split_column": "part"}
MISTAKES = {
    "column": ({"text_column": "txt", **PLAIN}, {}, "has no column 'txt'; its columns are .*Set text_column"),
    "label": ({"label_column": "lable", **PLAIN}, {}, "has no column 'lable'.*Set label_column"),
    "split column": ({"split_column": "prt"}, {}, "has no column 'prt'.*Set split_column"),
    "no split": ({}, {}, "has no split 'test'; its splits are 'train'. .*split_column or split_fractions"),
    "test name": ({"test_split": "tset", **PLAIN}, {}, "has no split 'tset'; its splits are 'train', 'dev', 'test'"),
    "names": (PLAIN, {"label_names": ["bad", "good"]}, "those of the model 'bad', 'good'. Pass class_names"),
    "unnamed": (PLAIN, {"label_names": None}, "of the model have no names. Pass class_names"),
    "given": ({"class_names": ["x", "y"], **PLAIN}, {}, "the label 'negative' in 'label' is none of the classes 'x'"),
    "too many": ({"class_names": list("abc"), **PLAIN}, {}, "has 3 classes .* has 2. Use a model with a head"),
    "texts": ({"target_column": "text", **PLAIN}, {}, "'text' must hold numbers.*Classes go into label_column"),
    "numbers": ({"text_column": "value", **PLAIN}, {}, "the column 'value' must hold texts"),
    "no tokenizer": (PLAIN, {"tokenizer": None}, "TableTask needs a model that says how texts reach it"),
    "no image model": ({"image_column": "text", **PLAIN}, {"image_transform": None}, "image files were expected"),
    "little": ({"split_fractions": {"test": 0.001}}, {}, "0.001 of 40 rows for 'test' are none"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_names_what_is_there(folder, name):
    options, given, message = MISTAKES[name]
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        ready(TableTask(str(folder / "table.csv"), **options), **given)


def test_options_that_exclude_each_other_are_refused_at_once():
    for options, message in (
        ({"text_column": "a", "image_column": "b"}, "text_column or image_column, not both"),
        ({"label_column": "a", "target_column": "b"}, "not both"),
        ({"split_column": "a", "split_fractions": {"test": 0.5}}, "not both"),
        ({"split_fractions": {"test": 1.5}}, "at most 1 together"),
        ({"text_column": ["a", "b", "c"]}, "one column, or two for pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            TableTask("table.csv", **options)
    assert isinstance(TableTask("table.csv"), Task)
