"""The demo behind ``make demo``: fine-tune, forget, add and infer a task, offline, with commands a user would type."""

from __future__ import annotations

import argparse
import logging
import re
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
from tva.cli.main import main as tva
from tva.console import make_console
from tva.edit.runs import revisit
from tva.evaluation.intervals import student_interval
from tva.report.edit_report import read_report
from tva.report.series import SCALING, curve

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
    """Print the test scores of each edit, their mean and 95 % interval over seeds."""
    console = make_console()
    table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left")
    table.title = (
        f"accuracy on test data, {'seed' if len(seeds) == 1 else 'mean and 95 % interval (Student) over seeds'} "
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
    """Format fractions as a percentage, with the 95 % interval over seeds if they differ.

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
    """Draw accuracy against the coefficient for each edit: lines on validation data, markers on test data.

    Args:
        reports: For each edit the ``edit.json`` of each seed; lines are means over seeds, bands their range.
        path: The SVG to write, of a size that fits a repository: text as text, coordinates to a tenth of a point.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(reports), figsize=(5 * len(reports), 4.6), sharey=True, layout="constrained")
    colors = plt.get_cmap("tab10")
    for axis, (edit, runs) in zip(axes, reports.items(), strict=True):
        for number, (task, first) in enumerate(runs[0]["tasks"].items()):
            control = first["role"] == "control"
            color, style = (str(0.2 + 0.2 * (number % 4)), "--") if control else (colors(number), "-")
            curves = [{coef: point.value for coef, point in curve(run, task, SCALING)} for run in runs]
            if len(curves[0]) > 1:
                coefs = list(curves[0])
                values = list(zip(*(points.values() for points in curves), strict=True))
                axis.plot(coefs, [statistics.fmean(v) for v in values], color=color, ls=style, lw=1.5)
                if len(runs) > 1:
                    axis.fill_between(
                        coefs, list(map(min, values)), list(map(max, values)), color=color, alpha=0.15, lw=0
                    )
            chosen = [run["coefficients"]["scaling_coef"] for run in runs]
            edited = [run["tasks"][task]["edited"]["value"] for run in runs]
            random = [
                (coef, run["tasks"][task]["random"]["value"])
                for coef, run in zip(chosen, runs, strict=True)
                if "random" in run["tasks"][task]  # not where no coefficient was feasible
            ]
            axis.scatter([0], [first["base"]["value"]], color=color, marker="_", s=90)
            label = f"{task} ({first['role']})"
            axis.scatter(chosen, edited, color=color, marker="o", s=28, zorder=3, label=label)
            for coef, value in random:
                axis.scatter([coef], [value], color=color, marker="x", s=28, zorder=3)
        axis.set_title(f"{edit}:  {runs[0]['recipe']}")
        axis.set_xlabel("scaling coefficient λ")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower left")
    axes[0].set_ylabel("accuracy")
    axes[0].set_ylim(0, 1.02)
    figure.supxlabel(
        "lines: validation data, the only data λ is chosen on;  ●: edited, ×: random vector of the same norm, "
        "–: base, on test data",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "demo", "font.sans-serif": ["DejaVu Sans"]}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    path.write_text(shorten(path.read_text(encoding="utf-8")), encoding="utf-8")


def shorten(svg: str) -> str:
    """Return a picture without what matplotlib writes for programs, and with coordinates to a tenth of a point.

    Example:
        >>> shorten('<g id="patch_1">\\n <path d="M 0.123 4.000 \\nL 5 6.78"/>\\n</g>')
        '<path d="M0.1 4L5 6.8"/>'
    """
    svg = re.sub(r"\s+", " ", svg).replace("> <", "><")
    svg = re.sub(
        r"<metadata>.*?</metadata>|<!DOCTYPE[^>]*>| clip-path=\S*\)\"| transform=\"rotate\(-0 [^)]*\)\"", "", svg
    )
    svg = re.sub(r'(?<=<g) id="[^"]*"', "", svg)
    while svg != (inner := re.sub(r"<g>((?:(?!</?g\b).)*)</g>", r"\1", svg)):
        svg = inner
    svg = re.sub(
        r' (?:d|x|y)="[^"]*"',
        lambda place: re.sub(r"-?\d+\.\d+", lambda n: f"{round(float(n[0]), 1):g}", place[0]),
        svg,
    )
    svg = re.sub(r' d="[^"]*"', lambda path: " d" + re.sub(r" ?([A-Za-z]) ?", r"\1", path[0][2:]), svg)
    styles: dict[str, str] = {}
    svg = re.sub(r'(?<= )style="([^"]*)"', lambda s: f'class="{styles.setdefault(s[1], f"s{len(styles)}")}"', svg)
    svg = svg.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("xlink:href", "href")
    for number, name in enumerate(dict.fromkeys(re.findall(r' id="(\w{11,})"', svg))):
        svg = svg.replace(name, f"i{number}")
    rules = "".join(f".{name}{{{style}}}" for style, name in styles.items())
    return svg.replace("</style>", f"{rules}</style>", 1).replace("><", ">\n<")


if __name__ == "__main__":
    main()
