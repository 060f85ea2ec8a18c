"""Run the benchmark on real images: fine-tune, forget, add, infer, and compare the rules for BatchNorm.

    python benchmarks/real/run.py DATA [--seeds 0 1 2] [--only forget confidence …] [--output runs/real]

DATA is the folder with ``images/*.parquet`` and ``unpack.py``. Every step is one ``tva`` command on a configuration
that is written beside its result, with the seed of training, of the held-out part and of the subsets drawn. What is
finished is skipped, so a run that was cut off goes on. The tables are printed, and written to OUTPUT/results.md.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parent
RUNS = "runs/real"  # as the configurations have it

# The ten most frequent of the 43 traffic signs, so that figures of an earlier ten-class experiment can be compared.
TEN_SIGNS = [1, 2, 3, 4, 5, 11, 12, 13, 25, 38]

FORGET = ("forget_mnist", "forget_gtsrb10")
ADD = ("add_four",)
ANALOGY = ("analogy_sketch_b", "analogy_photo_b", "analogy_sketch_a", "analogy_photo_a")
RULES = {  # name -> how it is trained, what the edit does with the statistics
    "folded": ("fold", "keep"),
    "frozen": ("freeze", "keep"),
    "trained, base's kept": ("train", "keep"),
    "trained, delta": ("train", "delta"),
    "trained, re-estimated": ("train", "reestimate"),
}
CONFIDENCE = 0.95
BATCHNORM = ("batchnorm_single", "batchnorm_forget", "batchnorm_add")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not there yet, then print every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with images/*.parquet and unpack.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--output", type=Path, default=Path(RUNS))
    options = parser.parse_args(argv)
    started = time.monotonic()
    benchmark = Benchmark(options.data.absolute(), options.output)
    for seed in options.seeds:
        for part in options.only:
            PARTS[part](benchmark, seed)
    text = "\n".join(line for part in options.only for line in TABLES[part](benchmark, options.seeds))
    (options.output / "results.md").write_text(text + "\n")
    print(f"\n{text}\n\n{time.monotonic() - started:.0f} s for what was not there yet.")


class Benchmark:
    """The folders of one run of the benchmark.

    Args:
        data: Folder with ``images/*.parquet`` and ``unpack.py``.
        output: Where everything is written.
    """

    def __init__(self, data: Path, output: Path) -> None:
        self.output = output
        os.environ |= {"TVA_DATA": str(data), "HF_HUB_OFFLINE": "1"}
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        if not (output / "models").exists():
            subprocess.run([sys.executable, data / "unpack.py", output / "models"], check=True)
        if not (output / "data").exists():
            write_ten_signs(data / "images", output / "data")

    def fit(self, task: str, seed: int, batch_norm: str = "fold") -> None:
        """Fine-tune on one task, unless its task vector is there."""
        config = merged(read("fit/common"), read(f"fit/{task}"))
        config["model"]["init_args"]["batch_norm"] = batch_norm
        config = self.adapt(config, seed, batch_norm)
        root = Path(config["trainer"]["default_root_dir"])
        if not (root / "checkpoints" / "last.tv.safetensors").exists():
            self.run("fit", config, root / "run.yaml")

    def edit(self, name: str, seed: int, rule: str = "folded", confidence: float | None = None) -> None:
        """Make one edit, unless its report, or the sign that no coefficient was feasible, is there."""
        batch_norm, statistics = RULES[rule]
        config = merged(read("edit/common"), read(f"edit/{name}"))
        config["model"]["init_args"]["batch_norm"] = batch_norm
        config = self.adapt(config, seed, batch_norm) | {"statistics": statistics, "random_seed": seed}
        folder = self.folder(name, seed, rule, confidence)
        config |= {"output": str(folder), "confidence": confidence}
        config["log"] = f"{self.folder(name, seed, rule)}.evaluations.jsonl"  # what needs no second evaluation
        if not (folder / "status").exists():
            status = self.run("edit", config, folder / "run.yaml")
            (folder / "edited.safetensors").unlink(missing_ok=True)  # 19 MB each; `tva edit` makes it again
            (folder / "status").write_text(f"{status}\n")

    def folder(self, name: str, seed: int, rule: str = "folded", confidence: float | None = None) -> Path:
        """Folder of an edit."""
        name = name if confidence is None else f"{name}-confidence={confidence}"
        return self.output / "edits" / "-".join(RULES[rule]) / name / f"seed={seed}"

    def reports(
        self, name: str, seeds: Sequence[int], rule: str = "folded", confidence: float | None = None
    ) -> list[dict[str, Any]]:
        """Reports of an edit for all seeds that found a feasible coefficient."""
        from tva.report.edit_report import read_report
        from tva.report.series import is_feasible

        folders = [self.folder(name, seed, rule, confidence) for seed in seeds]
        return list(filter(is_feasible, (read_report(folder) for folder in folders if (folder / "edit.json").exists())))

    def adapt(self, node: Any, seed: int, batch_norm: str) -> Any:
        """Set the seed, output folder and rule for BatchNorm; the files are for seed 0."""
        if isinstance(node, dict):
            return {
                key: seed if key in ("seed", "seed_everything") else self.adapt(value, seed, batch_norm)
                for key, value in node.items()
            }
        if isinstance(node, list):
            return [self.adapt(value, seed, batch_norm) for value in node]
        if isinstance(node, str) and node.startswith(RUNS):
            node = node.replace("seed=0", f"seed={seed}").replace("/fold/", f"/{batch_norm}/")
            return str(self.output) + node.removeprefix(RUNS)
        return node

    def run(self, command: str, config: Mapping[str, Any], path: Path) -> int:
        """Run one tva command in this process on a configuration that is written first; give its exit status."""
        from tva.cli.main import main as tva

        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
        print(f"\n$ tva {command} --config {path}", flush=True)
        started = time.monotonic()
        status = 0
        try:
            tva([command, "--config", str(path)])
        except SystemExit as stop:
            if stop.code not in (0, 1):
                raise
            status = stop.code
        print(f"  exit status {status}, {time.monotonic() - started:.0f} s", flush=True)
        return status


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two configurations as a second ``--config`` does: the second wins."""
    result = copy.deepcopy(dict(first))
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def write_ten_signs(images: Path, folder: Path) -> None:
    """Write the part of gtsrb with the ten most frequent signs, numbered anew."""
    import datasets

    for split in ("train", "test"):
        table = datasets.load_dataset("parquet", data_files=str(images / f"gtsrb-{split}.parquet"), split="train")
        names = [table.features["label"].names[label] for label in TEN_SIGNS]
        table = table.select([row for row, label in enumerate(table["label"]) if label in TEN_SIGNS])
        labels = [TEN_SIGNS.index(label) for label in table["label"]]
        table = table.remove_columns("label").add_column("label", labels)
        folder.mkdir(parents=True, exist_ok=True)
        table.cast_column("label", datasets.ClassLabel(names=names)).to_parquet(folder / f"gtsrb10-{split}.parquet")


# --- the parts


def run_forget(benchmark: Benchmark, seed: int) -> None:
    for edit in FORGET:
        benchmark.fit(edit.removeprefix("forget_"), seed)
        benchmark.edit(edit, seed)


def run_confidence(benchmark: Benchmark, seed: int) -> None:
    run_forget(benchmark, seed)
    for edit in FORGET:
        benchmark.edit(edit, seed, confidence=CONFIDENCE)


def run_add(benchmark: Benchmark, seed: int) -> None:
    for edit in ADD:
        for task in read(f"edit/{edit}")["vectors"]:
            benchmark.fit(task, seed)
        benchmark.edit(edit, seed)


def run_analogy(benchmark: Benchmark, seed: int) -> None:
    for edit in ANALOGY:
        benchmark.fit(edit.replace("analogy", "pacs"), seed, "freeze")
    for edit in ANALOGY:
        benchmark.edit(edit, seed, "frozen")


def run_batchnorm(benchmark: Benchmark, seed: int) -> None:
    for rule, (batch_norm, _) in RULES.items():
        for task in read("edit/batchnorm_add")["vectors"]:
            benchmark.fit(task, seed, batch_norm)
        for edit in BATCHNORM:
            benchmark.edit(edit, seed, rule)


PARTS: dict[str, Callable[[Benchmark, int], None]] = {
    "forget": run_forget,
    "confidence": run_confidence,
    "add": run_add,
    "analogy": run_analogy,
    "batchnorm": run_batchnorm,
}


# --- the tables: mean (lowest to highest) over seeds


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean and the range.

    Example:
        >>> spread([0.5, 0.6]), spread([0.5]), spread([])
        ('0.550 (0.500–0.600)', '0.500', '–')
    """
    if not values:
        return "–"
    mean, low, high = (f"{value:.{digits}f}" for value in (statistics.fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def rows(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for line in lines:
        yield "| " + " | ".join(line) + " |"
    yield ""


def scores(reports: Sequence[Mapping[str, Any]], task: str, label: str) -> list[float]:
    return [report["tasks"][task][label]["value"] for report in reports if label in report["tasks"][task]]


def coefs(reports: Sequence[Mapping[str, Any]]) -> str:
    return spread([report["coefficients"]["scaling_coef"] for report in reports], 2)


def held(reports: Sequence[Mapping[str, Any]], task: str) -> str:
    verdicts = [c["holds"] for report in reports for c in report["constraints"] if c["task"] == task]
    return f"{sum(verdicts)} of {len(verdicts)}" if verdicts else "–"


def edit_table(benchmark: Benchmark, edits: Sequence[str], seeds: Sequence[int]) -> Iterator[str]:
    lines = []
    for edit in edits:
        reports = benchmark.reports(edit, seeds)
        if not reports:
            lines.append([edit, "no feasible λ", *[""] * 7])
            continue
        for position, (task, first) in enumerate(reports[0]["tasks"].items()):
            normalized = [r["tasks"][task]["normalized"] for r in reports if r["tasks"][task]["normalized"] is not None]
            columns = [spread(scores(reports, task, label)) for label in ("base", "finetuned", "edited", "random")]
            name = f"`{reports[0]['recipe']}`, λ {coefs(reports)}, {len(reports)} of {len(seeds)} seeds"
            start = name if position == 0 else ""
            lines.append([start, task, first["role"], *columns, spread(normalized), held(reports, task)])
        averages = [
            statistics.fmean(n) for r in reports if None not in (n := [t["normalized"] for t in r["tasks"].values()])
        ]
        if len(averages) == len(reports):
            lines.append(["", "**mean**", "", "", "", "", "", f"**{spread(averages)}**", ""])
    header = ["edit", "task", "role", "base", "fine-tuned", "edited", "random", "normalized", "constraint holds"]
    yield from rows(header, lines)


def forget_table(benchmark: Benchmark, seeds: Sequence[int]) -> Iterator[str]:
    yield "### Forgetting\n"
    yield from edit_table(benchmark, FORGET, seeds)


def confidence_table(benchmark: Benchmark, seeds: Sequence[int]) -> Iterator[str]:
    yield "### Forgetting, by point estimate and with a stated confidence\n"
    lines = []
    for edit in FORGET:
        for confidence in (None, CONFIDENCE):
            for seed in seeds:
                how = "point estimate" if confidence is None else f"confidence {confidence}"
                start = [f"`-{edit.removeprefix('forget_')}`, seed {seed}", how]
                found = benchmark.reports(edit, [seed], confidence=confidence)
                if not found:
                    lines.append([*start, "no feasible λ", "", "", ""])
                    continue
                (report,) = found
                target = report["tasks"][edit.removeprefix("forget_")]
                kept = {
                    c["task"]: c["value"] / report["tasks"][c["task"]]["base"]["value"] for c in report["constraints"]
                }
                lines.append(
                    [
                        *start,
                        coefs(found),
                        f"{target['base']['value']:.3f} → {target['edited']['value']:.3f}",
                        ", ".join(f"{task} {ratio:.3f}" for task, ratio in kept.items()),
                        "yes" if report["holds"] else "**no**",
                    ]
                )
    yield from rows(["edit", "constraints hold by", "λ", "target", "controls, of base", "gate passed"], lines)


def add_table(benchmark: Benchmark, seeds: Sequence[int]) -> Iterator[str]:
    yield "### Addition\n"
    yield from edit_table(benchmark, ADD, seeds)


def analogy_table(benchmark: Benchmark, seeds: Sequence[int]) -> Iterator[str]:
    yield "### Subpopulation analogies on pacs\n"
    lines = []
    for edit in ANALOGY:
        reports, task = benchmark.reports(edit, seeds, "frozen"), edit.removeprefix("analogy_")
        helped = task[:-1] + {"a": "b", "b": "a"}[task[-1]]  # its recipe adds the vector of this one
        other = benchmark.reports(f"analogy_{helped}", seeds, "frozen")
        columns = [spread(scores(reports, task, label)) for label in ("base", "edited", "random")]
        lines.append([task, coefs(reports), *columns, spread(scores(other, task, "finetuned"))])
    yield from rows(["never trained on", "λ", "base", "edited", "random", "fine-tuned on it"], lines)


def batchnorm_table(benchmark: Benchmark, seeds: Sequence[int]) -> Iterator[str]:
    yield "### Rules for BatchNorm\n"
    lines, sums = [], []
    for rule in RULES:
        single, forget, add = (benchmark.reports(edit, seeds, rule) for edit in BATCHNORM)
        reached = spread(scores(forget, "mnist", "edited")) if forget else "no λ keeps the controls"
        lines.append(
            [
                rule,
                *(spread(scores(single, "mnist", label)) for label in ("base", "finetuned", "edited")),
                coefs(forget),
                reached,
                ", ".join(f"{control} {held(forget, control)}" for control in ("cifar10", "rsscn7")) if forget else "–",
            ]
        )
        columns = [
            spread(scores(add, task, label)) for task in ("mnist", "rsscn7") for label in ("finetuned", "edited")
        ]
        normalized = [statistics.fmean(t["normalized"] for t in report["tasks"].values()) for report in add]
        sums.append([rule, coefs(add), *columns, spread(normalized)])
    header = ["rule", "mnist base", "fine-tuned", "the same as an edit, λ = 1", "λ", "mnist forgotten", "controls hold"]
    yield from rows(header, lines)
    header = ["rule", "λ", "mnist fine-tuned", "edited", "rsscn7 fine-tuned", "edited", "mean normalized"]
    yield from rows(header, sums)


TABLES: dict[str, Callable[[Benchmark, Sequence[int]], Iterator[str]]] = {
    "forget": forget_table,
    "confidence": confidence_table,
    "add": add_table,
    "analogy": analogy_table,
    "batchnorm": batchnorm_table,
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    main()
