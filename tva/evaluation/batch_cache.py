"""Batches that are read and decoded once: in memory, on the device or memory-mapped from disk, within a budget."""

import contextlib
import copy
import functools
import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

Place = Literal["memory", "device", "disk"]


class BatchCache:
    """Batches kept for later passes over the same data.

    Args:
        max_bytes: Maximum size of the cache in bytes; further batches are read again at each pass.
        place: Keep them in ``"memory"``, on the ``"device"`` that evaluates, or memory-mapped on ``"disk"``, in a
            temporary folder.

    Attributes:
        num_read: Batches that were read and decoded so far, those read twice counted twice.
        batch_sizes: By data module and split the size of a batch, where examples have an order.
    """

    def __init__(self, max_bytes: int, place: Place = "memory") -> None:
        self.place = place
        self.bytes_left = max_bytes
        self.num_read = 0
        self.batch_sizes: dict[Any, int] = {}
        self._kept: dict[Any, Any] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="tva-batches-")) if place == "disk" else None
        if self._folder is not None:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __contains__(self, key: Any) -> bool:
        return key in self._kept

    def num_batches(self, datamodule: L.LightningDataModule, split: str, num_examples: int) -> int:
        """Return the number of batches of a task's examples; 1 if it has not been read, or has no order."""
        size = self.batch_sizes.get((id(datamodule), split))
        return 1 if size is None else -(-num_examples // size)

    def get(self, key: Any) -> Any:
        """Return a kept batch; the caller may change the batch, but not its tensors."""
        batch = self._kept[key]
        return torch.load(batch, mmap=True, weights_only=True) if isinstance(batch, Path) else shallow_copy(batch)

    def put(self, key: Any, batch: Any, device: torch.device) -> Any:
        """Keep a batch if there is room; give it back, on the device if that is where it is kept."""
        self.num_read += 1
        if self.place == "device":
            batch = apply_to_collection(batch, Tensor, lambda tensor: tensor.to(device))
        size = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.nbytes
            return tensor

        apply_to_collection(batch, Tensor, count)
        if size > self.bytes_left:
            return batch
        self.bytes_left -= size
        if self._folder is None:
            self._kept[key] = batch
        else:
            self._kept[key] = self._folder / f"{len(self._kept)}.pt"
            torch.save(batch, self._kept[key])
        return shallow_copy(batch)


def shallow_copy(batch: Any) -> Any:
    """Copy a batch's containers, not its tensors, so that a step may remove entries."""
    return copy.copy(batch) if isinstance(batch, (dict, list)) else batch


def example_order(num_examples: int, seed: int | None) -> Tensor:
    """Return the order in which examples are read: the data set's own without a seed.

    Nested subsets are the beginnings of one order, so that scores on a small subset are part of those on a larger one.

    Example:
        >>> example_order(4, None).tolist(), sorted(example_order(4, 7).tolist())
        ([0, 1, 2, 3], [0, 1, 2, 3])
    """
    if seed is None:
        return torch.arange(num_examples)
    return torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))


@dataclass
class Turns:
    """The batches that one of several processes evaluates in a pass.

    Attributes:
        even: Whether all must take equally many, as where the model's parts are gathered for each batch; then the last
            one is taken once more where another process has one more, and is not counted.
        num_own: How many batches count; None where all do.
    """

    even: bool = False
    num_own: int | None = None


