"""Small timm networks with random weights, and images to train them on, in files."""

from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from tva.checkpoints import save_weights

SIZE = 32


def write_network(folder: Path, name: str = "test_efficientnet") -> str:
    """Write a timm network's random weights, its BatchNorm statistics too, and give the path."""
    torch.manual_seed(0)
    network = timm.create_model(name)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    path = folder / f"{name}.safetensors"
    save_weights(network.state_dict(), path)
    return str(path)


def write_images(folder: Path, labels: list[int], seed: int = 0) -> str:
    """Write images of one color a class, with noise."""
    generator = np.random.default_rng(seed)
    colors = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]])
    images = colors[labels][:, None, None] + generator.normal(0, 20, (len(labels), 16, 16, 3))
    images = images.clip(0, 255).astype(np.uint8)
    path = folder / "colors.npz"
    labels = np.array(labels)
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return str(path)
