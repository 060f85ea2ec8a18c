"""SLERP: from one vector to another along the arc between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tva._torch import Tensor
from tva.merge.base import Chunk, Method
from tva.merge.exact_sum import Sum

_PARALLEL = 1e-4  # sine of the angle below which the arc is a straight line, to within its square


@dataclass(frozen=True)
class Slerp(Method):
    r"""Interpolate along the arc: :math:`\frac{\sin((1-t)\Omega)}{\sin\Omega} a + \frac{\sin(t\Omega)}{\sin\Omega} b`.

    :math:`\Omega` is the angle between the two task vectors, not between the two models' weights: mergekit's ``slerp``
    turns the weights themselves, which are nearly parallel, and is close to ``(1 - t) * a + t * b``; its ``nuslerp``
    with a base model is this. Where the vectors are parallel, opposite, or one is zero, there is no arc, and the result
    is that straight line. One pass.

    Args:
        t: 0 gives ``a`` and 1 gives ``b``, bit for bit; other numbers may be taken too.
        over: The angle is that of each ``"tensor"``, as in mergekit, or of the ``"model"``.

    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
    """

    t: float = 0.5
    over: Literal["tensor", "model"] = "tensor"

    name = "slerp"
    usage = 'slerp(a, b, t=0.5, over="tensor" or "model")'
    num_vectors = 2
    num_passes = 1

    def __post_init__(self) -> None:
        if self.over not in ("tensor", "model") or not math.isfinite(self.t):
            raise ValueError(f"slerp has a finite t and over 'tensor' or 'model'; found {self.t}, {self.over!r}.")

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

    def merge(self, deltas: Sequence[Tensor], state: tuple[Sum, Sum, Sum], chunk: Chunk) -> Tensor:
        first, second = self._coefficients(*(part.total for part in state))
        return (deltas[0] * first).add_(deltas[1] * second)

    def _coefficients(self, dot: float, square_a: float, square_b: float) -> tuple[float, float]:
        norms = math.sqrt(square_a) * math.sqrt(square_b)
        angle = math.acos(max(-1.0, min(1.0, dot / norms))) if norms else 0.0
        sine = math.sin(angle)
        if sine < _PARALLEL or self.t in (0, 1):
            return 1 - self.t, self.t
        return math.sin((1 - self.t) * angle) / sine, math.sin(self.t * angle) / sine
