"""Lightning's Trainer with one more verb, ``edit``."""

import os
from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from tva.console import in_notebook
from tva.edit.options import EditOptions, named_vectors
from tva.edit.run import run_edit
from tva.evaluation.evaluate import quiet
from tva.evaluation.ranks import wait_for_rank_zero
from tva.report.edit_report import EditReport
from tva.report.terminal import print_report
from tva.vectors.header import SUFFIX
from tva.vectors.task_vector import TaskVector

Vector = str | os.PathLike[str] | TaskVector
Vectors = Mapping[str, Vector] | Sequence[Vector] | Vector


class Trainer(L.Trainer):
    """A Trainer that can also edit.

    Attributes:
        report: What the last edit did.
        command: The command line that it serves, if any, by which an edit can be made again.
        config: The options of that command as YAML, which an edit writes beside its report.
    """

    report: EditReport | None = None
    command: str | None = None
    config: str | None = None

    def edit(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        *,
        json: bool = False,
        **options: Any,
    ) -> EditReport:
        """Combine task vectors, choose the coefficient, edit the model and prove it on control tasks.

        Args:
            model: Any LightningModule with validation and test steps; its weights are the base unless ``base`` is
                given.
            datamodule: Unused; LightningCLI passes one if it has one. Tasks go into ``targets`` and ``controls``.
            json: Print ``edit.json`` instead of a table.
            **options: Those of `tva.edit.options.EditOptions`.

        Returns:
            The report, which is also printed, except in a notebook.
        """
        asked = EditOptions(**options)
        self.report = run_edit(self, model, asked)
        if in_notebook():  # which shows what a cell returns
            return self.report
        if self.is_global_zero and json:
            print(dumps(self.report.to_json(), indent=1, ensure_ascii=False))
        elif self.is_global_zero:
            print_report(self.report, folder=asked.folder)
        return self.report

    def describe_fit(self) -> dict[str, Any]:
        """Return, as JSON values, what a fit reached and wrote."""
        found = [path for each in self.checkpoint_callbacks for path in (each.best_model_path, each.last_model_path)]
        checkpoints = list(dict.fromkeys(filter(None, found)))
        vectors = [path.removesuffix(".ckpt") + SUFFIX for path in checkpoints]
        return {
            "steps": self.global_step,
            "epochs": self.current_epoch,
            "metrics": {name: float(value) for name, value in self.callback_metrics.items()},
            "checkpoints": checkpoints,
            "vectors": [vector for vector in vectors if Path(vector).is_file()],
        }


def exit_status(trainer: Any) -> int:
    """Return 1 if the last edit of a Trainer was refused, else 0, the same on every rank; every rank must call it.

    Returns when the first process has done all that it had to, so that any rank may end.
    """
    if trainer.report is None or trainer.report.holds:
        return 0
    wait_for_rank_zero(trainer)
    return 1


def edit_model(
    model: L.LightningModule | nn.Module | str | os.PathLike[str],
    *,
    vectors: Vectors,
    output: str | os.PathLike[str],
    recipe: str | None = None,
    trainer: L.Trainer | None = None,
    **options: Any,
) -> EditReport:
    """Combine task vectors, choose the coefficient, edit the model and prove it, as ``tva edit`` does, from Python.

    Args:
        model: A LightningModule with validation and test steps, or any network, for tasks that bring a metric; its
            weights are the base unless ``base`` is given. Left with the edited weights.
        vectors: Names to task vector files, fine-tuned checkpoints or `TaskVector` in memory; or a list of these, or
            one, named by their paths.
        output: Folder for ``edit.json``, the page, and if the constraints hold the weights and the model card.
        recipe: Expression of the vectors, such as ``-toxic``; by default their sum.
        trainer: Any Trainer; by default a quiet one for this machine.
        **options: Those of `tva.edit.options.EditOptions`, such as ``targets``, ``controls`` and ``minimize``.

    Returns:
        The report; ``report.show()`` shows it, in a notebook as a page and elsewhere as a table.

    Raises:
        TypeError: Model, vectors or tasks are of a kind that cannot be edited or evaluated.
        ValueError: Options, model, base or vectors do not fit together; nothing was written.
        FileNotFoundError: A checkpoint or data file is missing.

    Example:
        Let a network forget what fine-tuning on toxic texts taught it, as far as a control task allows::

            edit_model(
                network,
                vectors={"toxic": "toxic-finetuned"},
                recipe="-toxic",
                targets={"toxic": (val_loader, test_loader, MulticlassAccuracy(2))},
                controls={"reviews": evaluate_on_reviews},
                minimize="toxic/accuracy",
                subject_to=["reviews/score >= 0.95 * base"],
                output="edited",
            )
    """
    named = named_vectors(vectors)
    with quiet():
        if trainer is None:
            bars = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
            trainer = Trainer(logger=False, **bars)
        recipe = " + ".join(named) if recipe is None else recipe
        return run_edit(trainer, model, EditOptions(output=output, vectors=named, recipe=recipe, **options))
