"""Find a task's metrics and compute them on given examples."""

from __future__ import annotations

import re

from torch import Tensor
from torchmetrics import Metric

from tva.errors import some


def compute(metric: Metric, preds: Tensor, target: Tensor) -> Tensor:
    metric.reset()
    metric.update(preds, target)
    return metric.compute()


def find_metric(name: str, num_classes: int) -> Metric:
    """Find the torchmetrics metric of a multi-class task by its name.

    Args:
        name: Such as ``f1_score``, ``F1Score`` or ``MulticlassF1Score``.
        num_classes: Classes of the task.

    Raises:
        ValueError: torchmetrics has none of that name.

    Example:
        >>> find_metric("f1_score", 3)
        MulticlassF1Score()
    """
    from torchmetrics import classification

    known = {
        re.sub(r"[_-]", "", kind.removeprefix("Multiclass")).lower(): kind
        for kind in dir(classification)
        if kind.startswith("Multiclass")
    }
    found = known.get(re.sub(r"[_-]", "", name.removeprefix("Multiclass")).lower())
    if found is None:
        raise ValueError(
            f"torchmetrics has no multi-class metric {name!r}; it has {some(sorted(known), 40)}. Name one of these, or "
            f"a metric that the model logs."
        )
    return getattr(classification, found)(num_classes=num_classes)
