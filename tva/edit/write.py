"""What an edit leaves: its report, and the files of its folder."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from tva.checkpoints import Info, LazyWeights, atomic_path, canonical_state_dict, fingerprint
from tva.checkpoints.lazy import InMemory
from tva.compose.apply import write_undo
from tva.compose.engine import Composer
from tva.compose.record import Record
from tva.compose.undo import undo_path
from tva.edit.options import EditOptions
from tva.edit.outcome import Outcome
from tva.evaluation.result import Evaluation
from tva.report.edit_report import EditReport, Score, TaskReport, stamp, write_report
from tva.report.model_card import check_card
from tva.report.run_files import EDITED
from tva.search import score
from tva.vectors.kind import KEY
from tva.vectors.lazy import LazyTaskVector
from tva.version import __version__


def check_output(options: EditOptions) -> None:
    """Check that the output folder holds no file of the same name that tva did not write."""
    check_card(options.folder)


def build_report(outcome: Outcome) -> EditReport:
    """Build the report of an edit; nothing is evaluated."""
    session, choice = outcome.session, outcome.choice
    options, goal, evaluator = session.options, session.goal, session.evaluator
    trainer, live = session.editor.trainer, canonical_state_dict(session.editor.model.state_dict())
    base = options.base
    return EditReport(
        recipe=goal.recipe.text,
        coefficients=dict(outcome.state.coefs),
        reason=choice.reason,
        base={"path": base, "fingerprint": evaluator.facts["base"], **({} if base is None else stamp(base))},
        vectors=_describe_vectors(outcome),
        rule="given" if goal.is_given else options.rule,
        objective=goal.objective.text if goal.objective else None,
        confidence=options.confidence,
        statistics=options.statistics,
        random_seed=options.random_seed,
        tasks={task: _task_report(outcome, task) for task in options.tasks},
        constraints=outcome.verdicts,
        holds=outcome.holds,
        sizes=evaluator.sizes(),
        search={
            "strategy": "given" if goal.is_given else type(goal.search).__name__,
            "num_forward": evaluator.num_forward,
            "num_reused": evaluator.log.num_reused,
            "log": options.log_file,
            **choice.details,
        },
        baselines=outcome.baselines,
        diagnostics=outcome.diagnostics,
        evaluations=evaluator.entries,
        versions={
            "tva": __version__,
            **{name: version(name) for name in ("torch", "lightning")},
            "python": platform.python_version(),
        },
        seed=int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
        command=getattr(trainer, "command", None) or _call(),
        model=evaluator.facts["model"],
        precision=evaluator.facts["precision"],
        data=evaluator.data(),
        edited={"path": EDITED, "fingerprint": fingerprint(live).digest} if outcome.holds else None,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        kind=session.kind,
    )


def _describe_vectors(outcome: Outcome) -> dict[str, dict[str, Any]]:
    session = outcome.session
    deltas = session.evaluator.facts["vectors"]
    return {
        name: {
            "path": path,
            "fingerprint": session.vectors[name].origin.finetuned,
            "norm": session.vectors[name].norm(),
            "deltas": deltas[name],
            "step": session.vectors[name].origin.step,
            **stamp(path),
        }
        for name, path in session.options.vectors.items()
    }


def _task_report(outcome: Outcome, task: str) -> TaskReport:
    evaluations, metric = outcome.evaluations[task], outcome.metrics[task]
    base, edited = evaluations["base"], evaluations["edited"]
    role = "target" if task in (outcome.session.options.targets or {}) else "control"
    for evaluation in (base, edited):
        score({role: evaluation.metrics}, role, metric)  # raises where the metric is missing
    return TaskReport(
        role=role,
        split=outcome.split,
        metric=metric,
        higher_is_better=base.higher(metric),
        num_examples=base.num_examples,
        scores={label: _score(evaluation, metric) for label, evaluation in evaluations.items()},
        comparison=edited.compare(base, metric),
    )


def _score(evaluation: Evaluation, metric: str) -> Score:
    return Score(evaluation.metrics[metric], *(evaluation.interval(metric) or (None, None)))


def _call() -> str:
    """Describe the call of an edit that no command made."""
    if not sys.argv[0] or Path(sys.argv[0]).stem == "ipykernel_launcher":
        return "tva.edit_model(…) in an interactive Python session, with the options above"
    return shlex.join(["python", *sys.argv])


def write_edit(report: EditReport, outcome: Outcome) -> EditReport:
    """Write the files of an edit, on rank 0: the weights too if the constraints hold."""
    session, options = outcome.session, outcome.session.options
    if not session.editor.trainer.is_global_zero:
        return report
    live = canonical_state_dict(session.editor.model.state_dict())
    folder, record = options.folder, None
    undo_path(folder / EDITED).unlink(missing_ok=True)
    if report.holds:
        record = _record(outcome, live)
        if options.keep_undo:
            before, after = _in_memory(session.editor.base), _in_memory(live)
            back = Composer(before, {}, session.goal.recipe, 0.0, None, {}).back(after, with_vectors=False)
            with atomic_path(undo_path(folder / EDITED)) as temporary:
                write_undo(temporary, before, back, record)
    header = {**(record.metadata() if record else {}), **({KEY: session.kind} if session.kind else {})}
    write_report(report, folder, live if record else None, header)
    return report


def _in_memory(weights: Mapping[str, Tensor]) -> LazyWeights:
    entries = {name: InMemory(tensor.detach().cpu()) for name, tensor in weights.items()}
    return LazyWeights(Info(Path("model"), "model in memory"), entries)


def _record(outcome: Outcome, edited: Mapping[str, Tensor]) -> Record:
    """Make the record that `tva.compose.verify` reads; the vectors' files are read once more for their fingerprints."""
    options, recipe, state = outcome.session.options, outcome.session.goal.recipe, outcome.state
    base, vectors = outcome.session.editor.base, {name: options.vectors[name] for name in recipe.vectors}
    opened = _in_memory(base)
    sources = {
        name: LazyTaskVector(path, opened, name=name, allow_other_base=options.allow_other_base)
        for name, path in vectors.items()
    }
    coefs, digest = dict(state.coefs), fingerprint(base).digest
    return Record(
        recipe=state.recipe,
        coefs={name: coefs[name] for name in recipe.coefs},
        scaling_coef=state.scaling_coef,
        dtype="",
        base=options.base or _base_beside(options.vectors.values(), digest),
        vectors=vectors,
        options={
            "allow_other_base": options.allow_other_base,
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
    """Return the base that TaskVectorCallback wrote beside a vector, found by its name, or an empty string."""
    places = [Path(path).parent / f"base-{digest}.safetensors" for path in vectors]
    return next((str(place) for place in places if place.is_file()), "")
