"""Rows of a table as examples and batches of a model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from tva.data.text_task import PADDING

IGNORED = -100  # the label of a token that is no beginning of a word


def padded(rows: Sequence[Tensor]) -> Tensor:
    """Return token ids of one dimension each as rows of one tensor, padded with -1."""
    return pad_sequence(list(rows), batch_first=True, padding_value=PADDING)


class Encoded(Dataset):
    """Token ids with targets.

    Args:
        inputs: One tensor per example.
        targets: Likewise.
    """

    def __init__(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


class Images(Dataset):
    """Images with targets, opened at access.

    Args:
        images: PIL images by index.
        targets: One tensor per example.
        transform: From a PIL image to a tensor.
    """

    def __init__(self, images: Sequence[Any], targets: Sequence[Tensor], transform: Callable[[Any], Tensor]) -> None:
        self.images = images
        self.targets = targets
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index].convert("RGB")), self.targets[index]


class ImageFiles(Sequence[Any]):
    """Images in files, opened at access.

    Args:
        paths: The files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image

        return Image.open(self.paths[index])


def collate(examples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Make a batch; token ids are padded with -1, labels of tokens with -100."""
    inputs, targets = zip(*examples, strict=True)
    if inputs[0].is_floating_point():
        return torch.stack(inputs), torch.stack(targets)
    if inputs[0].ndim == 2:
        longest = max(rows.shape[1] for rows in inputs)
        tokens = torch.stack([torch.nn.functional.pad(r, (0, longest - r.shape[1]), value=PADDING) for r in inputs])
    else:
        tokens = pad_sequence(list(inputs), batch_first=True, padding_value=PADDING)
    if targets[0].ndim and not targets[0].is_floating_point():
        return tokens, pad_sequence(list(targets), batch_first=True, padding_value=IGNORED)
    return tokens, torch.stack(targets)
