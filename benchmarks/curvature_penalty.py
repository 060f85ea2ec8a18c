"""Fine-tuning with a curvature penalty against ordinary fine-tuning: forgetting, and addition at λ = 1.

    python -m benchmarks run curvature_penalty --seeds 0 1 2 [--output runs/curvature]

The shipped CLIP on digits, letters, textures and the control objects. Ways: ordinary fine-tuning, the tangent space,
and the tangent space with the penalty over the factors of the other three tasks. Of the values of beta that are tried,
the one with which digits are forgotten furthest on validation data is taken, with seed 0. What is in the output folder
is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from tva.callbacks import CurvaturePenalty, MergeStatistics

import tva
from benchmarks.ledger import markdown, with_interval
from tva import TaskVector
from tva.data import ImageTask
from tva.models import ClipClassifier
from tva.search import Grid

TASKS = ("digits", "letters", "textures")
CONTROL = "objects"
RATES = {"ordinary": 6e-4, "tangent": 1.2e-3}
BETAS = (1e-2, 1e-1)
STEPS = 40
NUM_TEST = 400
OPTIONS = {"output": "runs/curvature"}
DEPENDS = (
    "benchmarks/curvature_penalty.py",
    "callbacks/curvature_penalty.py",
    "callbacks/merge_statistics.py",
    "tva/merge/curvature.py",
    "tva/models/tangent.py",
)


def data(task: str) -> ImageTask:
    """Return a task with few examples to choose on."""
    return ImageTask(f"builtin:{task}", batch_size=64, val_size=150, limit_test=NUM_TEST)


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Return a quiet Trainer of one CPU."""
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


def factors(output: Path) -> str:
    """Measure the factors of every task at the base; return the pattern of their files."""
    for task in (*TASKS, CONTROL):
        if not (output / "factors" / task / "curvature.safetensors").exists():
            measure = MergeStatistics(["curvature"], num_examples=64, dirpath=output / "factors" / task)
            trainer(measure, max_epochs=0, limit_val_batches=0).fit(ClipClassifier(), datamodule=data(task))
    return str(output / "factors/*/curvature.safetensors")


def fit(way: str, beta: float, task: str, seed: int, output: Path) -> str:
    """Fine-tune on a task unless that is done; return the path of its vector."""
    path = output / f"{way}-{beta:g}" / f"{task}-{seed}.tv.safetensors"
    if not path.exists():
        L.seed_everything(seed, verbose=False)
        model = ClipClassifier(learning_rate=RATES[way], warmup_steps=10, tangent=way == "tangent")
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        callbacks = [CurvaturePenalty(factors(output), beta)] if beta else []
        trainer(*callbacks, max_steps=STEPS, max_epochs=-1, limit_val_batches=0).fit(model, datamodule=data(task))
        vector = TaskVector.between(base, model.state_dict())
        (vector.as_kind("tangent") if way == "tangent" else vector).save(path)
    return str(path)


def edit(way: str, vectors: dict[str, str], folder: Path, **options: Any) -> dict[str, Any]:
    """Edit, and return what its report says of the tasks."""
    if not (folder / "edit.json").exists():
        tva.edit_model(
            ClipClassifier(tangent=way == "tangent"),
            vectors=vectors,
            output=folder,
            controls={CONTROL: data(CONTROL)},
            trainer=trainer(),
            random_seed=None,
            **options,
        )
    content = json.loads((folder / "edit.json").read_text())
    values = {task: {s: entry[s]["value"] for s in ("base", "edited", "finetuned") if s in entry}
              for task, entry in content["tasks"].items()}  # fmt: skip
    chosen = content["coefficients"]["scaling_coef"]
    val = {
        entry["task"]: entry["value"]
        for entry in content["evaluations"]
        if entry["split"] == "val" and entry["coefficients"]["scaling_coef"] == chosen and entry["model"] == "edited"
    }
    return {"scaling_coef": chosen, "holds": content["holds"], "tasks": values, "validation": val}


def forget(way: str, beta: float, seed: int, output: Path) -> dict[str, Any]:
    """Forget digits as far as the control allows."""
    return edit(
        way,
        {"digits": fit(way, beta, "digits", seed, output)},
        output / f"{way}-{beta:g}" / f"forget-{seed}",
        recipe="-digits",
        targets={"digits": data("digits")},
        minimize="digits/accuracy",
        subject_to=[f"{CONTROL}/accuracy >= 0.95 * base"],
        search=Grid(stop=2.4, num=13),
    )


def add(way: str, beta: float, seed: int, output: Path, searched: bool) -> dict[str, Any]:
    """Add the vectors of all tasks, at λ = 1 or at the best λ."""
    chosen: dict[str, Any] = (
        {"search": Grid(num=11), "maximize": "mean(normalized_accuracy)"} if searched else {"scaling_coef": 1.0}
    )
    return edit(
        way,
        {task: fit(way, beta, task, seed, output) for task in TASKS},
        output / f"{way}-{beta:g}" / f"add-{'searched' if searched else 1}-{seed}",
        recipe=" + ".join(TASKS),
        targets={task: data(task) for task in TASKS},
        **chosen,
    )


def measure(seed: int, output: str) -> dict[str, Any]:
    """Return what every way reaches with one seed."""
    folder = Path(output)
    tried = {beta: forget("tangent", beta, 0, folder)["validation"]["digits"] for beta in BETAS}
    beta = min(tried, key=tried.__getitem__)
    return {
        "beta": {"tried": tried, "chosen": beta},
        "forget": {
            "ordinary": forget("ordinary", 0.0, seed, folder),
            "tangent": forget("tangent", 0.0, seed, folder),
            "tangent with the penalty": forget("tangent", beta, seed, folder),
        },
        "add": {
            "ordinary, λ searched": add("ordinary", 0.0, seed, folder, True),
            "ordinary, λ = 1": add("ordinary", 0.0, seed, folder, False),
            "tangent with the penalty, λ = 1": add("tangent", beta, seed, folder, False),
        },
    }


def tables(runs: Mapping[int, Any]) -> dict[str, str]:
    """Return the tables of forgetting and of addition, and a sentence on beta."""
    values, form = list(runs.values()), "{:.1%}".format
    first = values[0]
    n = NUM_TEST

    def cells(kind: str, way: str, tasks: Sequence[str]) -> list[str]:
        found = [each[kind][way] for each in values]
        coefs = ", ".join(f"{each['scaling_coef']:g}" for each in found)
        scores = [with_interval([each["tasks"][task]["edited"] for each in found], n, form) for task in tasks]
        return [way, coefs, *scores]

    made = {}
    if "forget" in first:
        held = [f"{sum(each['forget'][way]['holds'] for each in values)} of {len(values)}" for way in first["forget"]]
        rows = [
            [*cells("forget", way, ("digits", CONTROL)), holds]
            for way, holds in zip(first["forget"], held, strict=True)
        ]
        made["forget"] = markdown(["way", "λ by seed", "digits", f"{CONTROL} (control)", "constraint holds"], rows)
    if "add" in first:
        rows = [cells("add", way, (*TASKS, CONTROL)) for way in first["add"]]
        made["add"] = markdown(["way", "λ by seed", *TASKS, f"{CONTROL} (control)"], rows)
    tried = ", ".join(f"{beta}: {value:.1%}" for beta, value in first["beta"]["tried"].items())
    made["beta"] = f"{first['beta']['chosen']} (digits on validation data, seed 0, by β: {tried})"
    return made
