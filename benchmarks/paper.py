"""The paper's experiments, from `tva paper`: forgetting and adding on real images, or all on what ships with tva.

    python -m benchmarks run paper --seeds 0 1 2 --scale real --data_root DATA [--output runs/paper]

The seeds are those of the scale's YAML. What is finished is skipped.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ledger import markdown, over_seeds
from tva.cli.main import main as tva

OPTIONS = {"scale": "real", "data_root": "", "output": "runs/paper"}
DEPENDS = ("benchmarks/paper.py", "tva/paper", "tva/edit", "tva/evaluation", "tva/search", "tva/models", "tva/data")
EXPERIMENTS = ("forgetting-images", "adding-images")


def measure(seed: int, scale: str, data_root: str, output: str) -> dict[str, Any]:
    """Run the experiments if need be, and return one seed's numbers and edits."""
    words = [*EXPERIMENTS, "--scale", scale, "--output", output]
    _call("paper", "run", *words, *(["--data_root", data_root] if data_root else []))
    _call("paper", "table", *words)
    return values_of(json.loads((Path(output) / "table.json").read_text()), seed)


def _call(*words: str) -> None:
    try:
        tva(list(words))
    except SystemExit as stop:
        if stop.code:
            raise


def values_of(table: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return what a seed contributes to a table of `tva paper table`."""
    return {
        "rows": {
            f"{row['experiment']}: {row['row']}": row["seeds"][str(seed)]
            for row in table["rows"]
            if str(seed) in row["seeds"]
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
            if edit["seed"] == seed
        },
    }


LABELS = ("base", "finetuned", "edited", "random")
FORGETTING = (  # row, the paper's number for ViT-B/32
    ("pre-trained, target", 48.3),
    ("pre-trained, control", 63.4),
    ("fine-tuned, target", 90.2),
    ("fine-tuned, control", 48.2),
    ("random vector, target", 45.7),
    ("random vector, control", 61.5),
    ("negative task vector, target", 24.0),
    ("negative task vector, control", 60.9),
)
ADDING = (  # row, its description here, the paper's number for ViT-L/14 and of how many tasks
    ("pairs, each against its own models", "pairs, each against its own models", 98.9, ""),
    ("all tasks, each against its own model", "all tasks in one model (here six)", 91.2, " (eight)"),
    ("all tasks, a random vector of the same norm", "a random vector of the same norm", None, ""),
    ("ensemble of outputs, on all tasks", "ensemble of the six models' outputs", None, ""),
    ("mean cosine of two vectors", "mean cosine of two vectors", None, ""),
)


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return the two comparisons with the paper, and the edits that forget."""
    found = list(runs.values())
    heads = ["number", "paper", "ours", "95 % over seeds", "difference"]
    forgetting = [_compared(found, "forgetting-images", row, row, paper) for row, paper in FORGETTING]
    adding = [_compared(found, "adding-images", row, shown, paper, about) for row, shown, paper, about in ADDING]
    edits = [_edit(found, name) for name in found[0]["edits"] if name.startswith("forget-")]
    return {
        "forgetting": markdown(heads, forgetting),
        "adding": markdown(heads, adding),
        "edits": markdown(
            ["forgotten", "λ by seed", "base", "fine-tuned", "edited", "random", "control, base → edited", "holds"],
            edits,
        ),
    }


def _compared(
    found: Sequence[Mapping[str, Any]], experiment: str, row: str, shown: str, paper: float | None, about: str = ""
) -> list[str]:
    values = [run["rows"][f"{experiment}: {row}"] for run in found]
    mean, ends, places = statistics.fmean(values), over_seeds(values), 1 if "cosine" not in row else 3
    return [
        shown,
        "" if paper is None else f"{paper}{about}",
        f"{mean:.{places}f}",
        "" if ends is None else f"[{ends[0]:.{places}f}, {ends[1]:.{places}f}]",
        "" if paper is None else f"{mean - paper:+.1f}".replace("-", "−"),
    ]


def _edit(found: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    edits, task = [run["edits"][name] for run in found], name.removeprefix("forget-")
    (control,) = edits[0]["tasks"].keys() - {task}

    def mean(label: str, of: str = task) -> str:
        return f"{100 * statistics.fmean(edit['tasks'][of][label] for edit in edits):.1f}"

    coefs, holds = ", ".join(f"{edit['coef']:g}" for edit in edits), sum(edit["holds"] for edit in edits)
    kept = f"{mean('base', control)} → {mean('edited', control)}"
    return [
        task,
        coefs,
        mean("base"),
        mean("finetuned"),
        mean("edited"),
        mean("random"),
        kept,
        f"{holds} of {len(edits)}",
    ]
