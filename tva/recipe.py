"""Recipes: the expressions that say how task vectors are combined, such as ``-toxic`` or ``0.3 * (a + b - c)``.

A recipe is written in Python's expression syntax and read with `ast`; it is never run as code. Every part is either a
task vector or a number: vectors add to vectors, numbers scale vectors, and anything else is refused at the place in the
text where it stands.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from tva.groups import Coefficient, coefs_by_tensor, layers_of
from tva.merge import METHODS, Method, Place
from tva.origin import Origin
from tva.state_dict import some
from tva.steps import ADD, DIV, LOAD, MUL, NEG, SUB, Step, Steps
from tva.task_vector import TaskVector
from tva.weights import HashedWeights

Kind = Literal["vector", "number"]
Piece = tuple[Place, Mapping[str, Tensor]]  # where it lies, and the flattened deltas of the vectors by name
Look = Callable[[Iterable[Piece]], None]


class RecipeError(ValueError):
    """A recipe cannot be read; the message shows it with a caret under the place."""


def _state_key(node: ast.Call, method: Method, place: Place) -> tuple[int, str]:
    return id(node), "" if method.over_model else place.tensor


_OPERATORS: dict[type, tuple[str, Callable]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}

_STEPS: dict[type, int] = {ast.Add: ADD, ast.Sub: SUB, ast.Mult: MUL, ast.Div: DIV}
_INTO: dict[type, Callable] = {ast.Add: torch.add, ast.Sub: torch.sub, ast.Mult: torch.mul, ast.Div: torch.div}


def _apply(kind: type, first: Any, second: Any, own_first: bool, own_second: bool) -> tuple[Any, bool]:
    """Apply an operator, over an operand's memory where that is free and the dtype fits."""
    tensors = [value for value in (first, second) if isinstance(value, Tensor)]
    function = _OPERATORS[kind][1]
    if not tensors:
        return function(first, second), False
    if not isinstance(first, Tensor):  # a number times a vector
        first, second, own_first, own_second = second, first, own_second, own_first
    for value, own in ((first, own_first), (second, own_second)):
        if own and value.is_floating_point() and all(value.dtype == other.dtype for other in tensors):
            return _INTO[kind](first, second, out=value), True
    return function(first, second), True


