"""The commands that run a Trainer: `TvaCLI`, which is LightningCLI with one more subcommand, ``edit``."""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import tva.callbacks  # these three so that their classes can be named without a module path
import tva.data
import tva.models
from tva.cli.arguments import replaced_argv
from tva.cli.configs import check_configs
from tva.cli.explain import explain
from tva.cli.fit_progress import with_progress
from tva.cli.help import HelpFormatter
from tva.cli.run_function import print_json, sentence
from tva.edit.options import EditOptions
from tva.edit.trainer import Trainer, exit_status
from tva.report.run_files import CONFIG

FLAGS = [f"--{option.name}" for option in fields(EditOptions) if option.default is False]  # may stand without a value
EDIT_DEFAULTS = {  # of the Trainer; an edit evaluates only
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


class EditMixin:
    """Adds the subcommand ``edit`` to a LightningCLI of your own.

    A ``trainer_class`` may be given as ever; it gains the method ``edit``. An edit whose constraints do not hold ends
    the process with status 1, as ``tva edit`` does.

    Example:
        >>> from lightning.pytorch.cli import LightningCLI
        >>> class MyCLI(EditMixin, LightningCLI):
        ...     def add_arguments_to_parser(self, parser):
        ...         parser.link_arguments("data.num_classes", "model.num_classes")
    """

    program: Sequence[str] = ()  # what the command line began with, for the report

    def __init__(self, *args: Any, trainer_class: type = Trainer, **kwargs: Any) -> None:
        if not isinstance(trainer_class, type):
            raise TypeError(f"trainer_class must be a class, which gains the method edit; found {trainer_class!r}.")
        if not issubclass(trainer_class, Trainer):
            trainer_class = type(trainer_class.__name__, (Trainer, trainer_class), {})
        super().__init__(*args, trainer_class=trainer_class, **kwargs)  # type: ignore[call-arg]

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        return {**super().subcommands(), "edit": {"model", "datamodule"}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **options: Any) -> Any:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **options)
        if subcommand == "edit":
            parser.set_defaults({f"trainer.{name}": value for name, value in EDIT_DEFAULTS.items()})
        return parser

    def _add_instantiators(self) -> None:
        """Leave classes to jsonargparse in ``edit``.

        Lightning's instantiators give every data module in a config the hyperparameters of the one under ``data``.
        """
        if self.subcommand != "edit":
            super()._add_instantiators()

    def instantiate_classes(self) -> None:
        if self.subcommand == "edit":
            self.save_config_callback = None  # `edit` writes its configuration beside its report
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse's, around what the constructor of an optional class raised
            if error.__cause__ is None or not str(error).startswith("Does not validate against any of the Union"):
                raise
            raise error.__cause__ from error.__cause__.__cause__

    def edit(self, **options: Any) -> None:
        """Run the subcommand ``edit``."""
        cli: Any = self
        program = self.program or ("python", sys.argv[0])
        cli.trainer.command = shlex.join([*program, *sys.argv[1:]])
        cli.trainer.config = cli._parser("edit").dump(cli.config["edit"], skip_none=False)
        cli.trainer.edit(**options)
        if status := exit_status(cli.trainer):
            sys.exit(status)


class TvaCLI(EditMixin, LightningCLI):
    """LightningCLI with the subcommands ``fit``, ``validate``, ``test``, ``predict`` and ``edit``.

    Its arguments are those of LightningCLI.

    Example:
        A script of your own, ``main.py``, which ``python main.py edit --config edit.yaml`` runs::

            from tva.cli import TvaCLI
            from my_project import MyData, MyModel

            TvaCLI(MyModel, MyData)
    """

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **options: Any) -> Any:
        """Let help begin with the subcommand's own options, and end with the Trainer's, which are many."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **options)
        groups = parser._action_groups
        first = groups.index(next(group for group in groups if group.title == "options")) + 1
        trainer, *middle, own = groups[first:]
        for group, title in zip((trainer, *middle), ("Lightning's Trainer", "The model", "The data"), strict=False):
            group.title = title
        own.title = f"Options of {subcommand}"
        groups[first:] = [own, *middle, trainer]
        return parser

    def _parse_ckpt_path(self) -> None:
        """Resume with the model that the command describes.

        Lightning 2.6 lets hyperparameters in the checkpoint override the command line, and takes those of a module
        that saves its own for arguments of the abstract LightningModule.
        """


class _CommandLine(TvaCLI):
    """`TvaCLI` as the command ``tva`` runs it: one subcommand, and mistakes in one sentence."""

    program = ("tva",)
    command: str

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        return {cls.command: super().subcommands()[cls.command]}

    def parse_arguments(self, parser: Any, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except OverflowError as error:  # of jsonargparse, which makes floats of integers
            raise ValueError(f"A number among the options is too large ({error}). Give a smaller one.") from error
        except ArgumentError as error:
            names = [action.dest for action in self._parser(self.command)._actions]
            raise ValueError(explain(error.message, self.command, names)) from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Any:
        if self.command == "fit" and not config.get("barebones"):
            given = config.get("callbacks") or []
            given = given if isinstance(given, list) else [given]
            config["callbacks"] = with_progress(given, config.get("enable_progress_bar") is not False)
        try:
            return super()._instantiate_trainer(config, callbacks)
        except (TypeError, ValueError, MisconfigurationException) as error:
            if "`devices`" in str(error) or "devices=" in str(error):
                raise ValueError(
                    f"--trainer.devices must be auto, a whole number of at least 1, or a list of the indices of GPUs; "
                    f"found {config['devices']!r}."
                ) from error
            raise ValueError(str(error)) from error  # the Trainer's words about its options


SAVED = "# lightning.pytorch=="  # how a configuration that LightningCLI saves begins


class _Described(Exception):
    """Carries a parser out of LightningCLI, which otherwise goes on to parse."""


class _DescribedCLI(_CommandLine):
    """Make the parser, and parse nothing."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise _Described(self._parser(self.command))


