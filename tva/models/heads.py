"""Heads made of examples: class means, and a linear probe that is trained before anything else; and a trained one."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
import xxhash
from torch import Tensor, nn
from torch.nn import functional as F

from tva.errors import some


def prototype_batches(datamodule: L.LightningDataModule) -> Iterator[tuple[Tensor, Tensor]]:
    """Return the batches that heads are made of: those of ``prototype_dataloader``, else of ``train_dataloader``."""
    loader = getattr(datamodule, "prototype_dataloader", datamodule.train_dataloader)
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed; training must not depend on what is in the cache
        batches = iter(loader())
    yield from batches


def examples_digest(datamodule: L.LightningDataModule) -> str:
    """Hash the transformed inputs and labels that a head is made of, in any order and however they are padded."""
    examples = []
    for inputs, labels in prototype_batches(datamodule):
        for example, label in zip(inputs, labels.tolist(), strict=True):
            if not example.is_floating_point():
                example = example[example >= 0]
            examples.append(xxhash.xxh3_128_hexdigest(example.contiguous().numpy(), seed=label))
    return xxhash.xxh3_128_hexdigest("".join(sorted(examples)).encode())


def class_means(encode: Callable[[Tensor], Tensor], datamodule: L.LightningDataModule) -> Tensor:
    """Compute the normalized mean of each class's normalized features.

    Args:
        encode: From a batch of inputs to normalized features (batch, features).
        datamodule: With ``class_names``.

    Returns:
        Shape (classes, features), float64, each row of norm 1.

    Raises:
        ValueError: A class has no example.
    """
    names = list(datamodule.class_names)
    sums, counts = torch.zeros(0), torch.zeros(len(names), dtype=torch.int64)
    for inputs, labels in prototype_batches(datamodule):
        features = encode(inputs).cpu().double()  # (batch, features)
        if not len(sums):
            sums = torch.zeros(len(names), features.shape[-1], dtype=torch.float64)  # (classes, features)
        sums.index_add_(0, labels, features)
        counts += torch.bincount(labels, minlength=len(names))
    _check_counts(datamodule, names, counts)
    return F.normalize(sums, dim=-1)  # the mean's direction is the sum's


@torch.inference_mode(False)  # Lightning evaluates in inference mode, where nothing can be trained
@torch.enable_grad()
def fit_probe(encode: Callable[[Tensor], Tensor], datamodule: L.LightningDataModule) -> Tensor:
    """Train a linear head on fixed features by logistic regression, from zero to its optimum.

    The penalty is half the squared norm of the head times the features' variance, so that it means the same for
    features that hardly differ and for those that do.

    Args:
        encode: From a batch of inputs to normalized features (batch, features).
        datamodule: With ``class_names``.

    Returns:
        Shape (classes, features), float64.

    Raises:
        ValueError: A class has no example.

    Source: Kumar et al., "Fine-tuning can distort pretrained features and underperform out-of-distribution", ICLR 2022,
    for training the head first.
    """
    names = list(datamodule.class_names)
    batches = [(encode(inputs).cpu().double(), labels) for inputs, labels in prototype_batches(datamodule)]
    features, labels = (torch.cat(parts).clone() for parts in zip(*batches, strict=True))  # clones can be trained on
    _check_counts(datamodule, names, torch.bincount(labels, minlength=len(names)))
    strength = 1e-3 * float(features.var(dim=0, correction=0).sum())
    head = torch.zeros(len(names), features.shape[-1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features @ head.T, labels) + 0.5 * strength * head.pow(2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head.detach()


def _check_counts(datamodule: L.LightningDataModule, names: Sequence[str], counts: Tensor) -> None:
    task = getattr(datamodule, "name", type(datamodule).__name__)
    empty = [name for name, count in zip(names, counts.tolist(), strict=True) if count == 0]
    if empty:
        raise ValueError(
            f"{task}: a head of class means, or a probe, needs training examples of each of the {len(names)} classes, "
            f"and there are none of {some(empty)}. Raise limit_train, or let prototype_where reach them ({{}} takes "
            f"all training examples)."
        )


class TrainedHead(nn.Module):
    """A head that is trained with the encoder, but is in no state dict and so in no task vector.

    Args:
        weight: Where it starts, shape (classes, features).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class HeldHead(nn.Module):
    """Holds a frozen head that moves between devices with a model, but is in no state dict.

    A module of its own, so that it can be a model's last: Lightning's WeightAveraging pairs the buffers of the model
    with those of a copy from before the head was there, by their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", None, persistent=False)
