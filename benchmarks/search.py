"""Measure the search: what race and bisect choose against the whole grid, and one pass against 21.

    python benchmarks/search.py choice [--seeds 0 1 2 3 4] [--output runs/search]
    python benchmarks/search.py pass [--side 320] [--examples 1000] [--repeats 3] [--device cuda]

``choice``: for each seed tva-tiny is fine-tuned on digits, letters and textures (what is there is used again), and each
task of the benchmark is edited three times, with the whole grid, with Race and with Bisect (where the rule is the
largest coefficient). Told are the coefficients, the share of the grid's forward passes, and whether the choices are
tied on test data: McNemar's exact test, or for a mean over tasks a sign-flip test, at 5 %.

``pass``: 21 coefficients on JPEG pictures of side ``--side``, by 21 calls of ``trainer.validate`` and by one shared
pass, in turn, in one process; with the time of only reading and decoding, so that its share is known.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import platform
import shutil
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tva.cli.main import main as tva
from tva.data import ImageTask
from tva.data.builtin import load_builtin
from tva.edit.editor import Editor
from tva.edit.options import EditOptions
from tva.edit.run import run_edit
from tva.evaluation.evaluate import evaluate
from tva.evaluation.intervals import compare, flip_test
from tva.models import ClipClassifier
from tva.search import Bisect, Grid, Race
from tva.vectors.task_vector import TaskVector

TASKS = ("digits", "letters", "textures")
CONFIGS = Path("configs/demo/fit")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["choice", "pass"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("runs/search"))
    parser.add_argument("--jobs", nargs="+", help="only these, by the beginning of their names")
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the pass")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    if options.part == "choice":
        choice(options.seeds, options.output, options.jobs)
    else:
        one_pass(options)


def make_trainer(device: str = "cpu") -> L.Trainer:
    return L.Trainer(
        accelerator=device,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


# --- what is chosen


def fit(task: str, seed: int, output: Path) -> str:
    """Fine-tune on a task, unless its vector is there."""
    root = output / task / f"seed={seed}"
    vector = root / "checkpoints" / "last.tv.safetensors"
    if not vector.exists():
        configs = ["--config", str(CONFIGS / "common.yaml"), "--config", str(CONFIGS / f"{task}.yaml")]
        tva(["fit", *configs, "--seed_everything", str(seed), "--trainer.default_root_dir", str(root)])
    return str(vector)


def jobs() -> dict[str, dict[str, Any]]:
    """Return each task of the benchmark as options of an edit."""
    forget = {
        f"forget {task}": {
            "recipe": f"-{task}",
            "targets": [task],
            "controls": ["objects"],
            "rule": "largest",
            "minimize": f"{task}/accuracy",
            "subject_to": ["objects/accuracy >= 0.95 * base"],
        }
        for task in TASKS
    }
    add = {"recipe": " + ".join(TASKS), "targets": list(TASKS), "controls": [], "maximize": "mean(normalized_accuracy)"}
    single = {
        f"only {task}": {"recipe": task, "targets": [task], "controls": [], "maximize": f"{task}/accuracy"}
        for task in TASKS
    }
    return {**forget, "add all": add, **single}


def choice(seeds: Sequence[int], output: Path, only: Sequence[str] | None = None) -> None:
    """Compare what the strategies choose, and what they spend."""
    rows = []
    for seed in seeds:
        paths = {task: fit(task, seed, output) for task in TASKS}
        for name, job in jobs().items():
            if only and not name.startswith(tuple(only)):
                continue
            searches = {"grid": Grid(), "race": Race(seed=seed)}
            if job.get("rule") == "largest":
                searches["bisect"] = Bisect()
            runs = {}
            for strategy, search in searches.items():
                folder = output / "edits" / name.replace(" ", "_") / f"seed={seed}" / strategy
                shutil.rmtree(folder, ignore_errors=True)
                tasks = {
                    task: ImageTask(f"builtin:{task}", batch_size=500, val_size=1000 if task == "objects" else None)
                    for task in (*job["targets"], *job["controls"])
                }
                options = EditOptions(
                    vectors={task: paths[task] for task in job["targets"]},
                    output=str(folder / "out"),
                    log=str(folder / "log.jsonl"),
                    search=search,
                    random_seed=None,
                    **{
                        **job,
                        "targets": {task: tasks[task] for task in job["targets"]},
                        "controls": {task: tasks[task] for task in job["controls"]},
                    },
                )
                report = run_edit(make_trainer(), ClipClassifier(), options)
                runs[strategy] = report, test_scores(folder / "log.jsonl", report)
            for strategy in list(searches)[1:]:
                report, scores = runs[strategy]
                p_values = compare_runs(scores, runs["grid"][1], job)
                row = {
                    "task": name,
                    "seed": seed,
                    "strategy": strategy,
                    "coefficient": report.coefficients["scaling_coef"],
                    "grid": runs["grid"][0].coefficients["scaling_coef"],
                    "share": report.search["num_scored"] / runs["grid"][0].search["num_scored"],
                    "p": p_values,
                }
                rows.append(row)
                tests = ", ".join(f"{task} p {p:.2g}" for task, p in p_values.items())
                print(
                    f"{name:16} seed {seed} {strategy:6} {row['coefficient']:.2f} (grid {row['grid']:.2f}), "
                    f"{row['share']:.1%} of the forward passes, {tests}",
                    flush=True,
                )
    for strategy in ("race", "bisect"):
        of = [row for row in rows if row["strategy"] == strategy]
        tied = sum(min(row["p"].values()) > 0.05 for row in of)
        shares = [row["share"] for row in of]
        if not of:
            continue
        print(
            f"{strategy}: tied with the grid on test data in {tied} of {len(of)}; share of the grid's forward passes "
            f"{statistics.fmean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"
        )
    (output / "choice.json").write_text(json.dumps(rows, indent=1))


def test_scores(log: Path, report: Any) -> dict[str, np.ndarray]:
    """Read the edited model's scores by example on test data from the log."""
    from tva.evaluation.log import decode

    found = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        same = entry["recipe"] == report.recipe and entry["coefficients"] == report.coefficients
        if entry["split"] == "test" and same and entry["statistics"] == report.statistics:
            found[entry["task"]] = decode(entry["scores"]["accuracy"])
    return found


