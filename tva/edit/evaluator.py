"""Evaluations of one model under many states: none is made twice, and all are recorded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Protocol

import lightning as L
from torch import Tensor

from tva.edit.editor import MAX_VECTORS, Editor, EditState
from tva.errors import HarnessError
from tva.evaluation.batch_cache import BatchCache, example_order
from tva.evaluation.evaluate import Part, evaluate, groups_of
from tva.evaluation.log import EvaluationLog, digest_of
from tva.evaluation.result import Evaluation, Split
from tva.models.network import measured_module
from tva.vectors.kind import kind_of
from tva.vectors.task_vector import TaskVector
from tva.version import __version__


class Elsewhere(Protocol):
    """What evaluates candidates in other processes; see `tva.edit.workers`."""

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
        """Return the evaluation of each state, which are all of candidates, as this process would have it."""


class Evaluator:
    """Evaluations made so far, so that none is made twice and all are recorded.

    Args:
        editor: Sets and evaluates the model.
        vectors: Task vectors by name.
        log: Evaluations of this and earlier runs.
        cache: Batches kept for later passes.
        extra: By task the names of metrics that the model may not log.

    Attributes:
        entries: One for each metric of each evaluation that was used, for the report.
        buffers: By task evaluated the buffers that the model made for it and does not save, such as its head.
        heads: By task evaluated what tells the model's head from others, where the model can tell.
        num_forward: Examples that went through the model in this run, each evaluation of one counted.
        workers: Evaluate candidates in other processes; None where this one does.
    """

    def __init__(
        self,
        editor: Editor,
        vectors: Mapping[str, TaskVector],
        log: EvaluationLog,
        cache: BatchCache,
        extra: Mapping[str, Sequence[str]],
    ) -> None:
        self.editor = editor
        self.vectors = vectors
        self.log = log
        self.cache = cache
        self.extra = extra
        self.entries: list[dict[str, Any]] = []
        self.num_forward = 0
        self._known: dict[tuple[Any, ...], Evaluation] = {}
        self._base: dict[tuple[str, Split], Evaluation] = {}
        self._checked: set[tuple[str, Split, bool]] = set()
        self.buffers: dict[str, dict[str, Tensor]] = {}
        self.heads: dict[str, str | None] = {}
        self._written = False
        self._modules: dict[str, L.LightningModule] = {}
        self.workers: Elsewhere | None = None

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What every evaluation of this run depends on."""
        model, trainer = getattr(self.editor.model, "wrapped", self.editor.model), self.editor.trainer
        return {
            "base": self.editor.fingerprint(self.editor.base).digest,
            "model": f"{type(model).__module__}.{type(model).__qualname__}",
            "kind": kind_of(model),
            "vectors": {
                name: self.editor.fingerprint({**vector.deltas, **vector.buffers}).digest
                for name, vector in self.vectors.items()
            },
            "precision": str(trainer.precision),
            "versions": {"tva": __version__, **{name: version(name) for name in ("torch", "lightning")}},
        }

    def module(self, task: str) -> L.LightningModule:
        """Return the module that evaluates the model on a task, the same in every pass."""
        if task not in self._modules:
            self._modules[task] = measured_module(self.editor.model, self.editor.datamodules[task])
        return self._modules[task]

    def base(self, task: str, split: Split) -> Evaluation:
        """Evaluate the base again in every run: what other evaluations are compared with, and the check of the log."""
        if (task, split) not in self._base:
            if self._written:
                self.editor.set(None, 0.0)
            found = evaluate(
                self.editor.trainer,
                self.module(task),
                self.editor.datamodules[task],
                split,
                cache=self.cache,
                extra=self.extra.get(task, ()),
                progress=f"the base on {task} ({split})",
            )
            self.num_forward += found.num_examples
            self.buffers[task] = self.editor.unsaved_buffers()
            self.heads[task] = getattr(self.editor.model, "head_digest", None)
            found = replace(found, groups=groups_of(self.editor.datamodules[task], split, found.num_examples))
            self._base[task, split] = found
            self._note("base", {"scaling_coef": 0.0}, task, split, found)
        return self._base[task, split]

    def of_base(self) -> dict[tuple[str, Split], Evaluation]:
        """Return the evaluations of the base so far, by task and split."""
        return dict(self._base)

    def sizes(self) -> dict[str, dict[str, int]]:
        """Return by task how many examples of each split were used."""
        found: dict[str, dict[str, int]] = {}
        for (task, split), evaluation in self._base.items():
            found.setdefault(task, {})[split] = evaluation.num_examples
        return found

    def data(self) -> dict[str, dict[str, str | None]]:
        """Return by task the hash of each split's batches, as the model got them."""
        found: dict[str, dict[str, str | None]] = {}
        for (task, split), evaluation in self._base.items():
            found.setdefault(task, {})[split] = evaluation.data_digest
        return found

    def finetuned(self, tasks: Iterable[str], split: Split) -> dict[str, Evaluation]:
        """Evaluate the models that were fine-tuned on tasks, each on its own task, statistics included."""
        found = {}
        for task in tasks:
            state = EditState(
                f"fine-tuned on {task}", task, (("scaling_coef", 1.0),), lambda task=task: self.vectors[task], "delta"
            )
            found[task] = self([state], [task], split)[0][task]
        return found

    def __call__(
        self,
        states: Sequence[EditState],
        tasks: Iterable[str],
        split: Split,
        ranges: Mapping[str, tuple[int, int]] | None = None,
        seed: int | None = None,
    ) -> list[dict[str, Evaluation]]:
        """Evaluate states on tasks, each batch under all states before the next is read.

        Args:
            states: Those that were evaluated before, in this run or one that left its log, are not evaluated again.
            tasks: Names of data modules.
            split: Split of the data.
            ranges: By task the first and last + 1 example of the order that ``seed`` gives; all without it.
            seed: None is the data set's own order.

        Raises:
            HarnessError: Coefficient 0 did not reproduce the base.
        """
        results: list[dict[str, Evaluation]] = [{} for _ in states]
        for task in tasks:
            base = self.base(task, split)
            window = (ranges or {}).get(task, (0, base.num_examples))
            whole = window == (0, base.num_examples) and seed is None
            missing: dict[tuple[Any, ...], EditState] = {}
            for state, result in zip(states, results, strict=True):
                if state.scaling_coef == 0 and whole:
                    result[task] = base
                    continue
                key = (*state.key, task, split, window, seed)
                if key not in self._known:
                    facts = self._describe(state, task, split, window, seed)
                    logged = self.log.get(facts) if _is_kept(base) else None
                    if logged is None:
                        missing[key] = state
                    else:
                        logged = self._known[key] = self._grouped(logged, base, window, seed)
                        self._note(state.label, dict(state.coefs), task, split, logged, window, seed)
            for keys in _chunks(missing):
                self._evaluate({key: missing[key] for key in keys}, task, split, window, seed, whole)
            for state, result in zip(states, results, strict=True):
                if task not in result:
                    key = (*state.key, task, split, window, seed)
                    result[task] = self._known[key]
        return results

    def _evaluate(
        self,
        states: Mapping[tuple[Any, ...], EditState],
        task: str,
        split: Split,
        window: tuple[int, int],
        seed: int | None,
        whole: bool,
    ) -> None:
        base = self._base[task, split]
        ordered = list(states.values())
        workers = self.workers if all(state.candidate is not None for state in ordered) else None
        check = whole and (task, split, workers is not None) not in self._checked  # workers prove themselves
        if check:  # last, so that other weights were in place before it in every batch
            ordered.append(ordered[-1].at_zero(self.editor.statistics))
        part = None if whole else (window, seed)
        progress = f"{len(states)} edit{'s' if len(states) > 1 else ''} on {task} ({split})"
        if workers is not None:
            found = workers.evaluate(self, ordered, task, split, part, base, progress)
        else:
            found = self.measure(ordered, task, split, part, base.shareable, base.computed, progress=progress)
        self.num_forward += sum(evaluation.num_examples for evaluation in found)
        if check:
            self._checked.add((task, split, workers is not None))
            check_identity(found.pop(), base, task, split, workers is not None)
        for (key, state), evaluation in zip(states.items(), found, strict=True):
            evaluation = self._known[key] = self._grouped(evaluation, base, window, seed)
            self._note(state.label, dict(state.coefs), task, split, evaluation, window, seed)
            if _is_kept(base):
                self.log.add(self._describe(state, task, split, window, seed), evaluation)

    def measure(
        self,
        states: Sequence[EditState],
        task: str,
        split: Split,
        part: Part | None,
        share: bool,
        extra: Sequence[str],
        **others: Any,
    ) -> Any:
        """Evaluate states here, whether they were evaluated before or not; ``others`` are options of `evaluate`."""
        edits: list[Callable[[], None]] = []
        for state in states:
            if state.remake and state.statistics != "reestimate":
                edits.append(functools.partial(self._set_remade, state))
                continue
            edits.append(functools.partial(self.editor.set, state.vector(), state.scaling_coef, state.statistics))
            if state.statistics == "reestimate":
                edits[-1]()  # estimate now rather than between two batches
        self._written = True
        return evaluate(
            self.editor.trainer,
            self.module(task),
            self.editor.datamodules[task],
            split,
            edits=edits,
            share=share,
            cache=self.cache,
            part=part,
            extra=extra,
            reference=functools.partial(self.editor.set, None, 0.0),
            **others,
        )

    @staticmethod
    def _grouped(evaluation: Evaluation, base: Evaluation, window: tuple[int, int], seed: int | None) -> Evaluation:
        """Return an evaluation of a part of the base's examples with their groups."""
        if base.groups is None:
            return evaluation
        rows = example_order(base.num_examples, seed)[slice(*window)].numpy()
        return replace(evaluation, groups=base.groups[rows])

    def _set_remade(self, state: EditState) -> None:
        self.editor.set(state.vector(), state.scaling_coef, state.statistics)

    def _describe(
        self, state: EditState, task: str, split: Split, window: tuple[int, int], seed: int | None
    ) -> dict[str, Any]:
        base = self._base[task, split]
        datamodule = self.editor.datamodules[task]
        settings = getattr(datamodule, "tva_settings", None)
        return {
            **self.facts,
            "recipe": state.recipe,
            "coefficients": dict(state.coefs),
            "statistics": state.statistics,
            "task": task,
            "data": {"digest": base.data_digest, "revision": getattr(datamodule, "revision", None)}
            | ({"settings": settings} if settings else {}),
            "split": split,
            "range": [*window, seed],
            "base_result": digest_of(base),
        }

    def _note(
        self,
        label: str,
        coefs: Mapping[str, Any],
        task: str,
        split: Split,
        evaluation: Evaluation,
        window: tuple[int, int] | None = None,
        seed: int | None = None,
    ) -> None:
        window = window or (0, evaluation.num_examples)
        self.entries += [
            {
                "model": label,
                "coefficients": dict(coefs),
                "task": task,
                "split": split,
                "num_examples": evaluation.num_examples,
                "range": [*window, seed],
                "metric": metric,
                "value": value,
                **dict(zip(("low", "high"), evaluation.quick_interval(metric) or (), strict=False)),
            }
            for metric, value in evaluation.metrics.items()
        ]


