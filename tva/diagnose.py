"""What an edit is compared with, and what explains it: baselines and diagnostics, each when it is asked for."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from tva.editor import Bench, State
from tva.geometry import blocks, cosine_matrix, fit, norms_by_block, sign_conflicts, without
from tva.kinds import KEY, check_kinds, kind_of
from tva.origin import Origin
from tva.search import SCALING, Candidate, Constraint, Grid, Objective, Problem, Rule
from tva.state_dict import some
from tva.task_vector import TaskVector
from tva.validate import Evaluation, Split, quiet
from tva.weights import canonical_state_dict, fingerprint, open_finetuned

Baseline = Literal["gradient_ascent", "average", "endpoints", "joint"]
Diagnosis = Literal["cosine", "signs", "norms", "linearity", "disentanglement", "blame"]


@dataclass(frozen=True)
class Finished:
    """An edit that was chosen, and what it was made from.

    Attributes:
        bench: Evaluates.
        state: The edited state.
        state_of: Makes the state of other coefficients.
        vectors: The recipe's task vectors by name.
        targets: Data modules of the tasks to change.
        controls: Data modules of the tasks to leave alone.
        constraints: On the edit.
        objective: Of the search.
        rule: Of the search.
        confidence: Of the constraints.
        metrics: The metric that is reported for each task.
        split: Split that is reported.
        joint: Checkpoint that was fine-tuned on all tasks together.
    """

    bench: Bench
    state: State
    state_of: Callable[[Candidate], State]
    vectors: Mapping[str, TaskVector]
    targets: Mapping[str, L.LightningDataModule]
    controls: Mapping[str, L.LightningDataModule]
    constraints: Sequence[Constraint]
    objective: Objective | None
    rule: Rule
    confidence: float | None
    metrics: Mapping[str, str]
    split: Split
    joint: str | None

    def moved(self, label: str, vector: TaskVector, coef: float = 1.0) -> State:
        """Make the state of the base moved along a vector, known by the vector's contents."""
        made = fingerprint({**vector.deltas, **vector.buffers}).digest
        return State(label, f"{label}, {made}", ((SCALING, coef),), lambda: vector, self.state.statistics)

    def rows(self, states: Sequence[State]) -> dict[str, dict[str, float]]:
        """Evaluate states on the split that is reported; give each one's reported metric by task."""
        results = self.bench(states, self.metrics, self.split)
        return {
            state.label: {task: found[task].metrics[metric] for task, metric in self.metrics.items()}
            for state, found in zip(states, results, strict=True)
        }


def run_baselines(names: Sequence[Baseline], finished: Finished) -> dict[str, Any]:
    """Evaluate the baselines asked for, on the split that is reported."""
    known = {
        "gradient_ascent": gradient_ascent,
        "average": weight_average,
        "endpoints": endpoints,
        "joint": joint_training,
    }
    return {name: known[name](finished) for name in names}


def run_diagnostics(names: Sequence[Diagnosis], finished: Finished) -> dict[str, Any]:
    """Make the diagnoses asked for."""
    known = {
        "cosine": lambda finished: {"rows": cosine_matrix(finished.vectors)},
        "signs": lambda finished: {"rows": sign_conflicts(finished.vectors)},
        "norms": layer_norms,
        "linearity": linearity_gap,
        "disentanglement": disentanglement,
        "blame": blame,
    }
    return {name: known[name](finished) for name in names}


# --- baselines


def weight_average(finished: Finished) -> dict[str, Any]:
    """The uniform average of the fine-tuned models: every vector times 1 / their number."""
    count = len(finished.vectors)
    vector = sum(finished.vectors.values()) / count
    return {"rows": finished.rows([finished.moved(f"average of {count}", vector)])}


def endpoints(finished: Finished) -> dict[str, Any]:
    """Every fine-tuned model on every task: the ends between which an edit lies."""
    states = [replace(finished.moved(name, vector), statistics="delta") for name, vector in finished.vectors.items()]
    return {"rows": finished.rows(states)}


def joint_training(finished: Finished) -> dict[str, Any]:
    """One model that was fine-tuned on all tasks together, from the checkpoint that was given."""
    base = finished.bench.editor.base
    assert finished.joint is not None
    opened = open_finetuned(finished.joint, base)
    kinds = {"the joint model": opened.metadata.get(KEY), "the model": kind_of(finished.bench.editor.model)}
    vector = TaskVector.between(base, opened, origin=Origin(kind=check_kinds(kinds, "leave the baseline out")))
    return {
        "rows": finished.rows([replace(finished.moved("joint fine-tuning", vector), statistics="delta")]),
        "reason": f"from {os.fspath(finished.joint)}",
    }


