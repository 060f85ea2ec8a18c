"""A parameter that is split over ranks by stretches of its elements, and what stands for it in a state dict."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

Layout = list[tuple[int, torch.Size]]


@dataclass(frozen=True)
class Partition:
    """How one parameter is split over the ranks.

    Attributes:
        layout: Each rank with the size of its stretch of the flattened parameter, in order; None where a stretch means
            nothing by itself, and the parameter is gathered.
        local: Returns this rank's stretch.
        gathered: A context in which ``whole`` is the parameter.
        whole: The parameter, empty outside of that context.
    """

    layout: Layout | None = None
    local: Callable[[], Tensor] | None = None
    gathered: Callable[[], AbstractContextManager] | None = None
    whole: Tensor | None = field(default=None, repr=False)

    def stand_in(self, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """Make a tensor without memory that stands for the parameter in a state dict."""
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        tensor.partition = self
        return tensor

    def full_tensor(self) -> Tensor:
        """Return the whole parameter, on every rank; every rank must call it."""
        with self.gathered():
            return self.whole.detach().clone()
