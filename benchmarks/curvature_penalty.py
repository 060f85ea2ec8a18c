"""Fine-tuning with a curvature penalty against ordinary fine-tuning: forgetting, and addition at λ = 1.

    python -m benchmarks run curvature_penalty --seeds 0 1 2 [--models images --data DATA] [--output runs/curvature]

The CLIP that ships with tva on digits, letters, textures and the control objects; or EfficientNet-Lite0 at 64 pixels on
mnist, usps and the control cifar10, forgetting only. Ways: ordinary fine-tuning, the tangent space, and the tangent
space with the penalty over the factors of the other tasks. Of the values of beta that are tried, the one with which the
first task is forgotten furthest on validation data is taken, with seed 0; of those alike, the one that keeps more of
the control. What is in the output folder is not done
again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from tva.callbacks import CurvaturePenalty, MergeStatistics

import tva
from benchmarks.ledger import markdown, with_interval
from benchmarks.merge_models import unpacked
from tva import TaskVector
from tva.data import ImageTask
from tva.models import ClipClassifier, VisionClassifier
from tva.search import Grid

OPTIONS = {"models": "tiny", "data": "", "output": "runs/curvature"}
PARTS = ("models",)  # the ledger has a file for each
DEPENDS = (
    "benchmarks/curvature_penalty.py",
    "callbacks/curvature_penalty.py",
    "callbacks/merge_statistics.py",
    "tva/merge/curvature.py",
    "tva/models/tangent.py",
)


class Tiny:
    """The CLIP that ships with tva.

    Args:
        data: Folder with ``images``.
        output: Where everything is kept.
        seed: Of fits and of which examples are held out.
    """

    tasks: Sequence[str] = ("digits", "letters", "textures")
    control = "objects"
    rates: Mapping[str, float] = {"ordinary": 6e-4, "tangent": 1.2e-3}
    betas: Sequence[float] = (1e-1, 1.0)
    steps, batch, num_val, num_control, num_test = 40, 64, 150, 150, 400
    adds = True

    def __init__(self, data: str, output: Path, seed: int) -> None:
        self.data, self.output, self.seed = Path(data).absolute(), output, seed

    def task(self, name: str) -> ImageTask:
        """Return a task with few examples to choose on."""
        num_val = self.num_control if name == self.control else self.num_val
        options = {"batch_size": self.batch, "val_size": num_val, "limit_test": self.num_test}
        return ImageTask(self.path(name), seed=self.seed, **options)

    def path(self, name: str) -> str:
        return f"builtin:{name}"

    def model(self, **options: Any) -> L.LightningModule:
        return ClipClassifier(**options)


class Images(Tiny):
    """EfficientNet-Lite0 with BatchNorm folded."""

    tasks = ("mnist", "usps")
    control = "cifar10"
    rates: Mapping[str, float] = {"ordinary": 2e-4, "tangent": 4e-4}
    betas = (1e-2, 1.0)
    steps, batch, num_val, num_control = 30, 32, 100, 400
    adds = False

    def path(self, name: str) -> str:
        return str(self.data / "images" / f"{name}-{{split}}.parquet")

    def model(self, **options: Any) -> L.LightningModule:
        weights = str(unpacked(self.data, self.output) / "efficientnet-lite0.safetensors")
        return VisionClassifier("tf_efficientnet_lite0", weights, image_size=64, **options)


MODELS = {"tiny": Tiny, "images": Images}


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


def factors(model: Tiny) -> str:
    """Measure the factors of every task at the base; return the pattern of their files."""
    folder = model.output / "factors"
    for task in (*model.tasks, model.control):
        if not (folder / task / "curvature.safetensors").exists():
            measure = MergeStatistics(["curvature"], num_examples=64, dirpath=folder / task)
            trainer(measure, max_epochs=0, limit_val_batches=0).fit(model.model(), datamodule=model.task(task))
    return str(folder / "*/curvature.safetensors")


def fit(way: str, beta: float, task: str, model: Tiny) -> str:
    """Fine-tune on a task unless that is done; return the path of its vector."""
    path = model.output / f"{way}-{beta:g}" / f"{task}-{model.seed}.tv.safetensors"
    if not path.exists():
        L.seed_everything(model.seed, verbose=False)
        module = model.model(learning_rate=model.rates[way], warmup_steps=10, tangent=way == "tangent")
        base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        callbacks = [CurvaturePenalty(factors(model), beta)] if beta else []
        limits = {"max_steps": model.steps, "max_epochs": -1, "limit_val_batches": 0}
        trainer(*callbacks, **limits).fit(module, datamodule=model.task(task))
        vector = TaskVector.between(base, module.state_dict())
        (vector.as_kind("tangent") if way == "tangent" else vector).save(path)
        print(f"{path}: {limits['max_steps']} steps", flush=True)
    return str(path)


def edit(way: str, vectors: dict[str, str], folder: Path, model: Tiny, **options: Any) -> dict[str, Any]:
    """Edit, and return what its report says of the tasks."""
    if not (folder / "edit.json").exists():
        tva.edit_model(
            model.model(tangent=way == "tangent"),
            vectors=vectors,
            output=folder,
            controls={model.control: model.task(model.control)},
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


def forget(way: str, beta: float, model: Tiny) -> dict[str, Any]:
    """Forget the first task as far as the control allows."""
    target = model.tasks[0]
    return edit(
        way,
        {target: fit(way, beta, target, model)},
        model.output / f"{way}-{beta:g}" / f"forget-{model.seed}",
        model,
        recipe=f"-{target}",
        targets={target: model.task(target)},
        minimize=f"{target}/accuracy",
        subject_to=[f"{model.control}/accuracy >= 0.95 * base"],
        search=Grid(stop=2.4, num=13),
    )


def add(way: str, beta: float, model: Tiny, searched: bool) -> dict[str, Any]:
    """Add the vectors of all tasks, at λ = 1 or at the best λ."""
    chosen: dict[str, Any] = (
        {"search": Grid(num=11), "maximize": "mean(normalized_accuracy)"} if searched else {"scaling_coef": 1.0}
    )
    return edit(
        way,
        {task: fit(way, beta, task, model) for task in model.tasks},
        model.output / f"{way}-{beta:g}" / f"add-{'searched' if searched else 1}-{model.seed}",
        model,
        recipe=" + ".join(model.tasks),
        targets={task: model.task(task) for task in model.tasks},
        **chosen,
    )


def measure(seed: int, models: str, data: str, output: str) -> dict[str, Any]:
    """Return what every way reaches with one seed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    first, model = (MODELS[models](data, Path(output) / models, each) for each in (0, seed))
    by_beta = {beta: forget("tangent", beta, first)["validation"] for beta in model.betas}
    tried = {beta: values[first.tasks[0]] for beta, values in by_beta.items()}
    beta = min(tried, key=lambda beta: (tried[beta], -by_beta[beta][first.control]))
    found = {
        "n": model.num_test,
        "beta": {"tried": tried, "chosen": beta},
        "forget": {
            "ordinary": forget("ordinary", 0.0, model),
            "tangent": forget("tangent", 0.0, model),
            "tangent with the penalty": forget("tangent", beta, model),
        },
    }
    if model.adds:
        found["add"] = {
            "ordinary, λ searched": add("ordinary", 0.0, model, True),
            "ordinary, λ = 1": add("ordinary", 0.0, model, False),
            "tangent with the penalty, λ = 1": add("tangent", beta, model, False),
        }
    return found