def compare_runs(left: dict[str, np.ndarray], right: dict[str, np.ndarray], job: dict[str, Any]) -> dict[str, float]:
    """Test whether two choices differ on test data: in the objective, and in what is constrained."""
    if len(job["targets"]) == 1:
        return {task: compare(left[task], right[task]).p_value or 1.0 for task in left}
    differences = np.concatenate([(left[t].astype(float) - right[t]) / len(left[t]) for t in job["targets"]])
    return {"mean": min(1.0, 2 * float(flip_test(np.stack([differences, -differences], axis=1)).min()))}


# --- one pass


class Jpegs(Dataset):
    """Pictures that are decoded and scaled each time they are read."""

    def __init__(self, side: int, num_examples: int, transform: Any) -> None:
        rows = load_builtin("objects")["test"]
        self.labels = [rows[index % len(rows)]["label"] for index in range(num_examples)]
        self.transform, self.files = transform, []
        for index in range(num_examples):
            file = io.BytesIO()
            rows[index % len(rows)]["image"].convert("RGB").resize((side, side), Image.BICUBIC).save(file, "JPEG")
            self.files.append(file.getvalue())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.open(io.BytesIO(self.files[index])).convert("RGB")), self.labels[index]


class Pictures(L.LightningDataModule):
    """The task that both sides evaluate."""

    def __init__(self, dataset: Dataset, batch_size: int) -> None:
        super().__init__()
        rows = load_builtin("objects")["test"]
        self.name, self.class_names = "objects", rows.features["label"].names
        self.dataset, self.batch_size = dataset, batch_size

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, self.batch_size)


def one_pass(options: argparse.Namespace) -> None:
    """Time 21 coefficients both ways."""
    model = ClipClassifier()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tuned = {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
    vector = TaskVector.between(base, tuned)
    data = Pictures(Jpegs(options.side, options.examples, model.image_transform), options.batch_size)
    trainer = make_trainer(options.device)
    editor = Editor(trainer, model, {"objects": data})
    coefs = [candidate.scaling_coef for candidate in Grid().candidates()]
    trainer.validate(model, datamodule=data, verbose=False)  # warm: the head is built and cached
    times: dict[str, list[float]] = {"decode": [], "21 x validate": [], "one pass": []}
    for _ in range(options.repeats):
        started = time.perf_counter()
        batches = list(data.val_dataloader())
        times["decode"].append(time.perf_counter() - started)
        started = time.perf_counter()
        separate = []
        for coef in coefs:
            editor.set(vector, coef)
            separate.append(trainer.validate(model, datamodule=data, verbose=False)[0]["val/objects/accuracy"])
        times["21 x validate"].append(time.perf_counter() - started)
        started = time.perf_counter()
        edits = [lambda coef=coef: editor.set(vector, coef) for coef in coefs]
        shared = evaluate(trainer, model, data, "val", edits=edits)
        times["one pass"].append(time.perf_counter() - started)
        assert np.allclose(separate, [evaluation.metrics["accuracy"] for evaluation in shared])
    del batches
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:14} {medians[name]:7.2f} s ({min(values):.2f} to {max(values):.2f})")
    share = 21 * medians["decode"] / medians["21 x validate"]
    print(
        f"decoding is {share:.0%} of the separate calls; one pass is "
        f"{medians['21 x validate'] / medians['one pass']:.2f} x faster; at this share sharing by itself allows "
        f"{1 / (1 - share + share / 21):.2f} x"
    )


if __name__ == "__main__":
    main()