class _OpenedCLI(_CommandLine):
    """Keep what ``edit`` would get, and do not edit."""

    options: dict[str, Any]

    def edit(self, json: bool = False, datamodule: Any = None, **options: Any) -> None:
        self.options = options


def _check_config(file: Path) -> None:
    """Check that saving a fit's configuration replaces only one that a fit saved, and nobody's own.

    Raises:
        FileExistsError: It would.
    """
    if file.is_file():
        with file.open("rb") as opened:
            if not opened.readline().startswith(SAVED.encode()):
                raise FileExistsError(
                    f"The fit saves its configuration as {file}, where a file is that tva did not write. Move it, or "
                    f"give the fit a folder of its own: --trainer.default_root_dir FOLDER."
                )


class _SaveConfig(SaveConfigCallback):
    """Save a fit's configuration, also where the logger has no folder."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.save_to_log_dir = trainer.log_dir is not None
        _check_config(Path(trainer.log_dir or trainer.default_root_dir) / self.config_filename)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not self.save_to_log_dir:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, folder / CONFIG, skip_none=False, overwrite=True, multifile=self.multifile)


def open_edit(config: str | os.PathLike[str]) -> dict[str, Any]:
    """Make the trainer and what an edit gets, from a YAML file with its options, and do not edit.

    Returns:
        The trainer, the model, and the options of the edit (see `tva.edit.options.EditOptions`), by name.
    """
    with replaced_argv(["edit", "--config", os.fspath(config)]):
        cli = _make(_OpenedCLI, "edit")
    return {"trainer": cli.trainer, **cli.options}


def make_parser(command: str) -> Any:
    """Return the parser of a subcommand, such as ``"fit"``."""
    about = importlib.import_module(f"tva.cli.commands.{command}").HELP
    with replaced_argv([command]):
        try:
            _make(_DescribedCLI, command, about)
        except _Described as described:
            return described.args[0]


def run_lightning(command: str, words: Sequence[str], as_json: bool = False, about: str | None = None) -> bool:
    """Run a subcommand of LightningCLI; return whether a fit wrote all task vectors, if it does not end the process.

    Args:
        command: Such as ``"fit"``.
        words: The arguments after it.
        as_json: Print what was reached as JSON only.
        about: What the command does, for its help.
    """
    words = [
        f"{word}=true" if word in FLAGS and (not after or after.startswith("--")) else word
        for word, after in zip(words, [*words[1:], ""], strict=False)
    ]
    words += ["--json=true"] if as_json and command == "edit" else []
    aside = as_json and command != "edit"  # whose JSON the trainer prints
    with replaced_argv([command, *words]):
        with redirect_stdout(sys.stderr) if aside else nullcontext():
            trainer = _make(_CommandLine, command, about).trainer
        if aside and trainer.is_global_zero:
            print_json(trainer.describe_fit())
    vectors = [callback for callback in trainer.callbacks if isinstance(callback, tva.callbacks.TaskVectorCallback)]
    return not any(callback.failures for callback in vectors)


def _make(kind: type[_CommandLine], command: str, about: str | None = None) -> Any:
    check_configs(sys.argv[1:])
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that classes of one's own project can be named, as with python -m
    if command == "edit":
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
    # torch 2.15 and jsonargparse 4.49 deprecate calls that lightning 2.6.6 makes; its master no longer makes them
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning.*")
    # a tip to install another logger
    warnings.filterwarnings("ignore", message=r".*`tensorboardX` has been removed as a dependency.*")
    # TaskVectorCallback has written the base there already; a folder with checkpoints gets -v1, unless asked otherwise
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    try:
        return type(kind.__name__, (kind,), {"command": command})(
            trainer_defaults={
                "enable_progress_bar": sys.stderr.isatty(),
                **({"gradient_clip_val": 1.0} if command == "fit" else {}),
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            save_config_callback=_SaveConfig if command == "fit" else None,
            # With it on, every data module in the config but the first gets the first one's hyperparameters.
            load_from_checkpoint_support=False,
            parser_kwargs={
                "exit_on_error": False,
                "formatter_class": HelpFormatter,
                command: {
                    "usage": f"tva {command} [options]",
                    "exit_on_error": False,
                    "formatter_class": HelpFormatter,
                    **({"description": sentence(about)} if about else {}),
                },
            },
        )
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
