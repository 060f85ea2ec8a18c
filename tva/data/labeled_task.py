"""Base class of tasks with one class per example: names of classes and labels."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tva.data.task import Task
from tva.errors import some


class LabeledTask(Task):
    """A task whose examples have one class each.

    Args:
        path: A data set; see the subclass.
        shots: Train on this many examples of each class that ``where`` keeps, the first of a seeded shuffle, so that
            those of fewer shots are among those of more.
        **options: Options of `tva.data.task.Task`.

    Raises:
        ValueError: ``shots`` is below 1 or goes with a stream, or a class has fewer examples.

    Attributes:
        label_column: Column of class indices or class names.
        class_names: Names in the order of the labels; the data set's own once it is read.
    """

    label_column: str
    class_names: list[str]
    _own_names: Sequence[str] = ()  # the data's, where they are some of class_names

    def __init__(self, path: str | dict[str, str], shots: int | None = None, **options: Any) -> None:
        super().__init__(path, **options)
        if shots is not None and (shots < 1 or self.streaming):
            raise ValueError(
                f"{self.name}: shots, the examples of a class to train on, must be at least 1 and no stream's; found "
                f"{shots}{' with streaming' if self.streaming else ''}. Leave it out, or use limit_train."
            )
        self.shots = shots

    @property
    def drawn(self) -> dict[str, Any]:
        return super().drawn | ({} if self.shots is None else {"shots": self.shots})

    def _limit(self, part: str, rows: np.ndarray, table: Any = None) -> np.ndarray:
        if part == "train" and self.shots is not None and len(rows):
            rows = self._few_of_each(rows, table, self.shots)
        return super()._limit(part, rows, table)

    def _few_of_each(self, rows: np.ndarray, table: Any, shots: int) -> np.ndarray:
        shuffled = np.random.default_rng(self.seed).permutation(rows)
        labels = self._read_labels(table.select(shuffled)).numpy()
        by_class = {label: shuffled[labels == label][:shots] for label in np.unique(labels)}
        short = [f"{self.class_names[label]} {len(found)}" for label, found in by_class.items() if len(found) < shots]
        if short:
            raise ValueError(
                f"{self.name}: each class must have {shots} training examples (shots); there are of {some(short)}."
            )
        return np.sort(np.concatenate(list(by_class.values())))

    def _value_names(self, table: Any, column: str) -> list[str] | None:
        if column == self.label_column:
            return list(self._own_names) or self.class_names
        return super()._value_names(table, column)

    def _tables(self, splits: Mapping[str, Any]) -> dict[str, Any]:
        tables = super()._tables(splits)
        self.class_names = self._read_class_names(tables["train"])
        return tables

    def _read_class_names(self, table: Any) -> list[str]:
        own = list(getattr(table.features[self.label_column], "names", None) or [])
        labels = list(table[self.label_column])
        if not own and isinstance(labels[0], str):
            own = sorted(set(labels))
        if not self.class_names:
            return self._default_class_names(own, labels)
        if own and len(own) < len(self.class_names) and set(own) <= set(self.class_names):
            self._own_names = own  # a head of more classes than the data have
            return self.class_names
        required = len(own) or max(labels) + 1
        if len(self.class_names) != required:
            raise ValueError(self._miscounted(required))
        return self.class_names

    def _default_class_names(self, own: list[str], labels: Sequence[Any]) -> list[str]:
        if not own:
            raise ValueError(
                f"{self.name} does not name its classes; pass class_names, {max(labels) + 1} names in the order of the "
                f"labels in {self.label_column!r}."
            )
        return own

    def _read_stream_names(self, table: Any) -> None:
        own = list(getattr((table.features or {}).get(self.label_column), "names", None) or [])
        if not self.class_names:
            self.class_names = self._stream_class_names(own)
        elif own and len(own) != len(self.class_names):
            raise ValueError(self._miscounted(len(own)))

    def _stream_class_names(self, own: list[str]) -> list[str]:
        if not own:
            raise ValueError(
                f"{self.name}: streamed labels in {self.label_column!r} have no class names; pass class_names."
            )
        return own

    def label_reader(self) -> Callable[[int | str], int]:
        """Return the function from a label of one row to its class index; it goes to worker processes."""
        return functools.partial(class_index, self.name, list(self.class_names))

    def _miscounted(self, required: int) -> str:
        return (
            f"{self.name} has {required} classes, but class_names has {len(self.class_names)}: "
            f"{some(self.class_names)}. Give one name for each class, in the order of the labels."
        )

    def _read_labels(self, table: Any) -> Tensor:
        labels = list(table[self.label_column])
        if self._own_names and not isinstance(labels[0], str):
            labels = [self._own_names[label] for label in labels]
        if isinstance(labels[0], str):
            index = {name: position for position, name in enumerate(self.class_names)}
            unknown = sorted(set(labels) - index.keys())
            if unknown:
                raise ValueError(
                    f"{self.name}: labels {some(unknown)} are not in class_names {some(self.class_names, 8)}."
                )
            labels = [index[label] for label in labels]
        labels = torch.as_tensor(labels, dtype=torch.int64)
        if labels.min() < 0 or labels.max() >= len(self.class_names):
            raise ValueError(
                f"{self.name}: labels must be in 0 … {len(self.class_names) - 1} but reach from {int(labels.min())} "
                f"to {int(labels.max())}. Give one class name for each class."
            )
        return labels


def class_index(task: str, class_names: Sequence[str], label: int | str) -> int:
    """Return the class index of one label.

    Raises:
        ValueError: No class has it.
    """
    if isinstance(label, str):
        if label not in class_names:
            raise ValueError(f"{task}: label {label!r} is not in class_names {some(class_names, 8)}.")
        return class_names.index(label)
    if not 0 <= label < len(class_names):
        raise ValueError(
            f"{task}: labels must be in 0 … {len(class_names) - 1}; found {label}. Give one class name for each class."
        )
    return int(label)
