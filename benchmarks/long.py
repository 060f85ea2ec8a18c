"""Call commands, evaluations and the callback many times in one process, and check that it does not grow.

    python -m benchmarks run long --seeds 0 [--scale 0.05]

There are 200 calls of each command, 10,000 evaluations and 1,000 checkpoints, times the scale. After a tenth of them,
in which caches fill, the rest may add no open file, no thread, and at most 16 MiB.
"""

import contextlib
import gc
import io
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tva.callbacks import TaskVectorCallback

from benchmarks.attacks import good, trial
from benchmarks.attacks.good import Blobs, Net
from benchmarks.ledger import markdown
from tva.cli.main import main as tva
from tva.evaluation.evaluate import evaluate

OPTIONS = {"scale": 1.0}
DEPENDS = ("benchmarks/long.py", "tva", "callbacks")
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


def grown(before: tuple[float, int, int], after: tuple[float, int, int], count: int, started: float) -> dict[str, Any]:
    mib, files, threads = (new - old for old, new in zip(before, after, strict=True))
    seconds = round(time.monotonic() - started)
    found = {"times": count, "mib": round(mib, 1), "files": files, "threads": threads, "seconds": seconds}
    print(found, flush=True)
    return found


def repeat(count: int, call: Callable[[], object]) -> dict[str, Any]:
    """Call something many times; return by what the process grew after a tenth of the calls."""
    first, started = max(1, count // 10), time.monotonic()
    for number in range(count):
        if number == first:
            before = usage()
        with contextlib.redirect_stdout(io.StringIO()):
            call()
    return grown(before, usage(), count, started)


def call(words: list[str]) -> None:
    """Run a command; a base that was restored before, which is nobody's but the user's, is removed first."""
    Path("back.safetensors").unlink(missing_ok=True)
    tva(words)


def quiet_trainer(**options: object) -> L.Trainer:
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**silent, **options)


def checkpoints(count: int) -> dict[str, Any]:
    """Write a checkpoint with its vector at every step; return by what the process grew after a tenth of them."""
    seen: list[tuple[float, int, int]] = []
    started = time.monotonic()

    class Watch(L.Callback):
        def on_train_batch_end(self, *given: object) -> None:
            if trainer.global_step in (max(1, count // 10), count):
                seen.append(usage())

    saving = L.pytorch.callbacks.ModelCheckpoint("ckpt", "last", every_n_train_steps=1, enable_version_counter=False)
    trainer = quiet_trainer(max_steps=count, callbacks=[saving, TaskVectorCallback(), Watch()])
    trainer.fit(Net(), datamodule=Blobs(1))
    return grown(seen[0], seen[1], count, started)


def measure(seed: int, scale: float) -> dict[str, Any]:
    """Return by what the process grew in each."""
    torch.set_num_threads(1)
    with trial.workplace() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            good.make_good(folder / "good")
        calls = max(4, int(200 * scale))
        found = {name: repeat(calls, lambda words=words: call(words)) for name, words in COMMANDS.items()}
        model, task, trainer = Net(), Blobs(seed + 1), quiet_trainer()
        found["evaluations"] = repeat(int(10_000 * scale), lambda: evaluate(trainer, model, task, "val"))
        found["checkpoints"] = checkpoints(int(1000 * scale))
    return found


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return one row a thing that was repeated, with the most of all seeds."""
    rows = []
    for name in next(iter(runs.values())):
        found = [run[name] for run in runs.values()]
        mib, files, threads = (max(each[key] for each in found) for key in ("mib", "files", "threads"))
        flat = "yes" if mib <= MIB and files <= 0 and threads <= 0 else "NO"
        times = f"{sum(each['times'] for each in found):,}"
        rows.append([name, times, f"{mib:+.1f}", f"{files:+d}", f"{threads:+d}", flat])
    return {"long": markdown(["what", "times", "MiB", "files", "threads", "flat"], rows)}
