"""The gate: evaluate the chosen edit on test data, and decide whether its weights may be written."""

import functools
from collections.abc import Mapping
from dataclasses import replace

from tva.edit.audits import audited, run_audits
from tva.edit.baselines import run_baselines
from tva.edit.diagnostics import run_diagnostics
from tva.edit.each import run_each
from tva.edit.editor import Editor, EditState
from tva.edit.outcome import Outcome
from tva.edit.session import EditSession
from tva.evaluation.leaks import check_shared
from tva.evaluation.result import Evaluation, Split
from tva.report.edit_report import ConstraintReport
from tva.search import Choice, Constraint, score
from tva.search.base import constraint_slack
from tva.search.confidence import power_of


def prove(session: EditSession, choice: Choice) -> Outcome:
    """Evaluate the chosen edit on test data, or where none was feasible the closest one on validation data.

    The model is left with the edited weights.
    """
    options, goal, evaluator = session.options, session.goal, session.evaluator
    state = session.state_of(choice.candidate) if choice.vector is None else session.learned_state(choice.vector)
    split: Split = "test" if choice.feasible else "val"
    states = [state]
    if options.random_seed is not None and choice.feasible:
        states.append(_random_state(session.editor, state, options.random_seed))
    before = {task: evaluator.base(task, split) for task in options.tasks}
    shared = _shared_examples(session, before) if choice.feasible else {}
    results = evaluator(states, options.tasks, split)
    finetuned = evaluator.finetuned([task for task in options.tasks if task in session.vectors], split)
    evaluations = {
        task: {"base": before[task]}
        | {state.label: found[task] for state, found in zip(states, results, strict=True)}
        | ({"finetuned": finetuned[task]} if task in finetuned else {})
        for task in options.tasks
    }
    del states[1:]  # a random vector takes what the edit takes
    chosen_on = {} if goal.is_given else {c.task: evaluator.base(c.task, "val") for c in goal.constraints}
    verdicts = [
        verdict_on(c, results[0][c.task], before[c.task], chosen_on.get(c.task), options.confidence)
        for c in goal.constraints
    ]
    decided = _decided(session, state, before) if choice.feasible else {}
    outcome = Outcome(session, choice, state, split, evaluations, verdicts, shared, decided)
    if choice.feasible:
        baselines = run_baselines(options.baselines or [], outcome)
        diagnostics = run_diagnostics(options.diagnostics or [], outcome)
        if options.each is not None:
            diagnostics[options.each] = run_each(outcome, options.each)
        audits, pairs = run_audits(options.audits or [], outcome)
        for constraint in goal.audited:
            plain, (base, edited) = audited(constraint, pairs)
            found = verdict_on(plain, edited, base, None, options.confidence)
            verdicts.append(replace(found, metric=constraint.metric))
        outcome = replace(outcome, baselines=baselines, diagnostics=diagnostics, audits=audits)
    editor, vector = session.editor, state.vector()
    editor.set(vector, state.scaling_coef, state.statistics)
    editor.check_effect(vector, state.scaling_coef)
    return outcome


def _shared_examples(session: EditSession, test: Mapping[str, Evaluation]) -> dict[str, int]:
    goal = session.goal
    if goal.is_given:
        return {}
    chosen_on = {*(goal.objective.tasks if goal.objective else ()), *(c.task for c in goal.constraints)}
    val = {task: session.evaluator.base(task, "val") for task in chosen_on}
    return check_shared(val, test, session.options.allow_shared_examples)


def _decided(session: EditSession, state: EditState, test: Mapping[str, Evaluation]) -> dict[str, int]:
    """Note that test parts decide this edit; return by task how many different edits each has decided so far."""
    parts = {c.task: test[c.task].data_digest for c in session.goal.constraints}
    facts = session.evaluator.facts
    edit = {"recipe": state.recipe, "coefficients": dict(state.coefs), "statistics": state.statistics, **facts}
    return session.evaluator.log.decide({task: part for task, part in parts.items() if part}, edit)


def _random_state(editor: Editor, state: EditState, seed: int) -> EditState:
    """Return the state of a random vector with the edit's norm in every tensor."""
    name = f"random_like({state.recipe}, seed={seed})"
    drawn = functools.cache(lambda: editor.random_like(state.vector(), seed))  # once, though two states share it
    return EditState("random", name, state.coefs, drawn, state.statistics)


def verdict_on(
    constraint: Constraint, edited: Evaluation, base: Evaluation, chosen_on: Evaluation | None, confidence: float | None
) -> ConstraintReport:
    """Return whether a constraint holds, with the confidence that is asked for."""
    after, before = {constraint.task: edited.metrics}, {constraint.task: base.metrics}
    value = score(after, constraint.task, constraint.metric)
    slack = 0.0 if confidence is None else constraint_slack(constraint, edited, base, confidence)
    needed, allowed = (None, None) if confidence is None else power_of(constraint, base, confidence)
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
        needed=needed,
        allowed_loss=allowed,
    )
