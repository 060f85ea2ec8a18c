"""What a reader of an edit's numbers must know of how they came about, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tva.edit.outcome import Outcome
from tva.edit.session import EditSession
from tva.errors import some
from tva.evaluation.intervals import FEWEST
from tva.evaluation.leaks import num_trained_on
from tva.evaluation.metrics import has_ground
from tva.search.confidence import lacking_power, power_of

WORDS = {"val": "validation", "test": "test"}
TrainedOn = Mapping[str, Mapping[str, Mapping[str, int]]]  # task -> split -> vector -> examples


def count_trained_on(session: EditSession) -> dict[str, dict[str, dict[str, int]]]:
    """Count by task and split the evaluated examples that a vector was trained on, where there are any."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for (task, split), evaluation in session.evaluator.of_base().items():
        for name, vector in session.vectors.items():
            data = vector.origin.training_data
            count = data and num_trained_on(data.num_examples, data.rows, evaluation)
            if count:
                found.setdefault(task, {}).setdefault(split, {})[name] = count
    return found


def notes_on(outcome: Outcome, trained_on: TrainedOn) -> list[str]:
    """Return the notes of an edit.

    Args:
        outcome: The edit.
        trained_on: From `count_trained_on`.
    """
    leaks = [*_leaks(outcome, trained_on), *_other_parts(outcome), *_other_heads(outcome)]
    power = [f"{text[0].upper()}{text[1:]}." for text in lacking_on_test(outcome.session)]
    power += shown_on_test(outcome.session) if outcome.split == "test" else []
    power += [*_without_ground(outcome), *_few_groups(outcome), *_decided(outcome), *_at_the_end(outcome)]
    form = [outcome.session.form.note] if outcome.session.form.note else []
    return [*_left_out(outcome.session), *form, *leaks, *power]


def lacking_on_test(session: EditSession) -> list[str]:
    """Return a sentence for each constraint that no edit can be shown to meet on the test data unless it gains.

    Only the base is evaluated, so that nothing is learned of any edit; what is said is known before the search.
    """
    confidence, constraints = session.options.confidence, session.goal.constraints
    if confidence is None or confidence == 0.5:
        return []
    base = {constraint.task: session.evaluator.base(constraint.task, "test") for constraint in constraints}
    return lacking_power(constraints, base, confidence, "test")


def shown_on_test(session: EditSession) -> list[str]:
    """Return a sentence for each constraint on what the test data suffice for; known before the search, as above."""
    notes, confidence = [], session.options.confidence
    for constraint in session.goal.constraints if confidence not in (None, 0.5) else ():
        assert confidence is not None
        base = session.evaluator.base(constraint.task, "test")
        needed, allowed = power_of(constraint, base, confidence)
        if allowed is None:
            continue
        bound = constraint.bound({constraint.task: base.metrics})
        unit = "examples" if base.groups is None else f"examples in {base.num_groups:,} groups"
        fewest = f" If nothing is lost, {needed:,} are enough." if needed else ""
        notes.append(
            f"with these {base.num_examples:,} test {unit}, {constraint.text} can be shown at {100 * confidence:.4g}% "
            f"confidence if at most {allowed:.3g} of {constraint.metric} is lost; its bound allows "
            f"{abs(base.metrics[constraint.metric] - bound):.3g}.{fewest}"
        )
    return notes


def _few_groups(outcome: Outcome) -> list[str]:
    """Notice tasks with fewer groups than an interval of a mean needs, or of sizes that make them count for fewer."""
    found = []
    for (task, split), base in outcome.session.evaluator.of_base().items():
        count = base.effective_groups
        if split != outcome.split or count is None or count >= FEWEST:
            continue
        sizes = f", of sizes that make them count as {count:.1f}" if base.num_groups != round(count, 1) else ""
        found.append(
            f"The {WORDS[split]} examples of {task} are of {base.num_groups} groups{sizes}. Below {FEWEST} no interval "
            f"covers, so there is none. Evaluate more groups; or, if the examples of a group are no more alike than "
            f"others, leave group out."
        )
    return found


