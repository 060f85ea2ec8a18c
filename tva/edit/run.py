"""One edit from end to end: compose task vectors, choose the coefficients, apply them, prove the edit on test data."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from tva.arithmetic import check_same
from tva.checkpoints import (
    Info,
    LazyWeights,
    atomic_path,
    canonical_state_dict,
    fingerprint,
    open_finetuned,
    open_weights,
)
from tva.checkpoints.lazy import InMemory
from tva.compose.apply import write_undo
from tva.compose.engine import Composer
from tva.compose.recipe import Recipe
from tva.compose.record import Record
from tva.compose.undo import undo_path
from tva.edit.baselines import Baseline, run_baselines
from tva.edit.diagnostics import Diagnosis, recipe_numbers, run_diagnostics
from tva.edit.editor import Bench, Editor, State, Statistics
from tva.edit.outcome import Finished
from tva.errors import some
from tva.evaluation.batch_cache import BatchCache, Place
from tva.evaluation.log import EvaluationLog
from tva.evaluation.ranks import check_strategy
from tva.evaluation.result import Evaluation, Split
from tva.models.tangent import check_at_base
from tva.report.edit_report import ConstraintReport, EditReport, Score, TaskReport, stamp, write_report
from tva.report.model_card import check_card
from tva.report.run_files import EDITED
from tva.search import (
    NORMALIZED,
    SCALING,
    Candidate,
    Choice,
    Constraint,
    Grid,
    Objective,
    Problem,
    Rule,
    Search,
    score,
)
from tva.search.base import constraint_slack
from tva.search.learned import Workshop
from tva.sizes import parse_bytes
from tva.vectors.header import Origin, is_vector_file
from tva.vectors.kind import KEY, check_kinds, kind_of
from tva.vectors.lazy import LazyTaskVector
from tva.vectors.task_vector import TaskVector
from tva.version import __version__


def run_edit(
    trainer: L.Trainer,
    model: L.LightningModule,
    *,
    vectors: Mapping[str, str | os.PathLike[str]],
    recipe: str,
    output: str | os.PathLike[str],
    targets: dict[str, L.LightningDataModule] | None = None,
    controls: dict[str, L.LightningDataModule] | None = None,
    base: str | os.PathLike[str] | None = None,
    coefs: dict[str, float] | None = None,
    scaling_coef: float | None = None,
    search: Search | None = None,
    rule: Rule = "best",
    minimize: str | None = None,
    maximize: str | None = None,
    subject_to: list[str] | None = None,
    confidence: float | None = None,
    statistics: Statistics = "keep",
    random_seed: int | None = 0,
    baselines: list[Baseline] | None = None,
    diagnostics: list[Diagnosis] | None = None,
    joint: str | os.PathLike[str] | None = None,
    log: str | os.PathLike[str] | None = None,
    cache: str = "1GiB",
    cache_in: Place = "memory",
    allow_other_base: bool = False,
    keep_undo: bool = False,
    allow_other_kind: bool = False,
) -> EditReport:
    """Edit a model, validate the edit on control tasks, and write it if the constraints hold.

    The coefficients are chosen on validation data; what is reported, and what decides, is test data. An edit with
    coefficient 0 is evaluated too, and must score exactly as the base.

    Args:
        trainer: Any Trainer.
        model: Any LightningModule with validation and test steps; its weights are the base unless ``base`` is given.
            Left with the edited weights.
        vectors: Names to task vector files, or to fine-tuned checkpoints whose task vector is taken here. A task of the
            same name is compared with its fine-tuned model.
        recipe: Expression of those names, such as ``-digits`` or ``analogy(a, b, c)``. Names that are no vectors are
            coefficients, with a value in ``coefs`` or a range in the search.
        output: Folder for ``edit.json`` and ``report.html``, and if the constraints hold for ``edited.safetensors`` and
            the model card ``README.md``.
        targets: Data modules of the tasks that the edit means to change, by name.
        controls: Data modules of the tasks that it must leave alone.
        base: Checkpoint of the base model.
        coefs: Values of the coefficients in the recipe.
        scaling_coef: Coefficient of the whole recipe; by default it is searched.
        search: How coefficients are searched: ``Grid``, ``Bisect``, ``Race``, ``Optuna`` or ``Learned``; by default the
            paper's 21 points from 0 to 1.
        rule: ``"largest"`` coefficient whose constraints hold, or the ``"best"`` objective among those.
        minimize: Objective to make small: ``TASK/METRIC``, ``mean(TASK/METRIC, …)`` or, over all targets,
            ``mean(METRIC)``. A metric is what the model logs, or the name of a multi-class metric of torchmetrics where
            its steps return ``preds`` and ``target``; with ``normalized_`` before it, it is divided by that of the
            task's own fine-tuned model.
        maximize: Objective to make large.
        subject_to: Constraints such as ``imagenet/accuracy >= 0.95 * base``.
        confidence: Constraints must hold with this one-sided confidence, such as 0.95, on validation data where the
            coefficient is chosen and on test data where it is proved; by default their point estimates must.
        statistics: BatchNorm statistics: ``"keep"`` the base's, add their ``"delta"``, or ``"reestimate"`` them on 20
            training batches of each target.
        random_seed: Seed of the baseline, a random vector of the same norm per tensor at the same coefficient; None
            leaves it out.
        baselines: What to compare with besides: see docs/choosing.md.
        diagnostics: What to look into besides: see docs/choosing.md.
        joint: Checkpoint of one model that was fine-tuned on all tasks together, for the baseline ``"joint"``.
        log: JSON lines of all evaluations, which the next run re-uses; by default ``OUTPUT.evaluations.jsonl``.
        cache: Transformed batches kept between passes over the same data, such as ``2GiB``.
        cache_in: Where: ``"memory"``, the ``"device"``, or memory-mapped on ``"disk"``.
        allow_other_base: Apply vectors to a base they were not taken from.
        keep_undo: Write ``edited.undo.safetensors`` too, from which ``tva revert`` restores the base bit for bit.
        allow_other_kind: Apply vectors of a linearized model (``tangent: true``) to an ordinary one, or the other way
            round.

    Returns:
        The report, also printed by the command line. ``report.holds`` is the verdict. Where no coefficient met the
        constraints on validation data, it is of the closest one, on those data.

    Raises:
        HarnessError: Coefficient 0 did not reproduce the base's scores; nothing was written.
        ValueError: Something does not fit; nothing was written.
        FileNotFoundError: A checkpoint or data file is not there.
    """
    vectors = {name: os.fspath(path) for name, path in vectors.items()}
    base, joint, log = (path and os.fspath(path) for path in (base, joint, log))
    check_card(Path(output))
    check_strategy(trainer)
    targets, controls = dict(targets or {}), dict(controls or {})
    twice = sorted(targets.keys() & controls.keys())
    if twice:
        raise ValueError(f"A task is a target or a control, not both: {some(twice)}. Rename one of them.")
    tasks = {**targets, **controls}
    if not tasks:
        raise ValueError("An edit must be shown to do something: give at least one data module under targets.")
    search = search or Grid()
    ranges = search.ranges if scaling_coef is None else {}
    named = {name: bounds[0] for name, bounds in ranges.items() if name != SCALING}
    _check_coefs(named, coefs or {})
    checked = Recipe(recipe, vectors, {**(coefs or {}), **named})
    unused = sorted(named.keys() - checked.coefs.keys())
    if unused:
        raise ValueError(f"The search has a range for {some(unused)}, which the recipe {recipe!r} does not use.")
    constraints = [Constraint.parse(text, tasks) for text in subject_to or []]
    objective = _objective(minimize, maximize, targets, tasks)
    if scaling_coef is None:
        _check_search(rule, objective, constraints)
    _check_confidence(confidence, constraints)
    unknown = [task for task in objective.normalized if task not in vectors] if objective else []
    if unknown:
        raise ValueError(
            f"{objective.text} divides by each task's fine-tuned model, and {some(unknown)} has none: name its task "
            f"vector like the task under vectors."
        )
    if "gradient_ascent" in (baselines or []) and objective is None:
        raise ValueError("The baseline 'gradient_ascent' is stopped by an objective: give minimize= or maximize= too.")
    if ("joint" in (baselines or [])) != (joint is not None):
        raise ValueError("The baseline 'joint' and the checkpoint joint= go together: give both or none.")

    kind = kind_of(model)
    editor, loaded = open_editor(trainer, model, vectors, base, tasks, statistics, targets, allow_other_kind)

    @functools.lru_cache(maxsize=4)
    def vector_with(values: tuple[tuple[str, float], ...]) -> TaskVector:
        found = Recipe(recipe, vectors, {**(coefs or {}), **dict(values)}).evaluate(loaded)
        found.check_base(editor.base, allow_other_base=allow_other_base)
        return found

    def state_of(candidate: Candidate, label: str = "edited") -> State:
        values = tuple((name, value) for name, value in candidate.coefs if name != SCALING)
        everything = {SCALING: candidate.scaling_coef, **checked.coefs, **dict(values)}
        return State(label, checked.text, tuple(everything.items()), functools.partial(vector_with, values), statistics)

    vector_with(tuple(named.items()))  # whatever does not fit is said before anything is evaluated
    log = os.fspath(Path(output)) + ".evaluations.jsonl" if log is None else log
    mentioned = _mentioned(objective, constraints)
    bench = Bench(editor, loaded, EvaluationLog(log, trainer), BatchCache(parse_bytes(cache), cache_in), mentioned)
    normalizing = {task: task for task in objective.normalized} if objective else {}
    if scaling_coef is None:
        needed = list(dict.fromkeys([*(objective.tasks if objective else ()), *(c.task for c in constraints)]))
        problem = Problem(
            lambda candidates, windows, seed: bench(
                [state_of(candidate) for candidate in candidates], windows, "val", windows, seed
            ),
            {task: bench.base(task, "val") for task in needed},
            constraints,
            objective,
            rule,
            confidence,
            bench.finetuned(normalizing, "val"),
            lambda candidate: candidate.scaling_coef == 0 or not _moves(state_of(candidate).vector()),
            lambda: _workshop(bench, state_of(Candidate.of(scaling_coef=1.0)), checked, loaded, targets, controls),
            trainer,
        )
        choice = search.run(problem)
        spent = {"num_scored": problem.num_scored}
    else:
        spent = {}
        choice = Choice(Candidate.of(scaling_coef=scaling_coef), True, "it was given")

    state = state_of(choice.candidate)
    if choice.vector is not None:
        state = _learned(choice.vector, checked, statistics)
    vector, coef = state.vector(), state.scaling_coef
    split: Split = "test" if choice.feasible else "val"
    states = [state]
    if random_seed is not None and choice.feasible:
        name = f"random_like({state.recipe}, seed={random_seed})"
        states.append(State("random", name, state.coefs, lambda: vector.random_like(random_seed), statistics))
    before = {task: bench.base(task, split) for task in tasks}
    results = bench(states, tasks, split)
    edited = results[0]
    scores = {label.label: found for label, found in zip(states, results, strict=True)}
    finetuned = bench.finetuned([task for task in tasks if task in loaded], split)
    chosen_on = {} if scaling_coef is not None else {c.task: bench.base(c.task, "val") for c in constraints}
    verdicts = [verdict_on(c, edited[c.task], before[c.task], chosen_on.get(c.task), confidence) for c in constraints]
    finished = Finished(
        bench=bench,
        state=state,
        state_of=state_of,
        vectors={name: loaded[name] for name in checked.vectors},
        targets=targets,
        controls=controls,
        constraints=constraints,
        objective=objective,
        rule=rule,
        confidence=confidence,
        metrics={task: _metric(before[task], mentioned, task) for task in tasks},
        split=split,
        joint=joint,
    )
    more = run_baselines(baselines or [], finished) if choice.feasible else {}
    diagnosed = run_diagnostics(diagnostics or [], finished) if choice.feasible else {}
    report = EditReport(
        recipe=checked.text,
        coefficients=dict(state.coefs),
        reason=choice.reason,
        base={"path": base, "fingerprint": bench.facts["base"], **({} if base is None else stamp(base))},
        vectors={
            name: {
                "path": os.fspath(path),
                "fingerprint": loaded[name].origin.finetuned,
                "norm": loaded[name].norm(),
                "deltas": bench.facts["vectors"][name],
                "step": loaded[name].origin.step,
                **stamp(path),
            }
            for name, path in vectors.items()
        },
        rule="given" if scaling_coef is not None else rule,
        objective=objective.text if objective else None,
        confidence=confidence,
        statistics=statistics,
        random_seed=random_seed,
        tasks={
            task: _task_report(
                "target" if task in targets else "control",
                split,
                finished.metrics[task],
                {"base": before[task]}
                | {label: found[task] for label, found in scores.items()}
                | ({"finetuned": finetuned[task]} if task in finetuned else {}),
            )
            for task in tasks
        },
        constraints=verdicts,
        holds=choice.feasible and all(verdict.holds for verdict in verdicts),
        sizes=bench.sizes(),
        search={
            "strategy": "given" if scaling_coef is not None else type(search).__name__,
            "num_forward": bench.num_forward,
            **spent,
            "num_reused": bench.log.num_reused,
            "log": log,
            **choice.details,
        },
        baselines=more,
        diagnostics=diagnosed,
        evaluations=bench.entries,
        versions={
            "tva": __version__,
            **{name: version(name) for name in ("torch", "lightning")},
            "python": platform.python_version(),
        },
        seed=int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
        command=getattr(trainer, "command", None) or _call(),
        model=bench.facts["model"],
        precision=bench.facts["precision"],
        data=bench.data(),
        edited=None,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        kind=kind,
    )
    editor.set(vector, coef, state.statistics)
    live = canonical_state_dict(model.state_dict())
    vector.check_effect(live, editor.base, coef)
    if report.holds:
        report = replace(report, edited={"path": EDITED, "fingerprint": fingerprint(live).digest})
    if trainer.is_global_zero:
        folder, record = Path(output), None
        undo_path(folder / EDITED).unlink(missing_ok=True)
        if report.holds:
            record = _record(state, base, vectors, checked, editor.base, live, allow_other_base)
        if record and keep_undo:
            before, after = _in_memory(editor.base), _in_memory(live)
            back = Composer(before, {}, checked, 0.0, None, {}).back(after, with_vectors=False)
            with atomic_path(undo_path(folder / EDITED)) as temporary:
                write_undo(temporary, before, back, record)
        header = {**(record.metadata() if record else {}), **({KEY: kind} if kind else {})}
        write_report(report, folder, live if record else None, header)
    return report


def _call() -> str:
    """Say what made an edit that no command made."""
    if not sys.argv[0] or Path(sys.argv[0]).stem == "ipykernel_launcher":
        return "tva.edit_model(…) in an interactive Python session, with the options above"
    return shlex.join(["python", *sys.argv])


def _in_memory(weights: Mapping[str, Tensor]) -> LazyWeights:
    entries = {name: InMemory(tensor.detach().cpu()) for name, tensor in weights.items()}
    return LazyWeights(Info(Path("model"), "model in memory"), entries)


def _record(
    state: State,
    base: str | None,
    vectors: Mapping[str, str],
    recipe: Recipe,
    base_weights: Mapping[str, Tensor],
    edited: Mapping[str, Tensor],
    allow_other_base: bool,
) -> Record:
    """Make the record that `tva.compose.verify` reads; the vectors' files are read once more for their fingerprints."""
    opened = _in_memory(base_weights)
    sources = {
        name: LazyTaskVector(vectors[name], opened, name=name, allow_other_base=allow_other_base)
        for name in recipe.vectors
    }
    coefs, digest = dict(state.coefs), fingerprint(base_weights).digest
    return Record(
        recipe=state.recipe,
        coefs={name: coefs[name] for name in recipe.coefs},
        scaling_coef=state.scaling_coef,
        dtype="",
        base=base or _base_beside(vectors.values(), digest),
        vectors={name: vectors[name] for name in recipe.vectors},
        options={
            "allow_other_base": allow_other_base,
            "key_map": {},
            "which": {name: source.weights.info.which for name, source in sources.items()},
            "statistics": state.statistics,
        },
        vector_fingerprints={name: source.weights.fingerprint().digest for name, source in sources.items()},
        file_fingerprints={path: file.fingerprint().digest for path, file in recipe.files.items()},
        base_fingerprint=digest,
        edited_fingerprint=fingerprint(edited).digest,
    )


