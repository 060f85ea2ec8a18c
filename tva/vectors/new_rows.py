"""Rows that a fine-tuned model has and its base has not: embeddings and output layers of a grown vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from tva._torch import Tensor, torch
from tva.checkpoints import Elements, Entry, LazyWeights, Spec
from tva.checkpoints.prefix import Prefix

NewRows = Literal["error", "keep", "zero", "drop"]
CHOICES = (
    "Only their numbers of rows differ, {} and {}, as where a vocabulary has grown. Choose by --new_rows what the "
    "output gets: keep (the new rows as the fine-tuned model has them, of several their mean), zero (rows of zeros), "
    "or drop (only the base's rows); the default is error. Or leave these tensors out by exclude."
)


def grown(weights: LazyWeights, base: LazyWeights) -> dict[str, tuple[int, int]]:
    """Return the tensors of which a checkpoint has more rows than its base, and both numbers of rows.

    They must have grown alike, as embeddings and output layer do; otherwise, and where anything else differs, none is.
    """
    found = {}
    for name in weights:
        if name in base and (sizes := (base.spec(name).sizes, weights.spec(name).sizes)) and sizes[0] != sizes[1]:
            if not all(sizes) or sizes[0][1:] != sizes[1][1:] or len(sizes[0]) != len(sizes[1]):
                return {}
            found[name] = (sizes[0][0], sizes[1][0])
    alike = len(set(found.values())) == 1 and all(old < new for old, new in found.values())
    return found if alike else {}


class MoreRows:
    """Rows behind the base's, in which several checkpoints may have a part.

    Args:
        base: The base's tensor.
        entries: The checkpoints' whole tensors, of which each has more rows.
        dtype: Of the output.
        zero: All new elements are 0; otherwise they are what the checkpoint has, or the mean of those that have them.
    """

    def __init__(self, base: Spec, entries: Sequence[Entry], dtype: str, zero: bool) -> None:
        self._entries, self._zero = entries, zero
        self._start = base.numel()
        rows = max(entry.spec.sizes[0] for entry in entries)
        self.spec = Spec(dtype, (rows, *base.sizes[1:]))

    def chunks(self, length: int) -> Iterator[tuple[int, Elements]]:
        """Yield where in the flattened output a chunk begins, and its elements."""
        for start in range(self._start, self.spec.numel(), length):
            stop = min(start + length, self.spec.numel())
            yield start, Elements.of(self._read(start, stop).to(self.spec.dtype))

    def _read(self, start: int, stop: int) -> Tensor:
        total = torch.zeros(stop - start, dtype=torch.float64)
        if self._zero:
            return total
        count = torch.zeros(stop - start, dtype=torch.float64)
        for entry in self._entries:
            there = min(stop, entry.spec.numel()) - start
            if there > 0:
                values = entry.slice(start, start + there)
                if len(self._entries) == 1:
                    return values
                total[:there] += values
                count[:there] += 1
        return total / count


def cut(weights: LazyWeights, base: LazyWeights) -> tuple[LazyWeights, dict[str, Entry]]:
    """Return a checkpoint with only those rows that the base has too, and its whole tensors that had more, by name."""
    names = grown(weights, base)
    if not names:
        return weights, {}
    entries, whole = {}, {}
    for name in weights:
        entries[name] = entry = weights.entry(name)
        if name in names:
            whole[name] = entry
            entries[name] = Prefix(entry, Spec(entry.spec.dtype_name, base.spec(name).sizes))
    return LazyWeights(weights.info, entries, weights.metadata), whole
