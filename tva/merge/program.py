"""Steps: elementwise arithmetic as short programs for a stack of values, which `tva.merge.kernels` runs fused.

A recipe, and those merge methods that look at one element of each vector at a time, can say what they do in such steps;
the values are the same bits that their torch operations give.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy

ZERO, LOAD, ADD, SUB, MUL, DIV, NEG, TRIM, DROP, TIES = range(10)
_OF_NUMBERS = {ADD: operator.add, SUB: operator.sub, MUL: operator.mul, NEG: operator.mul, DIV: operator.truediv}
_PUSHED = {ZERO: 1, LOAD: 1, ADD: -1, SUB: -1}


class Step(NamedTuple):
    """One step. It takes the topmost values of the stack and leaves one.

    Attributes:
        kind: ``LOAD`` puts the delta of vector ``count`` there, ``ZERO`` a delta that is zero; ``ADD`` and ``SUB`` take
            two, ``MUL`` and ``DIV`` a value and a number, ``NEG`` one. ``TRIM`` zeroes magnitudes of at most its
            number; ``DROP`` divides by its number and zeroes where random bits, as int32, are below ``count``; ``TIES``
            elects and merges ``count`` values (its numbers are those of `tva.merge.methods.ties`).
        count: See there.
        numbers: Taken as float32.
        keys: Upper and lower half of the key of random bits.
    """

    kind: int
    count: int = 0
    numbers: tuple[float, ...] = ()
    keys: tuple[int, int] = (0, 0)


Steps = tuple[Step, ...]


def sum_of(values: Sequence[Steps]) -> Steps:
    """Sum values, in their order."""
    total = values[0]
    for value in values[1:]:
        total = (*total, *value, Step(ADD))
    return total


class Program(NamedTuple):
    """Steps as arrays.

    Attributes:
        steps: Shape (steps, 5): kind, count, where the numbers begin, and the two keys.
        numbers: Float32.
        depth: Values on the stack at most.
        vectors: Those that it loads.
    """

    steps: numpy.ndarray
    numbers: numpy.ndarray
    depth: int
    vectors: frozenset[int]


def value_of(steps: Steps, values: Sequence[float]) -> float:
    """Compute a linear recipe's steps on numbers in place of deltas, in float64.

    Example:
        >>> value_of((Step(LOAD, 0), Step(LOAD, 1), Step(SUB), Step(MUL, numbers=(0.5,))), [3.0, 1.0])
        1.0
    """
    stack: list[float] = []
    for step in steps:
        if step.kind in (ZERO, LOAD):
            stack.append(values[step.count] if step.kind == LOAD else 0.0)
            continue
        last = -1.0 if step.kind == NEG else step.numbers[0] if step.numbers else stack.pop()
        stack[-1] = _OF_NUMBERS[step.kind](stack[-1], last)
    return stack[-1]


@lru_cache(maxsize=256)
def encode(steps: Steps) -> Program:
    """Turn a tuple of steps into arrays."""
    rows, numbers = [], [0.0]
    top = depth = 0
    for step in steps:
        rows.append((step.kind, step.count, len(numbers), *step.keys))
        numbers += step.numbers
        top += 1 - step.count if step.kind == TIES else _PUSHED.get(step.kind, 0)
        depth = max(depth, top)
    loaded = frozenset(step.count for step in steps if step.kind == LOAD)
    with numpy.errstate(over="ignore"):  # what overflows is an error of the edit, said there
        narrow = numpy.array(numbers, numpy.float32)
    return Program(numpy.array(rows, numpy.int64).reshape(-1, 5), narrow, depth, loaded)
