"""Presets: columns and class names of the literature's sets, on copies on disk; the real hub path asks by its name."""

import os
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import datasets
import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from small_images import everything, ready

import tva.data
from tva import plugins
from tva.cli.commands.data import run as run_data
from tva.data import ImageTask
from tva.data.loading import resolved_revision
from tva.data.presets import PRESETS, find_preset, list_presets

IMAGES = Path(os.environ.get("TVA_DATA", Path(__file__).parents[3] / "shared" / "data")) / "images"


def write(folder, names, labels, image="image", label="label", splits=("train", "test")):
    """Write a parquet file a split, as a copy of a hub set."""
    feature = datasets.Value("bool") if names == "bool" else datasets.ClassLabel(names=names)
    features = datasets.Features({image: datasets.Image(), label: feature})
    for split in splits:
        rows = {image: [Image.new("RGB", (4, 4), (9 * at, 0, 0)) for at in range(len(labels))], label: labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder / "{split}.parquet")


def test_the_lists_of_the_literature_are_nested():
    assert [len(list_presets(size)) for size in (8, 14, 20)] == [8, 14, 20]
    assert set(list_presets(8)) < set(list_presets(14)) < set(list_presets(20)) == set(PRESETS) - {"imagenet"}
    with pytest.raises(ValueError, match="of 8, 14 and 20; found 9"):
        list_presets(9)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_has_prompts_with_a_place_for_the_class_and_one_name_a_class(name):
    preset = find_preset(name)
    assert preset.templates
    assert all("{}" in template for template in preset.templates)
    assert len(set(preset.templates)) == len(preset.templates)
    if preset.classes is not None:
        assert len(preset.name_classes([], name)) == preset.num_classes


def test_the_hub_is_asked_for_a_presets_repository_and_configuration(monkeypatch):
    asked = []
    files = write(Path(), [str(number) for number in range(10)], list(range(10)))

    def load(path, name=None, revision=None, **options):
        asked.append((path, name))
        return {
            split: datasets.Dataset.from_parquet(files.format(split=split), cache_dir=".")
            for split in ("train", "test")
        }

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = ready("preset:svhn")
    assert asked == [("ufldl-stanford/svhn", "cropped_digits")]
    assert (task.name, task.class_names[3], task.templates) == ("svhn", "3", ['a photo of the number: "{}".'])


def test_the_commit_that_was_read_is_known(monkeypatch):
    commit, files = "0123456789" * 4, write(Path(), [str(number) for number in range(10)], list(range(10)))

    def load(path, **options):
        table = datasets.Dataset.from_parquet(files.format(split="train"), cache_dir=".")
        table.info.download_checksums = {f"hf://datasets/{path}@{commit}/train.parquet": {"num_bytes": 1}}
        return {"train": table, "test": table}

    assert ready(files).resolved_revision is None
    monkeypatch.setattr(datasets, "load_dataset", load)
    task = ready("preset:svhn")
    assert task.resolved_revision == task.drawn["revision"] == commit
    cached = SimpleNamespace(
        info=None, cache_files=[{"filename": f"/cache/them___svhn/default/0.0.0/{commit}/x.arrow"}]
    )
    assert resolved_revision({"train": cached}) == commit
    assert resolved_revision({"train": datasets.Dataset.from_dict({"a": [1]})}) is None


def test_columns_and_the_split_to_report_on_are_called_as_everywhere():
    names = sorted(f"thing_{number}" for number in range(100))
    copy = write(Path(), names, list(range(100)), image="img", label="fine_label")
    task = ready("preset:cifar100", local=copy)
    assert task.class_names[7] == "thing 15"
    food = Path("food")
    food.mkdir()
    copy = write(food, [f"dish_{number}" for number in range(101)], list(range(101)), splits=("train", "validation"))
    assert len(everything(ready("preset:food101", local=copy).test_dataloader())[1]) == 101


