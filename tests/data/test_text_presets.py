"""Named sets of texts: asked for by name, reported on where labels are, and checked on copies."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from small_text import make_tokenizer

from tva.cli.main import main
from tva.data import LanguageTask, TextTask
from tva.data.text_presets import TEXT_PRESETS, find_text_preset

SIZES = {"train": 30, "validation": 8, "test": 6}


def ready(task, kind="bert"):
    model = SimpleNamespace(tokenizer=make_tokenizer(kind=kind), max_length=256, encoder_decoder=False)
    task.trainer = SimpleNamespace(lightning_module=model)
    task.setup("fit")
    return task


def write(folder, names=("1", "2"), sizes=SIZES, column="sentence"):
    features = datasets.Features({column: datasets.Value("string"), "label": datasets.ClassLabel(names=list(names))})
    for number, (split, count) in enumerate(sizes.items()):
        labels = [-1 if split == "test" else row % 2 for row in range(count)]
        rows = {column: [f"film {number} {row} is good" for row in range(count)], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder / "{split}.parquet")


@pytest.fixture
def small(monkeypatch):
    """The hub's SST-2, small and with classes that are only numbered."""
    preset = replace(TEXT_PRESETS["sst2"], examples=SIZES)
    monkeypatch.setitem(TEXT_PRESETS, "sst2", preset)
    path, asked, original = write(Path()), [], datasets.load_dataset

    def load(hub, name=None, revision=None, **options):
        if "/" not in hub:
            return original(hub, name=name, revision=revision, **options)
        asked.append((hub, name, revision))
        files = {split: path.format(split=split) for split in SIZES}
        return {s: datasets.Dataset.from_parquet(f, cache_dir=".") for s, f in files.items()}

    monkeypatch.setattr(datasets, "load_dataset", load)
    return path, asked


def test_a_named_set_is_asked_for_on_the_hub_and_reported_on_where_labels_are(small):
    for make, column in ((TextTask, "text_column"), (LanguageTask, "prompt_column")):
        more = {} if make is TextTask else {"target_column": "label"}
        task = ready(make("preset:sst2", **{column: "sentence"}, **more), "bert" if make is TextTask else "causal")
        assert task.name == "sst2"
        assert [len(task._examples[part]) for part in ("train", "val", "test")] == [27, 3, 8]
    assert set(small[1]) == {("nyu-mll/glue", "sst2", None)}
    assert ready(TextTask("preset:sst2", text_column="sentence")).class_names == ["negative", "positive"]
    _, targets = task._examples["test"][0]
    written = make_tokenizer(kind="causal").decode(targets[targets >= 0])
    assert written  # the word, and not the number, of the class


def test_a_copy_is_checked(small, capsys):
    main(["data", "check", "sst2", "--path", small[0]])
    shown = " ".join(capsys.readouterr().out.split())
    assert "training and test share no text" in shown
    assert "licence, as its page says: other" in shown
    Path("other").mkdir()
    wrong = write(Path("other"), column="phrase", sizes={"train": 30, "validation": 7})
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", "preset:sst2", "--path", wrong])
    assert stop.value.code == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "there is no split 'test'; the splits are 'train', 'validation'" in shown
    assert "validation has 7 examples, where the hub's has 8" in shown
    assert "train lacks 'sentence'; its columns are 'phrase', 'label'" in shown


def test_texts_that_training_and_test_share_are_counted(small, capsys):
    train = datasets.Dataset.from_parquet("train.parquet", cache_dir="cache")
    train.select(range(8)).to_parquet("validation.parquet")
    main(["data", "check", "sst2", "--path", small[0]])
    assert "8 different test texts are in the training split too" in " ".join(capsys.readouterr().out.split())


def test_the_paper_s_sets_are_listed_and_a_mistake_names_them(capsys):
    main(["data", "--wide"])
    shown = capsys.readouterr().out
    assert all(f"preset:{name}" in shown for name in TEXT_PRESETS)
    with pytest.raises(ValueError, match="no preset of texts is named 'sst'; .*sst2"):
        find_text_preset("sst")
    with pytest.raises(ValueError, match="no preset of texts is named 'cola2'"):
        TextTask("preset:cola2")
