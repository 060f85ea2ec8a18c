"""An edit notices examples that its vectors were trained on, another held-out part, and another head."""

import json
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
from small_images import table
from tva.callbacks import TaskVectorCallback

from tva import TaskVector, edit_model, open_weights, save_weights
from tva.data import ImageTask
from tva.edit.notes import _other_parts
from tva.models import ClipClassifier
from tva.vectors import compress

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
NAMES = ["disk", "ring", "star"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and a vector of one step on them."""
    folder = tmp_path_factory.mktemp("pictures")
    table(60).to_parquet(folder / "train.parquet")
    table(20, seed=1).to_parquet(folder / "test.parquet")
    callback = TaskVectorCallback(dirpath=str(folder), at_train_end=True)
    trainer = L.Trainer(max_steps=1, callbacks=[callback], enable_checkpointing=False, limit_val_batches=0, **QUIET)
    trainer.fit(ClipClassifier("tva-tiny", warmup_steps=0, learning_rate=1e-3), pets(folder))
    return folder


def pets(folder, test="test", **options):
    path = {"train": str(folder / "train.parquet"), "test": str(folder / f"{test}.parquet")}
    return ImageTask(path, name="pets", class_names=NAMES, **options)


def edit(folder, output, task, **options):
    return edit_model(
        ClipClassifier("tva-tiny"),
        output=output,
        vectors={"pets": folder / "final.tv.safetensors"},
        recipe="pets",
        targets={"pets": task},
        trainer=L.Trainer(enable_checkpointing=False, **QUIET),
        **({"scaling_coef": 0.5} | options),
    )


def test_a_vector_says_what_it_was_trained_on(folder):
    data = TaskVector.load(folder / "final.tv.safetensors").origin.training_data
    assert (data.num_examples, len(data.rows)) == (54, 54 * 16)  # a tenth of 60 is held out
    assert data.drawn == {"train_split": "train", "val_split": None, "val_size": None, "seed": 0, "limit_train": None}
    assert (folder / "final.tv.safetensors").stat().st_size < 5_000_000
    compress(folder / "final.tv.safetensors", folder / "small.tv.safetensors", encoding="int8")
    assert TaskVector.load(folder / "small.tv.safetensors").origin.training_data == data


def test_honest_data_has_no_notes(folder):
    report = edit(folder, Path("out"), pets(folder))
    assert report.notes == []
    assert report.sizes == {"pets": {"test": 20}}


def test_test_examples_that_were_trained_on_are_counted_and_shown(folder, capsys):
    report = edit(folder, Path("out"), pets(folder, test="train"))
    assert report.sizes["pets"] == {"test": 60, "trained_test": 54}
    (note,) = report.notes
    assert note.startswith("54 of the 60 test examples of pets are among those that the vector pets was trained on")
    for file in ("report.html", "README.md"):
        assert "54 of the 60 test examples of pets" in Path(f"out/{file}").read_text()
    assert json.loads(Path("out/edit.json").read_text())["notes"] == [note]
    report.show()
    assert "note: 54 of the 60 test examples" in capsys.readouterr().out


def test_another_held_out_part_than_the_fits_is_noticed(folder):
    search = {"scaling_coef": None, "maximize": "pets/accuracy"}
    report = edit(folder, Path("out"), pets(folder, val_size=20, seed=3), **search)
    assert report.sizes["pets"]["val"] == 20
    assert report.sizes["pets"]["trained_val"] == 20 - len(held_out_of_both(folder))
    assert "validation examples of pets are among those" in report.notes[0]
    assert "which had val_size None, seed 0, and here it has val_size 20, seed 3: give it those" in report.notes[1]
    assert edit(folder, Path("same"), pets(folder), **search).notes == []


def test_another_commit_of_the_data_is_noticed():
    def note(now, was):
        data = SimpleNamespace(drawn={"val_split": "val", "seed": 0, "revision": was})
        task = SimpleNamespace(drawn={"val_split": "val", "seed": 1, "revision": now})
        session = SimpleNamespace(options=SimpleNamespace(tasks={"a": task}))
        session.vectors = {"a": SimpleNamespace(origin=SimpleNamespace(training_data=data))}
        return _other_parts(SimpleNamespace(session=session))

    assert "which had revision 1a, and here it has revision 2b" in note("2b", "1a")[0]
    assert note("1a", "1a") == []


def held_out_of_both(folder):
    parts = []
    for options in ({}, {"val_size": 20, "seed": 3}):
        rows = {"train": np.arange(60)}
        pets(folder, **options)._hold_out(rows)
        parts.append({*rows["val"].tolist()})
    return parts[0] & parts[1]


def test_another_head_than_the_fits_is_noticed(folder):
    report = edit(folder, Path("out"), pets(folder, templates=["a bad photo of a {}."]))
    (note,) = report.notes
    assert note.startswith("pets is evaluated under another head than its vector was trained under")


def test_a_damaged_note_of_the_training_data_is_an_error(folder):
    weights = open_weights(folder / "final.tv.safetensors")
    header = {key: text for key, text in weights.metadata.items() if "_fingerprint" not in key or "base" in key}
    save_weights(dict(weights), "v.safetensors", {**header, "tva.training_data": '{"rows": "xyz"}'})
    with pytest.raises(ValueError, match=r"v.safetensors is damaged: its tva.training_data must hold"):
        TaskVector.load("v.safetensors")