def _base_beside(vectors: Iterable[str], digest: str) -> str:
    """Find the base that TaskVectorCallback wrote beside a vector, by its name; empty if there is none."""
    places = [Path(path).parent / f"base-{digest}.safetensors" for path in vectors]
    return next((str(place) for place in places if place.is_file()), "")


def open_editor(
    trainer: L.Trainer,
    model: L.LightningModule,
    vectors: Mapping[str, str],
    base: str | None,
    tasks: Mapping[str, L.LightningDataModule],
    statistics: Statistics,
    targets: Mapping[str, L.LightningDataModule],
    allow_other_kind: bool = False,
) -> tuple[Editor, dict[str, TaskVector]]:
    """Put the base into a model, and give what edits it and the task vectors by name; see `run_edit`."""
    if any(hasattr(part, "peft_config") for part in model.modules()):
        raise ValueError(
            "An edit takes the plain model, and this one holds LoRA. Leave lora out of its options: the vectors that "
            "TaskVectorCallback writes of LoRA are dense, under the plain model's names."
        )
    if base is not None:
        weights = open_weights(base)
        check_same(canonical_state_dict(model.state_dict()), weights, "the model", f"the base {base}")
        for name, tensor in canonical_state_dict(model.state_dict()).items():
            tensor.copy_(weights[name])
    kind = kind_of(model)
    check_at_base(model)
    editor = Editor(trainer, model, tasks, statistics, targets.values())
    loaded = {name: _load_vector(path, editor.base) for name, path in vectors.items()}
    if allow_other_kind:
        loaded = {name: vector.as_kind(kind) for name, vector in loaded.items()}
    for name, vector in loaded.items():
        check_kinds(
            {f"the vector {name}": vector.origin.kind, f"the model {type(model).__name__}": kind},
            "pass allow_other_kind if the other kind is meant",
        )
    return editor, loaded