def _without_ground(outcome: Outcome) -> list[str]:
    extra = {task: outcome.evaluations[task]["base"].extra.get(metric) for task, metric in outcome.metrics.items()}
    return [
        f"{task}/{outcome.metrics[task]} has no interval: that of a number of all examples together covers only where "
        f"it is a smooth function of means, as F1 is, and a calibration error or the worst of several classes is not. "
        f"If yours is one, set its attribute has_interval = True."
        for task, metric in extra.items()
        if metric is not None and not has_ground(metric)
    ]


def _decided(outcome: Outcome) -> list[str]:
    return [
        f"The test part of {task} has decided {count} different edits by now: the best of them is not proved by the "
        f"examples that picked it."
        for task, count in outcome.decided.items()
        if count > 1
    ]


def _at_the_end(outcome: Outcome) -> list[str]:
    coefs, notes = dict(outcome.state.coefs), []
    for name, (low, high) in getattr(outcome.session.goal.search, "ranges", {}).items():
        if outcome.choice.feasible and low < high and coefs.get(name) in {low, high} - {0.0}:
            notes.append(
                f"{name} = {coefs[name]:g} is an end of what was searched, {low:g} to {high:g}: another may be better "
                f"beyond it. Widen the search to know."
            )
    return notes


def _left_out(session: EditSession) -> list[str]:
    left_out = session.left_out
    if not left_out:
        return []
    note = (
        f"{len(left_out)} of the {len(session.editor.base)} tensors take no part and keep the model's weights (by "
        f"{' and '.join(session.options.only.options)}): {some(left_out)}"
    )
    tuned = sorted(session.vectors.keys() & session.options.tasks.keys())
    return [f"{note}; the fine-tuned models of {some(tuned)} are evaluated so too." if tuned else f"{note}."]


def _leaks(outcome: Outcome, trained_on: TrainedOn) -> list[str]:
    notes, sizes = [], outcome.session.evaluator.sizes()
    for task, by_split in sorted(trained_on.items()):
        for split, by_vector in sorted(by_split.items()):
            name, count = max(by_vector.items(), key=lambda item: item[1])
            data = outcome.session.vectors[name].origin.training_data
            about = "about " if data is not None and data.num_examples > len(data.rows) // 16 else ""
            meaning = (
                "on them the numbers say how well it was remembered"
                if split == "test"
                else "on them a coefficient looks better than it is"
            )
            notes.append(
                f"{about}{count:,} of the {sizes[task][split]:,} {WORDS[split]} examples of {task} are among those "
                f"that the vector {name} was trained on: {meaning}."
            )
    return notes


def _other_parts(outcome: Outcome) -> list[str]:
    """Notice where a task reads or holds out other examples than its vector's fit did."""
    notes = []
    for task, datamodule in outcome.session.options.tasks.items():
        now, vector = getattr(datamodule, "drawn", None), outcome.session.vectors.get(task)
        data = vector.origin.training_data if vector is not None else None
        if now is None or data is None:
            continue
        # With a split of its own for validation nothing is held out. A part of the training data is no other part.
        keys = {"revision"} if now.get("val_split") is not None else now.keys() - {"limit_train"}
        was = data.drawn
        changed = {key: (was[key], now[key]) for key in now if key in keys & was.keys() and was[key] != now[key]}
        if changed:
            then, is_now = (", ".join(f"{key} {pair[side]}" for key, pair in changed.items()) for side in (0, 1))
            notes.append(
                f"{task} reads or holds out other examples than the fit of its vector did, which had {then}, and here "
                f"it has {is_now}: give it those of the fit."
            )
    return notes


def _other_heads(outcome: Outcome) -> list[str]:
    """Notice where a task's model has another head than its vector was trained under."""
    heads: Mapping[str, Any] = outcome.session.evaluator.heads
    known = {task: (vector.origin.head, heads.get(task)) for task, vector in outcome.session.vectors.items()}
    return [
        f"{task} is evaluated under another head than its vector was trained under, so that its fine-tuned model does "
        f"not score as in its fit. Give the task what the head is made of in the fit (class_names, templates, the "
        f"training examples), or the model the same head."
        for task, pair in known.items()
        if None not in pair and pair[0] != pair[1]
    ]