class Recipe:
    """A checked recipe.

    Args:
        text: The expression.
        vectors: Names that are task vectors.
        coefs: Names that are numbers, with their values: a number; or one by group of tensors, from regular expressions
            that are searched for in tensor names, the first that is found counting, to a number or to
            ``[first, …, last]`` over the layers. ``layer`` stands for every name that has a layer's number in it.

    Attributes:
        text: The expression as written.
        vectors: Names of the task vectors it uses, in order of appearance.
        coefs: Names of the coefficients it uses, with their values as given.

    Raises:
        RecipeError: It is no expression of task vectors, or uses an unknown name.

    Example:
        >>> import torch
        >>> a, b = TaskVector({"w": torch.tensor([1.0])}), TaskVector({"w": torch.tensor([4.0])})
        >>> Recipe("s * (b - a) / 2", vectors=["a", "b"], coefs={"s": 3.0}).evaluate({"a": a, "b": b}).deltas
        {'w': tensor([4.5000])}
    """

    def __init__(self, text: str, vectors: Collection[str], coefs: Mapping[str, Coefficient] | None = None) -> None:
        self.text = text
        self._known = set(vectors)
        self._values = dict(coefs or {})
        self._by_tensor: dict[str, dict[str, float]] = {}  # of coefficients by group, once the names are known
        self._layers: dict[str, tuple[int, int]] = {}  # likewise
        self.vectors: list[str] = []
        self.coefs: dict[str, Coefficient] = {}
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
        self._numbers: set[int] = set()  # parts that are no vectors
        self._methods: dict[int, Method] = {}
        self._observers: list[ast.Call] = []  # calls that must see the deltas first, inner before outer
        if self._check(self._tree) != "vector":
            raise self._error(f"A recipe must give a task vector, but this is a number; known {self._names()}", 0)

    def __repr__(self) -> str:
        return f"Recipe({self.text!r})"

    @property
    def is_linear(self) -> bool:
        """Whether the recipe is a fixed linear combination of its vectors."""
        return all(method.linear for method in self._methods.values())

    def bind(self, names: Collection[str]) -> None:
        """Count the model's layers, and give every tensor its value of the coefficients that are given by group.

        Args:
            names: Those of all tensors of the model.

        Raises:
            ValueError: A tensor is in no group, or a group has no tensor.
        """
        self._layers = layers_of(names)
        for name, groups in self.coefs.items():
            if isinstance(groups, Mapping):
                self._by_tensor[name] = coefs_by_tensor(name, groups, names)

    def coef_of(self, vector: str, place: Place) -> float:
        """Give the number by which a linear recipe multiplies one vector in one tensor."""
        deltas = {name: torch.tensor([float(name == vector)], dtype=torch.float64) for name in self.vectors}
        return float(self.merge(place, deltas, {}, dict.fromkeys(self.vectors, "")))

    def evaluate(self, vectors: Mapping[str, TaskVector]) -> TaskVector:
        """Compute the recipe in memory.

        Args:
            vectors: The task vectors by name, at least those in ``self.vectors``.

        Returns:
            A new task vector. Running statistics follow a linear recipe; under any other they do not move.

        Raises:
            MismatchError: The vectors come from different bases or architectures.
        """
        used = {name: vectors[name] for name in self.vectors}
        whole = sum(used.values())  # checks that they belong together
        sources = {name: vector.origin.finetuned or name for name, vector in used.items()}
        self.bind({*whole.deltas, *whole.buffers, *whole.untouched})

        def pieces() -> Iterator[Piece]:
            for name in sorted(whole.deltas):
                yield (
                    Place(name, shape=tuple(whole.deltas[name].shape)),
                    {
                        v: vector.deltas[name].reshape(-1)
                        if name in vector.deltas
                        else torch.zeros(whole.deltas[name].numel(), dtype=whole.deltas[name].dtype)
                        for v, vector in used.items()
                    },
                )

        observed = self.observe(pieces, sources)
        deltas = {
            place.tensor: self.merge(place, values, observed, sources).reshape(whole.deltas[place.tensor].shape)
            for place, values in pieces()
        }
        buffers = {}
        if self.is_linear:
            zeros = {name: torch.zeros_like(delta) for name, delta in whole.buffers.items()}
            for name in whole.buffers:
                values = {v: vector.buffers.get(name, zeros[name]) for v, vector in used.items()}
                buffers[name] = self.merge(Place(name), values, {}, sources)
        untouched = {**dict.fromkeys(whole.buffers.keys() - buffers.keys(), "excluded"), **whole.untouched}
        return TaskVector(deltas, buffers, untouched, Origin(base=whole.origin.base, kind=whole.origin.kind))

    @property
    def is_random(self) -> bool:
        """Whether a method of the recipe draws random numbers."""
        return any(method.random for method in self._methods.values())

    @property
    def needs_whole_tensors(self) -> bool:
        """Whether a method of the recipe must see every tensor in one piece."""
        return any(method.whole for method in self._methods.values())

    @property
    def files(self) -> dict[str, HashedWeights]:
        """The files that methods read besides the vectors, by path."""
        return {path: file for method in self._methods.values() for path, file in method.inputs().items()}

    @property
    def observing(self) -> list[Method]:
        """The methods that must look at the deltas before they merge."""
        return [self._methods[id(node)] for node in self._observers]

    # --- computing, one piece of the model at a time

    def observe(
        self,
        pieces: Callable[[], Iterable[Piece]],
        sources: Mapping[str, str],
        *,
        over_model: bool | None = None,
        known: Mapping[tuple[int, str], Any] | None = None,
        spread: Callable[[Look], None] | None = None,
    ) -> dict[tuple[int, str], Any]:
        """Let the methods that need it look at the deltas before they merge.

        Args:
            pieces: Gives all pieces anew at each call.
            sources: What identifies each vector.
            over_model: Only the methods that collect over the whole model (True), or tensor by tensor (False).
            known: States of methods that have looked already.
            spread: In place of going through ``pieces``: calls what it is given on the pieces of every tensor, several
                tensors at once, for methods that collect over the model.

        Returns:
            States for `merge`, by method and tensor.
        """
        states: dict[tuple[int, str], Any] = {}
        seen = dict(known or {})
        for node in self._observers:  # inner calls come first: their states are ready for the outer ones
            method = self._methods[id(node)]
            if over_model is not None and method.over_model != over_model:
                continue
            if method.over_model:
                states[id(node), ""] = seen[id(node), ""] = method.start(len(node.args))
            for sweep in range(method.num_sweeps):
                mine = [state for (owner, _), state in states.items() if owner == id(node)]
                if mine and all(method.ready(state, sweep) for state in mine):
                    continue

                def look(some: Iterable[Piece], node=node, method=method, sweep=sweep) -> None:
                    for place, deltas in some:
                        key = _state_key(node, method, place)
                        if key not in states:
                            states[key] = seen[key] = method.start(len(node.args))
                        arguments, here = self._arguments(node, place, deltas, seen, sources)
                        method.observe(states[key], arguments, here, sweep)

                if spread is not None and method.over_model:
                    spread(look)
                else:
                    look(pieces())
                for (owner, _), state in states.items():
                    if owner == id(node):
                        method.finish(state, sweep)
        return states

    def merge(
        self,
        place: Place,
        deltas: Mapping[str, Tensor],
        states: Mapping[tuple[int, str], Any],
        sources: Mapping[str, str],
        fresh: Collection[str] = (),
        free: Callable[[Tensor], None] = lambda _: None,
    ) -> Tensor:
        """Compute one piece of the result.

        Args:
            place: Where the piece lies.
            deltas: For each vector its flattened piece, float32 or float64; asked for each time a vector is named.
                Where they have a method ``run`` that computes `Steps`, it is asked first.
            states: From `observe`.
            sources: What identifies each vector.
            fresh: Vectors whose piece is made anew each time it is asked for, and may be overwritten.
            free: Told of each tensor that is no longer needed.
        """
        return self._evaluate(self._tree, place, deltas, states, sources, fresh, free)[0]

    def _evaluate(
        self,
        node: ast.expr,
        place: Place,
        deltas: Mapping[str, Tensor],
        states: Mapping[tuple[int, str], Any],
        sources: Mapping[str, str],
        fresh: Collection[str] = (),
        free: Callable[[Tensor], None] = lambda _: None,
    ) -> tuple[Any, bool]:
        """Give a value, and whether its memory is free to be overwritten; results are the same bits either way."""
        if isinstance(node, ast.BinOp | ast.UnaryOp | ast.Call) and id(node) not in self._numbers:
            steps = self.steps(place, states, sources, node) if hasattr(deltas, "run") else None
            value = None if steps is None else deltas.run(steps)
            if value is not None:
                return value, True
        match node:
            case ast.Constant(value=value):
                return float(value), False
            case ast.Name(id=name):
                return (deltas[name], name in fresh) if name in self._known else (self.number(name, place), False)
            case ast.UnaryOp(op=op, operand=operand):
                value, own = self._evaluate(operand, place, deltas, states, sources, fresh, free)
                if not isinstance(op, ast.USub):
                    return value, own
                return (value.neg_() if own else -value), isinstance(value, Tensor)
            case ast.BinOp(left=left, op=op, right=right):
                first, own = self._evaluate(left, place, deltas, states, sources, fresh, free)
                second, other = self._evaluate(right, place, deltas, states, sources, fresh, free)
                if isinstance(op, ast.Div) and second == 0:
                    raise self._error("This divides by zero", right.col_offset)
                result = _apply(type(op), first, second, own, other)
                if other and result[0] is not second:
                    free(second)
                return result
            case ast.Call():
                method = self._methods[id(node)]
                arguments, here = self._arguments(node, place, deltas, states, sources)
                return method.merge(arguments, states.get(_state_key(node, method, place)), here), True
        raise AssertionError(f"unchecked node {ast.dump(node)}")

    def steps(
        self,
        place: Place,
        states: Mapping[tuple[int, str], Any],
        sources: Mapping[str, str],
        node: ast.expr | None = None,
    ) -> Steps | None:
        """Give the steps that compute the recipe, or a part of it, in one tensor; None if a method has none.

        Args:
            place: The tensor.
            states: From `observe`.
            sources: What identifies each vector.
            node: A part that is a vector.
        """
        node = self._tree if node is None else node
        match node:
            case ast.Name(id=name):
                return (Step(LOAD, self.vectors.index(name)),)
            case ast.UnaryOp(op=op, operand=operand):
                steps = self.steps(place, states, sources, operand)
                return steps if steps is None or isinstance(op, ast.UAdd) else (*steps, Step(NEG))
            case ast.BinOp(left=left, op=op, right=right):
                if number := next((side for side in (left, right) if id(side) in self._numbers), None):
                    vector, value = right if number is left else left, self._evaluate(number, place, {}, {}, {})[0]
                    if isinstance(op, ast.Div) and value == 0:
                        raise self._error("This divides by zero", right.col_offset)
                    last, sides = Step(_STEPS[type(op)], numbers=(value,)), [vector]
                else:
                    last, sides = Step(_STEPS[type(op)]), [left, right]
                parts = [self.steps(place, states, sources, side) for side in sides]
                return None if None in parts else (*chain(*parts), last)
            case ast.Call(args=args):
                method = self._methods[id(node)]
                parts = [self.steps(place, states, sources, argument) for argument in args]
                here = dataclasses.replace(self._place_of(node, place, sources), start=0)
                return None if None in parts else method.steps(parts, states.get(_state_key(node, method, place)), here)
        raise AssertionError(f"unchecked node {ast.dump(node)}")

    def number(self, name: str, place: Place) -> float:
        """Give a coefficient's value in one tensor."""
        by_tensor = self._by_tensor.get(name)
        return self.coefs[name] if by_tensor is None else by_tensor[place.tensor]

    def _arguments(
        self,
        call: ast.Call,
        place: Place,
        deltas: Mapping[str, Tensor],
        states: Mapping[tuple[int, str], Any],
        sources: Mapping[str, str],
    ) -> tuple[list[Tensor], Place]:
        values = [self._evaluate(argument, place, deltas, states, sources)[0] for argument in call.args]
        return values, self._place_of(call, place, sources)

    def _place_of(self, call: ast.Call, place: Place, sources: Mapping[str, str]) -> Place:
        """Add what a method is told of its arguments and of the model."""
        named = tuple("+".join(sources[name] for name in self._names_in(argument)) for argument in call.args)
        return dataclasses.replace(place, sources=named, layers=self._layers)

    def _names_in(self, node: ast.expr) -> Iterator[str]:
        return (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in self._known)

    # --- reading: what kind of value each part has

    def _check(self, node: ast.expr) -> Kind:
        kind = self._kind(node)
        if kind == "number":
            self._numbers.add(id(node))
        return kind

    def _kind(self, node: ast.expr) -> Kind:
        match node:
            case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
                return "number"
            case ast.Name(id=name) if name in self._known:
                if name not in self.vectors:
                    self.vectors.append(name)
                return "vector"
            case ast.Name(id=name) if name in self._values:
                value = self._values[name]
                self.coefs[name] = value if isinstance(value, Mapping) else float(value)
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
        if name not in METHODS:
            raise self._error(
                f"There is no function {name!r}; known are {', '.join(METHODS)}.{self._nearest(name, METHODS)}",
                node.col_offset,
            )
        kind = METHODS[name]
        for argument in node.args:
            if self._check(argument) != "vector":
                raise self._error(f"This is a number, but {name} takes task vectors: {kind.usage}", argument.col_offset)
        if len(node.args) != kind.num_vectors if kind.num_vectors else not node.args:
            wanted = kind.num_vectors or "at least one"
            raise self._error(
                f"{name} takes {wanted} task vectors and was given {len(node.args)}: {kind.usage}", node.col_offset
            )
        options = {}
        known = [field.name for field in dataclasses.fields(kind)]
        for keyword in node.keywords:
            if keyword.arg not in known:
                options_text = f"its options are {', '.join(known)}" if known else "it has no options"
                raise self._error(
                    f"{name} has no option {keyword.arg!r}; {options_text}: {kind.usage}", keyword.value.col_offset
                )
            options[keyword.arg] = self._option(keyword.value)
        try:
            method = kind(**options)
        except (TypeError, ValueError) as error:
            raise self._error(f"{error} Written as {kind.usage}", node.col_offset) from error
        self._methods[id(node)] = method
        if method.num_sweeps:
            self._observers.append(node)
        return "vector"

    def _option(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id in self._values:
            if isinstance(self._values[node.id], Mapping):
                raise self._error("An option is one number; this coefficient is given by group", node.col_offset)
            self.coefs[node.id] = float(self._values[node.id])
            return self.coefs[node.id]
        try:
            return ast.literal_eval(node)
        except ValueError as error:
            raise self._error(
                "An option must be a number, a text in quotes or a coefficient", node.col_offset
            ) from error

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
