"""Time how long commands take until their work begins, beside ``import lightning.pytorch.cli``.

    python -m benchmarks run start --seeds 0 [--repeats 5]

Each is a new process, in turn. ``fit`` ends at its first training step and ``edit`` at its first evaluation, of a model
of ten parameters. CPU seconds are user and system time.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.ledger import ROOT, markdown
from tva import save_weights

OPTIONS = {"repeats": 5}
DEPENDS = ("benchmarks/start.py", "tva/cli", "tva/edit/run.py")


class Data(L.LightningDataModule):
    """Eight examples."""

    def _loader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.zeros(8, 4), torch.zeros(8, dtype=torch.long)))

    train_dataloader = val_dataloader = test_dataloader = _loader


CLOCKS = ("wall_s", "cpu_s")
BEGAN = 7  # the status of a process whose work began
TASK = f"{{class_path: benchmarks.start.{Data.__name__}}}"
TINY = "model: {class_path: benchmarks.start.Model}\ntrainer: {accelerator: cpu}\n"
EDIT = f"{TINY}vectors: {{a: a.ckpt}}\nrecipe: -a\nminimize: a/accuracy\ntargets: {{a: {TASK}}}\noutput: o"
FILES = {"fit": f"{TINY}data: {TASK}", "edit": EDIT, "recipe": EDIT.replace("-a", "-b"), "key": EDIT.replace("m", "n")}
IMPORT, LINE = "import lightning.pytorch.cli", "`tva edit`, until it prints `loading …`"
CASES = {
    f"`{IMPORT}`": (0, "-c", IMPORT),
    "`tva fit`, until its first training step": (BEGAN, "-m", "tva", "fit", "--config", "fit"),
    "`tva edit`, until its first evaluation": (BEGAN, "-m", "tva", "edit", "--config", "edit"),
    LINE: (-9, "-m", "tva", "edit", "--config", "edit"),
    "`tva edit` with a mistake in its recipe": (2, "-m", "tva", "edit", "--config", "recipe"),
    "`tva edit` with a misspelt option": (2, "-m", "tva", "edit", "--config", "key"),
    "`tva --help`": (0, "-m", "tva", "--help"),
    "`tva fit --help`": (0, "-m", "tva", "fit", "--help"),
}


class Model(L.LightningModule):
    """Ends the process when it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 2).requires_grad_()
        torch.nn.init.zeros_(self.net.weight), torch.nn.init.zeros_(self.net.bias)

    def _step(self, *_: Any) -> None:
        os._exit(BEGAN)

    forward = training_step = validation_step = test_step = _step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def _time(folder: str, status: int, *words: str) -> tuple[float, float]:
    """Run a process; return its wall and CPU seconds."""
    started, environment = time.perf_counter(), {**os.environ, "PYTHONPATH": str(ROOT)}
    with Popen([sys.executable, *words], cwd=folder, env=environment, stdout=DEVNULL, stderr=PIPE) as process:
        said = process.stderr.readline() if status < 0 else process.stderr.read()
        if status < 0:
            process.kill()
        _, ended, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(ended)
    if process.returncode != status:
        raise RuntimeError(f"{words} ended with status {process.returncode}: {said.decode()[-2000:]}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime


def measure(seed: int, repeats: int) -> dict[str, Any]:
    """Return wall and CPU seconds by case, of each repeat."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in FILES.items():
            Path(folder, name).write_text(text)
        save_weights({name: value + 1 for name, value in Model().state_dict().items()}, f"{folder}/a.ckpt")
        turns = [{case: _time(folder, *words) for case, words in CASES.items()} for _ in range(repeats)]
    return {case: {clock: [turn[case][at] for turn in turns] for at, clock in enumerate(CLOCKS)} for case in CASES}


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return the table of medians."""
    rows = []
    for case in CASES:
        wall, cpu = ([value for run in runs.values() for value in run[case][clock]] for clock in CLOCKS)
        reference = [value for run in runs.values() for value in run[f"`{IMPORT}`"]["cpu_s"]]
        ratio = statistics.median(own / other for own, other in zip(cpu, reference, strict=True))
        rows.append([case, f"{statistics.median(wall):.2f}", f"{statistics.median(cpu):.2f}", f"{ratio:.2f}"])
    return {"starts": markdown(["process", "wall s", "CPU s", "CPU ÷ that of the import"], rows)}