def tables(runs: Mapping[int, Any]) -> dict[str, str]:
    """Return the tables of forgetting and of addition, and a sentence on beta."""
    values, form = list(runs.values()), "{:.1%}".format
    first = values[0]
    target, control = first["forget"]["ordinary"]["tasks"]

    def cells(kind: str, way: str, tasks: Sequence[str]) -> list[str]:
        found = [each[kind][way] for each in values]
        coefs = ", ".join(f"{each['scaling_coef']:g}" for each in found)
        scores = [
            with_interval([each["tasks"][task]["edited"] for each in found], first.get("n", 400), form)
            for task in tasks
        ]
        return [way, coefs, *scores]

    held = [f"{sum(each['forget'][way]['holds'] for each in values)} of {len(values)}" for way in first["forget"]]
    lines = [[*cells("forget", way, (target, control)), h] for way, h in zip(first["forget"], held, strict=True)]
    made = {"forget": markdown(["way", "λ by seed", target, f"{control} (control)", "constraint holds"], lines)}
    left = ("ordinary", "tangent with the penalty")
    by_seed = [[each["forget"][way]["tasks"][target]["edited"] for way in left] for each in values]
    half = sum(penalized <= ordinary / 2 for ordinary, penalized in by_seed)
    listed = ", ".join(f"{ordinary:.1%} → {penalized:.1%}" for ordinary, penalized in by_seed)
    made["halved"] = f"{half} of {len(values)} seeds ({listed})"
    if "add" in first:
        tasks = list(first["add"]["ordinary, λ = 1"]["tasks"])
        heads = ["way", "λ by seed", *tasks[:-1], f"{tasks[-1]} (control)", "mean of the targets"]
        lines = []
        for way in first["add"]:
            scores = [sum(each["add"][way]["tasks"][task]["edited"] for task in tasks[:-1]) / (len(tasks) - 1)
                      for each in values]  # fmt: skip
            lines.append([*cells("add", way, tasks), with_interval(scores, form=form)])
        made["add"] = markdown(heads, lines)
    tried = ", ".join(f"{beta}: {value:.1%}" for beta, value in first["beta"]["tried"].items())
    made["beta"] = f"{first['beta']['chosen']} ({target} on validation data, seed 0, by β: {tried})"
    return made
