"""Time what TaskVectorCallback costs a fit that FSDP2 shards, by the messages that bring a vector to rank 0.

    python benchmarks/sharded.py                                                  # two processes on the CPU, over gloo
    python benchmarks/sharded.py --device cuda --processes 8 --width 4096 --layers 32       # over NCCL

The same fit with a vector every ``--every`` steps and without, in turn, ``--repeats`` pairs. Printed are the median
seconds of both, and what a vector takes: seconds, and bytes of the model by second.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.data import DataLoader, TensorDataset
from tva.callbacks import TaskVectorCallback


class Layers(L.LightningModule):
    """Square layers, each a unit."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))

    def configure_model(self) -> None:
        for unit in (*self.net, self):
            fully_shard(unit, mesh=self.device_mesh["data_parallel"])
        register_fsdp_forward_method(self, "training_step")

    def training_step(self, batch, batch_idx):
        (inputs,) = batch
        return self.net(inputs).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def time_fit(options: argparse.Namespace, folder: str | None) -> float:
    """Fit once and return its seconds, with vectors where there is a folder."""
    torch.manual_seed(0)
    callbacks = [] if folder is None else [TaskVectorCallback(dirpath=folder, every_n_steps=options.every)]
    trainer = L.Trainer(
        max_steps=options.steps,
        accelerator=options.device,
        devices=options.processes,
        strategy=ModelParallelStrategy(options.processes, 1),
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = torch.randn(options.batch_size * options.steps * options.processes, options.width)
    model, data = Layers(options.width, options.layers), DataLoader(TensorDataset(rows), options.batch_size)
    started = time.perf_counter()
    trainer.fit(model, data)
    return trainer.strategy.broadcast(time.perf_counter() - started)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=5, help="steps between vectors")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    time_fit(argparse.Namespace(**{**vars(options), "steps": 2}), None)  # warm
    without, extra = [], []
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            pair = {kind: time_fit(options, kind) for kind in ((None, folder) if repeat % 2 else (folder, None))}
        without.append(pair[None])
        extra.append(pair[folder] - pair[None])
    vectors = options.steps // options.every
    size = 4 * options.layers * (options.width**2 + options.width)
    each = statistics.median(extra) / vectors
    if torch.distributed.get_rank() == 0:
        print(
            f"{options.device}, {options.processes} processes, model of {size / 2**20:.1f} MiB: {options.steps} steps "
            f"take {statistics.median(without):.2f} s, and each of {vectors} vectors {each:.3f} s more, the base's "
            f"share included ({size / each / 2**20:.0f} MiB/s)"
        )


if __name__ == "__main__":
    main()