def test_class_names_follow_the_datas_own_whatever_their_order():
    archive = list(find_preset("eurosat").classes)
    task = ready("preset:eurosat", local=write(Path(), archive[::-1], list(range(10))))
    assert task.class_names[:2] == ["lake or sea", "river"]
    prompts = list(find_preset("eurosat").classes.values())
    task = ready("preset:eurosat", local=write(Path(), prompts, list(range(10))))
    assert task.class_names == prompts


def test_labels_that_everybody_numbers_alike_may_have_any_names():
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    task = ready("preset:mnist", local=write(Path(), words, list(range(10))))
    assert task.class_names == list("0123456789")
    assert ready("preset:mnist", local=write(Path(), list("9876543210"), list(range(10)))).class_names[0] == "9"
    with pytest.raises(ValueError, match=r"mnist: the data's classes '1' are not this set's"):
        ready("preset:mnist", local=write(Path(), ["1", *words[1:]], list(range(10))))


def test_labels_that_are_true_or_false_become_indices():
    task = ready("preset:pcam", local=write(Path(), "bool", [True, False] * 4))
    assert everything(task.test_dataloader())[1].tolist() == [1, 0] * 4
    assert task.class_names[1] == "lymph node containing metastatic tumor tissue"


def test_imagenets_own_names_stand_in_the_order_of_clips():
    from timm.data import ImageNetInfo

    own = [name.split(":")[-1] for name in ImageNetInfo().label_descriptions()]
    names = find_preset("imagenet").name_classes(own, "imagenet")
    assert (len(names), names[0], names[999], len(find_preset("imagenet").templates)) == (1000, "tench", names[-1], 80)


def test_a_class_list_can_be_taken_by_name():
    task = ready(write(Path(), [f"sign {n}" for n in range(43)], list(range(43))), class_names="gtsrb")
    assert task.class_names[14] == "stop"
    assert ImageTask("x.parquet", templates="gtsrb").templates[0] == 'a zoomed in photo of a "{}" traffic sign.'


def test_mistakes_with_presets_name_what_is_there():
    with pytest.raises(ValueError, match="no preset is named 'minst'.*Did you mean 'mnist'"):
        ImageTask("preset:minst")
    with pytest.raises(ValueError, match="local= is the copy of a preset, and 'mnist' is not a preset"):
        ImageTask("mnist", local="here")
    with pytest.raises(ValueError, match="gtsrb should have 43 classes, but the data names 2: 'a', 'b'"):
        ready("preset:gtsrb", local=write(Path(), ["a", "b"], [0, 1]))
    with pytest.raises(ValueError, match="eurosat: the data's classes 'x0', 'x1'.*Pass class_names"):
        ready("preset:eurosat", local=write(Path(), [f"x{n}" for n in range(10)], list(range(10))))
    with pytest.raises(ValueError, match="cars takes its 196 class names from the data, which names none"):
        ImageTask("x.parquet", class_names="cars")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_classes"), [("mnist", 10), ("gtsrb", 43), ("cifar10", 10)])
def test_real_pictures_come_under_their_presets_names(name, num_classes):
    if not IMAGES.is_dir():
        pytest.skip(f"real pictures are not at {IMAGES}; TVA_DATA says where they are")
    task = ready(f"preset:{name}", local=str(IMAGES / f"{name}-{{split}}.parquet"), limit_test=50, transform=_small)
    assert len(task.class_names) == num_classes
    assert everything(task.test_dataloader())[0].shape == (50, 3, 8, 8)


def _small(image):
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1)


