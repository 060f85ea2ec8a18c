"""The demo's three edits over seeds: the table at the top of the README.

python -m benchmarks run demo --seeds 0 1 2 3 4 [--output runs/demo]
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.ledger import markdown, with_interval
from examples import demo
from tva import TaskVector
from tva.data import ImageTask
from tva.edit.editor import Editor
from tva.evaluation.evaluate import evaluate
from tva.models import ClipClassifier

OPTIONS = {"output": "runs/demo"}
DEPENDS = (
    "benchmarks/demo.py",
    "examples/demo.py",
    "configs/demo",
    "tva/edit",
    "tva/evaluation",
    "tva/search",
    "tva/models",
    "tva/data",
    "callbacks",
)
COEFS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5)  # of the analogy's curve
LABELS = ("base", "finetuned", "edited", "random")


def measure(seed: int, output: str) -> dict[str, Any]:
    """Run the demo with one seed, and return what its edits reached on test data."""
    demo.run_seed(seed, Path(output))
    found = {
        edit: _reached(json.loads((Path(output) / edit / f"seed={seed}/edit.json").read_text())) for edit in demo.EDITS
    }
    return {**found, "curve": analogy_curve(seed, Path(output))}


def analogy_curve(seed: int, output: Path) -> list[float]:
    """Return the accuracy of the analogy on its target's test pictures at each of `COEFS`, seen afterwards."""
    solid_a, solid_b, sketch_a = (
        TaskVector.load(output / name / f"seed={seed}/checkpoints/last.tv.safetensors")
        for name in ("solid_a", "solid_b", "sketch_a")
    )
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(accelerator="cpu", devices=1, **dict.fromkeys(quiet, False))
    model = ClipClassifier()
    vector = (sketch_a + (solid_b - solid_a)).named_for(model.state_dict())
    where = {"style": "sketch", "half": "B"}
    data = ImageTask("builtin:symbols", batch_size=500, name="sketch_b", where=where)
    editor = Editor(trainer, model, {"sketch_b": data})
    edits = [lambda coef=coef: editor.set(vector, coef) for coef in COEFS]
    return [found.metrics["accuracy"] for found in evaluate(trainer, model, data, "test", edits=edits)]


def _reached(report: Mapping[str, Any]) -> dict[str, Any]:
    tasks = {}
    for name, task in report["tasks"].items():
        scores = {label: task[label]["value"] for label in LABELS if label in task}
        tasks[name] = {"n": task["num_examples"], "normalized": task["normalized"], **scores}
    parts = report["baselines"].get("parts", {}).get("rows", {})
    return {
        "parts": {name.split(",")[0]: row for name, row in parts.items()},
        "coefficients": report["coefficients"],
        "tasks": tasks,
        "holds": {constraint["task"]: constraint["holds"] for constraint in report["constraints"]},
    }


ANALOGY = "**analogy** `analogy(solid_a, solid_b, sketch_a)`"
ROWS = (  # edit, what is shown of it, task, what is shown of that
    ("forget", "**forget** `-digits`", "digits", "digits (target)"),
    ("forget", "", "objects", "objects (control: keep ≥ 95% of base)"),
    ("add", "**add** `digits + letters + textures`", "digits", "digits"),
    ("add", "", "letters", "letters"),
    ("add", "", "textures", "textures"),
    ("add", "", "objects", "objects (control, no constraint)"),
    (
        "analogy",
        "**analogy** `analogy(solid_a, solid_b, sketch_a)`",
        "sketch_b",
        "sketch_b, whose pictures were never used",
    ),
)


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return the README's table."""
    found, rows = list(runs.values()), []
    for edit, shown, task, described in ROWS:
        entries = [run[edit]["tasks"][task] for run in found]
        base, finetuned, edited, random = (_cell(entries, label) for label in LABELS)
        kept = [run[edit]["holds"][task] for run in found if task in run[edit]["holds"]]
        holds = f", holds in {sum(kept)} of {len(kept)}" if kept else ""
        bold = task != "objects"
        rows.append([shown, described, base, finetuned, f"**{edited}**{holds}" if bold else edited + holds, random])
    for part in found[0]["analogy"]["parts"]:
        entries = [{"n": run["analogy"]["tasks"]["sketch_b"]["n"], **run["analogy"]["parts"][part]} for run in found]
        rows.append(["", f"the part {part} of it by itself, on sketch_b", "", "", _cell(entries, "sketch_b"), ""])
    heads = ["edit", "task", "base", "fine-tuned on it", "edited", "random vector"]
    return {"edits": markdown(heads, rows), **_curve(found)}


def _curve(found: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the analogy's accuracy by coefficient, and the coefficients that were chosen."""
    if "curve" not in found[0]:
        return {}
    num = found[0]["analogy"]["tasks"]["sketch_b"]["n"]
    rows = [
        [f"{coef:g}", with_interval([run["curve"][place] for run in found], num, lambda value: f"{100 * value:.1f}")]
        for place, coef in enumerate(COEFS)
    ]
    chosen = ", ".join(f"{run['analogy']['coefficients']['scaling_coef']:g}" for run in found)
    return {"curve": markdown(["λ", "sketch_b, % right"], rows), "chosen": chosen}


def _cell(entries: Sequence[Mapping[str, Any]], label: str) -> str:
    values = [entry[label] for entry in entries if label in entry]
    if not values:
        return ""
    text = with_interval(values, entries[0]["n"], lambda value: f"{100 * value:.1f}")
    return text.replace(" [", "% [") if " [" in text else f"{text}%"
