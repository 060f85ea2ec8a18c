"""The commands that run a Trainer: `TvaCLI`, which is LightningCLI with one more subcommand, ``edit``."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import tva.callbacks  # these three so that their classes can be named without a module path
import tva.data
import tva.models  # noqa: F401
from tva.cli.arguments import replaced_argv
from tva.cli.run_function import print_json
from tva.edit.trainer import Trainer, write_config

FLAGS = ("--allow_other_base", "--allow_other_kind", "--keep_undo")  # options of edit that may stand without a value
DEFAULTS: dict[str, dict[str, Any]] = {  # of the Trainer
    "fit": {"gradient_clip_val": 1.0},
    "edit": {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    },
}


class TvaCLI(LightningCLI):
    """LightningCLI with one more subcommand, ``edit``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "edit": {"model", "datamodule"}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **options: Any) -> Any:
        """Let help begin with the command's own options, and end with the Trainer's, which are many."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **options)
        groups = parser._action_groups
        first = groups.index(next(group for group in groups if group.title == "options")) + 1
        trainer, *middle, own = groups[first:]
        for group, title in zip((trainer, *middle), ("Lightning's Trainer", "The model", "The data"), strict=False):
            group.title = title
        groups[first:] = [own, *middle, trainer]
        return parser

    def edit(self, **options: Any) -> None:
        self.trainer.command = shlex.join(["tva", *sys.argv[1:]])
        try:
            self.trainer.edit(**options)
        finally:  # what it prints may find no reader
            text = self._parser("edit").dump(self.config["edit"], skip_none=False)
            write_config(self.trainer, Path(options["output"]), text)

    def _parse_ckpt_path(self) -> None:
        """Resume with the model that the command describes.

        Lightning 2.6 lets hyperparameters in the checkpoint override the command line, and takes those of a module
        that saves its own for arguments of the abstract LightningModule.
        """


class _OpenedCLI(TvaCLI):
    """Keep what ``edit`` would get, and do not edit."""

    options: dict[str, Any]

    def edit(self, **options: Any) -> None:
        self.options = options


def open_edit(config: str | os.PathLike[str]) -> dict[str, Any]:
    """Make the trainer and what an edit gets, from a YAML file with its options, and do not edit.

    Returns:
        The arguments of `tva.edit.trainer.Trainer.edit` by name, and the trainer.
    """
    with replaced_argv(["edit", "--config", os.fspath(config)]):
        cli = _make(_OpenedCLI, "edit")
    return {"trainer": cli.trainer, **cli.options}


def run_lightning(command: str, words: Sequence[str], as_json: bool = False) -> bool:
    """Run a subcommand of LightningCLI; return whether what it was asked for holds.

    Args:
        command: Such as ``"fit"``.
        words: The arguments after it.
        as_json: Print what was reached as JSON only.
    """
    alone = [not after or after.startswith("--") for after in [*words[1:], ""]]
    words = [f"{word}=true" if word in FLAGS and last else word for word, last in zip(words, alone, strict=True)]
    words += ["--json=true"] if as_json and command == "edit" else []
    aside = as_json and command != "edit"  # whose JSON the trainer prints
    with replaced_argv([command, *words]):
        with redirect_stdout(sys.stderr) if aside else nullcontext():
            trainer = _make(TvaCLI, command).trainer
        if aside and trainer.is_global_zero:
            print_json(trainer.describe_fit())
    # rank 0 reports the verdict; Lightning kills it, whatever it is writing, if another process ends with status 1
    return not trainer.is_global_zero or trainer.report is None or trainer.report.holds


def _make(cli: type[LightningCLI], command: str) -> Any:
    """Parse the process's arguments and run the subcommand that they name."""
    if command == "edit":
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
    # torch 2.15 and jsonargparse 4.49 deprecate calls that lightning 2.6.6 makes; its master no longer makes them
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning.*")
    try:
        return cli(
            trainer_class=Trainer,
            trainer_defaults={"enable_progress_bar": sys.stderr.isatty(), **DEFAULTS.get(command, {})},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            save_config_callback=None if command == "edit" else SaveConfigCallback,
            # With it on, every data module in the config but the first gets the first one's hyperparameters.
            load_from_checkpoint_support=False,
            parser_kwargs={
                "exit_on_error": False,
                **{name: {"usage": f"tva {name} [options]", "exit_on_error": False} for name in cli.subcommands()},
            },
        )
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
