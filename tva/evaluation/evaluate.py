"""Evaluate one model, or many edits of it at once, on a task through the Trainer, with the scores of every example."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.model_helpers import is_overridden

from tva.console import counting
from tva.errors import some
from tva.evaluation.batch_cache import BatchCache, Turns, through_cache
from tva.evaluation.measures import FunctionTask, measures_of
from tva.evaluation.metrics import KL
from tva.evaluation.ranks import check_strategy, gather, in_turn, is_sharded
from tva.evaluation.recorder import Recorder, Share, recording, step_name
from tva.evaluation.result import Evaluation, Split

Part = tuple[tuple[int, int], int | None]  # (first, last + 1) examples of an order, and the order's seed


def evaluate(
    trainer: L.Trainer,
    model: L.LightningModule,
    datamodule: L.LightningDataModule,
    split: Split,
    *,
    edits: Sequence[Callable[[], None]] | None = None,
    share: bool = True,
    cache: BatchCache | None = None,
    part: Part | None = None,
    extra: Sequence[str] = (),
    reference: Callable[[], None] | None = None,
    progress: str | None = None,
    keep_preds: bool = False,
    turn: tuple[int, int] | None = None,
) -> Any:
    """Evaluate a model, or several edits of it, on one split of a task.

    With several edits every batch is read once, and evaluated under each edit before the next is read, where the model
    logs all its metrics in its step; else the edits are evaluated one after the other. The processes of a Trainer with
    several devices share the batches out, and all return the same evaluation of all examples, each counted once.

    Args:
        trainer: Any Trainer; its callbacks take part.
        model: Any LightningModule with a ``validation_step`` (or ``test_step``) that logs its metrics. The step may
            return ``correct`` (batch,) or ``scores``, a mapping from metric names to (batch,) scores; and ``preds``
            (batch, classes) with ``target`` (batch,) for metrics that it does not log.
        datamodule: The task.
        split: ``"val"`` to choose on, ``"test"`` to report on.
        edits: Functions, each of which sets the model to one state; by default it is evaluated as it is. It is left in
            the last state.
        share: Whether the model allows the shared pass, as `Evaluation.shareable` of its base says.
        cache: Keeps batches for later passes.
        part: Evaluate a part of the examples.
        extra: Names of torchmetrics metrics to compute from ``preds`` and ``target``, where the model does not log
            them; ``kl`` is the divergence of predictions from those of ``reference``.
        reference: Puts the model into its base, which ``kl`` of edits is measured against; needed only for that.
        keep_preds: Keep ``preds`` and ``target`` of all examples in the evaluation.
        progress: What is written before a progress bar on a terminal; None draws none.
        turn: Place among several processes that do not know each other, and their number: evaluate only the batches of
            this place, and return what was recorded of them, for `put_together`.

    Returns:
        An `Evaluation`, or a list with one for each edit. Metrics have their last name: ``val/mnist/accuracy`` and
        ``val_accuracy`` are both ``accuracy``.

    Raises:
        ValueError: The step logged nothing, or two metrics of one name; or scores by example contradict a metric; or
            several processes cannot share the task.
    """
    check_strategy(trainer)
    if isinstance(datamodule, FunctionTask):
        network = getattr(model, "bare_network", model)
        return datamodule.evaluate_edits(network, split, trainer.strategy.root_device, edits, part)
    if KL in extra and edits is not None and not share:
        raise ValueError(
            f"The metric {KL!r} compares edits with the base batch by batch, but {type(model).__name__} logs metrics "
            f"outside its {step_name(split)}, so that its edits are evaluated one after the other. Log in the step."
        )
    if edits is not None and not share:
        options = {"cache": cache, "part": part, "extra": extra, "progress": progress, "keep_preds": keep_preds}
        results = []
        for edit in edits:
            edit()
            results.append(evaluate(trainer, model, datamodule, split, **options))
        return results
    measures = measures_of(model) | measures_of(datamodule)
    extra = [name for name in extra if name not in measures]
    recorders = [Recorder(edits is None, extra, measures, keep_preds) for _ in edits or [None]]
    device, turns = trainer.strategy.root_device, Turns(even=is_sharded(trainer.strategy))
    with (
        quiet(),
        counting(progress if trainer.is_global_zero else None) as count,
        recording(model, split, recorders, edits, count, reference if KL in extra else None, turns),
        through_cache(
            datamodule, split, cache, device, part, *(turn or (trainer.global_rank, trainer.world_size)), turns=turns
        ),
    ):
        run = trainer.validate if split == "val" else trainer.test
        results = run(model, datamodule=datamodule, verbose=False)
        if turn is not None:
            return [recorder.share() for recorder in recorders]
        own = recorders[0].means()
        for recorder, shares in zip(
            recorders, zip(*gather(trainer, [r.batches for r in recorders]), strict=True), strict=True
        ):
            recorder.batches = in_turn(list(shares))
        logged = [recorder.logged() for recorder in recorders] if edits is not None else []
    if edits is not None:
        return [
            recorder.evaluation(model, split, values, True, extra)
            for recorder, values in zip(recorders, logged, strict=True)
        ]
    by_lightning = dict(results[0]) if results else {}
    recorder = recorders[0]
    ours = recorder.means()
    ours |= {name: by_lightning[name] for name in recorder.metrics if name in by_lightning}
    late = sorted(by_lightning.keys() - ours.keys())
    if late and trainer.world_size > 1:
        raise ValueError(
            f"{type(model).__name__} logs {some(late)} outside its {step_name(split)}, where {trainer.world_size} "
            f"processes know only their own examples. Log in the step, or use a Trainer with devices=1."
        )
    agree = ours.keys() == by_lightning.keys() and all(
        # of several processes Lightning gives the mean of all, or this one's, as the model says
        np.isclose([ours[name], own.get(name, ours[name])], by_lightning[name], rtol=1e-4, equal_nan=True).any()
        for name in ours
    )
    hooks = ("start", "end", "batch_start", "batch_end")
    stage = "validation" if split == "val" else "test"
    names = [f"on_{stage}_{'epoch_' if 'batch' not in hook else ''}{hook}" for hook in hooks]
    shareable = all(gather(trainer, agree)) and not any(is_overridden(name, model) for name in names)
    values = ours if shareable or trainer.world_size > 1 else by_lightning
    return recorder.evaluation(model, split, values, shareable, extra)


def groups_of(datamodule: Any, split: Split, num_examples: int) -> np.ndarray | None:
    """Return the group of each example, as numbers from 0, where groups are the independent draws and not examples.

    Args:
        datamodule: One with a method ``example_groups(split)``, which returns a label for each example in the loader's
            order, or None; as `tva.data.task.Task` has.
        split: The split.
        num_examples: Examples that were evaluated, the first ones.

    Returns:
        Shape (examples,); None where no groups are known, or every example is one of its own.

    Raises:
        ValueError: There are fewer labels than examples.
    """
    labels = getattr(datamodule, "example_groups", lambda split: None)(split)
    if labels is None:
        return None
    if len(labels) < num_examples:
        raise ValueError(
            f"{type(datamodule).__name__}.example_groups({split!r}) must return a label for each of the "
            f"{num_examples:,} examples of its loader; found {len(labels):,}."
        )
    groups = np.unique(np.asarray(labels)[:num_examples], return_inverse=True)[1]
    return None if groups.max(initial=-1) + 1 == num_examples else groups


def put_together(
    model: L.LightningModule,
    datamodule: L.LightningDataModule,
    split: Split,
    turns: Sequence[Sequence[Share]],
    extra: Sequence[str] = (),
) -> list[Evaluation]:
    """Return the evaluation of each edit from the records of all processes, equal to that of a single process."""
    measures = measures_of(model) | measures_of(datamodule)
    extra = [name for name in extra if name not in measures]
    found = []
    for shares in zip(*turns, strict=True):
        recorder = Recorder(False, extra, measures)
        recorder.put_together(shares)
        found.append(recorder.evaluation(model, split, recorder.logged(), True, extra))
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's messages about each of many short evaluations."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
            # what several processes log is put together here
            warnings.filterwarnings("ignore", message=r".*It is recommended to use `self.log\(.*sync_dist=True\)`.*")
            warnings.filterwarnings("ignore", message=r".*recommended to use .*devices=1.* to ensure each sample.*")
            # torch 2.15 deprecates a call that lightning 2.6.6 makes at every evaluation
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
            yield
    finally:
        logger.setLevel(level)
