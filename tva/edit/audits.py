"""Audits of forgetting: whether what an edit took away comes back, each when it is asked for."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from tva.checkpoints import canonical_state_dict
from tva.edit.audit_options import Audit, Relearn, audit_of
from tva.edit.editor import Editor, EditState
from tva.edit.outcome import Outcome
from tva.edit.training import overridden, train_briefly
from tva.evaluation.evaluate import quiet
from tva.evaluation.result import Evaluation
from tva.search import Constraint
from tva.vectors.task_vector import TaskVector

Pair = tuple[Evaluation, Evaluation]  # of the base and of the edited model, after the same was done to both
NUM_POINTS = 4  # of the curve of relearning


def run_audits(names: Sequence[Audit], outcome: Outcome) -> tuple[dict[str, Any], dict[tuple[Audit, str], Pair]]:
    """Run the audits asked for, on the split that is reported.

    Returns:
        By audit what the report holds; and by audit and task the evaluations that constraints decide on.
    """
    known: dict[Audit, Callable[[Outcome], tuple[dict[str, Any], dict[str, Pair]]]] = {
        "relearn": audit_relearning,
        "int8": audit_rounding,
    }
    found = {name: known[name](outcome) for name in names}
    pairs = {(name, task): pair for name, (_, by_task) in found.items() for task, pair in by_task.items()}
    return {name: shown for name, (shown, _) in found.items()}, pairs


def audited(constraint: Constraint, pairs: Mapping[tuple[Audit, str], Pair]) -> tuple[Constraint, Pair]:
    """Return a constraint on an audit as one on the metric itself, with the evaluations that it is on."""
    audit, metric = audit_of(constraint.metric) or ("int8", constraint.metric)
    return replace(constraint, metric=metric), pairs[audit, constraint.task]


# --- rounding


def audit_rounding(outcome: Outcome) -> tuple[dict[str, Any], dict[str, Pair]]:
    """Evaluate the edited model and the base with their linear and convolutional weights rounded to 8-bit integers.

    Raises:
        ValueError: The model has no such weight.

    Source: Zhang et al., "Catastrophic failure of LLM unlearning via quantization", ICLR 2025, who find that it comes
    back in 4 bits and hardly in 8.
    """
    editor, state = outcome.session.editor, outcome.state
    dimensions = rounded_weights(editor.model)
    if not dimensions:
        raise ValueError(
            f"The audit 'int8' rounds weights of linear layers and convolutions; {type(editor.model).__name__} has "
            f"none. Leave it out of audits."
        )
    vectors = []
    for vector, coef in ((None, 0.0), (state.vector(), state.scaling_coef)):
        editor.set(vector, coef, state.statistics)
        weights = {name: tensor.clone() for name, tensor in canonical_state_dict(editor.model.state_dict()).items()}
        for name, dimension in dimensions.items():
            weights[name] = round_to_int8(weights[name], dimension)
        vectors.append(TaskVector.between(editor.base, weights))
    editor.set(None, 0.0)
    labels = ("base in int8", "edited in int8")
    states = [_moved(outcome, label, vector) for label, vector in zip(labels, vectors, strict=True)]
    base, edited = outcome.session.evaluator(states, outcome.metrics, outcome.split)
    pairs = {task: (base[task], edited[task]) for task in outcome.metrics}
    return {"rounded": len(dimensions), "tasks": {task: _task(outcome, task, pairs[task]) for task in pairs}}, pairs


def round_to_int8(weight: Tensor, dimension: int = 0) -> Tensor:
    """Round a weight to 8-bit integers, symmetrically, with one scale for each output: the largest magnitude / 127.

    Args:
        weight: Shape (outputs, …), or with the outputs in another dimension; any floating dtype.
        dimension: That of the outputs.

    Returns:
        The rounded values in the weight's dtype; an output of zeros stays as it is.

    Example:
        >>> round_to_int8(torch.tensor([[1.27, 0.004, -0.006], [0.0, 0.0, 0.0]]))
        tensor([[ 1.2700,  0.0000, -0.0100],
                [ 0.0000,  0.0000,  0.0000]])
    """
    others = [other for other in range(weight.ndim) if other != dimension % weight.ndim]
    scale = weight.float().abs().amax(dim=others, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return ((weight.float() / scale).round().clamp(-127, 127) * scale).to(weight.dtype)


def rounded_weights(model: nn.Module) -> dict[str, int]:
    """Return the weights that integer inference rounds, by name in the state dict, with their outputs' dimension.

    These are the weights of linear layers (GPT-2's ``Conv1D`` and torch's attention too) and of convolutions, but for
    those that an embedding shares.
    """
    embedded = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    found: dict[int, int] = {}
    for part in model.modules():
        if isinstance(part, nn.MultiheadAttention):
            weights = (part.in_proj_weight, part.q_proj_weight, part.k_proj_weight, part.v_proj_weight)
            found |= {id(weight): 0 for weight in weights if weight is not None}
        elif isinstance(part, nn.Linear | nn.modules.conv._ConvNd) or type(part).__name__ == "Conv1D":
            swapped = isinstance(part, nn.modules.conv._ConvTransposeNd) or type(part).__name__ == "Conv1D"
            found[id(part.weight)] = int(swapped)
    named = canonical_state_dict(dict(model.named_parameters(remove_duplicate=False)))
    return {
        name: found[id(parameter)]
        for name, parameter in named.items()
        if id(parameter) in found and id(parameter) not in embedded and parameter.is_floating_point()
    }


# --- relearning


def audit_relearning(outcome: Outcome) -> tuple[dict[str, Any], dict[str, Pair]]:
    """Train the edited model, and the base in the same way, on a few examples of each target.

    The same examples in the same order, with the model's own training step and a fresh optimizer of a constant rate.

    Source: the relearning attack of Lynch et al., "Eight methods to evaluate robust unlearning in LLMs", 2024.
    """
    asked = outcome.session.options.relearn or Relearn()
    every = -(-asked.steps // NUM_POINTS)
    steps = [*range(every, asked.steps, every), asked.steps]
    tasks, pairs = {}, {}
    for task, datamodule in (outcome.session.options.targets or {}).items():
        batches = _few(outcome.session.editor, datamodule, asked)
        runs = []
        for label in ("base", "edited"):
            states = _relearned(outcome, label, datamodule, batches, asked, steps)
            runs.append([found[task] for found in outcome.session.evaluator(states, [task], outcome.split)])
        pairs[task] = (runs[0][-1], runs[1][-1])
        metric = outcome.metrics[task]
        tasks[task] = {
            **_task(outcome, task, pairs[task]),
            "num_trained": sum(_size(batch) for batch in batches),
            "curve": [
                {"step": step, "base": base.metrics[metric], "edited": edited.metrics[metric]}
                for step, base, edited in zip(steps, *runs, strict=True)
            ],
        }
    return {"options": asdict(asked), "tasks": tasks}, pairs


def _relearned(
    outcome: Outcome,
    label: str,
    datamodule: L.LightningDataModule,
    batches: list[Any],
    asked: Relearn,
    steps: Sequence[int],
) -> list[EditState]:
    """Return the states along the training of the base or of the edited model."""
    editor, state = outcome.session.editor, outcome.state
    start = functools.partial(editor.set, state.vector(), state.scaling_coef, state.statistics)
    optimizers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "AdamW": functools.partial(torch.optim.AdamW, lr=asked.learning_rate, weight_decay=0.0),
        "SGD": functools.partial(torch.optim.SGD, lr=asked.learning_rate),
    }
    with overridden(datamodule, "train_dataloader", lambda: DataLoader(cast("Any", batches), batch_size=None)):
        taken = train_briefly(
            editor,
            datamodule,
            steps,
            start=None if label == "base" else start,
            optimizer=optimizers[asked.optimizer],
            seed=asked.seed,
        )
    if len(taken) < len(steps):
        raise ValueError(
            f"The audit 'relearn' trains with a learning rate at which weights stay finite; with {asked.learning_rate} "
            f"those of the {label} model did not. Give a smaller relearn.learning_rate."
        )
    vectors = [(step, TaskVector.between(editor.base, weights)) for step, weights in taken]
    return [_moved(outcome, f"{label} relearned for {step} steps", vector) for step, vector in vectors]


def _few(editor: Editor, datamodule: L.LightningDataModule, asked: Relearn) -> list[Any]:
    """Return the batches of a task's few training examples, drawn by the seed."""
    datamodule.trainer = editor.trainer
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(asked.seed)
        datamodule.prepare_data()
        datamodule.setup("fit")
        loader = datamodule.train_dataloader()
        if not isinstance(loader, DataLoader):
            raise ValueError(
                f"The audit 'relearn' draws examples from one DataLoader of training data; that of "
                f"{type(datamodule).__name__} is a {type(loader).__name__}. Leave it out of audits."
            )
        data: Any = loader.dataset
        if isinstance(data, IterableDataset):
            data = list(itertools.islice(data, asked.examples))
        else:
            data = Subset(data, torch.randperm(len(data))[: asked.examples].tolist())
        return list(DataLoader(data, batch_size=loader.batch_size or 32, collate_fn=loader.collate_fn))


def _size(batch: Any) -> int:
    first = batch
    while not isinstance(first, Tensor):
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    return len(first)


# --- what is reported


def _moved(outcome: Outcome, label: str, vector: TaskVector) -> EditState:
    """Return a state that was made outside, with its BatchNorm statistics."""
    return replace(outcome.moved(label, vector), statistics="delta")


def _task(outcome: Outcome, task: str, after: Pair) -> dict[str, Any]:
    """Return a task's metric before and after, with intervals, and what of the loss came back."""
    metric, known = outcome.metrics[task], outcome.evaluations[task]
    base, edited = known["base"].metrics[metric], known["edited"].metrics[metric]
    scores = {"base": known["base"], "edited": known["edited"], "base_after": after[0], "edited_after": after[1]}
    against_base, change = after[1].compare(after[0], metric), after[1].compare(known["edited"], metric)
    return {
        "metric": metric,
        "split": outcome.split,
        "num_examples": known["base"].num_examples,
        **{name: vars(outcome.score(found, metric)) for name, found in scores.items()},
        "change": None if change is None else vars(change),
        "comparison": None if against_base is None else vars(against_base),
        "recovered": None if base == edited else (after[1].metrics[metric] - edited) / (base - edited),
    }