def _workshop(
    bench: Bench,
    state: State,
    recipe: Recipe,
    loaded: Mapping[str, TaskVector],
    targets: Mapping[str, L.LightningDataModule],
    controls: Mapping[str, L.LightningDataModule],
) -> Workshop:
    """Give what training coefficients needs; a recipe that is a sum gets coefficients for each of its vectors."""
    vectors = {name: loaded[name] for name in recipe.vectors}
    try:
        numbers = recipe_numbers(state, vectors)
        parts = {name: vector * numbers[name] for name, vector in vectors.items()}
    except ValueError:
        parts = {recipe.text: state.vector()}

    def evaluate(vector: TaskVector) -> dict[str, Evaluation]:
        learned = _learned(vector, recipe, state.statistics)
        needed = [task for task in bench.editor.datamodules if task in bench.buffers]
        return bench([learned], needed, "val")[0]

    for task in targets:
        bench.base(task, "val")  # which sets its data module up, and makes the model's head for it
    editor = bench.editor
    editor.set(None, 0.0)
    log = bench.log.path
    return Workshop(
        trainer=editor.trainer,
        model=editor.model,
        base=editor.base,
        vectors=parts,
        targets=targets,
        controls=controls,
        buffers=bench.buffers,
        evaluate=evaluate,
        inputs={**bench.facts, "recipe": recipe.text, "coefficients": recipe.coefs, "data": bench.data()},
        kept=None if log is None else log.with_name(log.name + ".learned"),
    )


