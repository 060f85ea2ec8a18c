"""What all tasks share: splits, the held-out part, rows that are kept, limits, labels, and loaders."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from tva.data.sources import default_name, expand, load_splits
from tva.state_dict import some


class Task(L.LightningDataModule, ABC):
    """A task over Hugging Face `datasets`: its splits, a held-out part, rows that are kept, limits and loaders.

    Args:
        path: As for `ImageTask`.
        name: Name in log keys and reports; by default the last part of ``path``.
        config: Configuration of a hub data set.
        revision: Revision of a hub data set.
        splits: Names of the splits ``train``, ``val`` (None: a part of train is held out) and ``test``.
        val_size: Hold out so many training examples, where there is no ``val`` split.
        where: Keep the rows whose column holds one of the given values.
        batch_size: Examples a batch.
        num_workers: Processes that load.
        seed: Of the held-out part and of limits.
        limits: Examples of ``train``, ``val`` and ``test`` at most, the first of a seeded shuffle.
    """

    column_options: tuple[str, ...] = ()  # attributes that name columns which the data must have
    folder_format: str | None = None  # how `datasets` reads a folder of files of no known format
    collate: Callable[[list[Any]], Any] | None = None  # puts examples into a batch; by default they are stacked

    def __init__(
        self,
        path: str | dict[str, str],
        name: str | None,
        config: str | None,
        revision: str | None,
        splits: Mapping[str, str | None],
        val_size: int | None,
        where: Mapping[str, Any] | None,
        batch_size: int,
        num_workers: int,
        seed: int,
        limits: Mapping[str, int | None],
    ) -> None:
        super().__init__()
        # Plain attributes rather than save_hyperparameters: LightningCLI can give one data module another's.
        self.path = {split: expand(file) for split, file in path.items()} if isinstance(path, dict) else expand(path)
        self.name = name or default_name(self.path)
        self.config = config
        self.revision = revision
        self.splits = dict(splits)
        self.val_size = val_size
        self.where = dict(where or {})
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.limits = dict(limits)
        self._examples: dict[str, Any] = {}

    @property
    def order_seed(self) -> int:
        """Seed of the order of training: the run's, which Lightning keeps in the environment, else ``seed``."""
        return int(os.environ.get("PL_GLOBAL_SEED", self.seed))

    # --- splits

    def _load_splits(self) -> Mapping[str, Any]:
        return load_splits(self.path, self.config, self.revision, self.folder_format)

    def _tables(self, splits: Mapping[str, Any]) -> dict[str, Any]:
        """Give the table that each part is taken from; without a ``val`` split that of train."""
        tables = {part: self._split(splits, part) for part in ("train", "test")}
        val = tables["train"] if self.splits["val"] is None else self._split(splits, "val")
        return {"train": tables["train"], "val": val, "test": tables["test"]}

    def _split(self, splits: Mapping[str, Any], part: str) -> Any:
        name = self.splits[part]
        if name not in splits:
            raise ValueError(
                f"{self.name} has no split {name!r}; its splits are {some(splits, 8)}. Set {part}_split to one of them."
            )
        table = splits[name]
        for option in self.column_options:
            column = getattr(self, option)
            if column is not None and column not in table.column_names:
                raise ValueError(
                    f"{self.name} has no column {column!r}; its columns are {some(table.column_names, 8)}. Set "
                    f"{option} to one of them."
                )
        return table

    def _hold_out(self, rows: dict[str, np.ndarray]) -> None:
        """Take ``val`` out of ``train``, in place, by the paper's rule, unless it is there."""
        if "val" in rows:
            return
        if len(rows["train"]) < 2:
            raise ValueError(
                f"{self.name}: at least 2 training examples are needed to hold one out for validation, and "
                f"{len(rows['train'])} are there{' where ' + str(self.where) if self.where else ''}."
            )
        order = np.random.default_rng(self.seed).permutation(rows["train"])
        num_val = max(1, min(len(order) // 10, 5000)) if self.val_size is None else self.val_size
        if not 0 < num_val < len(order):
            raise ValueError(f"{self.name}: val_size must lie in 1 … {len(order) - 1}; found {num_val}.")
        rows["train"], rows["val"] = np.sort(order[num_val:]), np.sort(order[:num_val])

    def _limit(self, part: str, rows: np.ndarray) -> np.ndarray:
        """Keep the first of a seeded shuffle, in the data's order."""
        limit = self.limits.get(part)
        if limit is not None and limit < len(rows):
            rows = np.sort(np.random.default_rng(self.seed).permutation(rows)[:limit])
        if not len(rows):
            raise ValueError(f"{self.name}: no {part} example is left where {self.where}.")
        return rows

    def _select(self) -> dict[str, Any]:
        """Give the rows of each part as a table."""
        tables = self._tables(self._load_splits())
        rows = self._choose_rows(tables)
        return {part: tables[part].select(self._limit(part, indices)) for part, indices in rows.items()}

    def _choose_rows(self, tables: dict[str, Any]) -> dict[str, np.ndarray]:
        rows = {part: self._filter(tables[part], self.where) for part in ("train", "test")}
        if self.splits["val"] is not None:
            rows["val"] = self._filter(tables["val"], self.where)
        self._hold_out(rows)
        return rows

    def _filter(self, table: Any, where: Mapping[str, Any]) -> np.ndarray:
        keep = np.ones(len(table), dtype=bool)
        for column, values in where.items():
            if column not in table.column_names:
                raise ValueError(
                    f"{self.name}: where names the column {column!r}, not one of {some(table.column_names, 8)}."
                )
            wanted = list(values) if isinstance(values, (list, tuple, set)) else [values]
            names = self._value_names(table, column)
            found = np.asarray(list(table[column]))
            if names and found.dtype.kind in "iu":
                unknown = [value for value in wanted if isinstance(value, str) and value not in names]
                wanted = [names.index(value) if value in names else value for value in wanted]
            else:
                unknown = [value for value in wanted if value not in found]
            if unknown:
                known = names or sorted({str(value) for value in found.tolist()})
                raise ValueError(f"{self.name}: where asks {column} for {some(unknown)}; it holds {some(known, 12)}.")
            keep &= np.isin(found, wanted)
        return np.flatnonzero(keep)

    def _value_names(self, table: Any, column: str) -> list[str] | None:
        """Name the values of a column of class indices."""
        return getattr(table.features[column], "names", None)

    # --- loaders

    @abstractmethod
    def setup(self, stage: str | None = None) -> None: ...

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def prototype_dataloader(self) -> DataLoader:
        """Training examples for heads that are made of examples, in order."""
        return self._loader("prototype" if "prototype" in self._examples else "train")

    def _loader(self, part: str, shuffle: bool = False) -> DataLoader:
        examples, sampler = self._examples[part], None
        if shuffle:  # the same order, and a new one each epoch, on any number of ranks; Lightning counts the epochs
            ranks, rank = getattr(self.trainer, "world_size", 1), getattr(self.trainer, "global_rank", 0)
            sampler = DistributedSampler(examples, num_replicas=ranks, rank=rank, seed=self.order_seed)
        return DataLoader(
            examples,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class LabeledTask(Task):
    """A task whose examples have one class each.

    Attributes:
        label_column: Column of class indices or class names.
        class_names: Names in the order of the labels; the data set's own once it is read.
    """

    label_column: str
    class_names: list[str]

    def _value_names(self, table: Any, column: str) -> list[str] | None:
        return self.class_names if column == self.label_column else super()._value_names(table, column)

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
        required = len(own) or max(labels) + 1
        if len(self.class_names) != required:
            raise ValueError(
                f"{self.name} has {required} classes, but class_names has {len(self.class_names)}: "
                f"{some(self.class_names)}. Give one name for each class, in the order of the labels."
            )
        return self.class_names

    def _default_class_names(self, own: list[str], labels: Sequence[Any]) -> list[str]:
        """Give the names where none were passed."""
        if not own:
            raise ValueError(
                f"{self.name} does not name its classes; pass class_names, {max(labels) + 1} names in the order of the "
                f"labels in {self.label_column!r}."
            )
        return own

    def _read_labels(self, table: Any) -> Tensor:
        labels = list(table[self.label_column])
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
                f"{self.name}: labels must lie in 0 … {len(self.class_names) - 1} but reach from {int(labels.min())} "
                f"to {int(labels.max())}. Give one class name for each class."
            )
        return labels
