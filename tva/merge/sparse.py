"""Methods that keep the elements of largest magnitude: magnitude pruning and TIES."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tva.merge.method import Method, Place

_HIGH, _LOW = 2**15, 2**16  # the 31 bits of a float32's magnitude, in two parts


class Threshold:
    """Find the k-th largest magnitude exactly, without sorting, from pieces seen twice.

    The bits of a non-negative float32 order as its value does. The first pass counts their upper 15 bits and finds the
    bin that holds the k-th largest; the second counts the lower 16 bits within that bin. Float64 input is rounded to
    float32 for the comparison.

    Args:
        density: Fraction of elements to keep, in (0, 1].

    Attributes:
        value: After both passes: magnitudes of at least this are kept. 0 keeps all.
    """

    def __init__(self, density: float) -> None:
        self.density = density
        self.value = 0.0
        self._counts = torch.zeros(_HIGH, dtype=torch.int64)
        self._bin = 0
        self._rank = 0  # how many of the largest are wanted, within the bin after the first pass

    def observe(self, delta: Tensor, sweep: int) -> None:
        """Count one piece."""
        bits = magnitude_bits(delta)
        if sweep == 0:
            self._counts += torch.bincount(bits >> 16, minlength=_HIGH).cpu()
        elif self._rank:
            inside = bits[(bits >> 16) == self._bin] & (_LOW - 1)
            self._counts += torch.bincount(inside, minlength=_LOW).cpu()

    def finish(self, sweep: int) -> None:
        """Close a pass."""
        if sweep == 0:
            total = int(self._counts.sum())
            self._rank = min(total, max(1, math.floor(self.density * total + 1e-9)))  # at least one of any tensor
            self._bin, self._rank = self._locate()
            self._counts = torch.zeros(_LOW, dtype=torch.int64)
        else:
            low, _ = self._locate()
            self.value = float(torch.tensor((self._bin << 16) | low, dtype=torch.int32).view(torch.float32))

    def _locate(self) -> tuple[int, int]:
        """Find the bin of the element wanted, and its rank from the top within that bin."""
        if not self._rank:
            return 0, 0
        from_top = self._counts.flip(0).cumsum(0)
        position = int(torch.searchsorted(from_top, torch.tensor(self._rank)))
        above = int(from_top[position - 1]) if position else 0
        return len(self._counts) - 1 - position, self._rank - above


def magnitude_bits(delta: Tensor) -> Tensor:
    """Give the bits of float32 magnitudes as int32, which order as the magnitudes do."""
    return delta.float().view(torch.int32) & 0x7FFFFFFF


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density is the fraction of elements to keep, in (0, 1]; found {density}.")


@dataclass(frozen=True)
class Magnitude(Method):
    """Keep the fraction ``density`` of elements of largest magnitude in each tensor, and zero the others.

    Elements that equal the smallest one kept are kept too.

    Args:
        density: Fraction to keep, in (0, 1].
    """

    density: float

    usage = "magnitude(v, density=0.2)"
    num_vectors = 1
    num_sweeps = 2

    def __post_init__(self) -> None:
        _check_density(self.density)

    def start(self, num_vectors: int) -> Threshold:
        return Threshold(self.density)

    def observe(self, state: Threshold, deltas: Sequence[Tensor], place: Place, sweep: int) -> None:
        state.observe(deltas[0], sweep)

    def finish(self, state: Threshold, sweep: int) -> None:
        state.finish(sweep)

    def merge(self, deltas: Sequence[Tensor], state: Threshold, place: Place) -> Tensor:
        return trim(deltas[0], state.value)


@dataclass(frozen=True)
class Ties(Method):
    r"""Trim, elect a sign, and merge what agrees with it.

    Each vector keeps its ``density`` largest magnitudes, :math:`\hat\tau_t`. The elected sign of an element is that of
    :math:`\sum_t \hat\tau_t`; the result is the mean (or sum) of the :math:`\hat\tau_t` that are not zero and have that
    sign. An element whose sum is exactly zero has no elected sign and stays at the base. Vectors vote as they are
    given: ``ties(2 * a, b)`` weights a's vote and its part of the mean.

    Args:
        density: Fraction to keep, in (0, 1]; the paper's default is 0.2.
        trim: ``"model"``: over each vector as a whole, as in the paper, that is all tensors that at least one of the
            recipe's vectors moves; ``"tensor"``: tensor by tensor, as mergekit does.
        combine: ``"mean"`` of those that agree, as in the paper, or their ``"sum"``.

    Source: Yadav et al., "TIES-Merging: resolving interference when merging models", NeurIPS 2023.
    """

    density: float = 0.2
    trim: Literal["model", "tensor"] = "model"
    combine: Literal["mean", "sum"] = "mean"

    usage = 'ties(a, b, …, density=0.2, trim="model" or "tensor", combine="mean" or "sum")'
    num_sweeps = 2

    def __post_init__(self) -> None:
        _check_density(self.density)
        if self.trim not in ("model", "tensor") or self.combine not in ("mean", "sum"):
            raise ValueError(
                f"ties has trim 'model' or 'tensor' and combine 'mean' or 'sum'; found {self.trim!r}, {self.combine!r}."
            )

    @property
    def over_model(self) -> bool:
        return self.trim == "model"

    def start(self, num_vectors: int) -> list[Threshold]:
        return [Threshold(self.density) for _ in range(num_vectors)]

    def observe(self, state: list[Threshold], deltas: Sequence[Tensor], place: Place, sweep: int) -> None:
        for threshold, delta in zip(state, deltas, strict=True):
            threshold.observe(delta, sweep)

    def finish(self, state: list[Threshold], sweep: int) -> None:
        for threshold in state:
            threshold.finish(sweep)

    def merge(self, deltas: Sequence[Tensor], state: list[Threshold], place: Place) -> Tensor:
        trimmed = [trim(delta, threshold.value) for delta, threshold in zip(deltas, state, strict=True)]
        total = torch.zeros_like(trimmed[0])
        for delta in trimmed:
            total += delta
        elected = torch.sign(total)
        merged, count = torch.zeros_like(total), torch.zeros_like(total)
        for delta in trimmed:
            agrees = (delta * elected) > 0
            merged += torch.where(agrees, delta, 0)
            count += agrees
        return merged / count.clamp_(min=1) if self.combine == "mean" else merged


def trim(delta: Tensor, threshold: float) -> Tensor:
    """Zero the elements whose magnitude, in float32, is below a threshold."""
    return torch.where(delta.float().abs() >= threshold, delta, 0)
