"""Plain Lightning: one callback writes task vectors, another shows forgetting while it happens.

    python examples/plain_lightning.py --folder runs/plain

A digit classifier that knows the digits 0-4, which are the control, learns the digits 5-9.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tva.callbacks import ControlEvaluation, TaskVectorCallback

from tva import TaskVector, open_weights


class Digits(L.LightningDataModule):
    """Real handwriting, 8 by 8 pixels, of some of the ten classes."""

    def __init__(self, classes: range) -> None:
        super().__init__()
        self.classes = classes

    def _loader(self, part: slice, shuffle: bool = False) -> DataLoader:
        digits = load_digits()
        chosen = torch.isin(torch.tensor(digits.target), torch.tensor(list(self.classes)))
        images = torch.tensor(digits.data, dtype=torch.float32)[chosen] / 16
        labels = torch.tensor(digits.target)[chosen]
        return DataLoader(TensorDataset(images[part], labels[part]), batch_size=50, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader:
        return self._loader(slice(0, 600), shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(slice(600, None))


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_accuracy", (self.net(images).argmax(-1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/plain"))
    folder = parser.parse_args().folder
    L.seed_everything(0)
    model = Classifier()
    options = {"max_epochs": 10, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    L.Trainer(**options, enable_checkpointing=False).fit(model, Digits(range(0, 5)))  # the base

    trainer = L.Trainer(
        **options,
        callbacks=[
            TaskVectorCallback(dirpath=folder, at_train_end=True, task="digits 5-9"),  # writes the vector
            ControlEvaluation({"old": Digits(range(0, 5))}),  # logs the control
        ],
        enable_checkpointing=False,
    )
    trainer.fit(model, Digits(range(5, 10)))
    print(f"new digits {float(trainer.callback_metrics['val_accuracy']):.2f}")
    print(f"old digits {float(trainer.callback_metrics['control/old/accuracy']):.2f}")

    vector = TaskVector.load(folder / "final.tv.safetensors")
    (base,) = folder.glob("base-*.safetensors")
    model.net.load_state_dict(vector.apply_to(open_weights(base), scaling_coef=0.4))  # under the network's own names
    print(vector, "applied at 0.4")


if __name__ == "__main__":
    main()
