"""tva data check: a copy of a named set against what the paper's code reads."""

from pathlib import Path

import datasets
import pytest
from PIL import Image

from tva.cli.main import main
from tva.data import check
from tva.data.check import EXAMPLES, check_data
from tva.data.presets import PRESETS, list_presets


@pytest.fixture
def small(monkeypatch):
    """Sizes that a test can write."""
    monkeypatch.setitem(EXAMPLES, "mnist", (20, 10))
    monkeypatch.setitem(EXAMPLES, "dtd", (20, 10))


def write(folder, train, test, classes=10, label="label"):
    features = datasets.Features({"image": datasets.Image(), label: datasets.Value("int64")})
    for split, shades in (("train", train), ("test", test)):
        rows = {"image": [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in shades]}
        rows[label] = [at % classes for at in range(len(shades))]
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder / "{split}.parquet")


def test_the_sets_of_the_paper_have_sizes():
    assert set(EXAMPLES) == set(list_presets(8))
    assert sum(EXAMPLES["dtd"]) == 5_640  # the 47 classes have 120 images each
    assert EXAMPLES.keys() <= PRESETS.keys()


def test_a_copy_of_the_right_size_without_a_leak_passes(small, capsys):
    main(["data", "check", "mnist", "--path", write(Path(), range(20), range(100, 110))])
    assert "share no image" in capsys.readouterr().out


def test_test_images_in_the_training_split_are_counted(small, capsys):
    path = write(Path(), range(20), range(17, 27))
    assert check_data("mnist", path).shared == 3
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", "preset:mnist", "--path", path])
    assert stop.value.code == 1
    assert "3 of 10 test images are in the training split too" in " ".join(capsys.readouterr().out.split())


def test_sizes_columns_and_classes_are_named(small):
    found = check_data("mnist", write(Path(), range(12), range(100, 110)))
    assert found.problems == ["train has 12 examples, where the paper's code has 20"]
    found = check_data("mnist", write(Path(), range(20), range(100, 110), label="digit"))
    assert "test lacks 'label'; its columns are 'image', 'digit'" in found.problems
    found = check_data("mnist", write(Path(), range(20), range(100, 110), classes=10))
    assert not found.problems
    Path("test.parquet").unlink()
    assert "there is no split 'test'; the splits are 'train'" in check_data("mnist", "{split}.parquet").problems


def test_the_leak_of_dtd_is_named(small):
    found = check_data("dtd", write(Path(), range(20), range(100, 110)))
    assert "training part holds test images" in found.notes[0]


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="no preset is named 'mnits'"):
        check_data("mnits", ".")
    with pytest.raises(FileNotFoundError, match="A copy of dtd was expected at"):
        check.check_data("dtd", "nowhere")
