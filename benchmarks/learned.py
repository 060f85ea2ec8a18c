"""Learned coefficients by each fine-tuned model's own predictions, against entropy, on the same unlabelled inputs.

    python -m benchmarks run learned --models tiny --seeds 0 1 2 [--data DATA] [--output runs/methods]

The networks, tasks and vectors are those of `benchmarks.methods`, which are used if they are there. One coefficient a
tensor in [0, 1] is learned from the inputs of the held-out examples; of these labels only the best λ of the sum knows.
Values are numbers of test examples that are classified rightly.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tva
from benchmarks.ledger import markdown, with_interval
from benchmarks.merge_models import MODELS, Examples, Model
from tva import TaskVector
from tva.search import Grid, Learned, Search

OPTIONS = {"models": "tiny", "num_tasks": 4, "data": "", "output": "runs/methods", "steps": 80, "rate": 0.01}
PARTS = ("models",)
DEPENDS = ("benchmarks/learned.py", "benchmarks/merge_models.py", "tva/search/learned.py", "tva/search/learners.py")


class Headed(nn.Module):
    """A model's fine-tuned layers under the head of the task that a batch is of.

    Args:
        model: With its examples.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.upper = model.module
        self._model = (model,)

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        """Return logits of inputs with the place of their task and, for texts, their lengths."""
        (model,), (inputs, places, *lengths) = self._model, batch
        rows = Examples(inputs, places, *lengths)
        if lengths:
            rows = rows._replace(inputs=inputs[:, : int(lengths[0].max())])
        return model.logits(model.tasks[int(places[0])], rows)


class _Places(TensorDataset):
    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor]:
        *inputs, labels = super().__getitem__(index)
        return inputs, labels


def loader(model: Model, task: str, split: str) -> DataLoader:
    """Return a loader of a task's examples, each with the place of the task."""
    every = model.whole[task, split]
    places = every.labels.new_full(every.labels.shape, model.tasks.index(task))
    lengths = [] if every.lengths is None else [every.lengths]
    return DataLoader(_Places(every.inputs, places, *lengths, every.labels), batch_size=50)


def right(preds: Tensor, target: Tensor) -> Tensor:
    """Return which examples are classified rightly."""
    return preds.argmax(dim=-1) == target


def edit(model: Model, search: Search) -> list[int]:
    """Merge the vectors of all tasks as a search says; count what is right of the test examples of each."""
    model.module.load_state_dict(model.base)
    vectors = {
        task: TaskVector({f"upper.{name}": delta for name, delta in vector.deltas.items()})
        for task, vector in model.vectors.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        tva.edit_model(
            Headed(model),
            vectors=vectors,
            output=Path(folder) / "edit",
            targets={task: (loader(model, task, "val"), loader(model, task, "test"), right) for task in model.tasks},
            maximize="mean(right)",
            search=search,
            random_seed=None,
        )
    edited = TaskVector.between(model.base, model.module.state_dict())
    return [model.right(edited, 1.0, task, "test") for task in model.tasks]


def measure(seed: int, models: str, num_tasks: int, data: str, output: str, steps: int, rate: float) -> dict[str, Any]:
    """Return what both losses reach with one seed, and the best λ of the sum."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = MODELS[models](data, Path(output), num_tasks)
    model.open(seed)
    alone = [model.right(model.vectors[task], 1.0, task, "test") for task in model.tasks]
    found = {"sum, best λ": edit(model, Grid(num=11))}
    for loss in ("entropy", "expert"):
        options = {"learning_rate": rate, "num_steps": steps, "batch_size": 8, "clamp": True, "seed": seed}
        found[loss] = edit(model, Learned(loss=loss, **options))
        print(f"{models} {seed}: {loss} {found[loss]} of {alone}", flush=True)
    return {"tasks": {task: model.count(task, "test") for task in model.tasks}, "alone": alone, "right": found}


def tables(runs: Mapping[int, Any]) -> dict[str, str]:
    """Return a table of both losses, and a sentence on the gain."""
    found = list(runs.values())

    def mean(values: Mapping[str, Any], name: str) -> float:
        pairs = zip(values["right"][name], values["alone"], strict=True)
        return statistics.fmean(count / alone for count, alone in pairs)

    lines = []
    for name in found[0]["right"]:
        scores = with_interval([mean(values, name) for values in found], form="{:.3f}".format)
        gain = with_interval([mean(v, name) - mean(v, "entropy") for v in found], form="{:+.3f}".format)
        by_seed = ", ".join(f"{mean(values, name):.3f}" for values in found)
        lines.append([name, scores, by_seed, "" if name == "entropy" else gain])
    gains = [mean(values, "expert") - mean(values, "entropy") for values in found]
    above = f"above 0 in {sum(gain > 0 for gain in gains)} of {len(gains)}"
    return {
        "losses": markdown(["coefficients from", "normalized accuracy", "by seed", "above entropy"], lines),
        "gain": f"{with_interval(gains, form='{:+.3f}'.format)}, {above}",
    }
