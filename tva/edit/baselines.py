"""What an edit is compared with: baselines, each when it is asked for."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from tva.edit.editor import EditState
from tva.edit.opening import load_vector
from tva.edit.options import ANALOGY, Baseline
from tva.edit.outcome import Outcome
from tva.edit.training import train_briefly
from tva.evaluation.evaluate import evaluate
from tva.evaluation.metrics import compute, find_metric
from tva.search import SCALING, Candidate, Grid, Problem
from tva.vectors.kind import check_kinds, kind_of
from tva.vectors.task_vector import TaskVector


def run_baselines(names: Sequence[Baseline], outcome: Outcome) -> dict[str, Any]:
    """Evaluate the baselines asked for, on the split that is reported."""
    known = {
        "gradient_ascent": gradient_ascent,
        "average": weight_average,
        "endpoints": endpoints,
        "joint": joint_training,
        "ensemble": output_ensemble,
        "random": random_vectors,
        "other_task": other_tasks,
        "parts": analogy_parts,
    }
    return {name: known[name](outcome) for name in names}


NUM_RANDOM = 5  # draws of the baseline 'random'


def random_vectors(outcome: Outcome) -> dict[str, Any]:
    """Random vectors with the edit's norm in every tensor, at its coefficient: five draws, to show their spread."""
    first, state = outcome.session.options.random_seed or 0, outcome.state
    seeds = range(first, first + NUM_RANDOM)
    states = [
        replace(
            state,
            label=f"random, seed {seed}",
            recipe=f"random_like({state.recipe}, seed={seed})",
            vector=functools.partial(_random_like, state, seed),
        )
        for seed in seeds
    ]
    return {"rows": outcome.rows(states)}


def _random_like(state: EditState, seed: int) -> TaskVector:
    return state.vector().random_like(seed)


def other_tasks(outcome: Outcome) -> dict[str, Any]:
    """The vectors that the recipe does not use, added and subtracted at the norm of the edit."""
    session, edit = outcome.session, outcome.state.vector()
    norm = abs(outcome.state.scaling_coef) * edit.norm()
    others = {name: vector for name, vector in session.vectors.items() if name not in outcome.vectors}
    states = [
        outcome.moved(f"{'+' if sign > 0 else '−'} {name}", vector, sign * norm / vector.norm())
        for name, vector in others.items()
        for sign in (1, -1)
    ]
    return {"rows": outcome.rows(states), "reason": f"norm {norm:.4g}, that of the edit"}


def analogy_parts(outcome: Outcome) -> dict[str, Any]:
    """The parts of an analogy C + (B − A): C alone, B − A and B + C, each with a coefficient chosen as the edit's was.

    An analogy says something only where it is better than all of them.
    """
    match = ANALOGY.fullmatch(outcome.session.options.recipe)
    assert match is not None
    a, b, c = match.groups()
    vectors = outcome.vectors
    parts = {c: vectors[c], f"{b} − {a}": vectors[b] - vectors[a], f"{b} + {c}": vectors[b] + vectors[c]}
    search, rows = outcome.session.goal.search, {}
    for name, vector in parts.items():
        state = outcome.moved(name, vector)

        def along(candidates: Sequence[Candidate], state: EditState = state) -> list[EditState]:
            return [replace(state, coefs=((SCALING, candidate.scaling_coef),)) for candidate in candidates]

        coef = outcome.state.scaling_coef
        if not outcome.session.goal.is_given:
            choice = (search if isinstance(search, Grid) else Grid()).run(_problem(outcome, along))
            coef = choice.scaling_coef if choice.feasible else 0.0
        rows |= outcome.rows([replace(state, label=f"{name}, λ = {coef:g}", coefs=((SCALING, coef),))])
    return {"rows": rows, "reason": "each at a coefficient of its own, chosen as the edit's was"}


def weight_average(outcome: Outcome) -> dict[str, Any]:
    """The uniform average of the fine-tuned models: every vector times 1 / their number."""
    count = len(outcome.vectors)
    vector = sum(outcome.vectors.values()) / count
    return {"rows": outcome.rows([outcome.moved(f"average of {count}", vector)])}


def endpoints(outcome: Outcome) -> dict[str, Any]:
    """Every fine-tuned model on every task: the end points of the edit."""
    states = [replace(outcome.moved(name, vector), statistics="delta") for name, vector in outcome.vectors.items()]
    return {"rows": outcome.rows(states)}