class _Snapshots(L.Callback):
    """Keep the weights every few steps, while they are finite."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.states: list[tuple[int, dict[str, Tensor]]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every:
            return
        state = {
            name: tensor.detach().cpu().clone() for name, tensor in canonical_state_dict(pl_module.state_dict()).items()
        }
        if all(bool(torch.isfinite(tensor).all()) for tensor in state.values() if tensor.is_floating_point()):
            self.states.append((trainer.global_step, state))
        else:
            trainer.should_stop = True


def gradient_ascent(finished: Finished, num_steps: int = 100, num_stops: int = 20) -> dict[str, Any]:
    """Train on each target with the loss turned round, and stop where the edit had to stop too.

    The model's own optimizer, batches and schedule are used. Two versions are reported. "stopped": the last of
    ``num_stops`` checkpoints before the constraints first fail on validation data. "interpolated": the line from the
    base to the last checkpoint, with a coefficient chosen as the edit's was.

    Source: the gradient ascent rows of Ilharco et al., ICLR 2023, table 1.
    """
    bench = finished.bench
    rows, steps = {}, {}
    for task, datamodule in finished.targets.items():
        taken = _ascend(bench, datamodule, num_steps, max(1, num_steps // num_stops))
        vectors = [(step, TaskVector.between(bench.editor.base, state)) for step, state in taken]
        states = [replace(finished.moved(f"step {step}", vector), statistics="delta") for step, vector in vectors]
        problem = _problem(
            finished, lambda candidates, states=states: [states[int(c.scaling_coef)] for c in candidates]
        )
        order = [Candidate.of(scaling_coef=float(number)) for number in range(len(states))]
        last = -1
        if order:
            problem.score(order)
            while last + 1 < len(order) and problem.choose([order[last + 1]]).feasible:
                last += 1
        steps[task] = vectors[last][0] if last >= 0 else 0
        stopped = states[last] if last >= 0 else finished.state_of(Candidate.of(scaling_coef=0.0))
        rows |= finished.rows([replace(stopped, label=f"ascent on {task}, stopped")])
        if vectors:
            line = vectors[-1][1]

            def along(candidates: Sequence[Candidate], line: TaskVector = line) -> list[State]:
                return [finished.moved("interpolated", line, candidate.scaling_coef) for candidate in candidates]

            choice = Grid().run(_problem(finished, along))
            coef = choice.scaling_coef if choice.feasible else 0.0
            label = f"ascent on {task}, interpolated at {coef:g}"
            rows |= finished.rows([finished.moved(label, line, coef)])
    reason = "stopped after step " + ", ".join(f"{step} of {num_steps} ({task})" for task, step in steps.items())
    return {"rows": rows, "reason": reason}


def _problem(finished: Finished, states: Callable[[Sequence[Candidate]], list[State]]) -> Problem:
    """Make the same choice as the edit's among other states."""
    bench, objective = finished.bench, finished.objective
    needed = [*(objective.tasks if objective else ()), *(c.task for c in finished.constraints)]
    return Problem(
        lambda candidates, windows, seed: bench(states(candidates), windows, "val", windows, seed),
        {task: bench.base(task, "val") for task in dict.fromkeys(needed or finished.targets)},
        finished.constraints,
        objective,
        finished.rule,
        finished.confidence,
        bench.finetuned(objective.normalized, "val") if objective else {},
        lambda candidate: False,
    )


def _ascend(
    bench: Bench, datamodule: L.LightningDataModule, num_steps: int, every: int
) -> list[tuple[int, dict[str, Tensor]]]:
    editor = bench.editor
    editor.set(None, 0.0)
    model = editor.model
    step, modes = model.training_step, {name: module.training for name, module in model.named_modules()}

    def reversed_step(batch: Any, batch_idx: int) -> Any:
        outputs = step(batch, batch_idx)
        return {**outputs, "loss": -outputs["loss"]} if isinstance(outputs, Mapping) else -outputs

    snapshots = _Snapshots(every)
    device = editor.trainer.strategy.root_device
    trainer = L.Trainer(
        accelerator="cpu" if device.type == "cpu" else "auto",
        devices=1,
        precision=editor.trainer.precision,
        max_steps=num_steps,
        max_epochs=-1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[snapshots],
    )
    model.training_step = reversed_step
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.train()
            trainer.fit(model, datamodule=datamodule)
    finally:
        del model.training_step
        model.zero_grad(set_to_none=True)
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)
    model.cpu()
    editor.set(None, 0.0)
    return snapshots.states


