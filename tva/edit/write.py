"""What an edit leaves: its report, and the files of its folder."""

import contextlib
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from tva.checkpoints import (
    Fingerprint,
    HashedWeights,
    Info,
    LazyWeights,
    NameFilter,
    atomic_path,
    fingerprint,
    read_metadata,
)
from tva.checkpoints.fingerprint import CONTENT
from tva.checkpoints.lazy import InMemory, as_real
from tva.checkpoints.wrappers import network_of
from tva.compose.apply import write_undo
from tva.compose.engine import Composer
from tva.compose.inputs import renamed
from tva.compose.record import Record
from tva.edit.folder import MADE_BY, replacing
from tva.edit.form import undo_name
from tva.edit.notes import count_trained_on, notes_on
from tva.edit.options import EditOptions
from tva.edit.outcome import Outcome
from tva.edit.session import EditSession
from tva.errors import MismatchError
from tva.evaluation.leaks import chance_accuracy
from tva.report.edit_report import EditReport, TaskReport, stamp
from tva.report.front import write_front
from tva.report.model_card import model_card
from tva.report.page import edit_page
from tva.report.run_files import CARD, CONFIG, EDIT_JSON, PAGE
from tva.search import score
from tva.vectors.header import is_vector_file
from tva.vectors.kind import KEY
from tva.vectors.lazy import LazyTaskVector
from tva.vectors.redact import public_command, public_path
from tva.vectors.task_vector import TaskVector
from tva.version import __version__


def build_report(outcome: Outcome, live: Mapping[str, Tensor]) -> EditReport:
    """Build the report of an edit; nothing is evaluated.

    Args:
        outcome: The edit.
        live: The model's weights, which are the edited ones.
    """
    session, choice = outcome.session, outcome.choice
    options, goal, evaluator = session.options, session.goal, session.evaluator
    trainer = session.editor.trainer
    trained_on = count_trained_on(session)
    base = {} if options.base is None else stamp(options.base)
    path = options.base and public_path(options.base)
    return EditReport(
        recipe=goal.recipe.text,
        coefficients=dict(outcome.state.coefs),
        reason=choice.reason,
        base={"path": path, "fingerprint": evaluator.facts["base"], **base},
        vectors=_describe_vectors(outcome),
        rule="given" if goal.is_given else options.rule,
        objective=goal.objective.text if goal.objective else None,
        confidence=options.confidence,
        statistics=options.statistics,
        random_seed=options.random_seed,
        tasks={task: _task_report(outcome, task) for task in options.tasks},
        constraints=outcome.verdicts,
        holds=outcome.holds,
        sizes={
            task: counts
            | ({"shared": outcome.shared[task]} if task in outcome.shared else {})
            | ({"decided": outcome.decided[task]} if outcome.decided.get(task, 1) > 1 else {})
            | {f"trained_{split}": max(found.values()) for split, found in trained_on.get(task, {}).items()}
            for task, counts in evaluator.sizes().items()
        },
        search={
            "strategy": "given" if goal.is_given else type(goal.search).__name__,
            "num_forward": evaluator.num_forward,
            "num_reused": evaluator.log.num_reused,
            "log": public_path(options.log_file),
            **({"maximize": goal.objective.maximize} if goal.objective else {}),
            **choice.details,
        },
        baselines=outcome.baselines,
        diagnostics=outcome.diagnostics,
        audits=outcome.audits,
        evaluations=evaluator.entries,
        versions={
            "tva": __version__,
            **{name: version(name) for name in ("torch", "lightning")},
            "python": platform.python_version(),
        },
        seed=int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
        command=public_command(getattr(trainer, "command", None) or _call()),
        model=evaluator.facts["model"],
        precision=evaluator.facts["precision"],
        data=evaluator.data(),
        edited=_edited(outcome, live) if outcome.holds else None,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        kind=session.kind,
        names=_names(session),
        means=outcome.means(),
        notes=notes_on(outcome, trained_on),
    )


