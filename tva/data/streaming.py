"""Labeled images read from beginning to end, for sets too large for this disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from tva.state_dict import some

if TYPE_CHECKING:
    from tva.data.image_task import ImageTask

BUFFER = 10_000  # examples among which the order is shuffled


class Stream(IterableDataset):
    """Examples of one part, in the order of the files or shuffled within a buffer.

    Args:
        table: A `datasets.IterableDataset` of this rank's rows.
        task: Says which columns, and what the classes are.
        transform: From a PIL image to a tensor.
    """

    def __init__(self, table: Any, task: ImageTask, transform: Callable[[Any], Tensor]) -> None:
        self.table = table
        self.columns = task.image_column, task.label_column
        self.class_names = list(task.class_names)
        self.name = task.name
        self.set_transform(transform)

    def set_transform(self, transform: Callable[[Any], Tensor]) -> None:
        """Change the transform."""
        self.transform = transform

    def set_epoch(self, epoch: int) -> None:
        """Shuffle the next pass as that epoch's; to be called where the loader is, not in its workers."""
        self.table.set_epoch(epoch)  # in memory that the workers share: if each of them set it, they would race

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        image_column, label_column = self.columns
        for row in self.table:
            yield self.transform(row[image_column].convert("RGB")), torch.tensor(self._label(row[label_column]))

    def _label(self, label: Any) -> int:
        if isinstance(label, str):
            if label not in self.class_names:
                raise ValueError(f"{self.name}: label {label!r} is not in class_names {some(self.class_names, 8)}.")
            return self.class_names.index(label)
        if not 0 <= label < len(self.class_names):
            raise ValueError(
                f"{self.name}: labels must lie in 0 … {len(self.class_names) - 1}; found {label}. Give one class name "
                f"for each class."
            )
        return int(label)


def make_streams(task: ImageTask, splits: Mapping[str, Any], transform: Callable[[Any], Tensor]) -> dict[str, Stream]:
    """Make the parts of a task of streamed splits.

    Args:
        task: Where ``class_names`` is empty, it is filled in.
        splits: Split names to `datasets.IterableDataset`.
        transform: From a PIL image to a tensor.

    Raises:
        ValueError: A split or column is missing, classes have no names, or it is not said what to validate on.
    """
    if task.prototype_where is not None:
        raise ValueError(f"{task.name}: prototype_where picks rows by number, which a stream has not. Leave one out.")
    train = _rows(task, splits, "train")
    names = getattr((train.features or {}).get(task.label_column), "names", None) or []
    if not task.class_names:
        if task.preset is None and not names:
            raise ValueError(
                f"{task.name}: streamed labels in {task.label_column!r} have no class names; pass class_names."
            )
        task.class_names = task.preset.name_classes(names, task.name) if task.preset else list(names)
    parts = {"train": train, "test": _rows(task, splits, "test")}
    if task.splits["val"] is not None:
        parts["val"] = _rows(task, splits, "val")
    elif task.val_size is None:
        raise ValueError(
            f"{task.name}: a stream's length is unknown, so no tenth can be held out. Set val_split, or val_size, so "
            f"many examples from the beginning."
        )
    else:
        parts["train"], parts["val"] = train.skip(task.val_size), train.take(task.val_size)
    from datasets.distributed import split_dataset_by_node

    rank, ranks = getattr(task.trainer, "global_rank", 0), getattr(task.trainer, "world_size", 1)
    streams = {}
    for part, table in parts.items():
        if task.limits.get(part) is not None:
            table = table.take(task.limits[part])
        if part == "train":
            table = table.shuffle(seed=task.order_seed, buffer_size=BUFFER)
        if ranks > 1:
            table = split_dataset_by_node(table, rank, ranks)
        streams[part] = Stream(table, task, transform)
    return streams


def _rows(task: ImageTask, splits: Mapping[str, Any], part: str) -> Any:
    name = task.splits[part]
    if name not in splits:
        raise ValueError(
            f"{task.name} has no split {name!r}; its splits are {some(splits, 8)}. Set {part}_split to one of them."
        )
    table = splits[name]
    columns = table.column_names or list(next(iter(table)))
    for column in (task.image_column, task.label_column, *task.where):
        if column not in columns:
            raise ValueError(f"{task.name} has no column {column!r}; its columns are {some(columns, 8)}.")
    for column, values in task.where.items():
        wanted = set(values) if isinstance(values, (list, tuple, set)) else {values}
        names = getattr((table.features or {}).get(column), "names", None) or []
        unknown = [value for value in wanted if names and isinstance(value, str) and value not in names]
        if unknown:
            raise ValueError(f"{task.name}: where asks {column} for {some(unknown)}; it holds {some(names, 12)}.")
        wanted |= {names.index(value) for value in wanted if value in names}
        table = table.filter(lambda value, wanted=wanted: value in wanted, input_columns=[column])
    return table
