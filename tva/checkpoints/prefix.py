"""Part of a tensor's rows, or a second copy of a tensor, as a tensor of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from tva._torch import Tensor
from tva.checkpoints.lazy import Described, Entry, Wrapped
from tva.checkpoints.spec import Spec


@dataclass(frozen=True)
class Prefix(Described, Wrapped):
    """The first elements of another tensor, or all of them, as a tensor of its own.

    Args:
        entry: The other tensor.
        header: Dtype, which is the other's, and shape.
        copied: It counts as another place in memory than the other: where both are named, both are stored.
    """

    entry: Entry
    header: Spec
    copied: bool = False

    @property
    def spec(self) -> Spec:
        return self.header

    @property
    def stored_bytes(self) -> int:
        return self.header.num_bytes

    @property
    def location(self) -> object:
        place = self.entry.location
        return None if self.copied or place is None else (place, self.header)

    def will_need(self, start: int, stop: int) -> None:
        self.entry.will_need(start, stop)

    def slice(self, start: int, stop: int) -> Tensor:
        return self.entry.slice(start, stop)

    def read_into(self, out: numpy.ndarray, start: int) -> None:
        self.entry.read_into(out, start)
