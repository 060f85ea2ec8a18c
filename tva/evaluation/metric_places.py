"""Find the torchmetrics objects inside a model and replace them temporarily by copies."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torchmetrics import Metric, MetricCollection


@contextlib.contextmanager
def standing_in(model: torch.nn.Module) -> Iterator[None]:
    """Replace a model's metrics by copies within the context."""
    places = metric_places(model)
    for parent, child, metric in places:
        parent._modules[child] = fresh(metric)
    try:
        yield
    finally:
        for parent, child, metric in places:
            parent._modules[child] = metric


def fresh(metric: Metric | MetricCollection) -> Any:
    copied = metric.clone()
    copied.reset()
    return copied


def metric_places(model: torch.nn.Module) -> list[tuple[torch.nn.Module, str, Any]]:
    """Find the outermost metrics below a module, each with its parent and its name there."""
    found = []
    for name, child in model._modules.items():
        if isinstance(child, (Metric, MetricCollection)):
            found.append((model, name, child))
        elif child is not None:
            found += metric_places(child)
    return found
