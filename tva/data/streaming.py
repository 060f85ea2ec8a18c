"""Examples read from beginning to end, for sets too large for this disk."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import fsspec.asyn
from torch.utils.data import IterableDataset, get_worker_info

BUFFER = 10_000  # rows among which the order is shuffled
READ = 100  # rows that are read at once

Cut = Callable[[Iterable[Mapping[str, Any]], int], Iterator[Any]]  # from rows, of which this many are taken at once


class Stream(IterableDataset):
    """Examples of one part. Every rank and worker reads all rows, and makes examples only of its share of them.

    So the batches are the same with any number of workers, and in each step n ranks take what one process with n times
    the batch takes; no rank gets more batches to train on than another, which would then wait for it for ever.

    Args:
        table: A `datasets.IterableDataset`, not shared out.
        finish: Makes an example of a row, or of an item.
        cut: Makes items of rows, where a row is not an example.
        limit: Items at most.
        batch_size: Items a batch on each rank.
        rank: This rank.
        ranks: Their number.
        even: Leave out the last items that are too few for all ranks.
    """

    def __init__(
        self,
        table: Any,
        finish: Callable[[Any], Any],
        cut: Cut | None = None,
        limit: int | None = None,
        batch_size: int = 1,
        rank: int = 0,
        ranks: int = 1,
        even: bool = False,
    ) -> None:
        self.table = table
        self.finish = finish
        self.cut = cut
        self.limit = limit
        self.batch_size = batch_size
        self.rank = rank
        self.ranks = ranks
        self.even = even

    def set_epoch(self, epoch: int) -> None:
        """Shuffle the next pass as that epoch's; to be called where the loader is, not in its workers."""
        self.table.set_epoch(epoch)  # in memory that the workers share: if each of them set it, they would race

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            fsspec.asyn.reset_lock()  # a forked process that reads from a network would wait for one of its parent's
        mine: list[Any] = []  # at most one item, until all ranks have theirs
        rows = read(self.table)
        for position, item in enumerate(islice(rows if self.cut is None else self.cut(rows, READ), self.limit)):
            step = position // (self.ranks * self.batch_size)
            if step % workers == number and position % self.ranks == self.rank:
                mine.append(item)
            if mine and (not self.even or position % self.ranks == self.ranks - 1):
                yield self.finish(mine.pop())


def read(table: Any) -> Iterator[dict[str, Any]]:
    """Return the rows of a `datasets.IterableDataset`, all of them in a worker too, which iterating would share out."""
    for rows in table.iter(batch_size=READ):
        yield from (dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True))


def make_streams(
    tables: Mapping[str, Any],
    finish: Callable[[Any], Any],
    cut: Cut | None = None,
    *,
    name: str,
    limits: Mapping[str, int | None],
    val_size: int | None,
    batch_size: int,
    order_seed: int,
    rank: int = 0,
    ranks: int = 1,
) -> dict[str, Stream]:
    """Make the parts of a task of streamed tables.

    Args:
        tables: ``train``, ``test`` and, unless it is to be held out, ``val``.
        finish: As for `Stream`.
        cut: As for `Stream`.
        name: The task's, for messages.
        limits: Items at most of each part.
        val_size: Items of the training split to hold out where ``tables`` has no ``val``.
        batch_size: Items a batch on each rank.
        order_seed: Seed of the training order.
        rank: This rank.
        ranks: Their number.

    Returns:
        The three parts, and ``prototype``: all of train in order, on every rank.

    Raises:
        ValueError: It is not said how many examples to hold out, or there are fewer.
    """
    tables, limits = dict(tables), dict(limits)
    if "val" not in tables:
        if val_size is None:
            raise ValueError(
                f"{name}: a stream's length is unknown, so no tenth can be held out. Set val_split, or val_size, "
                f"the number of examples from the beginning."
            )
        held = _rows_of(name, tables["train"], val_size, cut)
        tables["train"], tables["val"] = tables["train"].skip(held), tables["train"].take(held)
        limits["val"] = min(val_size, limits.get("val") or val_size)
    streams = {"prototype": Stream(tables["train"], finish, cut, limits.get("train"))}
    for part, table in tables.items():
        train = part == "train"
        table = table.shuffle(seed=order_seed, buffer_size=BUFFER) if train else table
        streams[part] = Stream(table, finish, cut, limits.get(part), batch_size, rank, ranks, even=train)
    return streams


def _rows_of(name: str, table: Any, wanted: int, cut: Cut | None) -> int:
    """Count the rows from the beginning that make up a number of items."""
    if cut is None:
        return wanted
    count = 0

    def counted() -> Iterator[Mapping[str, Any]]:
        nonlocal count
        for row in read(table):
            count += 1
            yield row

    found = sum(1 for _ in islice(cut(counted(), 1), wanted))
    if found < wanted:
        raise ValueError(f"{name}: {wanted} examples are to be held out, and the training split has {found}.")
    return count
