"""The demo behind ``make demo``: fine-tune, forget, add and infer a task, offline, with commands a user would type."""

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.table import Table

from tva import TaskVector
from tva.checkpoints import write_export
from tva.cli.main import main as tva
from tva.console import make_console
from tva.edit.runs import revisit
from tva.evaluation.intervals import student_interval
from tva.report.edit_report import read_report
from tva.report.render import draw
from tva.report.series import SCALING, curve
from tva.report.vega import CONFIG, MARK, label_of

CONFIGS = Path("configs/demo")
EDITS = ("forget", "add", "analogy")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo from a checkout's folder.

    Raises:
        SystemExit: Status 1 if a constraint did not hold in one of the edits.
    """
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run per seed (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)")
    options = parser.parse_args(argv)
    import lightning.pytorch  # noqa: F401 (which sets its loggers to INFO, so it must come before the next lines)

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    started = time.monotonic()
    passed = [run_seed(seed, options.output) for seed in options.seeds]
    reports = {edit: [read_report(options.output / edit / f"seed={seed}") for seed in options.seeds] for edit in EDITS}
    print_summary(reports, options.seeds)
    figure = options.output / "curves.svg"
    draw_curves(reports, figure)
    page = options.output / "report.html"
    revisit([str(options.output / edit / f"seed={seed}") for edit in EDITS for seed in options.seeds], str(page))
    print(f"\n{figure} shows every coefficient that was tried; {page} puts the edits side by side, and each has a page")
    print(f"of its own, such as {options.output / 'forget' / f'seed={options.seeds[0]}' / 'report.html'}.")
    print(f"{time.monotonic() - started:.0f} s in all.")
    if not all(passed):
        sys.exit(1)


def run_seed(seed: int, output: Path) -> bool:
    """Fine-tune every task and make every edit with one seed; return whether all constraints held."""
    vectors = {}
    common = CONFIGS / "fit" / "common.yaml"
    for config in sorted(set((CONFIGS / "fit").glob("*.yaml")) - {common}):
        task, root = config.stem, output / config.stem / f"seed={seed}"
        configs = ["--config", common, "--config", config]
        run("fit", *configs, "--seed_everything", seed, "--data.seed", seed, "--trainer.default_root_dir", root)
        vectors[task] = root / "checkpoints" / "last.tv.safetensors"
        vector = TaskVector.load(vectors[task])
        print(f"  {vectors[task]}: {vector}, validation accuracy {vector.origin.metrics[f'val/{task}/accuracy']:.1%}\n")
    passed = []
    for edit in EDITS:
        config = CONFIGS / "edit" / f"{edit}.yaml"
        used = yaml.safe_load(config.read_text())["vectors"]
        paths = [argument for name in used for argument in (f"--vectors.{name}", vectors[name])]
        folder = output / edit / f"seed={seed}"
        configs = ["--config", config, "--config", with_seed(config, seed, folder.with_name(f"seed={seed}.yaml"))]
        passed.append(run("edit", *configs, "--seed_everything", seed, *paths, "--output", folder))
        print()
    return all(passed)


def with_seed(config: Path, seed: int, path: Path) -> Path:
    """Write what a seed changes in an edit's configuration: the tasks' held-out parts, and the random vector."""
    content = yaml.safe_load(config.read_text())
    changed: dict[str, Any] = {"random_seed": seed}
    for role in ("targets", "controls"):
        changed[role] = {
            task: {**given, "init_args": {**given["init_args"], "seed": seed}} for task, given in content[role].items()
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(changed, sort_keys=False))
    return path


def run(*arguments: object) -> bool:
    """Run one tva command in this process, showing it first; return whether its exit status was 0."""
    words = [str(argument) for argument in arguments]
    print("$ tva", *words, flush=True)
    try:
        tva(words)
    except SystemExit as stop:
        if stop.code not in (0, 1):
            raise
        return stop.code == 0
    return True


def print_summary(reports: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int]) -> None:
    """Print the test scores of each edit, their mean and 95% interval over seeds."""
    console = make_console()
    table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left")
    table.title = (
        f"accuracy on test data, {'seed' if len(seeds) == 1 else 'mean and 95% interval (Student) over seeds'} "
    )
    table.title += ", ".join(map(str, seeds))
    for heading in ("edit", "task", "role"):
        table.add_column(heading)
    for heading in ("base", "fine-tuned", "edited", "random", "normalized", "constraint holds"):
        table.add_column(heading, justify="right")
    for edit, runs in reports.items():
        for position, (task, first) in enumerate(runs[0]["tasks"].items()):
            entries = [run["tasks"][task] for run in runs]
            holds = [c["holds"] for run in runs for c in run["constraints"] if c["task"] == task]
            table.add_row(
                edit if position == 0 else "",
                task,
                first["role"],
                *(spread([e[label]["value"] for e in entries if label in e]) for label in _LABELS),
                spread([e["normalized"] for e in entries if e["normalized"] is not None]),
                f"{sum(holds)} of {len(holds)}" if holds else "–",
            )
    console.print(table)


_LABELS = ("base", "finetuned", "edited", "random")


def spread(values: Sequence[float]) -> str:
    """Format fractions as a percentage, with the 95% interval over seeds if they differ.

    Example:
        >>> spread([0.5]), spread([0.5, 0.52, 0.54]), spread([])
        ('50.0%', '52.0% [47.0, 57.0]', '–')
    """
    if not values:
        return "–"
    mean, found = f"{statistics.fmean(values):.1%}", student_interval(np.array(values))
    if found is None or len(set(values)) == 1:
        return mean
    low, high = (100 * min(1.0, max(0.0, end)) for end in found)
    return f"{mean} [{low:.1f}, {high:.1f}]"


def draw_curves(reports: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw accuracy against the coefficient for each edit: lines on validation data, points on test data.

    Args:
        reports: For each edit the ``edit.json`` of each seed; lines are means over seeds.
        path: The SVG to write.
    """
    rows: list[dict[str, Any]] = []
    for edit, runs in reports.items():
        for content, task in [(each, task) for each in runs for task in each["tasks"]]:
            of = {"edit": f"{edit}: {content['recipe']}", "task": label_of(content, task)}
            rows += [{**of, "coef": coef, "value": point.value} for coef, point in curve(content, task, SCALING)]
            tested, chosen = content["tasks"][task]["edited"]["value"], content["coefficients"][SCALING]
            rows.append({**of, "coef": chosen, "value": tested, "tested": True})
    axis: dict[str, Any] = {"type": "quantitative", "axis": {"grid": False, "tickCount": 5}}
    x = {**axis, "field": "coef", "title": "scaling coefficient λ"}
    y = {**axis, "field": "value", "title": "accuracy", "scale": {"domain": [0, 1]}}
    layers = [
        {"transform": [{"filter": "!datum.tested"}], "mark": "line", "encoding": {"y": {**y, "aggregate": "mean"}}},
        {"transform": [{"filter": "datum.tested"}], "mark": {**MARK, "size": 80}, "encoding": {"y": y}},
    ]
    panel = {"width": 280, "height": 260, "encoding": {"x": x, "color": {"field": "task"}}, "layer": layers}
    edits = list(dict.fromkeys(row["edit"] for row in rows))
    spec = {
        "data": {"values": rows},
        "config": {**CONFIG, "background": "white", "legend": {**CONFIG["legend"], "columns": 7}},
        "facet": {"column": {"field": "edit", "sort": edits, "title": None}},
        "spec": panel,
    }
    write_export(path, draw(spec, path.stem).encode())


if __name__ == "__main__":
    main()
