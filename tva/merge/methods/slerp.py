"""SLERP: from one vector to another along the arc between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tva._torch import Tensor, torch
from tva.merge.base import Chunk, Method
from tva.merge.exact_sum import Sum

_PARALLEL = 1e-4  # sine of the angle below which the arc is a straight line, to within its square


@dataclass(frozen=True)
class Slerp(Method):
    r"""Interpolate along the arc: :math:`\frac{\sin((1-t)\Omega)}{\sin\Omega} a + \frac{\sin(t\Omega)}{\sin\Omega} b`.

    :math:`\Omega` is the angle between the two task vectors, as in mergekit's ``nuslerp`` with a base model. Its
    ``slerp`` turns the weights themselves, which are nearly parallel: ``slerp(base, base + b, linear_above=0.9995) -
    base``. Where the vectors are parallel, opposite, or one is zero, there is no arc, and the result is the straight
    line ``(1 - t) * a + t * b``. One pass; none by rows or columns.

    Args:
        t: 0 gives ``a`` and 1 gives ``b``, bit for bit; other numbers may be taken too.
        over: The angle is that of each ``"tensor"``, as in mergekit, of the ``"model"``, of each ``"row"`` (along the
            last dimension), or of each ``"column"`` (along the first). A tensor of one dimension is one of either.
        linear_above: A cosine whose magnitude is above this counts as parallel; mergekit's ``slerp`` has 0.9995.

    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
    """

    t: float = 0.5
    over: Literal["tensor", "model", "row", "column"] = "tensor"
    linear_above: float = 1.0

    name = "slerp"
    usage = 'slerp(a, b, t=0.5, over="tensor", "model", "row" or "column", linear_above=1)'
    num_vectors = 2

    def __post_init__(self) -> None:
        if self.over not in ("tensor", "model", "row", "column") or not math.isfinite(self.t):
            raise ValueError(
                f"slerp has a finite t, and over 'tensor', 'model', 'row' or 'column'; found {self.t}, {self.over!r}."
            )
        if not 0 <= self.linear_above <= 1:
            raise ValueError(f"linear_above is the magnitude of a cosine, in [0, 1]; found {self.linear_above}.")

    @property
    def num_passes(self) -> int:
        return 0 if self.whole else 1

    @property
    def whole(self) -> bool:
        return self.over in ("row", "column")

    @property
    def over_model(self) -> bool:
        return self.over == "model"

    def start(self, num_vectors: int) -> tuple[Sum, Sum, Sum]:
        return Sum(), Sum(), Sum()

    def observe(self, state: tuple[Sum, Sum, Sum], deltas: Sequence[Tensor], chunk: Chunk, pass_number: int) -> None:
        a, b = (delta.double() for delta in deltas)
        for part, product in zip(state, (a * b, a * a, b * b), strict=True):
            part.add(product, chunk)

    def finish(self, state: tuple[Sum, Sum, Sum], pass_number: int) -> None:
        for part in state:
            part.close()

    def merge(self, deltas: Sequence[Tensor], state: tuple[Sum, Sum, Sum] | None, chunk: Chunk) -> Tensor:
        if state is None:
            return self._merge_lines(deltas, chunk)
        first, second = self._coefficients(*(part.total for part in state))
        return (deltas[0] * first).add_(deltas[1] * second)

    def _coefficients(self, dot: float, square_a: float, square_b: float) -> tuple[float, float]:
        norms = math.sqrt(square_a) * math.sqrt(square_b)
        angle = math.acos(max(-1.0, min(1.0, dot / norms))) if norms else 0.0
        sine = math.sin(angle)
        if sine < _PARALLEL or self.t in (0, 1) or abs(math.cos(angle)) > self.linear_above:
            return 1 - self.t, self.t
        return math.sin((1 - self.t) * angle) / sine, math.sin(self.t * angle) / sine

    def _merge_lines(self, deltas: Sequence[Tensor], chunk: Chunk) -> Tensor:
        if not deltas[0].numel():
            return deltas[0].clone()
        axis = -1 if self.over == "row" else 0
        a, b = (delta.double().view(chunk.shape or (1,)) for delta in deltas)
        norms = a.norm(dim=axis, keepdim=True) * b.norm(dim=axis, keepdim=True)
        cosine = ((a * b).sum(axis, keepdim=True) / torch.where(norms > 0, norms, 1)).clamp(-1, 1)
        angle = torch.where(norms > 0, cosine, 1).acos()
        sine = angle.sin()
        straight = (sine < _PARALLEL) | (cosine.abs() > self.linear_above) | (self.t in (0, 1))
        sine = torch.where(straight, 1, sine)
        first = torch.where(straight, 1 - self.t, ((1 - self.t) * angle).sin() / sine)
        second = torch.where(straight, self.t, (self.t * angle).sin() / sine)
        return (a * first + b * second).reshape(-1).to(deltas[0].dtype)
