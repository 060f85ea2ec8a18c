"""Which subsets of a sum's vectors an edit reports, and which edits can."""

import ast
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tva.errors import some
from tva.search import SCALING, Given, Grid

Each = Literal["pairs", "subsets"]
Subset = tuple[str, ...]


def subsets_of(names: Sequence[str], each: Each) -> list[Subset]:
    """Return the pairs, or all subsets that are not empty, small ones first.

    Example:
        >>> subsets_of(["a", "b", "c"], "pairs")
        [('a', 'b'), ('a', 'c'), ('b', 'c')]
        >>> len(subsets_of("abcdefgh", "subsets"))
        255
    """
    sizes = [2] if each == "pairs" else range(1, len(names) + 1)
    return [subset for size in sizes for subset in itertools.combinations(names, size)]


def check_each(recipe: str, search: Any, tasks: Mapping[str, Any]) -> None:
    """Check that a recipe is a sum of vectors that have tasks of their names.

    Raises:
        ValueError: It is not, or the search is not one that subsets can share.
    """
    names = _summands(ast.parse(recipe, mode="eval").body)
    if names is None or len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(f"each takes the vectors of a plain sum, such as 'a + b + c'; the recipe is {recipe!r}.")
    missing = [name for name in names if name not in tasks]
    if missing:
        raise ValueError(
            f"each reports every subset on its own tasks, and {some(missing)} has none: give a task of the "
            f"vector's name under targets."
        )
    if not isinstance(search, (Grid, Given)) or search.ranges.keys() - {SCALING}:
        raise ValueError(
            f"each tries the same scaling coefficients for every subset: use the search Grid over scaling_coef, or "
            f"give scaling_coef; found {type(search).__name__}."
        )


def _summands(node: ast.expr) -> list[str] | None:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _summands(node.left), _summands(node.right)
        return None if left is None or right is None else left + right
    return None
