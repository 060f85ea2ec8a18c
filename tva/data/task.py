"""Base class of all tasks: splits, the held-out part, rows that are kept, limits, and loaders."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from tva.data.loading import check_path, comparison, default_name, expand, load_splits, resolved_revision
from tva.data.streaming import Cut, Stream, make_streams
from tva.data.text_presets import TextPreset, find_text_preset
from tva.errors import some


class Task(L.LightningDataModule, ABC):
    """A task over Hugging Face `datasets`: its splits, a held-out part, rows that are kept, limits and loaders.

    Args:
        path: A data set, as each kind of task says.
        name: Name of the task in log keys and reports; by default the last part of ``path``.
        config: Configuration of a hub data set, such as ``sst2``.
        revision: Revision of a hub data set, so that the data cannot change under you. The commit that was read is in
            a vector's header and in ``edit.json``.
        train_split: Name of the training split.
        val_split: Name of the validation split. By default min(10%, 5,000) examples of the training split are held
            out, which is the paper's rule.
        val_size: Number of training examples to hold out instead, if there is no ``val_split``.
        test_split: Name of the test split.
        where: Keep the rows whose column holds one of the given values, such as
            ``{style: [sketch], label: [cat, dog]}``; or meets a comparison, such as ``{toxicity: "> 0.8"}``.
        batch_size: Examples per batch, on each rank.
        num_workers: Number of processes that make batches; 0 makes them in this process.
        seed: Seed of the held-out part, so that it is the same in every run; also of the training order if the run has
            no seed (``seed_everything``).
        limit_train: Train on at most this many examples, the first of a seeded shuffle, or of a stream.
        limit_val: Validate on at most this many examples, chosen in the same way.
        limit_test: Test on at most this many examples, chosen in the same way.
        group: Column that groups examples, such as by document, speaker, patient or sign: intervals and the gate then
            treat groups, not examples, as independent draws. A held-out part consists of whole groups, until it has
            as many examples as requested.
        streaming: Read from beginning to end without an index, for sets too large for the disk: a hub set, or local
            parquet, arrow, csv or json files. Needs ``val_split`` or ``val_size``, whose examples are then the first of
            the training split, and ``trainer.max_steps``.
    """

    column_options: tuple[str, ...] = ()  # attributes that name columns which the data must have
    folder_format: str | None = None  # how `datasets` reads a folder of files of no known format
    collate: Callable[[list[Any]], Any] | None = None  # puts examples into a batch; by default they are stacked

    def __init__(
        self,
        path: str | dict[str, str],
        name: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        val_size: int | None = None,
        test_split: str = "test",
        where: dict[str, Any] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
        group: str | None = None,
        streaming: bool = False,
    ) -> None:
        super().__init__()
        self._named: TextPreset | None = None
        if isinstance(path, str) and path.startswith("preset:"):
            preset = path.removeprefix("preset:")
            self._named = find_text_preset(preset)
            path, name, config = self._named.hub, name or preset, config or self._named.config
        # Plain attributes rather than save_hyperparameters: LightningCLI can give one data module another's.
        self.path = {split: expand(file) for split, file in path.items()} if isinstance(path, dict) else expand(path)
        self.name = name or default_name(self.path)
        self.config = config
        self.revision = revision
        self.resolved_revision: str | None = None
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.val_size = val_size
        self.where = dict(where or {})
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; {self.name} has {batch_size}.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.limits = {"train": limit_train, "val": limit_val, "test": limit_test}
        self.streaming = streaming
        if group is not None and streaming:
            raise ValueError(f"{self.name}: a stream's groups are not known beforehand. Leave group or streaming out.")
        self.group = group
        self._groups: dict[str, Sequence[Any]] = {}
        self._examples: dict[str, Any] = {}

    @property
    def order_seed(self) -> int:
        """Seed of the order of training: the run's, which Lightning keeps in the environment, else ``seed``."""
        return int(os.environ.get("PL_GLOBAL_SEED", self.seed))

    # --- splits

    def check_files(self) -> None:
        """Check that the data set's local files exist, before any work begins; see `tva.data.loading.check_path`."""
        if not self.streaming:  # files of a stream may be anywhere
            check_path(self.path)

    def _load_splits(self) -> Mapping[str, Any]:
        splits = load_splits(self.path, self.config, self.revision, self.folder_format, self.streaming)
        self.resolved_revision = resolved_revision(splits)
        return splits if self._named is None else self._named.standardize(splits)

    def _tables(self, splits: Mapping[str, Any]) -> dict[str, Any]:
        """Return the table that each part is taken from; without a ``val`` split that of train."""
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
        columns = table.column_names or list(next(iter(table)))  # some streams show them only by their first row
        for option in self.column_options:
            column = getattr(self, option)
            missing = [name for name in ([column] if isinstance(column, str) else column or ()) if name not in columns]
            if missing:
                advice = f"Set {option} to one of them."
                if self.folder_format and option == "label_column" and columns == ["image"]:
                    advice = f"Images of two or more classes are needed, in a folder each: {part}/CLASS/NAME.png."
                raise ValueError(
                    f"{self.name} has no column {missing[0]!r}; its columns are {some(columns, 8)}. {advice}"
                )
        return table

    # --- streams

    def _check_streaming(self, stage: str | None) -> None:
        if self.streaming and stage == "fit" and getattr(self.trainer, "max_steps", None) == -1:
            raise ValueError(f"{self.name}: a stream's length is unknown, so training needs trainer.max_steps. Set it.")

    def _stream_tables(self) -> dict[str, Any]:
        splits = self._load_splits()
        tables = {part: self._split(splits, part) for part, name in self.splits.items() if name is not None}
        self._read_stream_names(tables["train"])
        return {part: self._keep_rows(table) for part, table in tables.items()}

    def _make_streams(
        self, tables: Mapping[str, Any], finish: Callable[[Any], Any], cut: Cut | None = None
    ) -> dict[str, Stream]:
        return make_streams(
            tables,
            finish,
            cut,
            name=self.name,
            limits=self.limits,
            val_size=self.val_size,
            batch_size=self.batch_size,
            order_seed=self.order_seed,
            rank=getattr(self.trainer, "global_rank", 0),
            ranks=getattr(self.trainer, "world_size", 1),
        )

    def _read_stream_names(self, table: Any) -> None:
        """Read what must be known before the first row."""

    def _keep_rows(self, table: Any) -> Any:
        columns = table.column_names or list(next(iter(table)))
        for column, values in self.where.items():
            if column not in columns:
                raise ValueError(f"{self.name}: where names the column {column!r}, not one of {some(columns, 8)}.")
            if (meets := comparison(values)) is not None:
                table = table.filter(meets, input_columns=[column])
                continue
            wanted = set(values) if isinstance(values, (list, tuple, set)) else {values}
            names = self._value_names(table, column) or []
            unknown = [value for value in wanted if names and isinstance(value, str) and value not in names]
            if unknown:
                raise ValueError(f"{self.name}: where asks {column} for {some(unknown)}; it holds {some(names, 12)}.")
            wanted |= {names.index(value) for value in wanted if value in names}
            table = table.filter(lambda value, wanted=wanted: value in wanted, input_columns=[column])
        return table

    def _hold_out(self, rows: dict[str, np.ndarray], groups: Sequence[Any] | None = None) -> None:
        """Hold ``val`` out of ``train``, in place, by the paper's rule, unless it is there.

        Args:
            rows: By part the rows of its table.
            groups: The group of each row of the training table, where a group must be on one side.
        """
        if "val" in rows:
            return
        if len(rows["train"]) < 2:
            raise ValueError(
                f"{self.name}: at least 2 training examples are needed to hold one out for validation, and "
                f"{len(rows['train'])} are there{' where ' + str(self.where) if self.where else ''}."
            )
        count = len(rows["train"])
        num_val = max(1, min(count // 10, 5000)) if self.val_size is None else self.val_size
        if not 0 < num_val < count:
            raise ValueError(f"{self.name}: val_size must be in 1 … {count - 1}; found {num_val}.")
        if groups is None:
            held, kept = self._draw_held_out(count, num_val)
        else:
            held, kept = self._draw_held_out_groups(np.asarray(groups)[rows["train"]], num_val)
        rows["train"], rows["val"] = np.sort(rows["train"][kept]), np.sort(rows["train"][held])

    def _draw_held_out(self, count: int, num_val: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng(self.seed).permutation(count)
        return order[:num_val], order[num_val:]

    def _draw_held_out_groups(self, groups: np.ndarray, num_val: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which training examples are held out, in whole groups until there are enough, and which are kept."""
        names, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        if len(names) < 2:
            raise ValueError(
                f"{self.name}: all training examples are of one group of {self.group!r}, {names[0]!s}, and a group is "
                f"held out as a whole. Set val_split, or name another column."
            )
        order = np.random.default_rng(self.seed).permutation(len(names))
        order = order[np.argsort(2 * sizes[order] > len(groups), kind="stable")]  # more than half is for training
        enough = int(np.searchsorted(sizes[order].cumsum(), num_val)) + 1
        held = np.isin(index, order[: min(enough, len(names) - 1)])
        return np.flatnonzero(held), np.flatnonzero(~held)

    def _limit(self, part: str, rows: np.ndarray, table: Any = None) -> np.ndarray:
        limit = self.limits.get(part)
        if limit is not None and limit < len(rows):
            rows = np.sort(np.random.default_rng(self.seed).permutation(rows)[:limit])
        if not len(rows):
            raise ValueError(f"{self.name}: no {part} example is left where {self.where}.")
        return rows

    def _select(self) -> dict[str, Any]:
        tables = self._tables(self._load_splits())
        rows = self._choose_rows(tables)
        return self._grouped(self._limited(rows, tables))

    def _limited(self, rows: Mapping[str, np.ndarray], tables: Mapping[str, Any]) -> dict[str, Any]:
        return {part: tables[part].select(self._limit(part, indices, tables[part])) for part, indices in rows.items()}

    def _grouped(self, parts: dict[str, Any]) -> dict[str, Any]:
        """Note the groups of the parts that are evaluated, and return the parts."""
        for part in ("val", "test"):
            if part in parts and (labels := self._group_labels(parts[part])) is not None:
                self._groups[part] = labels
        return parts

    def _group_labels(self, table: Any) -> Sequence[Any] | None:
        if self.group is None:
            return None
        if self.group not in table.column_names:
            raise ValueError(
                f"{self.name} has no column {self.group!r}; its columns are {some(table.column_names, 8)}. Set group "
                f"to one of them."
            )
        return [str(value) for value in table[self.group]]

    def example_groups(self, split: str) -> Sequence[Any] | None:
        """Return the group of each example of a split, in order; None where groups are not known.

        Any data module may have this method. Examples of one group are taken to be alike, groups to be independent.
        """
        return self._groups.get(split)

    def _choose_rows(self, tables: dict[str, Any]) -> dict[str, np.ndarray]:
        rows = {part: self._filter(tables[part], self.where) for part in ("train", "test")}
        if self.splits["val"] is not None:
            rows["val"] = self._filter(tables["val"], self.where)
        self._hold_out(rows, self._group_labels(tables["train"]) if self.group is not None else None)
        return rows

    def _filter(self, table: Any, where: Mapping[str, Any]) -> np.ndarray:
        keep = np.ones(len(table), dtype=bool)
        for column, values in where.items():
            if column not in table.column_names:
                raise ValueError(
                    f"{self.name}: where names the column {column!r}, not one of {some(table.column_names, 8)}."
                )
            if (meets := comparison(values)) is not None:
                keep &= np.array([meets(value) for value in table[column]], dtype=bool)
                continue
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
        return getattr((table.features or {}).get(column), "names", None)

    # --- what is trained on

    @property
    def drawn(self) -> dict[str, Any]:
        """How the training examples are drawn, so that an edit notices where the fit drew them otherwise."""
        split = {"train_split": self.splits["train"], "val_split": self.splits["val"]}
        drawn = {**split, "val_size": self.val_size, "seed": self.seed, "limit_train": self.limits["train"]}
        return {**drawn, "revision": self.resolved_revision} if self.resolved_revision else drawn

    def training_sample(self, most: int) -> tuple[int, Iterator[Any]] | None:
        """Return how many examples are trained on, and batches of a random sample of them as evaluation reads them.

        Any data module may have this method, from which `tva.callbacks.TaskVectorCallback` writes into a vector's file
        which examples it was trained on.

        Args:
            most: Examples in the sample, at most.

        Returns:
            None where it is not known: of a stream, and before ``setup``.
        """
        examples = self._examples.get("train")
        if examples is None or isinstance(examples, Stream):
            return None
        rows = np.sort(np.random.default_rng(0).permutation(len(examples))[:most])
        collate = self.collate or default_collate
        starts = range(0, len(rows), self.batch_size)
        return len(examples), (
            collate([examples[int(row)] for row in rows[start : start + self.batch_size]]) for start in starts
        )

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
        streamed = isinstance(examples, Stream)
        if (
            shuffle and not streamed
        ):  # the same order, and a new one each epoch, on any number of ranks; Lightning counts the epochs
            ranks, rank = getattr(self.trainer, "world_size", 1), getattr(self.trainer, "global_rank", 0)
            sampler = DistributedSampler(examples, num_replicas=ranks, rank=rank, seed=self.order_seed)
        loader = DataLoader(
            examples,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
        if streamed and shuffle:
            loader.sampler.set_epoch = examples.set_epoch  # Lightning tells samplers the epoch, and no data set
        return loader
