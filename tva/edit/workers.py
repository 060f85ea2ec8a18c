"""Evaluate candidates in several processes, each of which opens the same edit once and takes some of the batches.

A batch is the same in every process, and results are put together in the order of the batches: so they do not depend
on the number of workers, and an edit with coefficient 0 must score in them exactly as the base did in the first
process.
"""

import contextlib
import functools
import hashlib
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from tva.console import progress
from tva.edit.editor import EditState
from tva.edit.evaluator import Evaluator
from tva.edit.options import EditOptions, Goal
from tva.edit.session import EditSession, open_session
from tva.evaluation.evaluate import Part, put_together
from tva.evaluation.log import EvaluationLog
from tva.evaluation.measures import FunctionTask
from tva.evaluation.result import Evaluation, Split
from tva.executors import Executor, Worker, make_executor
from tva.search import Candidate, Learned


@dataclass(frozen=True)
class Pass:
    """What one call evaluates.

    Attributes:
        candidates: Whose states are evaluated.
        task: On which task.
        split: On which split.
        part: See `tva.evaluation.evaluate.evaluate`.
        share: Likewise.
        extra: Likewise.
        turn: Likewise; None evaluates all batches.
    """

    candidates: tuple[Candidate, ...]
    task: str
    split: Split
    part: Part | None
    share: bool
    extra: tuple[str, ...]
    turn: tuple[int, int] | None = None


class Workers:
    """Evaluates candidates in other processes.

    Args:
        executor: Runs them.
        file: The edit, which every worker opens.
        digest: SHA-256 of the file.
    """

    def __init__(self, executor: Executor, file: Path, digest: str) -> None:
        self.executor, self.file, self.digest = executor, file, digest

    def evaluate(
        self,
        evaluator: Evaluator,
        states: Sequence[EditState],
        task: str,
        split: Split,
        part: Part | None,
        base: Evaluation,
        progress_text: str,
    ) -> list[Evaluation]:
        """Return the evaluation of each state.

        Workers share out the batches where the model's metrics can be put together exactly, else the states.
        """
        editor = evaluator.editor
        datamodule, trainer = editor.datamodules[task], editor.trainer
        candidates = tuple(state.candidate for state in states if state.candidate is not None)
        num_examples = base.num_examples if part is None else part[0][1] - part[0][0]
        limit = trainer.limit_val_batches if split == "val" else trainer.limit_test_batches
        count = evaluator.cache.num_batches(datamodule, split, num_examples)
        if not base.splittable or isinstance(datamodule, FunctionTask) or limit != 1.0:
            count = 1
        whole = Pass(candidates, task, split, part, base.shareable, base.computed)
        num = min(self.executor.num_workers, count if count > 1 else len(states))
        if count > 1:
            passes = [replace(whole, turn=(place, num)) for place in range(num)]
        else:
            passes = [replace(whole, candidates=candidates[place::num]) for place in range(num)]
        found = self._run(passes, evaluator.facts, progress_text)
        if count > 1:
            return put_together(evaluator.module(task), datamodule, split, found, base.computed)
        return [found[place % num][place // num] for place in range(len(states))]

    def _run(self, passes: Sequence[Pass], facts: dict[str, Any], progress_text: str) -> list[Any]:
        function = functools.partial(
            evaluate_pass, file=self.file, digest=self.digest, facts=facts, threads=torch.get_num_threads()
        )
        found = {}
        with contextlib.closing(self.executor.run(function, passes)) as ended:
            for (one, result), _ in zip(ended, progress(passes, progress_text), strict=True):
                if isinstance(result, Exception):
                    raise result
                found[passes.index(one)] = result
        return [found[place] for place in range(len(passes))]


def evaluate_pass(one: Pass, worker: Worker, file: Path, digest: str, facts: dict[str, Any], threads: int) -> list[Any]:
    """Evaluate candidates in this process.

    Returns:
        For each its evaluation, or what was recorded of the batches of this turn.

    Raises:
        ValueError: The edit is another one here than in the first process.
    """
    torch.set_num_threads(threads)  # sums over threads differ in the last bits
    session = _open(str(file), digest)
    mine = dict(session.evaluator.facts)
    mine["model"] = mine["model"].replace("__mp_main__", "__main__")  # a script's, as multiprocessing loads it
    odd = [f"{name} {mine[name]} here, {facts[name]} there" for name in facts if mine[name] != facts[name]]
    if odd:
        raise ValueError(
            f"{worker.name} opens another edit than the command: {'; '.join(odd[:3])}. All must read the same "
            f"files with the same versions of torch and lightning."
        )
    states = [session.state_of(candidate) for candidate in one.candidates]
    evaluator = session.evaluator
    return evaluator.measure(states, one.task, one.split, one.part, one.share, one.extra, turn=one.turn)


@functools.lru_cache(maxsize=1)
def _open(file: str, digest: str) -> EditSession:
    data = Path(file).read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(
            f"{file} is not what the command wrote. Give an output in a folder that only you can write to."
        )
    trainer, model, options = pickle.loads(data)
    if trainer.progress_bar_callback is not None:
        trainer.progress_bar_callback.disable()
    return open_session(trainer, model, options.checked(), EvaluationLog(None))


@contextlib.contextmanager
def open_workers(trainer: L.Trainer, model: L.LightningModule, goal: Goal) -> Iterator[Workers | None]:
    """Start what evaluates candidates, or nothing where the engine is ``local``: this process.

    Args:
        trainer: Trainer of the edit.
        model: The model, before it is edited.
        goal: What the edit is asked to do.

    Raises:
        ValueError: The engine cannot be had, or the edit cannot be sent to other processes.
    """
    options = goal.options
    if options.engine == "local":
        yield None
        return
    if trainer.world_size > 1 or isinstance(goal.search, Learned):
        what = "search Learned trains by the Trainer" if trainer.world_size == 1 else "the Trainer has several devices"
        raise ValueError(
            f"The engine {options.engine!r} spreads candidates over processes with one device each, and {what}. Leave "
            f"engine out, or {'--trainer.devices' if trainer.world_size > 1 else 'take another search'}."
        )
    gpu = trainer.strategy.root_device.type != "cpu"
    per_call = {"cpus": 1, "gpus": 1} if gpu else {"cpus": torch.get_num_threads()}
    if options.engine.startswith("local"):
        executor = make_executor(options.engine, devices=None if gpu else "cpu", processes=True)
    else:
        executor = make_executor(options.engine, per_call=per_call)
    file = options.folder.with_name(f".{options.folder.name}.workers")
    with contextlib.closing(executor):
        executor.check(file.absolute().parent)
        data = _pickled(trainer, model, options)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # of a run that was killed
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
            opened.write(data)
        try:
            yield Workers(executor, file.absolute(), hashlib.sha256(data).hexdigest())
        finally:
            file.unlink(missing_ok=True)


def _pickled(trainer: L.Trainer, model: L.LightningModule, options: EditOptions) -> bytes:
    try:
        return pickle.dumps((trainer, model, options))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The engine {options.engine!r} sends model, data and Trainer to other processes, which cannot be done: "
            f"{error}. Define them at the top of a module that can be imported, or leave engine out."
        ) from error
