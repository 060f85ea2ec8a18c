"""How task vectors lie to each other: angles, signs that disagree, and norms by block of layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from tva.task_vector import TaskVector


def block_of(name: str) -> str:
    """Give the block of layers that a tensor lies in: its name up to the first number, else its module.

    Example:
        >>> block_of("encoder.blocks.3.attn.weight"), block_of("encoder.proj.weight"), block_of("scale")
        ('encoder.blocks.3', 'encoder.proj', 'scale')
    """
    numbered = re.match(r"(.*?(?:^|\.)\d+)(?:\.|$)", name)
    return numbered[1] if numbered else name.rpartition(".")[0] or name


def blocks(names: Iterable[str]) -> dict[str, list[str]]:
    """Group tensor names by block, in order of appearance."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(block_of(name), []).append(name)
    return found


def cosine_matrix(vectors: Mapping[str, TaskVector]) -> dict[str, dict[str, float]]:
    """Give the cosine of every pair of vectors.

    Example:
        >>> import torch
        >>> a, b = TaskVector({"w": torch.tensor([1.0, 0.0])}), TaskVector({"w": torch.tensor([0.0, 2.0])})
        >>> cosine_matrix({"a": a, "b": b})
        {'a': {'a': 1.0, 'b': 0.0}, 'b': {'a': 0.0, 'b': 1.0}}
    """
    return {a: {b: left.cosine(right) for b, right in vectors.items()} for a, left in vectors.items()}


def sign_conflicts(vectors: Mapping[str, TaskVector]) -> dict[str, dict[str, float]]:
    """Give for every pair the share of elements with opposite signs, among those that both move.

    Example:
        >>> import torch
        >>> a, b = TaskVector({"w": torch.tensor([1.0, 1.0, 0.0])}), TaskVector({"w": torch.tensor([-1.0, 2.0, 3.0])})
        >>> sign_conflicts({"a": a, "b": b})["a"]
        {'a': 0.0, 'b': 0.5}
    """
    return {a: {b: _conflicts(left, right) for b, right in vectors.items()} for a, left in vectors.items()}


def _conflicts(left: TaskVector, right: TaskVector) -> float:
    opposite = both = 0
    for name, delta in left.deltas.items():
        if name in right.deltas:
            signs = delta.sign() * right.deltas[name].sign()
            opposite, both = opposite + int((signs < 0).sum()), both + int((signs != 0).sum())
    return opposite / both if both else math.nan


def norms_by_block(vector: TaskVector) -> dict[str, float]:
    """Give the Euclidean norm of a vector's part in each block."""
    return {
        block: math.sqrt(math.fsum(float(vector.deltas[name].double().square().sum()) for name in names))
        for block, names in blocks(vector.deltas).items()
    }


def without(vector: TaskVector, names: Iterable[str]) -> TaskVector:
    """Leave tensors out of a vector.

    Example:
        >>> import torch
        >>> without(TaskVector({"a": torch.ones(1), "b": torch.ones(1)}), ["a"]).deltas
        {'b': tensor([1.])}
    """
    left_out = set(names)
    kept = {name: delta for name, delta in vector.deltas.items() if name not in left_out}
    untouched = {**vector.untouched, **dict.fromkeys(vector.deltas.keys() & left_out, "excluded")}
    return TaskVector(kept, vector.buffers, untouched, vector.origin)