def _learned(vector: TaskVector, recipe: Recipe, statistics: Statistics) -> State:
    """Make the state of a learned vector, which is known by its contents."""
    made = f"learned({recipe.text}), {fingerprint(vector.deltas).digest}"
    return State("edited", made, ((SCALING, 1.0), *recipe.coefs.items()), lambda: vector, statistics)


def _moves(vector: TaskVector) -> bool:
    return any(bool(delta.any()) for delta in vector.deltas.values())


def _mentioned(objective: Objective | None, constraints: Sequence[Constraint]) -> dict[str, list[str]]:
    """Give by task the metrics that objective and constraints name, that which is reported first."""
    found: dict[str, list[str]] = {}
    named = [(task, metric.removeprefix(NORMALIZED)) for task, metric in (objective.terms if objective else ())]
    for task, metric in [*named, *((c.task, c.metric) for c in constraints)]:
        found.setdefault(task, [])
        if metric not in found[task]:
            found[task].append(metric)
    return found


def _metric(evaluation: Evaluation, mentioned: Mapping[str, Sequence[str]], task: str) -> str:
    """Choose the metric that is reported: what is asked of the task; accuracy; what is asked of others; the first."""
    if task in mentioned:
        return mentioned[task][0]
    others = (metric for metrics in mentioned.values() for metric in metrics)
    return next(metric for metric in ("accuracy", *others, *evaluation.metrics) if metric in evaluation.metrics)