def _edited(outcome: Outcome, live: Mapping[str, Tensor]) -> dict[str, Any]:
    form, undo = outcome.session.form, outcome.session.options.keep_undo
    return {
        "path": form.path,
        "format": form.format,
        "files": [*form.files(live), *([undo_name(form)] if undo else [])],
        "fingerprint": fingerprint(form.named(live)).digest,
    }


def _names(session: EditSession) -> dict[str, Any]:
    patterns, left_out = session.options.only.options, session.left_out
    return {**patterns, "left_out": len(left_out), "of": len(session.editor.base)} if patterns else {}


def _describe_vectors(outcome: Outcome) -> dict[str, dict[str, Any]]:
    session = outcome.session
    deltas = session.evaluator.facts["vectors"]
    return {
        name: {
            "path": shown_path(path),
            "fingerprint": session.vectors[name].origin.finetuned,
            "norm": session.editor.norm(session.vectors[name]),
            "deltas": deltas[name],
            "step": session.vectors[name].origin.step,
            **(_file_facts(path) if isinstance(path, str) else {}),
        }
        for name, path in session.options.vectors.items()
    }


def _file_facts(path: str) -> dict[str, Any]:
    content = read_metadata(path).get(CONTENT) if is_vector_file(path) else None
    return stamp(path) | ({"content": content} if content else {})


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
        scores={label: outcome.score(evaluation, metric) for label, evaluation in evaluations.items()},
        comparison=edited.compare(base, metric),
        chance=chance_accuracy(edited, base) if metric == "accuracy" else None,
        num_groups=base.num_groups,
        **outcome.normalized_interval(task),
        revision=getattr(outcome.session.options.tasks[task], "resolved_revision", None),
        settings=getattr(outcome.session.options.tasks[task], "tva_settings", None),
    )


def _call() -> str:
    if not sys.argv[0] or Path(sys.argv[0]).stem == "ipykernel_launcher":
        return "tva.edit_model(…) in an interactive Python session, with the options above"
    return shlex.join(["python", *sys.argv])


def write_edit(report: EditReport, outcome: Outcome, live: Mapping[str, Tensor]) -> EditReport:
    """Write the files of an edit, on rank 0: all of them or none, the weights if the constraints hold.

    The page comes last, and whatever keeps it from being drawn loses nothing else.

    Args:
        report: What is written about it.
        outcome: The edit.
        live: The model's weights, which are the edited ones; where several processes hold them, the others send theirs.
    """
    form = outcome.session.form

    def order() -> list[str]:
        return [form.names[name] for name in form.named(live) if name in form.names] if report.holds else []

    outcome.session.editor.on_rank_zero(order, lambda: _write(report, outcome, live))
    return report


def _write(report: EditReport, outcome: Outcome, live: Mapping[str, Tensor]) -> None:
    session, options = outcome.session, outcome.session.options
    content, config = report.to_json(), getattr(session.editor.trainer, "config", None)
    with replacing(options.folder) as folder:
        if report.holds:
            form, before = session.form, session.editor.base_state()
            edited = form.named(live)
            record = _record(outcome, edited)
            header = {"format": "pt", **record.metadata(), "tva.command": report.command}
            header |= {KEY: session.kind} if session.kind else {}
            form.write(folder, live, header)
            if options.keep_undo:
                base = form.base(before)
                back = Composer(base, {}, session.goal.recipe, 0.0, None, {}).back(edited, with_vectors=False)
                with atomic_path(folder / undo_name(form)) as temporary:
                    write_undo(temporary, base, back, record, form.config(before))
            (folder / CARD).write_text(model_card(content, facts=form.facts()), encoding="utf-8")
        if config is not None:
            (folder / CONFIG).write_text(f"{MADE_BY}\n{config}", encoding="utf-8")
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / EDIT_JSON).write_text(text + "\n", encoding="utf-8")
    if options.front is not None:
        write_front(content, options.front)
    _write_page(content, options.folder)


def _write_page(content: Mapping[str, Any], folder: Path) -> None:
    try:
        page = edit_page(content)
        with atomic_path(folder / PAGE) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(
            f"tva: the edit is written, but its page cannot be drawn: {error}. `tva report {folder}` draws it again.",
            file=sys.stderr,
        )


