"""Tiny Lightning classes that configs in the tests name by their path."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Blobs(L.LightningDataModule):
    """Two Gaussian blobs, one a class, in a direction that the seed decides; keeps its arguments as hparams."""

    def __init__(self, seed: int = 0, num_examples: int = 60) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.name = f"blobs{seed}"

    def _loader(self, part: int) -> DataLoader:
        generator = torch.Generator().manual_seed(1000 * self.hparams.seed + part)
        direction = torch.randn(4, generator=torch.Generator().manual_seed(self.hparams.seed + 9))
        labels = torch.arange(self.hparams.num_examples) % 2
        inputs = torch.randn(len(labels), 4, generator=generator) + 2 * (2 * labels[:, None] - 1) * direction
        return DataLoader(TensorDataset(inputs, labels), batch_size=20)

    def train_dataloader(self):
        return self._loader(0)

    def val_dataloader(self):
        return self._loader(1)

    def test_dataloader(self):
        return self._loader(2)


class LinearNet(L.LightningModule):
    """A LightningModule as people have them: it knows nothing of tva, logs under its own names, keeps hparams."""

    def __init__(self, width: int = 8, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return nn.functional.cross_entropy(self(inputs), labels)

    def validation_step(self, batch, batch_idx):
        inputs, labels = batch
        self.log("val_accuracy", (self(inputs).argmax(-1) == labels).float().mean())

    def test_step(self, batch, batch_idx):
        inputs, labels = batch
        self.log("test_accuracy", (self(inputs).argmax(-1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


class ControlCallback(L.Callback):
    """A callback that holds a data module of its own, as a control evaluation does."""

    seen: dict[str, int] = {}  # noqa: RUF012 (read by the test after the run)

    def __init__(self, control: L.LightningDataModule) -> None:
        self.control = control

    def on_fit_start(self, trainer, pl_module):
        self.seen.update(control=self.control.hparams.seed, data=trainer.datamodule.hparams.seed)