def verdict_on(
    constraint: Constraint,
    edited: Evaluation,
    base: Evaluation,
    chosen_on: Evaluation | None,
    confidence: float | None,
) -> ConstraintReport:
    """Say whether a constraint holds, with what confidence is asked for."""
    after, before = {constraint.task: edited.metrics}, {constraint.task: base.metrics}
    value = score(after, constraint.task, constraint.metric)
    slack = 0.0 if confidence is None else constraint_slack(constraint, edited, base, confidence)
    return ConstraintReport(
        text=constraint.text,
        task=constraint.task,
        value=value,
        bound=constraint.bound(before),
        limit=None if confidence is None else value - slack if constraint.above else value + slack,
        holds=constraint.holds(after, before, slack),
        metric=constraint.metric,
        above=constraint.above,
        val_bound=None if chosen_on is None else constraint.bound({constraint.task: chosen_on.metrics}),
    )


def _task_report(role: Any, split: Split, metric: str, evaluations: Mapping[str, Evaluation]) -> TaskReport:
    base, edited = evaluations["base"], evaluations["edited"]
    for evaluation in (base, edited):
        score({role: evaluation.metrics}, role, metric)
    return TaskReport(
        role=role,
        split=split,
        metric=metric,
        higher_is_better=base.higher(metric),
        num_examples=base.num_examples,
        scores={
            label: Score(evaluation.metrics[metric], *(evaluation.interval(metric) or (None, None)))
            for label, evaluation in evaluations.items()
        },
        comparison=edited.compare(base, metric),
    )


