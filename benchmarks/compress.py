"""Measure what compressing task vectors costs: size and error of the files, and accuracy after the edit.

    python benchmarks/compress.py [--data DATA] [--seeds 0 1 2] [--only tiny real] [--output runs/compress]

``tiny`` fine-tunes the shipped tiny CLIP as the demo does; ``real`` fine-tunes EfficientNet-Lite0 as benchmarks/real
does, for which DATA is the folder with ``images/*.parquet`` and ``unpack.py``. Every vector is compressed by
``tva compress``, and the same two edits are made with each kind of file by ``tva edit``: one task forgotten by the
paper's rule, and all tasks added. The coefficient is chosen anew each time, on validation data; all that is printed is
from test data. What is finished is skipped, so a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from real.run import Benchmark, merged, read, rows, spread

EXACT = "exact"
CHOICES = (
    EXACT,
    "bf16",
    "fp16",
    "int8",
    "max_error=0.01",
    "max_size=20%",
    "top_k(density=0.1)",
    "low_rank(rank=16)",
    "max_size=10%",
    "sign",
    "max_size=5%",
)
DEMO = Path("configs/demo")
TINY = ("digits", "letters", "textures")
REAL = ("mnist", "gtsrb10", "rsscn7", "cifar10")
BISECT = {"class_path": "tva.search.Bisect", "init_args": {"stop": 2.0, "num": 41}}
GRID = {"class_path": "tva.search.Grid", "init_args": {"start": 0.2, "stop": 1.2, "num": 6}}


class Runner:
    """The folders of one run.

    Args:
        output: Where everything is written.
        data: For the real images.
    """

    def __init__(self, output: Path, data: Path | None) -> None:
        self.output = output
        self.real = Benchmark(data.absolute(), output / "real") if data else None
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def tva(self, command: str, *words: object) -> None:
        """Run one command in this process, showing it first."""
        from tva.cli.main import main

        print("$ tva", command, *words, flush=True)
        try:
            main([command, *map(str, words)])
        except SystemExit as stop:
            if stop.code not in (0, 1):
                raise

    # --- the vectors

    def dense(self, model: str, task: str, seed: int) -> Path:
        """Return a task's vector, fine-tuning for it unless it is there."""
        if model == "real":
            self.real.fit(task, seed)
            return self.real.output / "fold" / task / f"seed={seed}" / "checkpoints" / "last.tv.safetensors"
        root = self.output / "tiny" / task / f"seed={seed}"
        path = root / "checkpoints" / "last.tv.safetensors"
        if not path.exists():
            configs = ["--config", DEMO / "fit" / "common.yaml", "--config", DEMO / "fit" / f"{task}.yaml"]
            seeds = ["--seed_everything", seed, "--data.seed", seed]
            self.tva("fit", *configs, *seeds, "--trainer.default_root_dir", root)
        return path

    def small(self, model: str, task: str, seed: int, choice: str) -> Path:
        """Return a task's vector, compressed."""
        path = self.folder(model, choice, seed) / f"{task}.tv.safetensors"
        if not path.exists():
            flag = f"--{choice}" if choice.startswith("max_") else f"--encoding={choice}"
            self.tva("compress", self.dense(model, task, seed), "--output", path, flag)
        return path

    def folder(self, model: str, choice: str, seed: int) -> Path:
        return self.output / "edits" / model / choice / f"seed={seed}"

    # --- the edits

    def edit(self, model: str, name: str, seed: int, choice: str) -> None:
        """Make one edit unless its report is there."""
        config = self.config(model, name, seed)
        folder = self.folder(model, choice, seed) / name
        config["vectors"] = {task: str(self.small(model, task, seed, choice)) for task in config["vectors"]}
        config |= {"output": str(folder), "random_seed": None, "search": BISECT if name.startswith("forget") else GRID}
        config["log"] = str(self.output / "edits" / model / f"seed={seed}-{name}.jsonl")  # bases are scored once
        if not (folder / "edit.json").exists():
            path = folder.with_suffix(".yaml")
            path.write_text(yaml.safe_dump(config, sort_keys=False))
            self.tva("edit", "--config", path)
            (folder / "edited.safetensors").unlink(missing_ok=True)

    def config(self, model: str, name: str, seed: int) -> dict[str, Any]:
        if model == "real":
            name = {"forget": "forget_mnist", "add": "add_four"}[name]
            return self.real.adapt(merged(read("edit/common"), read(f"edit/{name}")), seed, "fold")
        return yaml.safe_load((DEMO / "edit" / f"{name}.yaml").read_text()) | {"seed_everything": seed}

    # --- the table

    def table(self, model: str, choices: Sequence[str], seeds: Sequence[int]) -> Iterator[str]:
        """One row a choice: mean (lowest to highest) over seeds."""
        tasks = TINY if model == "tiny" else REAL
        target = tasks[0]
        lines = []
        exact = [self.report(model, "add", seed, EXACT) for seed in seeds]
        best = [{task: report["tasks"][task]["finetuned"]["value"] for task in tasks} for report in exact]
        for choice in choices:
            sizes, errors = zip(
                *(self.measure(model, task, seed, choice) for task in tasks for seed in seeds), strict=True
            )
            forget = [self.report(model, "forget", seed, choice) for seed in seeds]
            add = [self.report(model, "add", seed, choice) for seed in seeds]
            controls = [
                min(t["edited"]["value"] / t["base"]["value"] for name, t in r["tasks"].items() if is_held(r, name))
                for r in forget
            ]
            normalized = [
                statistics.fmean(report["tasks"][task]["edited"]["value"] / of_seed[task] for task in tasks)
                for report, of_seed in zip(add, best, strict=True)
            ]
            columns = [
                f"`{choice}`",
                f"{statistics.fmean(sizes):.1%}",
                f"{statistics.fmean(errors):.2g}",
                spread([report["coefficients"]["scaling_coef"] for report in forget], 2),
                spread([report["tasks"][target]["edited"]["value"] for report in forget]),
                spread(controls),
                spread([report["coefficients"]["scaling_coef"] for report in add], 2),
                spread(normalized),
            ]
            lines.append(columns)
        base = spread([self.report(model, "forget", s, EXACT)["tasks"][target]["base"]["value"] for s in seeds])
        yield f"### {model}: forgetting {target} (base {base}), adding {', '.join(tasks)}; seeds {list(seeds)}\n"
        yield from rows(
            ["encoding", "size", "error", "λ", f"{target} left", "worst control of base", "λ", "sum, normalized"], lines
        )

    def report(self, model: str, name: str, seed: int, choice: str) -> Mapping[str, Any]:
        from tva.report.edit_report import read_report

        return read_report(self.folder(model, choice, seed) / name)

    def measure(self, model: str, task: str, seed: int, choice: str) -> tuple[float, float]:
        """Return a file's part of the float32 size, and its error."""
        from tva import open_weights

        path = self.small(model, task, seed, choice)
        weights = open_weights(path)
        float32 = 4 * sum(weights.spec(name).shape.numel() for name in weights)
        return path.stat().st_size / float32, float(weights.metadata["tva.encoding_error"])


def is_held(report: Mapping[str, Any], task: str) -> bool:
    """Whether a constraint is on a task."""
    return any(constraint["task"] == task for constraint in report["constraints"])


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not there yet, then print every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with images/*.parquet and unpack.py, for the real images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=["tiny", "real"], default=["tiny", "real"])
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES), metavar="CHOICE", help="rows")
    parser.add_argument("--output", type=Path, default=Path("runs/compress"))
    options = parser.parse_args(argv)
    if "real" in options.only and options.data is None:
        parser.error("real needs --data DATA")
    runner = Runner(options.output, options.data)
    text: list[str] = []
    for model in options.only:
        for seed in options.seeds:
            for choice in dict.fromkeys((EXACT, *options.choices)):
                for name in ("forget", "add"):
                    runner.edit(model, name, seed, choice)
        text += runner.table(model, options.choices, options.seeds)
    print("\n" + "\n".join(text))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    main()