def joint_training(outcome: Outcome) -> dict[str, Any]:
    """One model that was fine-tuned on all tasks together, from the checkpoint that was given."""
    base, model = outcome.session.editor.base, outcome.session.editor.model
    joint = outcome.session.options.joint
    assert joint is not None
    vector = load_vector(joint, model, base, outcome.session.options)
    vector.check_base(base, allow_other_base=outcome.session.options.allow_other_base)
    check_kinds({"the joint model": vector.origin.kind, "the model": kind_of(model)}, "leave the baseline out")
    return {
        "rows": outcome.rows([replace(outcome.moved("joint fine-tuning", vector), statistics="delta")]),
        "reason": f"from {joint}",
    }


def output_ensemble(outcome: Outcome) -> dict[str, Any]:
    """The mean of the fine-tuned models' logits: what the sum of their vectors stands for, at the cost of all of them.

    Source: Ilharco et al., ICLR 2023, appendix: ensembles of outputs against sums of weights.

    Raises:
        ValueError: The model's steps return no ``preds`` and ``target``, or a metric is not one of predictions.
    """
    session = outcome.session
    editor, row = session.editor, {}
    for task, metric in outcome.metrics.items():
        edits = [functools.partial(editor.set, vector, 1.0, "delta") for vector in outcome.vectors.values()]
        found = evaluate(
            editor.trainer,
            editor.model,
            editor.datamodules[task],
            outcome.split,
            edits=edits,
            share=session.evaluator.base(task, outcome.split).shareable,
            cache=session.evaluator.cache,
            keep_preds=True,
        )
        if any(each.preds is None or each.target is None for each in found):
            raise ValueError(
                f"The baseline 'ensemble' averages predictions, and the steps of {type(editor.model).__name__} return "
                f"none on {task}: return 'preds' (batch, classes) and 'target' from them, or leave the baseline out."
            )
        logits = torch.stack([each.preds.float() for each in found]).mean(0)  # (examples, classes)
        if metric == "accuracy":
            row[task] = float((logits.argmax(-1) == found[0].target).double().mean())
        else:
            row[task] = float(compute(find_metric(metric, logits.shape[-1]), logits, found[0].target).double().mean())
    editor.set(None, 0.0)
    return {"rows": {f"ensemble of {len(outcome.vectors)}": row}, "reason": "mean of the logits"}


def gradient_ascent(outcome: Outcome, num_steps: int = 100, num_stops: int = 20) -> dict[str, Any]:
    """Train on each target with the loss negated, and stop where the edit had to stop too.

    The model's own optimizer, batches and schedule are used. Two versions are reported. "stopped": the last of
    ``num_stops`` checkpoints before the constraints first fail on validation data. "interpolated": the line from the
    base to the last checkpoint, with a coefficient chosen as the edit's was.

    Source: the gradient ascent rows of Ilharco et al., ICLR 2023, table 1.
    """
    editor = outcome.session.editor
    rows, steps = {}, {}
    for task, datamodule in (outcome.session.options.targets or {}).items():
        every = max(1, num_steps // num_stops)
        taken = train_briefly(editor, datamodule, range(every, num_steps + 1, every), reverse=True)
        vectors = [(step, TaskVector.between(editor.base, state)) for step, state in taken]
        states = [replace(outcome.moved(f"step {step}", vector), statistics="delta") for step, vector in vectors]
        problem = _problem(outcome, lambda candidates, states=states: [states[int(c.scaling_coef)] for c in candidates])
        order = [Candidate.of(scaling_coef=float(number)) for number in range(len(states))]
        last = -1
        if order:
            problem.score(order)
            while last + 1 < len(order) and problem.choose([order[last + 1]]).feasible:
                last += 1
        steps[task] = vectors[last][0] if last >= 0 else 0
        stopped = states[last] if last >= 0 else outcome.session.state_of(Candidate.of(scaling_coef=0.0))
        rows |= outcome.rows([replace(stopped, label=f"ascent on {task}, stopped")])
        if vectors:
            line = vectors[-1][1]

            def along(candidates: Sequence[Candidate], line: TaskVector = line) -> list[EditState]:
                return [outcome.moved("interpolated", line, candidate.scaling_coef) for candidate in candidates]

            choice = Grid().run(_problem(outcome, along))
            coef = choice.scaling_coef if choice.feasible else 0.0
            label = f"ascent on {task}, interpolated at {coef:g}"
            rows |= outcome.rows([outcome.moved(label, line, coef)])
    reason = "stopped after step " + ", ".join(f"{step} of {num_steps} ({task})" for task, step in steps.items())
    return {"rows": rows, "reason": reason}


def _problem(outcome: Outcome, states: Callable[[Sequence[Candidate]], list[EditState]]) -> Problem:
    """Return the edit's own choice, to be made among other states."""
    return outcome.session.problem(states, lambda candidate: False)