def _check_coefs(named: Mapping[str, float], coefs: Mapping[str, Any]) -> None:
    both = sorted(named.keys() & coefs.keys())
    if both:
        raise ValueError(f"{some(both)} has a value in coefs and a range in the search; give one of them.")


def _check_search(rule: Rule, objective: Objective | None, constraints: list[Constraint]) -> None:
    if rule == "best" and objective is None:
        raise ValueError(
            "To search a coefficient, say what is best (minimize= or maximize=), or set rule='largest' with a "
            "constraint in subject_to, or give a scaling_coef."
        )
    if rule == "largest" and not constraints:
        raise ValueError("The rule 'largest' needs a constraint in subject_to: without one the largest is unlimited.")


def _check_confidence(confidence: float | None, constraints: list[Constraint]) -> None:
    if confidence is None:
        return
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must lie in [0.5, 1), where 0.5 is the point estimate; found {confidence}.")
    for constraint in constraints:
        _ = constraint.slope  # raises where the bound is no straight line


def _objective(
    minimize: str | None, maximize: str | None, targets: Mapping[str, Any], tasks: Mapping[str, Any]
) -> Objective | None:
    if minimize is not None and maximize is not None:
        raise ValueError(f"Give one objective: minimize={minimize!r} or maximize={maximize!r}.")
    text = minimize if maximize is None else maximize
    if text is None:
        return None
    return Objective.parse(text, maximize=maximize is not None, targets=list(targets), tasks=list(tasks))


def _load_vector(path: str, base: Mapping[str, Tensor]) -> TaskVector:
    if is_vector_file(path):
        return TaskVector.load(path)
    finetuned = open_finetuned(path, base)
    return TaskVector.between(base, finetuned, origin=Origin(kind=finetuned.metadata.get(KEY)))
