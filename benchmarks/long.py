"""Call commands, evaluations and the callback many times in one process, and check that it does not grow.

    python benchmarks/long.py                    # 200 calls of each command, 10,000 evaluations, 1,000 checkpoints
    python benchmarks/long.py --scale 0.05       # a twentieth of each

After a tenth of the calls, in which caches fill, the rest may add no open file, no thread, and at most 16 MiB.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from attacks.good import Blobs, Net, make_good
from tva.callbacks import TaskVectorCallback

from tva.cli.main import main as tva
from tva.evaluation.evaluate import evaluate

MIB = 16  # that the process may grow by
COMPOSE = ["compose", "--base", "base.safetensors", "--vectors.a", "a.tv.safetensors", "--output", "made.safetensors"]
COMMANDS = {
    "compose": [*COMPOSE, "--recipe", "0.5*a"],
    "compose ties": [*COMPOSE, "--recipe", "ties(a)"],
    "extract": ["extract", "--base", "base.safetensors", "--finetuned", "tuned.safetensors", "--output",
                "v.tv.safetensors"],
    "compress": ["compress", "a.tv.safetensors", "--encoding", "int8", "--output", "c.tv.safetensors"],
    "inspect": ["inspect", "a.tv.safetensors"],
    "compare": ["compare", "a.tv.safetensors", "b.tv.safetensors"],
    "verify": ["verify", "edited.safetensors"],
    "revert": ["revert", "edited.safetensors", "--output", "back.safetensors"],
    "vectors ls": ["vectors", "ls", "."],
    "vectors match": ["vectors", "match", "edited.safetensors", "a.tv.safetensors", "--base", "base.safetensors"],
    "report": ["report", "run"],
}  # fmt: skip


def usage() -> tuple[float, int, int]:
    """Return MiB in memory, open files and threads."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20, len(os.listdir("/proc/self/fd")), threading.active_count()


def repeat(name: str, count: int, call: Callable[[], object]) -> bool:
    """Call something many times; return whether the process stayed as it was."""
    first, started = max(1, count // 10), time.monotonic()
    for number in range(count):
        if number == first:
            before = usage()
        with contextlib.redirect_stdout(io.StringIO()):
            call()
    after = usage()
    grown = [new - old for old, new in zip(before, after, strict=True)]
    flat = grown[0] <= MIB and grown[1] <= 0 and grown[2] <= 0
    seconds = time.monotonic() - started
    print(f"| {name} | {count:,} | {grown[0]:+.1f} | {grown[1]:+d} | {grown[2]:+d} | {seconds:.0f} |", flush=True)
    return flat


def quiet_trainer(**options: object) -> L.Trainer:
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**silent, **options)


def checkpoints(count: int) -> bool:
    """Write a checkpoint with its vector at every step; return whether the process stayed as it was."""
    seen: list[tuple[float, int, int]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *given: object) -> None:
            if trainer.global_step in (max(1, count // 10), count):
                seen.append(usage())

    saving = L.pytorch.callbacks.ModelCheckpoint("ckpt", "last", every_n_train_steps=1, enable_version_counter=False)
    trainer = quiet_trainer(max_steps=count, callbacks=[saving, TaskVectorCallback(), Watch()])
    trainer.fit(Net(), datamodule=Blobs(1))
    grown = [new - old for old, new in zip(*seen, strict=True)]
    print(f"| checkpoints | {count:,} | {grown[0]:+.1f} | {grown[1]:+d} | {grown[2]:+d} | |", flush=True)
    return grown[0] <= MIB and grown[1] <= 0 and grown[2] <= 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="times the numbers of calls")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            make_good(Path(folder) / "good")
        os.chdir(Path(folder) / "good")
        print("| what | times | MiB | files | threads | s |\n|---|---|---|---|---|---|")
        calls = max(4, int(200 * given.scale))
        flat = [repeat(name, calls, lambda words=words: tva(words)) for name, words in COMMANDS.items()]
        model, task, trainer = Net(), Blobs(1), quiet_trainer()
        flat.append(repeat("evaluations", int(10_000 * given.scale), lambda: evaluate(trainer, model, task, "val")))
        flat.append(checkpoints(int(1000 * given.scale)))
        os.chdir("/")
    sys.exit(not all(flat))


if __name__ == "__main__":
    main()
