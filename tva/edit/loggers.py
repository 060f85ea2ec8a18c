"""An edit as one run of Lightning's loggers: what was asked, the curve of the search, the table, and the page."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger

from tva.report.run_files import EDIT_JSON, PAGE
from tva.report.series import Content, points

ASKED = ("recipe", "rule", "objective", "confidence", "holds", "verdict", "reason", "seed")
MODELS = ("base", "edited", "finetuned", "random")


@contextmanager
def without_loggers(trainer: L.Trainer) -> Iterator[list[Logger]]:
    """Take a Trainer's loggers away while an edit evaluates, which would log every candidate as a run's only result.

    Yields:
        The loggers.
    """
    loggers = trainer.loggers
    trainer.loggers = []
    try:
        yield loggers
    finally:
        trainer.loggers = loggers


def log_edit(loggers: Sequence[Logger], content: Content, folder: Path) -> None:
    """Log a finished edit, on rank 0.

    Args:
        loggers: Lightning's; each gets the same.
        content: The ``edit.json``.
        folder: Of the edit, whose page and numbers become artefacts where a logger has such.
    """
    for logger in loggers:
        logger.log_hyperparams(hyperparameters(content))
        for step, metrics in enumerate(search_series(content)):
            logger.log_metrics(metrics, step=step)
        logger.log_metrics(results(content), step=len(content["evaluations"]))
        _keep_files(logger, [path for path in (folder / PAGE, folder / EDIT_JSON) if path.exists()])
        logger.save()
        logger.finalize("success")


def hyperparameters(content: Content) -> dict[str, Any]:
    """Return what was asked and chosen, as flat values."""
    return {
        **{name: content[name] for name in ASKED if content.get(name) is not None},
        "base": content["base"]["fingerprint"],
        "constraints": json.dumps([constraint["text"] for constraint in content["constraints"]]),
        "search": content["search"]["strategy"],
        **{f"vectors/{name}": vector["fingerprint"] for name, vector in content["vectors"].items()},
        **{f"chosen/{name}": value for name, value in content["coefficients"].items() if _is_number(value)},
    }


def search_series(content: Content) -> list[dict[str, float]]:
    """Return for every choice of coefficients on validation data these and each task's metric, in ascending order.

    The coefficients are ``search/scaling_coef`` and the like, the axis to draw the metrics against.
    """
    found: dict[tuple[tuple[str, float], ...], dict[str, float]] = {}
    for task, entry in content["tasks"].items():
        for point in points(content, task):
            coefs = {name: float(value) for name, value in point.coefs.items() if _is_number(value)}
            key = tuple(sorted(coefs.items()))
            row = found.setdefault(key, {f"search/{name}": value for name, value in coefs.items()})
            row[f"search/{task}/{entry['metric']}"] = point.value
    return [found[key] for key in sorted(found)]


def results(content: Content) -> dict[str, float]:
    """Return the table of the edit: every task under the base, the edit, its fine-tuned model and the random vector."""
    found = {
        f"{entry['split']}/{task}/{entry['metric']}/{model}": entry[model]["value"]
        for task, entry in content["tasks"].items()
        for model in MODELS
        if model in entry and entry[model]["value"] is not None
    }
    return {**found, "holds": float(content["holds"])}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _keep_files(logger: Any, files: Sequence[Path]) -> None:
    """Store files with the run, by the client that the logger has: MLflow's or that of Weights & Biases."""
    kind = type(logger).__name__
    for file in files:
        if kind == "MLFlowLogger":
            logger.experiment.log_artifact(logger.run_id, str(file))
        elif kind == "WandbLogger":
            logger.experiment.log_artifact(str(file), name=file.name, type="edit")
