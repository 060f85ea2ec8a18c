"""Tasks of EleutherAI's lm-evaluation-harness as targets and controls of an edit."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tva.errors import some
from tva.evaluation.measures import FunctionTask
from tva.evaluation.result import Split

PREFIX = "lm_eval:"


class LmEvalTask(FunctionTask):
    """A task of lm-evaluation-harness, with its own prompts and metrics, on a causal language model of transformers.

    The harness evaluates a task's test documents, or its validation documents where it has no others. They are shared
    out by ``seed``: half to choose on, half to report on. Metrics have the harness's names, such as ``acc`` and
    ``acc_norm``, of another filter than ``none`` with its name behind: ``exact_match_strict-match``. Those that are a
    mean over documents have scores by document, and so intervals.

    Args:
        task: Name of one task of the harness, with or without ``lm_eval:`` before it; no group.
        include_path: Folder with further task files of your own.
        num_fewshot: Examples in the prompt; by default the task's own number.
        tokenizer: Folder or hub name of the tokenizer; by default that of the model's folder.
        seed: Of the halves, and of the harness's examples in prompts.
        limit_val: Choose on at most this many documents.
        limit_test: Report on at most this many documents.
        batch_size: Requests at a time.

    Raises:
        ValueError: lm-eval is not installed, or has no such task.
    """

    def __init__(
        self,
        task: str,
        include_path: str | None = None,
        num_fewshot: int | None = None,
        tokenizer: str | None = None,
        seed: int = 0,
        limit_val: int | None = None,
        limit_test: int | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(self._scores)
        self.task, self.num_fewshot, self.tokenizer = task.removeprefix(PREFIX), num_fewshot, tokenizer
        self.include_path = None if include_path is None else os.path.expandvars(os.path.expanduser(include_path))
        self.seed, self.batch_size = seed, batch_size
        self.limits = {"val": limit_val, "test": limit_test}
        self.higher_is_better: dict[str, bool] = {}
        known = list(self._manager.all_subtasks)
        if self.task not in known:
            raise ValueError(
                f"lm-eval must have a task {self.task!r}, no group; it has {len(known)} tasks, such as "
                f"{some(known, 5)}. `lm_eval ls tasks` lists them; include_path adds a folder of your own."
            )

    @property
    def tva_settings(self) -> dict[str, Any]:
        """What the numbers depend on besides documents and weights; ``edit.json`` has it."""
        from importlib.metadata import version

        settings = {name: getattr(self, name) for name in ("task", "num_fewshot", "seed")}
        return {**settings, "harness": f"lm_eval {version('lm_eval')}"}

    @property
    def _manager(self) -> Any:
        return _manager_of(self.include_path)

    @functools.cached_property
    def _documents(self) -> dict[str, list[int]]:
        (loaded,) = self._manager.load([self.task])["tasks"].values()
        order = np.random.default_rng(self.seed).permutation(len(list(loaded.eval_docs)))
        if len(order) < 2:
            raise ValueError(f"{self.task} must have at least 2 documents, to choose and to report on; it has {order}.")
        halves = {"val": order[: len(order) // 2], "test": order[len(order) // 2 :]}
        return {split: sorted(map(int, rows[: self.limits[split]])) for split, rows in halves.items()}

    def _scores(self, network: Any, split: Split) -> dict[str, Any]:
        with _apart():
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer or network.name_or_path)
            model = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=self.batch_size)
            found = simple_evaluate(
                model,
                tasks=[self.task],
                num_fewshot=self.num_fewshot,
                samples={self.task: self._documents[split]},
                bootstrap_iters=0,
                task_manager=self._manager,
                random_seed=self.seed,
                numpy_random_seed=self.seed,
                torch_random_seed=self.seed,
                fewshot_random_seed=self.seed,
            )
        directions = found["higher_is_better"].get(self.task, {})
        scores: dict[str, Any] = {}
        for key, value in found["results"][self.task].items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            name = metric if chosen == "none" else f"{metric}_{chosen}"
            by_document = _by_document(found["samples"][self.task], metric, chosen)
            mean = by_document is not None and np.isclose(np.mean(by_document), value, rtol=1e-6)
            scores[name] = by_document if mean else float(value)
            if directions.get(metric) is not None:
                self.higher_is_better[name] = bool(directions[metric])
        return scores

    def evaluate(self, network: Any, split: Split) -> Any:
        """Evaluate a model by the harness."""
        from dataclasses import replace

        found = super().evaluate(network, split)
        return replace(found, higher_is_better=dict(self.higher_is_better))


@functools.cache
def _manager_of(include_path: str | None) -> Any:
    """Return the harness's index of task files, which takes long to make and is the same for all tasks."""
    _import()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _by_document(samples: Sequence[Mapping[str, Any]], metric: str, chosen: str) -> np.ndarray | None:
    rows = sorted((row for row in samples if row.get("filter", "none") == chosen), key=lambda row: row["doc_id"])
    values = [row.get(metric) for row in rows]
    if not values or not all(isinstance(value, (bool, int, float)) for value in values):
        return None
    found = np.array(values, dtype=np.float64)
    return found.astype(bool) if np.isin(found, (0, 1)).all() else found


def _import() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError("Tasks of lm-evaluation-harness need the package: pip install 'tva[lm-eval]'.") from error


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Keep the harness's seeds, warnings and log to itself."""
    states, log = (random.getstate(), np.random.get_state()), logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        random.setstate(states[0])
        np.random.set_state(states[1])
