"""Ways to fine-tune against each other: each task alone, and all after their vectors are added; what
docs/results/paper.md reports.

    python benchmarks/better_vectors.py [--seeds 0 1 2] [--output runs/better-vectors]

The tasks and settings are the demo's (``configs/demo``). The learning rate of each way is the one of three, or of more
while the largest is the best, with the best validation accuracy on one task with one seed; the scaling coefficient of
each sum is chosen on validation data. What is there is not done again, so a run that was stopped goes on. Prints the
tables in Markdown.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.demo import CONFIGS, run
from tva import TaskVector
from tva.report.edit_report import read_report

TASKS = ("digits", "letters", "textures")
CHOICE_TASK, CHOICE_SEED = "letters", 0
# Options of the model, and the learning rates that are tried.
WAYS: dict[str, tuple[dict[str, str], tuple[float, ...]]] = {
    "full": ({}, (3e-4, 6e-4, 1.2e-3)),
    "LoRA, rank 8": ({"lora": "{r: 8, alpha: 16}"}, (2e-3, 4e-3, 8e-3)),
    "tangent": ({"tangent": "true"}, (6e-4, 1.2e-3, 2.4e-3)),
    "attention only": ({"train_only": "attention"}, (6e-4, 1.2e-3, 2.4e-3)),
    "linear layers only": ({"train_only": "linear"}, (3e-4, 6e-4, 1.2e-3)),
    "biases only": ({"train_only": "bias"}, (5e-3, 1e-2, 2e-2)),
}


def place(output: Path, way: str, rate: float) -> Path:
    """Return the folder of a way with a learning rate."""
    return output / way.replace(" ", "-").replace(",", "") / f"lr={rate:g}"


def fit(way: str, rate: float, task: str, seed: int, output: Path) -> Path:
    """Fine-tune on one task unless that is done; give the path of its vector."""
    folder = place(output, way, rate) / task / f"seed={seed}"
    vector = folder / "checkpoints/last.tv.safetensors"
    if not vector.exists():
        options = [word for name, value in WAYS[way][0].items() for word in (f"--model.{name}", value)]
        configs = [word for name in ("common", task) for word in ("--config", CONFIGS / f"fit/{name}.yaml")]
        rate_options = ["--model.learning_rate", f"{rate:g}", "--trainer.enable_progress_bar", "false"]
        run("fit", *configs, "--seed_everything", seed, "--trainer.default_root_dir", folder, *rate_options, *options)
    return vector


def choose_rate(way: str, output: Path) -> tuple[float, dict[float, float]]:
    """Choose a learning rate, beyond those listed while the last is the best; give it, and what each reached."""

    def accuracy(rate: float) -> float:
        vector = TaskVector.load(fit(way, rate, CHOICE_TASK, CHOICE_SEED, output))
        return vector.origin.metrics[f"val/{CHOICE_TASK}/accuracy"]

    found = {rate: accuracy(rate) for rate in WAYS[way][1]}
    while (best := max(found, key=found.__getitem__)) == max(found):
        found[2 * best] = accuracy(2 * best)
    return best, found


def add(way: str, rate: float, seed: int, output: Path) -> dict[str, Any]:
    """Add the vectors of all tasks unless that is done; give the report."""
    vectors = {task: fit(way, rate, task, seed, output) for task in TASKS}
    folder = place(output, way, rate) / "sum" / f"seed={seed}"
    if not (folder / "edit.json").exists():
        paths = [word for task in TASKS for word in (f"--vectors.{task}", vectors[task])]
        model = ["--model.tangent", "true"] if "tangent" in WAYS[way][0] else []
        options = ["--seed_everything", seed, "--output", folder, *paths, *model]
        run("edit", "--config", CONFIGS / "edit/add.yaml", *options)
    return read_report(folder)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and range."""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if low == high else f"{mean} ({low}–{high})"


def main() -> None:
    """Make what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/better-vectors"))
    options = parser.parse_args()
    import lightning.pytorch  # noqa: F401 (which sets its loggers to INFO, so it must come before the next lines)

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    started = time.monotonic()
    rates = {way: choose_rate(way, options.output) for way in WAYS}
    reports = {way: [] for way in WAYS}
    for seed in options.seeds:  # all ways before the next seed, so that a run that is stopped can be compared
        for way in WAYS:
            reports[way].append(add(way, rates[way][0], seed, options.output))
    print("\n| way | validation accuracy on letters, seed 0, by learning rate | chosen |\n|---|---|---|")
    for way, (rate, found) in rates.items():
        print(f"| {way} | {', '.join(f'{r:g}: {value:.3f}' for r, value in found.items())} | {rate:g} |")
    print(f"\n| way | λ | {' | '.join(f'{task} alone | in the sum' for task in TASKS)} | normalized mean | control |")
    print("|---" * (4 + 2 * len(TASKS)) + "|")
    for way, found in reports.items():
        cells = [spread([report["coefficients"]["scaling_coef"] for report in found], 2)]
        for task in TASKS:
            for state in ("finetuned", "edited"):
                cells.append(spread([report["tasks"][task][state]["value"] for report in found]))
        cells.append(spread([statistics.mean(r["tasks"][task]["normalized"] for task in TASKS) for r in found]))
        cells.append(spread([report["tasks"]["objects"]["edited"]["value"] for report in found]))
        print(f"| {way} | {' | '.join(cells)} |")
    base = {task: spread([r["tasks"][task]["base"]["value"] for r in reports["full"]]) for task in (*TASKS, "objects")}
    print(f"\nBase: {base}. {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
