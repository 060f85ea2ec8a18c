"""An edit in Lightning's loggers: one run, its curve as a series, its table, and its page where files are kept."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from small_cli import edit_config, write_yaml
from small_edit import edit, make_trainer

from tva.cli.main import main
from tva.edit.loggers import log_edit, results, search_series, without_loggers
from tva.report.edit_report import read_report


@pytest.fixture(scope="module")
def edited(vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged")
    edit(vectors, subject_to=["other/accuracy >= 0.1 * base"], folder=folder)
    return read_report(folder / "out"), folder / "out"


def test_the_command_logs_one_run_with_the_curve_and_the_table(runs):
    search = {"class_path": "tva.search.Grid", "init_args": {"num": 5}}
    config = edit_config(runs, Path("out"), search=search)
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "."}}
    main(["edit", "--config", write_yaml(Path("edit.yaml"), {**config, "trainer": {"logger": logger}})])
    content = read_report(Path("out"))
    (run,) = Path("lightning_logs").iterdir()
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    curve = [row for row in rows if row["search/scaling_coef"]]
    assert [float(row["search/scaling_coef"]) for row in curve] == [0, 0.25, 0.5, 0.75, 1]
    assert [row["step"] for row in curve] == list("01234")
    chosen = next(row for row in curve if float(row["search/scaling_coef"]) == content["coefficients"]["scaling_coef"])
    (point,) = [
        entry["value"]
        for entry in content["evaluations"]
        if entry["split"] == "val"
        and entry["task"] == "blobs1"
        and entry["model"] == "edited"
        and entry["metric"] == "accuracy"
        and entry["coefficients"] == content["coefficients"]
    ]
    assert float(chosen["search/blobs1/accuracy"]) == pytest.approx(point)
    (table,) = [row for row in rows if row["holds"]]
    assert float(table["test/blobs2/accuracy/edited"]) == pytest.approx(content["tasks"]["blobs2"]["edited"]["value"])
    assert float(table["test/other/accuracy/base"]) == pytest.approx(content["tasks"]["other"]["base"]["value"])
    assert len(rows) == 6  # and nothing of the evaluations in between
    asked = yaml.safe_load((run / "hparams.yaml").read_text())
    assert asked["recipe"] == "blobs1 + blobs2"
    assert asked["base"] == content["base"]["fingerprint"]


def test_a_trainer_has_its_loggers_back_after_an_edit_that_fails():
    trainer = make_trainer()
    trainer.loggers = [CSVLogger(Path())]
    with pytest.raises(OSError, match="gone"), without_loggers(trainer) as loggers:
        assert trainer.loggers == []
        assert len(loggers) == 1
        raise OSError("gone")
    assert trainer.loggers == loggers


def test_tensorboard_has_the_curve(edited):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    content, folder = edited
    logger = TensorBoardLogger(Path())
    log_edit([logger], content, folder)
    found = events.EventAccumulator(logger.log_dir)
    found.Reload()
    wanted = search_series(content)
    assert [event.value for event in found.Scalars("search/scaling_coef")] == pytest.approx(
        [row["search/scaling_coef"] for row in wanted]
    )
    for name, value in results(content).items():
        assert found.Scalars(name)[0].value == pytest.approx(value)


def test_mlflow_has_the_curve_and_keeps_the_page(edited, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    pytest.importorskip("mlflow")
    content, folder = edited
    logger = MLFlowLogger("edits", tracking_uri=f"file:{tmp_path}/mlruns")
    run_id, client = logger.run_id, logger.experiment
    log_edit([logger], content, folder)
    kept = {entry.path for entry in client.list_artifacts(run_id)}
    assert kept == {"report.html", "edit.json"}
    history = client.get_metric_history(run_id, "search/scaling_coef")
    assert [metric.value for metric in history] == [row["search/scaling_coef"] for row in search_series(content)]
    assert client.get_run(run_id).info.status == "FINISHED"


def test_weights_and_biases_has_the_table_and_keeps_the_page(edited, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    content, folder = edited
    logger = WandbLogger("edit", save_dir=Path(), offline=True)
    run = logger.experiment
    log_edit([logger], content, folder)
    summary = dict(run.summary)
    for name, value in results(content).items():
        assert summary[name] == pytest.approx(value)
    assert json.loads(run.config["constraints"]) == ["other/accuracy >= 0.1 * base"]
    run.finish()
