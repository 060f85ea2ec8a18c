"""What explains an edit: diagnostics, each when it is asked for."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tva.edit.editor import EditState
from tva.edit.options import Diagnosis
from tva.edit.outcome import Outcome
from tva.errors import some
from tva.evaluation.result import Evaluation
from tva.vectors.geometry import blocks, cosine_matrix, fit, norms_by_block, sign_conflicts, without
from tva.vectors.task_vector import TaskVector


def run_diagnostics(names: Sequence[Diagnosis], outcome: Outcome) -> dict[str, Any]:
    """Make the diagnoses asked for."""
    known = {
        "cosine": lambda outcome: {"rows": cosine_matrix(outcome.vectors)},
        "signs": lambda outcome: {"rows": sign_conflicts(outcome.vectors)},
        "norms": layer_norms,
        "linearity": linearity_gap,
        "disentanglement": disentanglement,
        "blame": blame,
    }
    return {name: known[name](outcome) for name in names}


def layer_norms(outcome: Outcome) -> dict[str, Any]:
    """The norm of each vector, and of the edit, in each block of layers."""
    columns = {name: norms_by_block(vector) for name, vector in outcome.vectors.items()}
    edit = outcome.state.vector() * outcome.state.scaling_coef
    columns["the edit"] = norms_by_block(edit)
    names = dict.fromkeys(block for norms in columns.values() for block in norms)
    return {"rows": {block: {name: norms.get(block, 0.0) for name, norms in columns.items()} for block in names}}


def linearity_gap(outcome: Outcome) -> dict[str, Any]:
    """The metric under the whole edit, against the base plus what each vector would change by itself.

    Only for recipes that are sums; each vector is applied with the number that the edit gives it.
    """
    parts = _parts(outcome)
    states = [outcome.moved(f"{name} alone", vector) for name, vector in parts.items()]
    results = outcome.session.evaluator([outcome.state, *states], outcome.metrics, outcome.split)
    rows = {}
    for task, metric in outcome.metrics.items():
        base = outcome.session.evaluator.base(task, outcome.split).metrics[metric]
        measured, *alone = (found[task].metrics[metric] for found in results)
        predicted = base + sum(value - base for value in alone)
        rows[task] = {"base": base, "predicted": predicted, "measured": measured, "gap": measured - predicted}
    return {"rows": rows}


def _parts(outcome: Outcome) -> dict[str, TaskVector]:
    numbers = recipe_numbers(outcome.state, outcome.vectors)
    return {name: vector * numbers[name] for name, vector in outcome.vectors.items()}


def recipe_numbers(state: EditState, vectors: Mapping[str, TaskVector]) -> dict[str, float]:
    """Find the numbers by which a state's vector is the sum of others, by least squares.

    Raises:
        ValueError: It is no such sum.
    """
    whole = state.vector()
    names = list(vectors)
    gram = torch.tensor([[vectors[a].dot(vectors[b]) for b in names] for a in names], dtype=torch.float64)
    right = torch.tensor([vectors[a].dot(whole) for a in names], dtype=torch.float64)
    found = torch.tensor(fit(gram, right)[0], dtype=torch.float64)
    residual = whole.dot(whole) - float(found @ right)
    if residual > 1e-6 * max(whole.dot(whole), 1e-30):
        raise ValueError(
            f"This diagnosis needs an edit that is a sum of its vectors, each times a number; {state.recipe!r} is not "
            f"({math.sqrt(max(0.0, residual)):.3g} of its norm {whole.norm():.3g} is left over)."
        )
    numbers = [round(number, 9) for number in (found * state.scaling_coef).tolist()]
    return dict(zip(names, numbers, strict=True))


def disentanglement(outcome: Outcome, num: int = 5, low: float = -1.0, high: float = 1.0) -> dict[str, Any]:
    r"""The weight disentanglement error of the first two vectors over a square of coefficients.

    :math:`\xi(\lambda_1, \lambda_2) = \sum_t P(f(x; \theta_0 + \lambda_t \tau_t) \ne f(x; \theta_0 + \lambda_1 \tau_1
    + \lambda_2 \tau_2))` over the examples of each vector's own task: how often the other vector changes a prediction,
    where 0 is perfect. Predictions are the step's ``preds``; without them it is counted how often right turns wrong or
    wrong right, which misses changes among wrong answers.

    Source: Ortiz-Jimenez et al., "Task arithmetic in the tangent space", NeurIPS 2023, equation 5.
    """
    names = [name for name in outcome.vectors if name in outcome.metrics][:2]
    if len(names) < 2:
        raise ValueError(
            f"The disentanglement error needs two vectors that have a task of their name; the recipe's are "
            f"{some(outcome.vectors)}, and the tasks {some(outcome.metrics, 8)}."
        )
    axis = [round(low + (high - low) * step / (num - 1), 12) for step in range(num)]
    first, second = (outcome.vectors[name] for name in names)
    both = {
        (x, y): outcome.moved(f"{x:g} {names[0]} + {y:g} {names[1]}", first * x + second * y)
        for x, y in itertools.product(axis, axis)
    }
    errors = dict.fromkeys(both, 0.0)
    for place, name in enumerate(names):
        alone = {x: outcome.moved(f"{x:g} {name}", outcome.vectors[name] * x) for x in axis}
        found = outcome.session.evaluator([*both.values(), *alone.values()], [name], outcome.split)
        together = dict(zip(both, found, strict=False))
        single = dict(zip(alone, found[len(both) :], strict=True))
        for point in both:
            errors[point] += _disagreement(together[point][name], single[point[place]][name])
    rows = {f"{names[0]} {x:g}": {f"{names[1]} {y:g}": errors[x, y] for y in axis} for x in axis}
    return {"rows": rows, "reason": "share of predictions that the other vector changes, summed over both tasks"}


def _disagreement(left: Evaluation, right: Evaluation) -> float:
    if left.predicted is not None and right.predicted is not None:
        return float((left.predicted != right.predicted).mean())
    if "accuracy" not in left.scores:
        raise ValueError("The disentanglement error needs steps that return 'preds' or 'correct'.")
    return float((left.scores["accuracy"] != right.scores["accuracy"]).mean())


def blame(outcome: Outcome) -> dict[str, Any]:
    """Which block of layers carries the effect: each task's metric when the edit leaves one block as it was.

    A share of 1 says that without this block nothing of the effect is left; shares need not sum to 1.
    """
    vector, coef = outcome.state.vector(), outcome.state.scaling_coef
    states = {
        block: outcome.moved(f"without {block}", without(vector, names), coef)
        for block, names in blocks(vector.deltas).items()
    }
    results = outcome.session.evaluator([outcome.state, *states.values()], outcome.metrics, outcome.split)
    rows: dict[str, dict[str, Any]] = {block: {} for block in states}
    for task, metric in outcome.metrics.items():
        base = outcome.session.evaluator.base(task, outcome.split).metrics[metric]
        edited = results[0][task].metrics[metric]
        for block, found in zip(states, results[1:], strict=True):
            value = found[task].metrics[metric]
            rows[block][task] = value
            rows[block][f"share of {task}"] = (value - edited) / (base - edited) if base != edited else None
    return {"rows": rows}
