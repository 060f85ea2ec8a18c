"""Configurations of tiny runs, as people write them, and runs of `tva fit`."""

import pytest
import yaml

from tva.cli.main import main


def run(*words):
    """Run a command in this process; return its exit status."""
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def blobs(seed, **options):
    return {"class_path": "small_models.Blobs", "init_args": {"seed": seed, **options}}


def write_yaml(path, content):
    path.write_text(yaml.safe_dump(content))
    return str(path)


def fit_config(folder, seed=1, callbacks=(), **trainer):
    return {
        "trainer": {
            "max_epochs": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "callbacks": [
                {"class_path": "tva.callbacks.TaskVectorCallback"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": str(folder), "filename": "last", "enable_version_counter": False},
                },
                *callbacks,
            ],
            **trainer,
        },
        "model": {"class_path": "small_models.LinearNet"},
        "data": blobs(seed),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Task vectors of two blob tasks, made by `tva fit`."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        config = write_yaml(folder / f"fit{seed}.yaml", fit_config(folder / f"blobs{seed}", seed))
        main(["fit", "--config", config])
    return folder


def edit_config(runs, output, **changes):
    return {
        "model": {"class_path": "small_models.LinearNet"},
        "vectors": {name: str(runs / name / "last.tv.safetensors") for name in ("blobs1", "blobs2")},
        "recipe": "blobs1 + blobs2",
        "output": str(output),
        "maximize": "mean(normalized_accuracy)",
        "targets": {"blobs1": blobs(1), "blobs2": blobs(2)},
        "controls": {"other": blobs(3)},
        **changes,
    }
