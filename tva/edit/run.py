"""One edit from end to end: open it, choose the coefficients, prove it on test data, write it if it holds."""

import sys
import warnings
from dataclasses import replace
from typing import Any

import lightning as L

from tva.checkpoints import canonical_state_dict
from tva.console import begin_pace
from tva.edit.folder import check_output, check_writable
from tva.edit.form import Form, undo_name
from tva.edit.gate import prove
from tva.edit.loggers import log_edit, without_loggers
from tva.edit.notes import lacking_on_test, shown_on_test
from tva.edit.options import EditOptions, Goal
from tva.edit.session import EditSession, open_session
from tva.edit.sharded import ShardedModel, set_up
from tva.edit.sharded_editor import check_supported
from tva.edit.training_context import training_context
from tva.edit.workers import open_workers
from tva.edit.write import build_report, write_edit
from tva.evaluation.ranks import check_strategy, is_sharded
from tva.models.network import as_module
from tva.report.edit_report import EditReport
from tva.search import Candidate, Choice, Given


def run_edit(trainer: L.Trainer, model: Any, options: EditOptions) -> EditReport:
    """Edit a model, validate the edit on control tasks, and write it if the constraints hold.

    The coefficients are chosen on validation data; what is reported, and what decides, is test data. An edit with
    coefficient 0 is evaluated too, and must score exactly as the base.

    Args:
        trainer: Any Trainer.
        model: What `tva.models.network.as_module` takes; its weights are the base unless ``base`` is given. Left with
            the edited weights.
        options: What to do.

    Returns:
        The report, also printed by the command line. ``report.holds`` is the verdict. If no coefficient met the
        constraints on validation data, it describes the closest one, on those data.

    Raises:
        HarnessError: Coefficient 0 did not reproduce the base's scores; nothing was written.
        ValueError: Options, model, base or vectors do not fit together; nothing was written.
        FileNotFoundError: A checkpoint or data file is missing.
    """
    check_strategy(trainer)
    begin_pace()
    module = as_module(model)
    goal = without_head(options, module).checked()
    for task in options.tasks.values():  # a file that is missing is reported before anything is evaluated
        getattr(task, "check_files", lambda: None)()
    if is_sharded(trainer.strategy):
        check_supported(goal, module, trainer.strategy)
    with set_up(trainer, module, next(iter(options.tasks.values()))) as sharded:
        return _run(trainer, module, goal, sharded)


def _run(trainer: L.Trainer, module: L.LightningModule, goal: Goal, sharded: ShardedModel | None) -> EditReport:
    options = goal.options
    live = canonical_state_dict(module.state_dict()) if sharded is None else sharded.lazy()
    form = Form.of(module, options.base, options.format, live)
    inputs = [*options.inputs, *goal.recipe.files, *([form.source] if form.source else [])]
    undo = [undo_name(form)] if options.keep_undo else []
    check_output(options.folder, inputs, [*form.files(live), *undo])
    if trainer.world_size == 1:  # of several processes only the first must be able to
        check_writable(options.folder)
    with without_loggers(trainer) as loggers, open_workers(trainer, module, goal) as workers:
        session = open_session(trainer, module, goal, form=form, sharded=sharded)
        session.evaluator.workers = workers
        if not goal.is_given:  # what is wrong in the name of a metric is reported before the longer test data are read
            for task in goal.needed:
                session.evaluator.base(task, "val")
        _say_what_can_be_shown(session)
        outcome = prove(session, choose(session))
    live = session.editor.state()
    report = write_edit(build_report(outcome, live), outcome, live)
    if trainer.is_global_zero and loggers:
        log_edit(loggers, report.to_json(), options.folder)
    return report


def _say_what_can_be_shown(session: EditSession) -> None:
    """Say before the search what the test data suffice for; every rank evaluates the base, the first one speaks."""
    lacking, shown = lacking_on_test(session), shown_on_test(session)
    trainer = session.editor.trainer
    if not trainer.is_global_zero:
        return
    for sentence in lacking:
        warnings.warn(f"{sentence[0].upper()}{sentence[1:]}.", stacklevel=4)
    if getattr(trainer, "command", None):
        for sentence in shown:
            print(f"tva: {sentence}", file=sys.stderr)


def without_head(options: EditOptions, model: L.LightningModule) -> EditOptions:
    """Return options that leave the model's head out of the edit, where the model says so (``edit_head``)."""
    patterns = getattr(model, "head_patterns", None)
    if not patterns:
        return options
    given = [options.exclude] if isinstance(options.exclude, str) else list(options.exclude or [])
    return replace(options, exclude=[*given, *patterns])


def choose(session: EditSession) -> Choice:
    """Choose the coefficients on validation data, if they are not given."""
    search = session.goal.search
    if isinstance(search, Given):
        return search.run()

    def is_identity(candidate: Candidate) -> bool:
        vector = None if candidate.scaling_coef == 0 else session.state_of(candidate).vector()
        return vector is None or not session.editor.moves(vector)

    problem = session.problem(
        lambda candidates: [session.state_of(candidate) for candidate in candidates],
        is_identity,
        lambda: training_context(session),
    )
    choice = search.run(problem)
    return replace(choice, details={"num_scored": problem.num_scored, **choice.details})
