"""The paper's experiments, from `tva paper`: forgetting and adding on real images.

    python -m benchmarks run paper --seeds 0 1 2 --data_root DATA [--scale real] [--output runs/paper]

What is finished is skipped. `paper_texts`, `paper_language`, `paper_analogies` and `paper_smoke` are other experiments.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ledger import markdown, over_seeds
from tva.cli.main import main as tva
from tva.evaluation.intervals import student_interval
from tva.paper.suite import find_scale

OPTIONS = {"scale": "real", "data_root": "", "output": "runs/paper"}
DEPENDS = ("benchmarks/paper.py", "tva/paper", "tva/edit", "tva/evaluation", "tva/search", "tva/models", "tva/data")
EXPERIMENTS = ("forgetting-images", "adding-images")


def measure(seed: int, scale: str, data_root: str, output: str) -> dict[str, Any]:
    """Run the experiments if need be, and return one seed's numbers and edits."""
    return run_seed(EXPERIMENTS, seed, scale, data_root, output)


def run_seed(experiments: Sequence[str], seed: int, scale: str, data_root: str, output: str) -> dict[str, Any]:
    """Run experiments with one seed if need be, and return its numbers and edits."""
    words = [*experiments, "--scale", scale, "--output", output]
    _call("paper", "run", *words, "--seeds", f"[{seed}]", *(["--data_root", data_root] if data_root else []))
    _call("paper", "table", *words)
    return values_of(json.loads((Path(output) / "table.json").read_text()), seed)


def _call(*words: str) -> None:
    try:
        tva(list(words))
    except SystemExit as stop:
        if stop.code:
            raise


def values_of(table: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return what a seed contributes to a table of `tva paper table`: rows, effects and edits that forget one task."""
    return {
        "rows": {
            f"{row['experiment']}: {row['row']}": row["seeds"][str(seed)]
            for row in table["rows"]
            if str(seed) in row["seeds"]
        },
        "effects": {
            f"{effect['experiment']}: {effect['effect']}": effect["seeds"][str(seed)]
            for effect in table["effects"]
            if str(seed) in effect["seeds"]
        },
        "edits": {
            edit["edit"]: {
                "coef": edit["coefficients"]["scaling_coef"],
                "holds": edit["verdict"] in ("all constraints hold on test data", "no constraint was set"),
                "tasks": {
                    name: {label: task[label]["value"] for label in LABELS if label in task}
                    | {"n": task["num_examples"]}
                    for name, task in edit["tasks"].items()
                },
            }
            for edit in table["edits"]
            if edit["seed"] == seed and edit["edit"].startswith("forget-")
        },
    }


LABELS = ("base", "finetuned", "edited", "random")


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return the two comparisons with the paper, and the edits that forget."""
    return {
        "forgetting": compared(runs, "forgetting-images"),
        "adding": compared(runs, "adding-images"),
        "edits": edits(runs),
    }


def compared(runs: Mapping[int, Mapping[str, Any]], experiment: str, scale: str = "real") -> str:
    """Return an experiment's numbers beside those of the paper, and its effects below them."""
    found = find_scale(experiment, scale)
    column, rows = found.options.get("paper"), {}
    for entry in found.content["rows"]:
        key = f"{experiment}: {entry['row']}"
        values = [run["rows"][key] for run in runs.values() if key in run["rows"]]
        if values:
            paper = (entry.get("paper") or {}).get(column)
            rows[entry["row"]] = _row(entry["row"], paper, values, entry.get("unit", "percent") == "percent")
    for entry in found.content.get("effects", []):
        key = f"{experiment}: {entry['effect']}"
        values = [run["effects"][key] for run in runs.values() if key in run.get("effects", {})]
        if len(values) > 1:
            low, _ = student_interval(np.array(values), 0.9)
            ours = f"by {statistics.fmean(values):.3f}, at least {low:.3f}".replace("-", "−")
            rows[key] = [f"*{entry['effect']}*", "", ours, "shown" if low > 0 else "not shown", ""]
    heads = ["number", f"paper ({column})" if column else "paper", "ours", "95 % over seeds", "difference"]
    return markdown(heads, list(rows.values()))


def _row(name: str, paper: float | None, values: Sequence[float], percent: bool) -> list[str]:
    mean, ends = statistics.fmean(values), over_seeds(values)
    form = "{:.1f}" if percent else "{:.3g}"
    if percent and ends is not None and max(values) <= 100:
        ends = max(0.0, ends[0]), min(100.0, ends[1])
    return [
        name,
        "" if paper is None else f"{paper}",
        form.format(mean),
        "" if ends is None else f"[{form.format(ends[0])}, {form.format(ends[1])}]".replace("-", "−"),
        "" if paper is None else f"{mean - paper:{'+.1f' if percent else '+.3g'}}".replace("-", "−"),
    ]


def edits(runs: Mapping[int, Mapping[str, Any]]) -> str:
    """Return a row for each task that was forgotten."""
    found = list(runs.values())
    heads = ["forgotten", "λ by seed", "base", "fine-tuned", "edited", "random", "control, base → edited", "holds"]
    return markdown(heads, [_edit(found, name) for name in found[0]["edits"] if name.startswith("forget-")])


def _edit(found: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    made, task = [run["edits"][name] for run in found], name.removeprefix("forget-")
    (control,) = made[0]["tasks"].keys() - {task}

    def mean(label: str, of: str = task) -> str:
        return f"{100 * statistics.fmean(edit['tasks'][of][label] for edit in made):.1f}"

    coefs, holds = ", ".join(f"{edit['coef']:g}" for edit in made), sum(edit["holds"] for edit in made)
    kept = f"{mean('base', control)} → {mean('edited', control)}"
    return [task, coefs, *map(mean, LABELS), kept, f"{holds} of {len(made)}"]