# --- diagnostics


def layer_norms(finished: Finished) -> dict[str, Any]:
    """The norm of each vector, and of the edit, in each block of layers."""
    columns = {name: norms_by_block(vector) for name, vector in finished.vectors.items()}
    edit = finished.state.vector() * finished.state.scaling_coef
    columns["the edit"] = norms_by_block(edit)
    names = dict.fromkeys(block for norms in columns.values() for block in norms)
    return {"rows": {block: {name: norms.get(block, 0.0) for name, norms in columns.items()} for block in names}}


def linearity_gap(finished: Finished) -> dict[str, Any]:
    """The metric under the whole edit, against the base plus what each vector alone would change.

    Only for recipes that are sums; each vector is applied with the number that the edit gives it.
    """
    parts = _parts(finished)
    states = [finished.moved(f"{name} alone", vector) for name, vector in parts.items()]
    results = finished.bench([finished.state, *states], finished.metrics, finished.split)
    rows = {}
    for task, metric in finished.metrics.items():
        base = finished.bench.base(task, finished.split).metrics[metric]
        measured, *alone = (found[task].metrics[metric] for found in results)
        predicted = base + sum(value - base for value in alone)
        rows[task] = {"base": base, "predicted": predicted, "measured": measured, "gap": measured - predicted}
    return {"rows": rows}


def _parts(finished: Finished) -> dict[str, TaskVector]:
    """Split the edit into each vector times its number."""
    numbers = recipe_numbers(finished.state, finished.vectors)
    return {name: vector * numbers[name] for name, vector in finished.vectors.items()}


def recipe_numbers(state: State, vectors: Mapping[str, TaskVector]) -> dict[str, float]:
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


def disentanglement(finished: Finished, num: int = 5, low: float = -1.0, high: float = 1.0) -> dict[str, Any]:
    r"""The weight disentanglement error of the first two vectors over a square of coefficients.

    :math:`\xi(\lambda_1, \lambda_2) = \sum_t P(f(x; \theta_0 + \lambda_t \tau_t) \ne f(x; \theta_0 + \lambda_1 \tau_1
    + \lambda_2 \tau_2))` over the examples of each vector's own task: how often the other vector changes a prediction,
    where 0 is perfect. Predictions are the step's ``preds``; without them it is counted how often right turns wrong or
    wrong right, which misses changes among wrong answers.

    Source: Ortiz-Jimenez et al., "Task arithmetic in the tangent space", NeurIPS 2023, equation 5.
    """
    names = [name for name in finished.vectors if name in finished.metrics][:2]
    if len(names) < 2:
        raise ValueError(
            f"The disentanglement error needs two vectors that have a task of their name; the recipe's are "
            f"{some(finished.vectors)}, and the tasks {some(finished.metrics, 8)}."
        )
    axis = [round(low + (high - low) * step / (num - 1), 12) for step in range(num)]
    first, second = (finished.vectors[name] for name in names)
    both = {
        (x, y): finished.moved(f"{x:g} {names[0]} + {y:g} {names[1]}", first * x + second * y)
        for x, y in itertools.product(axis, axis)
    }
    errors = dict.fromkeys(both, 0.0)
    for place, name in enumerate(names):
        alone = {x: finished.moved(f"{x:g} {name}", finished.vectors[name] * x) for x in axis}
        found = finished.bench([*both.values(), *alone.values()], [name], finished.split)
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


def blame(finished: Finished) -> dict[str, Any]:
    """Which block of layers carries the effect: each task's metric when the edit leaves one block as it was.

    A share of 1 says that without this block nothing of the effect is left; shares need not sum to 1.
    """
    vector, coef = finished.state.vector(), finished.state.scaling_coef
    states = {
        block: finished.moved(f"without {block}", without(vector, names), coef)
        for block, names in blocks(vector.deltas).items()
    }
    results = finished.bench([finished.state, *states.values()], finished.metrics, finished.split)
    rows: dict[str, dict[str, Any]] = {block: {} for block in states}
    for task, metric in finished.metrics.items():
        base = finished.bench.base(task, finished.split).metrics[metric]
        edited = results[0][task].metrics[metric]
        for block, found in zip(states, results[1:], strict=True):
            value = found[task].metrics[metric]
            rows[block][task] = value
            rows[block][f"share of {task}"] = (value - edited) / (base - edited) if base != edited else None
    return {"rows": rows}