class _Batches:
    """Replaces a loader: yields its batches, or those of a part of an order, through a cache.

    Of several processes each takes the batches whose number leaves its rank over; none is taken twice, which
    Lightning's own sampler does to make their numbers even.
    """

    def __init__(
        self,
        loader: DataLoader,
        cache: BatchCache,
        key: tuple[Any, ...],
        device: torch.device,
        part: tuple[int, int] | None,
        seed: int | None,
        rank: int,
        num_ranks: int,
        turns: Turns,
    ) -> None:
        self.loader, self.cache, self.key, self.device = loader, cache, key, device
        count = len(loader.dataset)
        if loader.drop_last:
            count -= count % loader.batch_size
        start, stop = part or (0, count)
        order, size = example_order(count, seed), loader.batch_size
        cache.batch_sizes[key] = size
        starts = list(range(start, stop, size))
        if len(starts) < num_ranks:  # smaller batches, so that no process is left without one
            if stop - start < num_ranks:
                raise ValueError(
                    f"Each process must have an example, but {num_ranks} processes have {stop - start}. Use fewer "
                    f"devices."
                )
            starts = [start + (stop - start) * number // num_ranks for number in range(num_ranks)]
        windows = list(itertools.pairwise([*starts, stop]))[rank::num_ranks]
        if turns.even:
            turns.num_own = len(windows)
            windows += windows[-1:] * (-(-len(starts) // num_ranks) - len(windows))
        self.rows = [order[first:last].tolist() for first, last in windows]
        self.keys = [(*key, seed, *window) for window in windows]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        missing = [rows for key, rows in zip(self.keys, self.rows, strict=True) if key not in self.cache]
        fresh = iter(_reload(self.loader, missing)) if missing else iter(())
        for key in self.keys:
            yield self.cache.get(key) if key in self.cache else self.cache.put(key, next(fresh), self.device)


def _reload(loader: DataLoader, rows: list[list[int]]) -> DataLoader:
    workers = {}
    if loader.num_workers:
        workers = {"prefetch_factor": loader.prefetch_factor, "multiprocessing_context": loader.multiprocessing_context}
    return DataLoader(
        loader.dataset,
        batch_sampler=rows,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        **workers,
    )


@contextlib.contextmanager
def through_cache(
    datamodule: L.LightningDataModule,
    split: str,
    cache: BatchCache | None,
    device: torch.device,
    part: tuple[tuple[int, int], int | None] | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    turns: Turns | None = None,
) -> Iterator[None]:
    """Replace a data module's loader of one split by one that reads through a cache, or only a part of the examples.

    Args:
        datamodule: Restored afterwards.
        split: ``"val"`` or ``"test"``.
        cache: None reads again.
        device: Where batches are evaluated.
        part: (first, last + 1) examples of the order that a seed gives, and the seed; all in the data set's order
            without it.
        rank: Which of the processes that share the batches this one is.
        num_ranks: How many there are.
        turns: Receives the batches that count for this process.

    Raises:
        ValueError: The loader shuffles, or a part, or a process's share, is asked of data without an order.
    """
    name = f"{split}_dataloader"
    make = getattr(datamodule, name)

    @functools.wraps(make)
    def wrapped() -> Any:
        loader = make()
        indexed = (
            isinstance(loader, DataLoader)
            and isinstance(loader.sampler, SequentialSampler)
            and not isinstance(loader.dataset, IterableDataset)
            and loader.batch_size is not None
        )
        if isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler):
            raise ValueError(
                f"{type(datamodule).__name__}.{name} shuffles, but models are compared on the same examples in the "
                f"same order. Set shuffle=False."
            )
        if not indexed and (part is not None or num_ranks > 1):
            advice = "Use the Grid." if num_ranks == 1 else "Use a Trainer with devices=1."
            raise ValueError(
                f"{type(datamodule).__name__}.{name} must give one DataLoader over a map-style data set in its own "
                f"order, so that a part of its examples can be taken; found {type(loader).__name__}. {advice}"
            )
        if not indexed or (cache is None and part is None and num_ranks == 1):
            return loader
        window, seed = part if part is not None else (None, None)
        key = (id(datamodule), split)
        return _Batches(loader, cache or BatchCache(0), key, device, window, seed, rank, num_ranks, turns or Turns())

    before = datamodule.__dict__.get(name)
    setattr(datamodule, name, wrapped)
    try:
        yield
    finally:
        if before is None:
            delattr(datamodule, name)
        else:
            setattr(datamodule, name, before)