def shown_path(vector: str | TaskVector) -> str:
    """Return where a vector is, for the report and the record."""
    return public_path(vector) if isinstance(vector, str) else "in memory"


def _in_memory(weights: Mapping[str, Tensor]) -> LazyWeights:
    entries = {name: InMemory(tensor.detach().cpu()) for name, tensor in weights.items()}
    return as_real(LazyWeights(Info(Path("model"), "model in memory"), entries))


def _record(outcome: Outcome, edited: Mapping[str, Tensor]) -> Record:
    """Make the record that `tva.compose.verify` reads; the vectors' files are read once more for their fingerprints."""
    options, recipe, state = outcome.session.options, outcome.session.goal.recipe, outcome.state
    form, base = outcome.session.form, outcome.session.editor.base_state()
    vectors = {name: options.vectors[name] for name in recipe.vectors}
    is_base, before = form.has_base(base), form.base(base)
    path, names = (form.source or "", form.renaming()) if is_base else _base_beside(outcome)
    left_out = _left_out(options, form.rest() if is_base else [], "" if names[0] else names[1])
    given = {"allow_other_base": options.allow_other_base, "key_map": options.key_map}
    given["only"] = NameFilter(left_out.get("include"), left_out.get("exclude"))
    opened = before.renamed(renamed(before, form.renaming()))  # as verify opens it

    def source(name: str) -> HashedWeights:
        path, vector = vectors[name], outcome.vectors[name]
        if isinstance(path, str):
            in_spite_of = () if isinstance(base, LazyWeights) else MismatchError  # of names; a part cannot stand for it
            with contextlib.suppress(in_spite_of):
                return LazyTaskVector(path, opened, name=name, **given).weights
        return HashedWeights(_in_memory({**vector.deltas, **vector.buffers}))  # as its file would be

    sources = {name: source(name) for name in vectors}
    coefs = dict(state.coefs)
    return Record(
        recipe=state.recipe,
        coefs={name: coefs[name] for name in recipe.coefs},
        scaling_coef=state.scaling_coef,
        dtype=form.dtype_of(base) or "",
        base=public_path(path),
        vectors={name: shown_path(vector) for name, vector in vectors.items()},
        options={
            "allow_other_base": options.allow_other_base,
            "key_map": options.key_map or {},
            "which": {name: found.info.which for name, found in sources.items()},
            "statistics": state.statistics,
            **left_out,
            "names": {"base": names, "edited": form.renaming()},
        },
        vector_fingerprints={name: found.fingerprint().digest for name, found in sources.items()},
        file_fingerprints={path: file.fingerprint().digest for path, file in recipe.files.items()},
        base_fingerprint=fingerprint(before).digest,
        edited_fingerprint=fingerprint(edited).digest,
    )


def _left_out(options: EditOptions, rest: Iterable[str], added: str) -> dict[str, list[str]]:
    """Return the patterns of names that take no part, those among them that the base has and the model has not."""
    patterns = dict(options.only.options)
    more = [f"^({re.escape(added)})?{re.escape(name)}$" for name in rest]
    return {**patterns, "exclude": [*patterns.get("exclude", []), *more]} if more else patterns


def _base_beside(outcome: Outcome) -> tuple[str, tuple[str, str]]:
    """Return the base that TaskVectorCallback wrote beside a vector, found by its name, or an empty string.

    Returns:
        Its path, and what to strip from its names, and to add, to get the model's.
    """
    tree = fingerprint(outcome.session.editor.base_state()).tensors
    paths = outcome.session.options.vectors.values()
    prefix, _ = network_of(outcome.session.editor.model)
    for strip in dict.fromkeys(("", prefix)):
        digest = Fingerprint.from_tensors({name.removeprefix(strip): found for name, found in tree.items()}).digest
        places = [Path(path).parent / f"base-{digest}.safetensors" for path in paths if isinstance(path, str)]
        found = next((str(place) for place in places if place.is_file()), "")
        if found:
            return found, ("", strip)
    return "", ("", "")