def numbered(folder, count):
    """Write a copy of MNIST whose images are their own number."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    for split in ("train", "test"):
        images = [Image.new("RGB", (1, 1), (at // 256, at % 256, 0)) for at in range(count)]
        rows = {"image": images, "label": [at % 10 for at in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return str(folder / "{split}.parquet")


def rows_of(loader):
    images, _ = everything(loader)
    return [int(256 * image[0] + image[1]) for image in images[:, :, 0, 0]]


@pytest.mark.parametrize("seed", [0, 3])
def test_a_preset_holds_out_what_the_papers_code_does(seed):
    task = ready("preset:mnist", local=numbered(Path(), 300), seed=seed)
    kept, held = torch.utils.data.random_split(range(300), [270, 30], torch.Generator().manual_seed(seed))
    assert rows_of(task.val_dataloader()) == sorted(held.indices)
    assert rows_of(task.prototype_dataloader()) == sorted(kept.indices)


def test_the_first_training_row_of_mnist_is_that_of_the_papers_code():
    task = ImageTask("preset:mnist")
    held, kept = task._draw_held_out(60000, 5000)
    assert (kept[0], len(held), len(kept)) == (36044, 5000, 55000)  # its code asserts this index


def test_an_installed_package_adds_presets_and_data_modules(tmp_path, monkeypatch):
    Path("their_sets.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    found = {"twos": "their_sets:TWOS", "TheirData": "their_sets:TheirData", "odd": "math:tau"}
    points = [EntryPoint(name, value, "tva.data_sets") for name, value in found.items()]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points[:2] if group == "tva.data_sets" else [])
    plugins.installed.cache_clear()
    try:
        files = write(Path(), ["0", "1"], [0, 1] * 10)
        task = ready("preset:twos", local=files)
        assert (task.name, task.class_names, task.templates) == ("twos", ["nil", "one"], ["the number {}"])
        assert find_preset("twos").revision == "abc"
        assert ImageTask("preset:twos").revision == "abc"
        assert ImageTask("preset:twos", revision="mine").revision == "mine"
        rows = {row["path"]: row for row in run_data()}
        assert "preset:twos" in rows
        assert (rows["preset:twos"]["revision"], rows["preset:mnist"]["revision"]) == ("abc", "unpinned")
        assert (rows["preset:mnist"]["license"], rows["preset:wikitext103"]["license"][:5]) == ("not recorded", "CC BY")
        assert tva.data.TheirData(size=3).size == 3
        parser = ArgumentParser()
        parser.add_argument("--data", type=L.LightningDataModule)
        parsed = parser.parse_args(["--data=tva.data.TheirData", "--data.size=4"])
        assert parser.instantiate_classes(parsed).data.size == 4
        with pytest.raises(AttributeError, match="'twos': the entry point .* A preset is used as preset:twos"):
            _ = tva.data.twos
        with pytest.raises(ValueError, match="no preset is named 'two'.*Did you mean 'twos'"):
            find_preset("two")
        monkeypatch.setattr(plugins, "entry_points", lambda group: points[2:])
        plugins.installed.cache_clear()
        with pytest.raises(
            TypeError, match=r"'odd' in tva.data_sets .* must be a tva.data.presets.Preset .*found float"
        ):
            find_preset("mnist")
        points[:] = [EntryPoint("mnist", "their_sets:TWOS", "tva.data_sets")] * 3
        plugins.installed.cache_clear()
        with pytest.raises(ValueError, match="'mnist' in tva.data_sets .* has a preset's name; rename it"):
            find_preset("mnist")
    finally:
        plugins.installed.cache_clear()


THEIRS = """
import lightning as L
from tva.data.presets import Preset

TWOS = Preset("them/twos", 2, ("the number {}",), classes=("nil", "one"), label_order=True, revision="abc")


class TheirData(L.LightningDataModule):
    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.size = size
"""


@pytest.mark.parametrize(("name", "known"), [("00003_{:05}.ppm", True), ("{:05}.png", False)])
def test_signs_of_one_track_are_no_independent_examples_where_file_names_tell_them(name, known):
    pixels = b"\x89PNG"  # nothing is decoded
    images = [{"bytes": pixels, "path": name.format(row)} for row in range(6)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 0, 0, 0, 1, 1]}, features=features)
    task = ImageTask("preset:gtsrb", local=".")
    task.class_names = [str(label) for label in range(43)]
    labels = task._group_labels(table.select([5, 0, 1, 4]))
    assert labels == (
        ["1/00003", "0/00003", "0/00003", "1/00003"] if known else None
    )  # a track's number is its class's
