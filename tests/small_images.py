"""Tiny pictures in tables, and tasks that are set up as a Trainer would."""

from types import SimpleNamespace

import datasets
import numpy as np
import torch
from PIL import Image

from tva.data import ImageTask


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def ready(path, transform=to_tensor, **options) -> ImageTask:
    """Set up a task as a Trainer would."""
    task = ImageTask(path, **options)
    task.trainer = SimpleNamespace(lightning_module=SimpleNamespace(image_transform=transform))
    task.setup("fit")
    return task


def everything(loader):
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def pictures(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


def table(count, seed=0, **columns):
    labels = [index % 3 for index in range(count)]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])}
    features |= {name: datasets.Value("string") for name in columns}
    rows = {"image": [Image.fromarray(picture) for picture in pictures(count, seed)], "label": labels, **columns}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))
