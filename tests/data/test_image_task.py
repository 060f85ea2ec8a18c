"""ImageTask: every source gives the same examples, the paper's splits, and the mistakes of a newcomer."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from small_images import everything, pictures, ready, table, to_tensor

from tva.data import ImageTask
from tva.data.builtin import BUILTIN_SETS, load_builtin
from tva.models import ClipClassifier


@pytest.fixture
def parquet():
    table(40, style=["ink", "oil"] * 20).to_parquet("pets-train.parquet")
    table(12, seed=1, style=["ink", "oil"] * 6).to_parquet("pets-test.parquet")
    return "pets-{split}.parquet"


def test_split_by_the_papers_rule_holds_out_a_tenth_and_shares_nothing(parquet):
    task = ready(parquet)
    train, val, test = (
        everything(loader())[0] for loader in (task.train_dataloader, task.val_dataloader, task.test_dataloader)
    )
    assert (len(train), len(val), len(test)) == (36, 4, 12)
    seen = {image.numpy().tobytes() for image in train}
    assert not seen & {image.numpy().tobytes() for image in val}
    assert seen | {image.numpy().tobytes() for image in val} == {
        to_tensor(Image.fromarray(picture)).numpy().tobytes() for picture in pictures(40)
    }


def test_held_out_part_depends_only_on_the_seed(parquet):
    first, same, other = (everything(ready(parquet, seed=seed).val_dataloader())[0] for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.slow
def test_at_most_5000_examples_are_held_out():
    count = 50_010
    dot = {"bytes": load_builtin("digits")["test"].with_format("arrow")[0]["image"][0].as_py()["bytes"], "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    dots = datasets.Dataset.from_dict({"image": [dot] * count, "label": [0] * count}, features=features)
    dots.to_parquet("dots.parquet")
    task = ready({"train": "dots.parquet", "test": "dots.parquet"})
    assert (len(task.train_dataloader().dataset), len(task.val_dataloader().dataset)) == (count - 5000, 5000)


def test_every_source_gives_the_same_examples(parquet, tmp_path):
    expected = everything(ready(parquet).test_dataloader())
    both = datasets.DatasetDict({"train": table(40), "test": table(12, seed=1)})
    both.save_to_disk(Path("arrow"))
    for split, seed, count in (("train", 0, 40), ("test", 1, 12)):
        labels = np.arange(count) % 3
        np.savez(Path(f"{split}.npz"), images=pictures(count, seed), labels=labels)
        for index, (picture, label) in enumerate(zip(pictures(count, seed), labels, strict=True)):
            folder = tmp_path / "folder" / split / "abc"[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"{index:03}.png")
    np.savez(
        Path("one.npz"),
        train_images=pictures(40),
        train_labels=np.arange(40) % 3,
        test_images=pictures(12, 1),
        test_labels=np.arange(12) % 3,
    )
    names = ["ant", "bee", "cat"]
    files = {split: f"pets-{split}.parquet" for split in ("train", "test")}
    for path, options in (
        (files, {}),
        ("arrow", {}),
        ("{split}.npz", {"class_names": names}),
        ("one.npz", {"class_names": names}),
    ):
        images, labels = everything(ready(path, **options).test_dataloader())
        assert torch.equal(images, expected[0]), path
        assert torch.equal(labels, expected[1]), path
    by_folder = ready("folder", class_names=names)  # sorted by class
    assert sorted(everything(by_folder.test_dataloader())[1].tolist()) == sorted(expected[1].tolist())


def test_where_keeps_the_named_rows_in_every_split_and_the_full_class_list(parquet):
    task = ready(parquet, where={"style": "ink", "label": ["ant", "cat"]})
    assert task.class_names == ["ant", "bee", "cat"]
    for loader in (task.train_dataloader(), task.val_dataloader(), task.test_dataloader()):
        assert set(everything(loader)[1].tolist()) <= {0, 2}
    ink = {to_tensor(Image.fromarray(p)).numpy().tobytes() for p in pictures(12, 1)[::2]}
    assert {image.numpy().tobytes() for image in everything(task.test_dataloader())[0]} <= ink


def test_prototypes_come_from_their_own_rows_and_never_from_the_held_out_part(parquet):
    task = ready(parquet, where={"style": "ink"}, prototype_where={"style": ["oil"]})
    prototypes = {image.numpy().tobytes() for image in everything(task.prototype_dataloader())[0]}
    assert prototypes == {to_tensor(Image.fromarray(p)).numpy().tobytes() for p in pictures(40)[1::2]}
    plain = ready(parquet)
    assert len(everything(plain.prototype_dataloader())[1]) == 36
    everywhere = ready(parquet, prototype_where={})
    held_out = {image.numpy().tobytes() for image in everything(everywhere.val_dataloader())[0]}
    assert not held_out & {i.numpy().tobytes() for i in everything(everywhere.prototype_dataloader())[0]}


def test_limits_are_a_seeded_choice(parquet):
    task = ready(parquet, limit_train=10, limit_test=5)
    assert len(task.train_dataloader().dataset) == 10
    first, again = (everything(ready(parquet, limit_test=5).test_dataloader())[0] for _ in range(2))
    assert torch.equal(first, again)
    assert len(first) == 5


def test_examples_are_decoded_once_and_again_for_another_model(parquet):
    calls = []

    def counted(image):
        calls.append(1)
        return to_tensor(image)

    task = ready(parquet, transform=counted)
    for _ in range(3):
        everything(task.test_dataloader())
    assert len(calls) == 12
    task.trainer.lightning_module.image_transform = lambda image: to_tensor(image) + 1
    task.setup("test")
    assert everything(task.test_dataloader())[0].min() >= 1


def test_labels_that_are_text_become_indices():
    rows = {"image": table(9)["image"][:], "label": ["bee", "ant", "cat"] * 3}
    data = datasets.Dataset.from_dict(
        rows, features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    )
    data.to_parquet("t.parquet")
    files = {"train": "t.parquet", "test": "t.parquet"}
    task = ready(files)
    assert task.class_names == ["ant", "bee", "cat"]
    assert everything(task.test_dataloader())[1].tolist() == [1, 0, 2] * 3
    with pytest.raises(ValueError, match="labels 'cat' are not in class_names"):
        ready(files, class_names=["ant", "bee", "cow"])


def test_a_hub_name_is_loaded_with_its_configuration_and_revision(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return {"train": table(20), "test": table(6, seed=1)}

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = ready("ylecun/mnist", config="plain", revision="abc123")
    assert asked == [(("ylecun/mnist",), {"name": "plain", "revision": "abc123"})]
    assert task.name == "mnist"
    assert len(task.test_dataloader().dataset) == 6


# --- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_column": "class"}, r"no column 'class'; its columns are 'image', 'label', 'style'. Set label_column"),
        ({"image_column": "img"}, r"no column 'img'.*Set image_column"),
        ({"test_split": "tset"}, r"no split 'tset'; its splits are 'train', 'test'|'test', 'train'"),
        ({"val_split": "validation"}, r"no split 'validation'.*Set val_split"),
        ({"class_names": ["ant", "bee"]}, r"has 3 classes, but class_names has 2"),
        ({"class_names": ["ant", "bee", "dog", "elk"]}, r"has 3 classes, but class_names has 4"),
        ({"where": {"label": ["dog"]}}, r"where asks label for 'dog'; it holds 'ant', 'bee', 'cat'"),
        ({"where": {"styel": "ink"}}, r"where names the column 'styel', not one of"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"where": {"style": "chalk"}}, r"where asks style for 'chalk'; it holds 'ink', 'oil'"),
    ],
)
def test_mistakes_name_what_is_there(parquet, options, message):
    with pytest.raises(ValueError, match=message):
        ready(parquet, **options)


def test_missing_files_and_variables(parquet, monkeypatch):
    with pytest.raises(FileNotFoundError, match="but none is there"):
        ready(parquet.replace("pets", "pest"))
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*pets-train\.parquet"):
        ready({"train": parquet.format(split="trian"), "test": parquet.format(split="test")})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ready("./nowhere/pets.parquet")
    Path("pets").mkdir()
    with pytest.raises(FileNotFoundError, match="expected at pets/train, but nothing is there"):
        ready("pets/train")  # not asked of the hub, for pets is a folder here
    with pytest.raises(ValueError, match="pets holds no data set that can be read: .* Give a file or folder with"):
        ready("./pets")
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(ValueError("offline")))
    with pytest.raises(ValueError, match="pest holds no .* there is no such file or folder here. Did you mean .*pets"):
        ready("pest")
    monkeypatch.undo()
    for part in ("train", "test"):
        Path(f"pets/{part}/cat").mkdir(parents=True)
        Image.new("L", (4, 4)).save(f"pets/{part}/cat/1.png")
    with pytest.raises(ValueError, match="no column 'label'.* two or more classes are needed, in a folder each"):
        ready("./pets")
    with pytest.raises(ValueError, match="environment variable that is not set"):
        ImageTask("$TVA_NO_SUCH_FOLDER/x.parquet")
    monkeypatch.setenv("PETS", ".")
    assert len(ready("$PETS/pets-{split}.parquet").test_dataloader().dataset) == 12
    with pytest.raises(ValueError, match="files of one format"):
        Path("x.tar").touch()
        ready({"train": "x.tar"})


def test_classes_must_be_named_when_the_data_does_not():
    np.savez(Path("n.npz"), images=pictures(6), labels=np.arange(6) % 3)
    with pytest.raises(ValueError, match="does not name its classes; pass class_names, 3 names"):
        ready({"train": "n.npz", "test": "n.npz"})
    np.savez(Path("bad.npz"), images=pictures(6))
    with pytest.raises(ValueError, match="'labels' must hold one label for each"):
        ready({"train": "bad.npz", "test": "bad.npz"}, class_names=["a"])


def test_a_model_must_say_how_images_reach_it(parquet):
    task = ImageTask(parquet)
    task.trainer = SimpleNamespace(lightning_module=SimpleNamespace())
    with pytest.raises(TypeError, match="image_transform"):
        task.setup("fit")


# --- what ships with the package


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BUILTIN_SETS))
def test_builtin_sets_are_the_same_each_time_and_their_splits_share_nothing(name, monkeypatch):
    first = load_builtin(name)
    monkeypatch.setitem(BUILTIN_SETS, name, replace(BUILTIN_SETS[name], num_train=30))  # of no consequence to the test
    again = load_builtin(name)
    for split in ("train", "test"):
        labels = np.array(first[split]["label"])
        assert len(np.unique(labels)) == len(first[split].features["label"].names)
        assert np.bincount(labels).min() >= 0.7 * len(labels) / len(np.unique(labels))
        assert first[split][0]["image"].size == (32, 32)
    images = {split: [np.array(image).tobytes() for image in first[split]["image"]] for split in ("train", "test")}
    assert images["test"] == [np.array(image).tobytes() for image in again["test"]["image"]]
    assert not set(images["train"]) & set(images["test"])


def test_an_unknown_builtin_set_names_the_known_ones():
    with pytest.raises(ValueError, match="digits"):
        ready("builtin:digitz")


# --- augmentation


def augmented(path, **options):
    task = ImageTask(path, augment=True, **options)
    model = SimpleNamespace(image_transform=to_tensor, train_transform=lambda image: to_tensor(image) + torch.rand(1))
    task.trainer = SimpleNamespace(lightning_module=model)
    task.setup("fit")
    return task


def test_augmented_training_images_are_made_anew_and_all_others_stay(parquet):
    task, plain = augmented(parquet), ready(parquet)
    torch.manual_seed(0)
    first, labels = everything(task.train_dataloader())
    second, _ = everything(task.train_dataloader())
    expected, plain_labels = everything(plain.train_dataloader())
    assert torch.equal(labels, plain_labels)  # the same order
    assert not torch.equal(first, second)
    assert ((first - expected) >= 0).all()
    assert ((first - expected) < 1).all()
    for part in ("val", "test", "prototype"):
        one, other = (everything(getattr(it, f"{part}_dataloader")()) for it in (task, plain))
        assert torch.equal(one[0], other[0])


def test_augmentation_needs_a_model_that_has_some(parquet):
    with pytest.raises(TypeError, match="augment needs a model with a train_transform"):
        ready(parquet, augment=True)
    with pytest.raises(ValueError, match="a stream is not augmented"):
        augmented(parquet, streaming=True, val_size=2)


def test_clip_crops_at_random_in_training_as_the_papers_code_does():
    model = ClipClassifier()
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    crop = model.train_transform.transforms[0]
    assert (type(crop).__name__, tuple(crop.scale)) == ("RandomResizedCrop", (0.9, 1.0))
    torch.manual_seed(0)
    made = [model.train_transform(image) for _ in range(4)]
    assert made[0].shape == model.image_transform(image).shape
    assert not all(torch.equal(made[0], other) for other in made[1:])


def test_data_with_some_of_a_longer_list_of_classes_are_labelled_by_name(parquet):
    own = ready(parquet).class_names
    names = ["preset:mnist", *reversed(own)]
    task = ready(parquet, class_names=names, where={"label": own[:1]})
    assert task.class_names[10:] == names[1:]
    labels = {int(label) for _, labels in task.test_dataloader() for label in labels}
    assert labels == {len(task.class_names) - 1}
