"""Lightning's Trainer with one more verb, ``edit``."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Any

import lightning as L

from tva.edit import run_edit
from tva.report import CONFIG, EDIT_JSON, EditReport, read_report
from tva.terminal import print_report
from tva.weights import atomic_path


class Trainer(L.Trainer):
    """A Trainer that can also edit.

    Attributes:
        report: What the last edit did.
    """

    report: EditReport | None = None

    def edit(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        *,
        output: str,
        json: bool = False,
        **kwargs: Any,
    ) -> EditReport:
        """Combine task vectors, choose the coefficient, edit the model and prove it on control tasks.

        Args:
            model: Any LightningModule with validation and test steps; its weights are the base unless ``base`` is
                given.
            datamodule: Unused; LightningCLI passes one if it has one. Tasks go into ``targets`` and ``controls``.
            output: Folder for ``edited.safetensors``, ``edit.json``, ``report.html`` and the model card.
            json: Print ``edit.json`` instead of a table.
            **kwargs: Those of `tva.edit.run_edit`.

        Returns:
            The report, which is also printed.
        """
        self.report = run_edit(self, model, output=output, **kwargs)
        if self.is_global_zero and json:
            print(dumps(self.report.to_json(), indent=1, ensure_ascii=False))
        elif self.is_global_zero:
            print_report(self.report, folder=Path(output))
        return self.report


def write_config(trainer: Trainer, folder: Path, text: str) -> None:
    """Write the options of the trainer's last edit beside its ``edit.json``, if it wrote one."""
    written = (folder / EDIT_JSON).exists() and trainer.report is not None
    if trainer.is_global_zero and written and read_report(folder)["created"] == trainer.report.created:
        with atomic_path(folder / CONFIG) as temporary:
            temporary.write_text(text, encoding="utf-8")
