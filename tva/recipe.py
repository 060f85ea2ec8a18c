"""Recipes: the expressions that say how task vectors are combined, such as ``-toxic`` or ``0.3 * (a + b - c)``.

A recipe is written in Python's expression syntax and read with `ast`; it is never run as code. Every part is either a
task vector or a number: vectors add to vectors, numbers scale vectors, and anything else is refused at the place in the
text where it stands.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from tva.state_dict import some
from tva.task_vector import TaskVector

Kind = Literal["vector", "number"]
Value = TaskVector | float


class RecipeError(ValueError):
    """A recipe cannot be read; the message shows it with a caret under the place."""


def mean(*vectors: TaskVector) -> TaskVector:
    """Average task vectors, which averages their fine-tuned models."""
    return sum(vectors) / len(vectors)


@dataclass(frozen=True)
class _Function:
    call: Callable[..., TaskVector]
    usage: str
    num_vectors: int | None = None  # None: one or more


FUNCTIONS = {
    "analogy": _Function(TaskVector.analogy, "analogy(a, b, c), which is c + (b - a)", 3),
    "mean": _Function(mean, "mean(a, b, …)"),
}
_OPERATORS: dict[type, tuple[str, Callable]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}


class Recipe:
    """A checked recipe.

    Args:
        text: The expression.
        vectors: Names that are task vectors.
        coefs: Names that are numbers, with their values.

    Attributes:
        text: The expression as written.
        vectors: Names of the task vectors it uses, in order of appearance.
        coefs: Names of the coefficients it uses, with their values.

    Raises:
        RecipeError: It is no expression of task vectors, or uses an unknown name.

    Example:
        >>> import torch
        >>> a, b = TaskVector({"w": torch.tensor([1.0])}), TaskVector({"w": torch.tensor([4.0])})
        >>> Recipe("s * (b - a) / 2", vectors=["a", "b"], coefs={"s": 3.0}).evaluate({"a": a, "b": b}).deltas
        {'w': tensor([4.5000])}
    """

    def __init__(self, text: str, vectors: Collection[str], coefs: Mapping[str, float] | None = None) -> None:
        self.text = text
        self._known = set(vectors)
        self._values = dict(coefs or {})
        self.vectors: list[str] = []
        self.coefs: dict[str, float] = {}
        both = sorted(self._known & self._values.keys())
        if both:
            raise RecipeError(f"{some(both)} names both a task vector and a coefficient; rename one of them.")
        odd = sorted(name for name in (*vectors, *self._values) if not name.isidentifier())
        if odd:
            raise RecipeError(
                f"Names in a recipe must be letters, digits and underscores, not beginning with a digit, so that the "
                f"recipe can tell them from operators; found {some(odd)}."
            )
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise self._error("This is not an expression", (error.offset or 1) - 1) from error
        if self._check(self._tree) != "vector":
            raise self._error(f"A recipe must give a task vector, but this is a number; known {self._names()}", 0)

    def __repr__(self) -> str:
        return f"Recipe({self.text!r})"

    def evaluate(self, vectors: Mapping[str, TaskVector]) -> TaskVector:
        """Compute the recipe.

        Args:
            vectors: The task vectors by name, at least those in ``self.vectors``.

        Raises:
            MismatchError: The vectors come from different bases or architectures.
        """
        return self._evaluate(self._tree, vectors)

    # --- reading: what kind of value each part has

    def _check(self, node: ast.expr) -> Kind:
        match node:
            case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
                return "number"
            case ast.Name(id=name) if name in self._known:
                if name not in self.vectors:
                    self.vectors.append(name)
                return "vector"
            case ast.Name(id=name) if name in self._values:
                self.coefs[name] = float(self._values[name])
                return "number"
            case ast.Name(id=name):
                raise self._error(f"{name!r} is unknown; known {self._names()}.{self._nearest(name)}", node.col_offset)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
                return self._check(node.operand)
            case ast.BinOp() if type(node.op) in _OPERATORS:
                return self._check_operator(node)
            case ast.Call(func=ast.Name(id=name)):
                return self._check_call(node, name)
        raise self._error(
            "Only names, numbers, + - * /, parentheses and functions are allowed here", getattr(node, "col_offset", 0)
        )

    def _check_operator(self, node: ast.BinOp) -> Kind:
        left, right = self._check(node.left), self._check(node.right)
        symbol = _OPERATORS[type(node.op)][0]
        if symbol in "+-" and left == right:
            return left
        if symbol == "*" and "number" in (left, right):
            return "number" if left == right else "vector"
        if symbol == "/" and right == "number":
            return left
        place = self._operator_offset(node)
        if symbol in "+-":
            raise self._error("A task vector and a number cannot be added; a number can scale a task vector", place)
        if symbol == "/":
            raise self._error("Nothing can be divided by a task vector; divide by a number", place)
        raise self._error("Two task vectors cannot be multiplied; multiply one by a number", place)

    def _check_call(self, node: ast.Call, name: str) -> Kind:
        if name not in FUNCTIONS:
            raise self._error(
                f"There is no function {name!r}; known are {', '.join(FUNCTIONS)}.{self._nearest(name, FUNCTIONS)}",
                node.col_offset,
            )
        function = FUNCTIONS[name]
        if node.keywords:
            raise self._error(f"{name} takes task vectors alone: {function.usage}", node.col_offset)
        for argument in node.args:
            if self._check(argument) != "vector":
                raise self._error(
                    f"This is a number, but {name} takes task vectors: {function.usage}", argument.col_offset
                )
        if len(node.args) != function.num_vectors if function.num_vectors else not node.args:
            wanted = function.num_vectors or "at least one"
            raise self._error(
                f"{name} takes {wanted} task vectors and was given {len(node.args)}: {function.usage}", node.col_offset
            )
        return "vector"

    # --- computing

    def _evaluate(self, node: ast.expr, vectors: Mapping[str, TaskVector]) -> Value:
        match node:
            case ast.Constant(value=value):
                return float(value)
            case ast.Name(id=name):
                return vectors[name] if name in self._known else self._values[name]
            case ast.UnaryOp(op=op, operand=operand):
                value = self._evaluate(operand, vectors)
                return -value if isinstance(op, ast.USub) else value
            case ast.BinOp(left=left, op=op, right=right):
                function = _OPERATORS[type(op)][1]
                try:
                    return function(self._evaluate(left, vectors), self._evaluate(right, vectors))
                except ZeroDivisionError as error:
                    raise self._error("This divides by zero", right.col_offset) from error
            case ast.Call(func=ast.Name(id=name), args=args):
                return FUNCTIONS[name].call(*(self._evaluate(argument, vectors) for argument in args))
        raise AssertionError(f"unchecked node {ast.dump(node)}")

    # --- errors

    def _error(self, problem: str, offset: int) -> RecipeError:
        text = self.text.strip()
        # ast counts bytes of UTF-8; a caret stands under a character
        column = len(text.encode()[:offset].decode(errors="ignore"))
        return RecipeError(f"{problem if problem.endswith('?') else problem + '.'}\n  {text}\n  {' ' * column}^")

    def _operator_offset(self, node: ast.BinOp) -> int:
        between = self.text.strip().encode()[node.left.end_col_offset : node.right.col_offset].decode(errors="ignore")
        return node.left.end_col_offset + between.index(_OPERATORS[type(node.op)][0])

    def _names(self) -> str:
        vectors = f"task vectors are {some(sorted(self._known), 8)}" if self._known else "task vectors: none"
        return vectors + (f", coefficients {some(sorted(self._values), 8)}" if self._values else "")

    def _nearest(self, name: str, known: Collection[str] | None = None) -> str:
        near = difflib.get_close_matches(name, sorted(known or (self._known | self._values.keys())), n=1, cutoff=0.5)
        return f" Did you mean {near[0]!r}?" if near else ""
