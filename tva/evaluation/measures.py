"""Tasks that bring their own measure: DataLoaders with a metric, or a function that evaluates a model."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from tva.errors import some
from tva.evaluation.batch_cache import example_order
from tva.evaluation.metrics import FunctionMetric, compute, find_metric
from tva.evaluation.result import Evaluation, Split

FORMS = (
    "a LightningDataModule; (val_loader, test_loader) where the model's own steps log metrics; (val_loader, "
    "test_loader, metric) or (datamodule, metric) with a torchmetrics metric, its name, or a function of predictions "
    "and targets; or a function evaluate(model, split)"
)


class Measure:
    """A metric of predictions and targets, under its name.

    Args:
        name: Its name in objectives and constraints.
        given: A torchmetrics metric; or a function of ``preds`` and ``target`` that returns one number, or one number
            an example (then the metric is their mean, and has intervals); or what `find_metric` finds by name.
    """

    def __init__(self, name: str, given: Any) -> None:
        self.name, self.given = name, given
        self._by_example: bool | None = None

    def metric(self, num_classes: int) -> Metric:
        """Return it as a torchmetrics metric."""
        if isinstance(self.given, str):
            return find_metric(self.given, num_classes)
        return self.given.clone().cpu() if isinstance(self.given, Metric) else FunctionMetric(self.given)

    def scores(self, preds: Any, target: Any) -> Tensor | None:
        """Compute one score per example of a batch; None where the metric is one number of all examples together.

        Raises:
            ValueError: Some batches have a score an example, and this one has not.
        """
        if self._by_example is False:
            return None
        metric = self.metric(width(preds))
        if not isinstance(metric, FunctionMetric):
            self._by_example = False
            return None
        with self.explained(preds, target):
            value = as_tensor(metric.function(preds, target))
        found = value.ndim == 1 and len(value) == len(preds)
        if self._by_example is None:
            self._by_example = found
        if not self._by_example:
            return None
        if not found and value.numel() == len(preds) == 1:
            return value.reshape(1)
        if not found:
            raise ValueError(
                f"The metric {self.name!r} returned one number per example before, and now for {len(preds)} examples "
                f"the shape {list(value.shape)}. Return one number per example of every batch, or one number."
            )
        return value

    def compute(self, preds: Any, target: Any) -> tuple[Metric, Tensor]:
        """Compute it on all examples."""
        metric = self.metric(width(preds))
        with self.explained(preds, target):
            if isinstance(preds, Tensor):
                return metric, compute(metric, preds, target)
            assert isinstance(metric, FunctionMetric)
            return metric, as_tensor(metric.function(preds, target))

    def explained(self, preds: Any, target: Any) -> Explained:
        """Return a context in which errors of the metric state what it was given."""
        return Explained(self.name, preds, target)


class Explained:
    """Turn an error of a metric into one that states what it was given.

    Args:
        name: The metric's name.
        preds: What it is given.
        target: Likewise.
    """

    def __init__(self, name: str, preds: Any, target: Any) -> None:
        self.name, self.preds, self.target = name, preds, target

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (ValueError, RuntimeError, TypeError, IndexError)):
            raise ValueError(
                f"The metric {self.name!r} cannot be computed from predictions {_shape(self.preds)} and targets "
                f"{_shape(self.target)}: {' '.join(str(error).split())} Give a metric that takes these, such as a "
                f"function of preds and target."
            ) from error


def _shape(value: Any) -> str:
    return f"{list(value.shape)} {value.dtype}".replace("torch.", "") if isinstance(value, Tensor) else f"{value!r:.60}"


def width(preds: Any) -> int:
    """Return the number of classes of predictions, 0 where they are not logits."""
    return preds.shape[-1] if isinstance(preds, Tensor) and preds.ndim > 1 else 0


def as_tensor(value: Any) -> Tensor:
    """Return a number, several or an array as a tensor on the CPU that no graph holds."""
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        value = torch.stack([torch.as_tensor(item) for item in value])
    elif not isinstance(value, Tensor):
        value = np.asarray(value)  # which keeps a Python number's 64 bits
    return torch.as_tensor(value).detach().cpu()


def measures_of(datamodule: Any) -> dict[str, Measure]:
    """Return the measures that a task brings, by name."""
    found = getattr(datamodule, "tva_metrics", None) or {}
    return {name: given if isinstance(given, Measure) else Measure(name, given) for name, given in found.items()}


def named_metrics(given: Any) -> dict[str, Any]:
    """Return metrics by name: a mapping as it is; else a metric, a name or a function under its own name.

    Example:
        >>> from torchmetrics.classification import MulticlassF1Score
        >>> list(named_metrics(MulticlassF1Score(num_classes=3))), list(named_metrics("my_package.margin"))
        (['f1_score'], ['margin'])
    """
    if isinstance(given, Mapping):
        return {name: _checked(metric) for name, metric in given.items()}
    metric = _checked(given)
    if isinstance(metric, str):
        name = metric.rpartition(".")[2]
    elif isinstance(metric, Metric):
        short = re.sub(r"^(Multiclass|Multilabel|Binary)(?=.)", "", type(metric).__name__)
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", short).lower()
    else:
        function = metric.func if isinstance(metric, functools.partial) else metric
        name = getattr(function, "__name__", "metric")
    return {name if re.fullmatch(r"[\w.-]+", name) else "metric": metric}


def _checked(metric: Any) -> Any:
    if isinstance(metric, type) and issubclass(metric, Metric):
        raise TypeError(f"A metric must be an instance; found the class {metric.__name__}. Give {metric.__name__}(…).")
    if not isinstance(metric, (str, Metric)) and not callable(metric):
        raise TypeError(
            f"A metric must be a torchmetrics metric, its name, or a function of preds and target; found {metric!r}."
        )
    return metric


class LoaderTask(L.LightningDataModule):
    """Two DataLoaders as a task, with the metrics it is measured by.

    Args:
        val: Batches to choose on.
        test: Batches to report on.
        metrics: By name; None where the model's own steps log metrics.
    """

    def __init__(self, val: Iterable[Any], test: Iterable[Any], metrics: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._loaders = (val, test)
        self.tva_metrics = {name: Measure(name, given) for name, given in (metrics or {}).items()}

    def val_dataloader(self) -> Any:
        return self._loaders[0]

    def test_dataloader(self) -> Any:
        return self._loaders[1]


class FunctionTask(L.LightningDataModule):
    """A function that evaluates a model as a task.

    Args:
        function: Takes the model, in evaluation mode and without gradients, and ``"val"`` or ``"test"``. Returns one
            number; or one number per example, whose mean is the metric ``score``, with intervals; or a mapping from
            metric names to these. Its attribute ``higher_is_better`` is the direction.
    """

    def __init__(self, function: Callable[[Any, Split], Any]) -> None:
        super().__init__()
        self.function = function

    def evaluate(self, network: Any, split: Split) -> Evaluation:
        """Call the function on a model.

        Raises:
            ValueError: It returned something else than numbers.
        """
        modes = [(module, module.training) for module in network.modules()]
        network.eval()
        try:
            with torch.no_grad():
                returned = self.function(network, split)
        finally:
            for module, mode in modes:
                module.training = mode
        given = dict(returned) if isinstance(returned, Mapping) else {"score": returned}
        metrics: dict[str, float] = {}
        scores: dict[str, np.ndarray] = {}
        for name, value in given.items():
            found = self._numbers(name, value)
            if found.ndim:
                scores[str(name)] = found.numpy() if found.dtype == torch.bool else found.double().numpy()
            metrics[str(name)] = float(found.double().mean())
        counts = {len(values) for values in scores.values()}
        if len(counts) > 1:
            raise ValueError(
                f"{self._name} must return as many scores for every metric; found {some(map(str, sorted(counts)))}."
            )
        direction = getattr(self.function, "higher_is_better", None)
        return Evaluation(
            metrics,
            counts.pop() if counts else 0,
            scores,
            {} if direction is None else dict.fromkeys(metrics, bool(direction)),
            shareable=True,
            computed=tuple(metrics),
        )

    def evaluate_edits(
        self,
        network: torch.nn.Module,
        split: Split,
        device: torch.device,
        edits: Sequence[Callable[[], None]] | None,
        part: tuple[tuple[int, int], int | None] | None,
    ) -> Any:
        """Evaluate a model on a device, or edits of it, on all examples or a part of them.

        The arguments are those of `tva.evaluation.evaluate.evaluate`.
        """
        found = []
        home = next((tensor.device for tensor in network.parameters()), device)
        for edit in edits or [lambda: None]:
            edit()
            network.to(device)
            evaluation = self.evaluate(network, split)
            found.append(evaluation if part is None else self._part(evaluation, *part))
        network.to(home)
        return found[0] if edits is None else found

    def _part(self, evaluation: Evaluation, window: tuple[int, int], seed: int | None) -> Evaluation:
        if not evaluation.scores:
            raise ValueError(
                f"{self._name} returns one number, of which no part of the examples can be taken. Return one number an "
                f"example, or search by Grid or Bisect."
            )
        rows = example_order(evaluation.num_examples, seed)[slice(*window)].numpy()
        scores = {name: values[rows] for name, values in evaluation.scores.items()}
        metrics = {name: float(values.mean(dtype=np.float64)) for name, values in scores.items()}
        return replace(evaluation, metrics=metrics, num_examples=len(rows), scores=scores, computed=tuple(metrics))

    @property
    def _name(self) -> str:
        return f"The function {getattr(self.function, '__name__', self.function)!r}"

    def _numbers(self, name: Any, value: Any) -> Tensor:
        try:
            found = as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            found = None
        if found is None or found.ndim > 1 or not found.numel() or found.is_complex():
            kind = f"shape {list(found.shape)}" if found is not None else f"{value!r:.60}"
            raise ValueError(
                f"{self._name} must return one number, one number per example, or a mapping from metric names to "
                f"these; for {name!r} it returned {kind}."
            )
        return found


def as_task(name: str, given: Any) -> L.LightningDataModule:
    """Return a task as a data module.

    Args:
        name: The task's name, for messages.
        given: One of `FORMS`.

    Raises:
        TypeError: It is none of these.
    """
    if isinstance(given, L.LightningDataModule):
        return given
    if callable(given) and not isinstance(given, type) and not isinstance(given, torch.nn.Module):
        _check_takes_two(name, given)
        return FunctionTask(given)
    if isinstance(given, (tuple, list)) and given:
        first = given[0]
        if isinstance(first, L.LightningDataModule) and len(given) == 2:
            task = copy.copy(first)  # the same data may be measured by another metric in another task
            task.tva_metrics = named_metrics(given[1])
            return task
        if len(given) in (2, 3) and all(map(_is_loader, given[:2])):
            return LoaderTask(given[0], given[1], named_metrics(given[2]) if len(given) == 3 else None)
    kinds = ", ".join(type(each).__name__ for each in given) if isinstance(given, (tuple, list)) else None
    found = f"a {type(given).__name__} of ({kinds})" if kinds else f"a {type(given).__name__}"
    if isinstance(given, type):
        found = f"the class {given.__name__}: make an instance of it"
    raise TypeError(f"The task {name!r} must be {FORMS}. Found {found}.")


def _is_loader(given: Any) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping, torch.nn.Module))


def _check_takes_two(name: str, function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind("model", "split")
    except TypeError as error:
        raise TypeError(
            f"The task {name!r} is a function, which must take (model, split) and return scores; "
            f"{getattr(function, '__name__', function)}{inspect.signature(function)} does not. To measure by a metric "
            f"of predictions and targets, give (val_loader, test_loader, metric)."
        ) from error
    except ValueError:  # a builtin without a signature
        pass


def as_tasks(given: Mapping[str, Any] | None) -> dict[str, L.LightningDataModule] | None:
    """Return the tasks of an option as data modules, by name.

    Raises:
        TypeError: One is none of `FORMS`.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise TypeError(f"Tasks must be given by name, as in {{'toxic': …}}; found a {type(given).__name__}.")
    return {name: as_task(name, task) for name, task in given.items()}
