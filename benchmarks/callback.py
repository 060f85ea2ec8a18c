"""Time what TaskVectorCallback costs a fit, and its emission against writing the same bytes.

    python -m benchmarks run callback --seeds 0 [--folder /somewhere/with/space] [--megabytes 600] [--steps 400]
        [--repeats 5]

Overhead: the same fit of a transformer on the CPU, with a vector every 200 steps and without, in turn, ``--repeats``
pairs; the median of the paired differences over the median time without is printed, with all differences, as two fits
of the same thing differ too; and the time spent inside the callback's own hooks, which does not depend on that. Every
vector is of a fresh step, so that every one is written in full. Emission: one pass that fingerprints, subtracts and
writes, with its fsync, against ``safetensors.torch.save_file`` of the same deltas, bare and followed by an fsync; in
turn, each from page cache.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tva.callbacks import TaskVectorCallback

from benchmarks.ledger import markdown
from tva import fingerprint, open_weights, save_weights
from tva.vectors.header import Origin
from tva.vectors.write import TensorSource, VectorPlan, emit

OPTIONS = {"folder": "", "megabytes": 600, "steps": 400, "repeats": 5}
DEPENDS = ("benchmarks/callback.py", "callbacks", "tva/vectors/write.py", "tva/checkpoints/fingerprint.py")


class Timed(TaskVectorCallback):
    """Counts the seconds spent in its hooks."""

    inside_s = 0.0


def _timed(name: str) -> Callable[..., Any]:
    hook = getattr(TaskVectorCallback, name)

    def run(self: Timed, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return hook(self, *arguments, **options)
        finally:
            self.inside_s += time.perf_counter() - started

    return run


for _name in vars(TaskVectorCallback):
    if _name in ("setup", "teardown") or (_name.startswith("on_") and _name != "on_vector_saved"):
        setattr(Timed, _name, _timed(_name))


class Transformer(L.LightningModule):
    """Four layers of width 256: 3.2 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
        self.net = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def training_step(self, batch, batch_idx):
        (inputs,) = batch  # (batch, length, width)
        return (self.net(inputs) - inputs.flip(1)).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def time_fit(folder: Path, steps: int, every: int | None) -> tuple[float, float]:
    """Fit once; seconds of all, with the base's writing where there is a callback, and seconds inside the callback."""
    callback = [] if every is None else [Timed(dirpath=folder, every_n_steps=every)]
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=callback,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(TensorDataset(torch.randn(8 * steps, 16, 256)), batch_size=8)
    model = Transformer()
    started = time.perf_counter()
    trainer.fit(model, data)
    return time.perf_counter() - started, sum(one.inside_s for one in callback)


def measure_overhead(folder: Path, steps: int, repeats: int) -> dict[str, Any]:
    time_fit(folder / "warm", min(steps, 20), None)
    without, extra, inside = [], [], []
    for repeat in range(repeats):
        pair = {}
        for every in (None, 200) if repeat % 2 else (200, None):
            pair[every] = time_fit(folder / f"fit-{repeat}", steps, every)
        without.append(pair[None][0])
        extra.append(pair[200][0] - pair[None][0])
        inside.append(pair[200][1])
    return {"without_s": without, "extra_s": extra, "inside_s": inside}


def measure_emission(folder: Path, megabytes: int, repeats: int) -> dict[str, list[float]]:
    elements = 2**20  # 4 MiB a tensor
    base = {f"w{n}": torch.randn(elements) for n in range(max(1, megabytes // 4))}
    tuned = {name: value + 1e-3 * torch.randn(elements) for name, value in base.items()}
    save_weights(base, folder / "base.safetensors")
    weights = open_weights(folder / "base.safetensors")
    tree = fingerprint(weights)
    deltas = {name: tuned[name] - base[name] for name in base}

    def vector() -> None:
        plan = VectorPlan(weights, tree, {name: TensorSource.of(value) for name, value in tuned.items()})
        emit(plan, folder / "v.tv.safetensors", Origin())

    def library(sync: bool) -> None:
        save_file(deltas, folder / "s.safetensors")
        if sync:
            with open(folder / "s.safetensors", "rb") as file:
                os.fsync(file.fileno())

    jobs: dict[str, Callable[[], None]] = {
        "emit_s": vector,
        "save_file_s": lambda: library(False),
        "save_file_fsync_s": lambda: library(True),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in times.items()}  # the first warms the cache


def measure(seed: int, folder: str, megabytes: int, steps: int, repeats: int) -> dict[str, Any]:
    """Return all times, in seconds."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=folder or None) as place:
        warnings.filterwarnings("ignore", module="lightning")
        return {
            "megabytes": megabytes,
            "steps": steps,
            "emission": measure_emission(Path(place), megabytes, repeats),
            "fit": measure_overhead(Path(place), steps, repeats),
        }


def tables(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, str]:
    """Return the table; all repeats of all seeds count alike."""
    found = list(runs.values())
    emit, bare, synced = (
        [second for run in found for second in run["emission"][name]]
        for name in ("emit_s", "save_file_s", "save_file_fsync_s")
    )
    without, extra, inside = (
        [second for run in found for second in run["fit"][name]] for name in ("without_s", "extra_s", "inside_s")
    )
    size, steps = found[0]["megabytes"], found[0]["steps"]
    step = 1000 * statistics.median(without) / steps
    rows = [
        [f"writing {size} MB of vector, with fsync", f"{_range(emit)} s", ""],
        ["`safetensors.torch.save_file` of the same bytes", f"{_range(bare)} s", f"{_range(_ratios(emit, bare))} ×"],
        ["the same with an fsync", f"{_range(synced)} s", f"{_range(_ratios(emit, synced))} ×"],
        [f"a fit of {steps} steps of {step:.0f} ms without the callback", f"{_range(without)} s", ""],
        [
            f"the same with it: inside its hooks, for the base and {max(1, steps // 200)} of its vectors, 13 MB each",
            f"{_range(inside)} s",
            f"{_range([100 * ratio for ratio in _ratios(inside, without)])}%",
        ],
        [
            "the same with it: added in all, pair by pair",
            f"{_range(extra)} s",
            f"{_range([100 * ratio for ratio in _ratios(extra, without)])}%",
        ],
    ]
    return {"cost": markdown(["what", "seconds", "vector ÷ file, or share of the fit"], rows)}


def _ratios(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(ones, others, strict=True)]


def _range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
