"""FSDP2: the same callback, on any number of devices; no rank ever holds the whole model.

python examples/fsdp2.py --folder runs/fsdp2 --accelerator cpu --devices 2
"""

import argparse
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from tva.callbacks import TaskVectorCallback


class Sharded(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))

    def configure_model(self) -> None:
        for layer in (self.net[0], self.net[2]):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        (inputs,) = batch
        return (self.net(inputs) - inputs.sum(1, keepdim=True)).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/fsdp2"))
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=2)
    arguments = parser.parse_args()
    L.seed_everything(0)
    trainer = L.Trainer(
        max_epochs=3,
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        strategy=ModelParallelStrategy(data_parallel_size=arguments.devices, tensor_parallel_size=1),
        callbacks=[
            ModelCheckpoint(dirpath=arguments.folder, filename="last"),  # a folder of shards
            TaskVectorCallback(),  # a file next to it
        ],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(Sharded(), DataLoader(TensorDataset(torch.randn(64, 16)), batch_size=8))
    if (
        dist.is_initialized()
    ):  # gloo's threads would outlive the interpreter; Lightning ends only NCCL's group by itself
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
