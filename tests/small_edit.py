"""A tiny model, its tasks and its task vectors, and an edit of them in one call."""

import pytest
import torch
from small_models import Blobs, LinearNet
from small_models import quiet_trainer as make_trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from tva import TaskVector
from tva.edit.options import EditOptions
from tva.edit.run import run_edit
from tva.search import Grid


class Counted(Dataset):
    """Examples that note each time one is read."""

    def __init__(self, dataset, reads):
        self.dataset, self.reads = dataset, reads

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.reads.append(index)
        return self.dataset[index]


class Task(Blobs):
    """Blobs whose reads are counted."""

    def __init__(self, seed: int, num_examples: int = 200, shuffle: bool = False):
        super().__init__(seed, num_examples)
        self.reads = {"val": [], "test": []}
        self.shuffle = shuffle

    def _counted(self, part, split):
        return DataLoader(Counted(self._loader(part).dataset, self.reads[split]), 50, shuffle=self.shuffle)

    def val_dataloader(self):
        return self._counted(1, "val")

    def test_dataloader(self):
        return self._counted(2, "test")


class Net(LinearNet):
    """Returns scores by example, and logs a torchmetrics metric beside a mean."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=2, average="micro")

    def _step(self, batch, stage):
        inputs, labels = batch
        logits = self(inputs)
        loss = nn.functional.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log(f"{stage}/loss", loss)
        self.log(f"{stage}/accuracy", self.accuracy)
        return {"loss": loss, "correct": logits.argmax(-1) == labels, "preds": logits, "target": labels}

    def validation_step(self, batch, batch_idx):
        return self._step(batch, "val")

    def test_step(self, batch, batch_idx):
        return self._step(batch, "test")


class LateNet(Net):
    """Logs at the end of the epoch, so that edits cannot share a pass."""

    def on_validation_epoch_end(self):
        self.log("val/late", 1.0)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """Task vectors of two blob tasks."""
    folder, paths = tmp_path_factory.mktemp("vectors"), {}
    for seed, name in ((1, "a"), (2, "b")):
        model = Net()
        base = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        inputs, labels = Task(seed).train_dataloader().dataset.tensors
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
        paths[name] = str(folder / f"{name}.tv.safetensors")
        TaskVector.between(base, model.state_dict()).save(paths[name])
    return paths


def edit(vectors, model=None, folder=".", **changes):
    tasks = {"a": Task(1), "b": Task(2)}
    options = {
        "recipe": "a + b",
        "targets": tasks,
        "controls": {"other": Task(3)},
        "maximize": "mean(normalized_accuracy)",
        "search": Grid(num=5),
        "log": f"{folder}/log.jsonl",
        **changes,
    }
    asked = EditOptions(vectors=vectors, output=f"{folder}/out", **options)
    return run_edit(make_trainer(), model or Net(), asked)