def _is_kept(base: Evaluation) -> bool:
    """Return whether the log holds all of an evaluation: predictions, of which others are computed, are not in it."""
    return base.scores.keys() >= set(base.computed)


def _chunks(missing: Mapping[tuple[Any, ...], EditState]) -> Iterator[list[tuple[Any, ...]]]:
    """Split states so that few task vectors are held at once; those of one vector stay together."""
    by_vector: dict[Any, list[tuple[Any, ...]]] = {}
    remade = [key for key, state in missing.items() if state.remake and state.statistics != "reestimate"]
    if remade:
        yield remade
    for key, state in missing.items():
        if key in remade:
            continue
        of_vector = tuple((name, repr(value)) for name, value in state.coefs if name != "scaling_coef")
        by_vector.setdefault((state.recipe, of_vector), []).append(key)
    groups = list(by_vector.values())
    for start in range(0, len(groups), MAX_VECTORS):
        yield [key for group in groups[start : start + MAX_VECTORS] for key in group]


def check_identity(found: Evaluation, base: Evaluation, task: str, split: str, on_workers: bool = False) -> None:
    """Check that coefficient 0 gave the base's scores, bit for bit.

    Args:
        found: What it gave.
        base: The base's.
        task: Of the task.
        split: Of the split.
        on_workers: Whether other processes may have evaluated it.

    Raises:
        HarnessError: It did not.
    """
    if found.same_as(base):
        return
    odd = [
        f"{name} {base.metrics[name]!r} and then {value!r}"
        for name, value in found.metrics.items()
        if value != base.metrics.get(name)
    ] or ["the same means of other scores by example"]
    raise HarnessError(
        f"An edit with coefficient 0 must score exactly as the base, but on {task} ({split}) it did not: "
        f"{', '.join(odd[:3])}. So what is measured is not only the edit: look for randomness in the evaluation step, "
        f"the data or the function that evaluates, and for state outside the state dict"
        f"{', and give all workers the processor of this process' if on_workers else ''}. Nothing was written."
    )
