"""Lightning's Trainer with one more verb, ``edit``."""

from __future__ import annotations

from typing import Any

import lightning as L

from tva.edit import run_edit
from tva.report import EditReport, print_report


class Trainer(L.Trainer):
    """A Trainer that can also edit.

    Attributes:
        report: What the last edit did.
    """

    report: EditReport | None = None

    def edit(
        self, model: L.LightningModule, datamodule: L.LightningDataModule | None = None, **kwargs: Any
    ) -> EditReport:
        """Combine task vectors, choose the coefficient, edit the model and prove it on control tasks.

        Args:
            model: Any LightningModule with validation and test steps; its weights are the base unless ``base`` is
                given.
            datamodule: Unused; LightningCLI passes one if it has one. Tasks go into ``targets`` and ``controls``.
            **kwargs: Those of `tva.edit.run_edit`.

        Returns:
            The report, which is also printed.
        """
        self.report = run_edit(self, model, **kwargs)
        if self.is_global_zero:
            print_report(self.report)
        return self.report
