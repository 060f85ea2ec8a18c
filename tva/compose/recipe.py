"""Recipes: the expressions that say how task vectors are combined, computed tensor by tensor."""

from __future__ import annotations

import ast
import dataclasses
import operator
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from numpy import ndarray

from tva._torch import Tensor, torch
from tva.arithmetic import from_real_parts, real_parts
from tva.checkpoints import HashedWeights
from tva.compose.syntax import BASE, Expression
from tva.errors import RecipeError as RecipeError
from tva.layers import Coefficient, coefs_by_tensor, layers_of
from tva.merge import Chunk, Method
from tva.merge.program import ADD, DIV, LOAD, MUL, NEG, SUB, Step, Steps, value_of
from tva.vectors.header import Origin

if TYPE_CHECKING:
    from tva.vectors.task_vector import TaskVector

ChunkDeltas = tuple[Chunk, Mapping[str, Tensor]]  # where it is, and the flattened deltas of the vectors by name
Chunks = Callable[[], Iterable[ChunkDeltas]]
Spread = Callable[[Callable[[str, Chunks], None]], None]
States = MutableMapping[tuple[int, str], Any]  # of a call and a tensor; of methods over the model the tensor is ""


def _state_key(node: ast.Call, method: Method, chunk: Chunk) -> tuple[int, str]:
    return id(node), "" if method.over_model else chunk.tensor


def _state(node: ast.Call, method: Method, chunk: Chunk, states: States) -> Any:
    """Return what a method has observed; one that must observe and has not is a KeyError rather than a wrong edit."""
    return states[_state_key(node, method, chunk)] if method.num_passes else None


_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_STEPS: dict[type, int] = {ast.Add: ADD, ast.Sub: SUB, ast.Mult: MUL, ast.Div: DIV}
_INTO = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    """Return a merged delta in the shape of another, of complex numbers where that one is."""
    return from_real_parts(flat, like).reshape(like.shape)


def _apply(kind: type, first: Any, second: Any, own_first: bool, own_second: bool) -> tuple[Any, bool]:
    """Apply an operator, over an operand's memory where that is free and the dtype fits."""
    tensors = [value for value in (first, second) if isinstance(value, Tensor)]
    function = _OPERATORS[kind]
    if not tensors:
        return function(first, second), False
    if not isinstance(first, Tensor):  # a number times a vector
        first, second, own_first, own_second = second, first, own_second, own_first
    for value, own in ((first, own_first), (second, own_second)):
        if own and value.is_floating_point() and all(value.dtype == other.dtype for other in tensors):
            return getattr(torch, _INTO[kind])(first, second, out=value), True
    return function(first, second), True


class Recipe(Expression):
    """A checked recipe, which can be computed.

    Args:
        text: The expression.
        vectors: Names that are task vectors.
        coefs: Names that are numbers, with their values: a number; or one by group of tensors, from regular expressions
            that are searched for in tensor names, the first that is found counting, to a number or to
            ``[first, …, last]`` over the layers. ``layer`` stands for every name that has a layer's number in it.
        with_base: Whether ``base`` is the base's own weights, a vector from zero, where no vector has that name.

    Attributes:
        text: The expression as written.
        vectors: Names of the task vectors it uses, in order of appearance.
        coefs: Names of the coefficients it uses, with their values as given.

    Raises:
        RecipeError: It is not an expression of task vectors, or uses an unknown name.

    Example:
        >>> import torch
        >>> from tva import TaskVector
        >>> a, b = TaskVector({"w": torch.tensor([1.0])}), TaskVector({"w": torch.tensor([4.0])})
        >>> Recipe("s * (b - a) / 2", vectors=["a", "b"], coefs={"s": 3.0}).evaluate({"a": a, "b": b}).deltas
        {'w': tensor([4.5000])}
    """

    def __init__(
        self,
        text: str,
        vectors: Collection[str],
        coefs: Mapping[str, Coefficient] | None = None,
        with_base: bool = False,
    ) -> None:
        super().__init__(text, vectors, coefs, with_base)
        self._in_tensor: dict[tuple[int, str], Method] = {}  # methods whose options differ by tensor
        self._by_tensor: dict[str, dict[str, float]] = {}  # of coefficients by group, once the names are known
        self._layers: dict[str, tuple[int, int]] = {}  # likewise

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
        for node in (node for node in ast.walk(self._tree) if id(node) in self._by_group):
            made: dict[tuple[Any, ...], Method] = {}
            method, by_group = self._methods[id(node)], self._by_group[id(node)]
            for tensor in names:
                options = {option: self._option(value, tensor) for option, value in by_group.items()}
                key = tuple(options.values())
                if key not in made:
                    rest = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
                    made[key] = self._make(node, type(method), rest | options, f"In {tensor!r}: ")
                self._in_tensor[id(node), tensor] = made[key]

    def _method(self, node: ast.expr, tensor: str) -> Method:
        return self._in_tensor.get((id(node), tensor)) or self._methods[id(node)]

    def _number_in(self, name: str, tensor: str) -> float:
        by_tensor = self._by_tensor.get(name)
        return float(self.coefs[name]) if by_tensor is None else by_tensor[tensor]

    def coef_of(self, vector: str, chunk: Chunk) -> float:
        """Return the number by which a linear recipe multiplies one vector in one tensor."""
        names = [*self.vectors, BASE]
        steps = self.steps(chunk, {}, dict.fromkeys(names, ""))
        if steps is not None:
            return value_of(steps, [float(name == vector) for name in self.vectors])
        deltas = {name: torch.tensor([float(name == vector)], dtype=torch.float64) for name in names}
        return float(self.merge(chunk, deltas, {}, dict.fromkeys(names, "")))

    def evaluate(self, vectors: Mapping[str, TaskVector]) -> TaskVector:
        """Compute the recipe in memory.

        Args:
            vectors: The task vectors by name, at least those in ``self.vectors``.

        Returns:
            A new task vector. Running statistics follow a linear recipe; under any other they do not move.

        Raises:
            MismatchError: The vectors come from different bases or architectures.
        """
        from tva.vectors.task_vector import TaskVector

        if self.uses_base:
            raise self._error("The base's own weights are known only where a checkpoint is composed, not here", 0)
        used = {name: vectors[name] for name in self.vectors}
        whole = sum(used.values())  # checks that they belong together
        sources = {name: vector.origin.finetuned or name for name, vector in used.items()}
        self.bind({*whole.deltas, *whole.buffers, *whole.untouched})

        def chunks() -> Iterator[ChunkDeltas]:
            for name in sorted(whole.deltas):
                like = whole.deltas[name]
                parts = real_parts(like).reshape(-1)
                yield (
                    Chunk(name, shape=tuple((parts if like.is_complex() else like).shape)),  # complex: no matrix
                    {
                        v: real_parts(vector.deltas[name]).reshape(-1)
                        if name in vector.deltas
                        else torch.zeros_like(parts)
                        for v, vector in used.items()
                    },
                )

        observed = self.observe(chunks, sources)
        deltas = {
            chunk.tensor: _shaped(self.merge(chunk, values, observed, sources), whole.deltas[chunk.tensor])
            for chunk, values in chunks()
        }
        buffers = {}
        if self.is_linear:
            zeros = {name: torch.zeros_like(delta) for name, delta in whole.buffers.items()}
            for name in whole.buffers:
                values = {v: real_parts(vector.buffers.get(name, zeros[name])) for v, vector in used.items()}
                buffers[name] = _shaped(self.merge(Chunk(name), values, {}, sources), zeros[name])
        untouched = {**dict.fromkeys(whole.buffers.keys() - buffers.keys(), "excluded"), **whole.untouched}
        return TaskVector(deltas, buffers, untouched, Origin(base=whole.origin.base, kind=whole.origin.kind))

    @property
    def is_random(self) -> bool:
        """Whether a method of the recipe draws random numbers."""
        return any(method.random for method in self._methods.values())

    @property
    def is_fusible(self) -> bool:
        """Whether it can be computed in steps only, whatever is observed."""
        return not self.uses_base and all(
            not method.whole
            and type(method).in_steps is not Method.in_steps
            and (method.counts or not method.num_passes)
            for method in self._methods.values()
        )

    @property
    def needs_whole_tensors(self) -> bool:
        """Whether a method of the recipe must see every tensor in one chunk."""
        return any(method.whole for method in self._methods.values())

    @property
    def files(self) -> dict[str, HashedWeights]:
        """The files that methods read besides the vectors, by path."""
        return {path: file for method in self._methods.values() for path, file in method.inputs().items()}

    @property
    def observing(self) -> list[Method]:
        """The methods that must look at the deltas before they merge."""
        return [self._methods[id(node)] for node in self._observers]

    @property
    def observing_bytes(self) -> int:
        """Predicted memory that looking at the deltas takes of each thread."""
        return sum(self._methods[id(node)].observing_bytes(len(node.args)) for node in self._observers)

    # --- computing, one chunk of the model at a time

    def observe(self, chunks: Chunks, sources: Mapping[str, str]) -> States:
        """Let methods observe the deltas of a whole model before they merge: one after the other, inner ones first.

        Args:
            chunks: Returns the chunks of all tensors, afresh at each call.
            sources: What identifies each vector.

        Returns:
            States for `merge`, by method and tensor.
        """
        states: States = {}
        for node in self._observers:
            for pass_number in range(self._methods[id(node)].num_passes):
                mine = [(tensor, state) for (owner, tensor), state in states.items() if owner == id(node)]
                if not (mine and all(self._method(node, tensor).ready(state, pass_number) for tensor, state in mine)):
                    self._one_pass(node, chunks, states, sources, pass_number)
                    for (owner, tensor), state in states.items():
                        if owner == id(node):
                            self._method(node, tensor).finish(state, pass_number)
        return states

    def observe_model(self, spread: Spread, sources: Mapping[str, str]) -> States:
        """Let the methods that collect over the whole model observe it, several tensors at once.

        A method of single tensors in an argument of such a method observes each tensor just before that one does, and
        its states stay.

        Args:
            spread: Calls what it is given with the name of every tensor that the recipe moves, and with a function that
                returns the tensor's chunks afresh.
            sources: What identifies each vector.

        Returns:
            States for `observe_tensor` and `merge`.
        """
        states: States = {}
        for node in self._observers:
            method = self._methods[id(node)]
            if not method.over_model:
                continue
            inside = {id(inner) for inner in ast.walk(node)}
            state = states[id(node), ""] = method.start(len(node.args))
            for pass_number in range(method.num_passes):
                if pass_number and method.ready(state, pass_number):
                    continue

                def observe(tensor: str, chunks: Chunks, node=node, pass_number=pass_number, inside=inside) -> None:
                    if pass_number == 0:
                        states.update(self.observe_tensor(tensor, chunks, sources, states, inside))
                    self._one_pass(node, chunks, states, sources, pass_number)

                spread(observe)
                method.finish(state, pass_number)
        return states

    def packed(self, states: States) -> States:
        """Return states by the place of their method, for `unpacked` of the same recipe in another process."""
        places = {id(node): place for place, node in enumerate(self._observers)}
        return {(places[owner], tensor): state for (owner, tensor), state in states.items()}

    def unpacked(self, states: States) -> States:
        """Return the states that `packed` gave."""
        return {(id(self._observers[place]), tensor): state for (place, tensor), state in states.items()}

    def observe_tensor(
        self,
        tensor: str,
        chunks: Chunks,
        sources: Mapping[str, str],
        known: States,
        only: Collection[int] | None = None,
    ) -> States:
        """Let the methods that collect tensor by tensor observe one tensor.

        Args:
            tensor: Its name.
            chunks: Returns its chunks, afresh at each call.
            sources: What identifies each vector.
            known: States so far: methods that have observed the tensor do not observe it again.
            only: Nodes of the calls that are to observe; by default all.

        Returns:
            The states that were added.
        """
        added: States = {}
        for node in self._observers:
            method, key = self._method(node, tensor), (id(node), tensor)
            if method.over_model or key in known or (only is not None and id(node) not in only):
                continue
            state = added[key] = method.start(len(node.args))
            for pass_number in range(method.num_passes):
                if not (pass_number and method.ready(state, pass_number)):
                    self._one_pass(node, chunks, ChainMap(added, known), sources, pass_number)
                    method.finish(state, pass_number)
        return added

    def _one_pass(
        self, node: ast.Call, chunks: Chunks, states: States, sources: Mapping[str, str], pass_number: int
    ) -> None:
        for chunk, deltas in chunks():
            method = self._method(node, chunk.tensor)
            key = _state_key(node, method, chunk)
            if key not in states:
                states[key] = method.start(len(node.args))
            seen = self._observed(node, chunk, deltas, states, sources)
            method.observe(states[key], seen, self._chunk_of(node, chunk, sources), pass_number)

    def merge(
        self,
        chunk: Chunk,
        deltas: Mapping[str, Tensor],
        states: States,
        sources: Mapping[str, str],
        fresh: Collection[str] = (),
        free: Callable[[Tensor], None] = lambda _: None,
    ) -> Tensor:
        """Compute one chunk of the result.

        Args:
            chunk: Where the chunk is.
            deltas: For each vector its flattened chunk, float32 or float64; asked for each time a vector is named.
                Where they have a method ``run`` that computes `Steps`, it is asked first.
            states: From `observe`.
            sources: What identifies each vector.
            fresh: Vectors whose chunk is made afresh each time it is asked for, and may be overwritten.
            free: Called with each tensor that is no longer needed.
        """
        return self._evaluate(self._tree, chunk, deltas, states, sources, fresh, free)[0]

    def _evaluate(
        self,
        node: ast.expr,
        chunk: Chunk,
        deltas: Mapping[str, Tensor],
        states: States,
        sources: Mapping[str, str],
        fresh: Collection[str] = (),
        free: Callable[[Tensor], None] = lambda _: None,
    ) -> tuple[Any, bool]:
        """Return a value, and whether its memory is free to be overwritten; results are the same bits either way."""
        if isinstance(node, ast.BinOp | ast.UnaryOp | ast.Call) and id(node) not in self._numbers:
            steps = self.steps(chunk, states, sources, node) if hasattr(deltas, "run") else None
            value = None if steps is None else deltas.run(steps)
            if value is not None:
                return value, True
        match node:
            case ast.Constant(value=value):
                return float(value), False
            case ast.Name(id=name):
                is_vector = name in self._known or (self.uses_base and name == BASE)
                return (deltas[name], name in fresh) if is_vector else (self.number(name, chunk), False)
            case ast.UnaryOp(op=op, operand=operand):
                value, own = self._evaluate(operand, chunk, deltas, states, sources, fresh, free)
                if not isinstance(op, ast.USub):
                    return value, own
                return (value.neg_() if own else -value), isinstance(value, Tensor)
            case ast.BinOp(left=left, op=op, right=right):
                first, own = self._evaluate(left, chunk, deltas, states, sources, fresh, free)
                second, other = self._evaluate(right, chunk, deltas, states, sources, fresh, free)
                if isinstance(op, ast.Div) and second == 0:
                    raise self._error("This divides by zero", right.col_offset)
                result = _apply(type(op), first, second, own, other)
                if other and result[0] is not second:
                    free(second)
                return result
            case ast.Call():
                method = self._method(node, chunk.tensor)
                arguments, here = self._arguments(node, chunk, deltas, states, sources)
                return method.merge(arguments, _state(node, method, chunk, states), here), True
        raise AssertionError(f"unchecked node {ast.dump(node)}")

    def steps(
        self, chunk: Chunk, states: States, sources: Mapping[str, str], node: ast.expr | None = None
    ) -> Steps | None:
        """Return the steps that compute the recipe, or a part of it, in one tensor; None if a method has none.

        Args:
            chunk: The tensor.
            states: From `observe`.
            sources: What identifies each vector.
            node: A part that is a vector.
        """
        node = self._tree if node is None else node
        match node:
            case ast.Name(id=name):
                return (Step(LOAD, self.vectors.index(name)),) if name in self._known else None
            case ast.UnaryOp(op=op, operand=operand):
                steps = self.steps(chunk, states, sources, operand)
                return steps if steps is None or isinstance(op, ast.UAdd) else (*steps, Step(NEG))
            case ast.BinOp(left=left, op=op, right=right):
                if number := next((side for side in (left, right) if id(side) in self._numbers), None):
                    vector, value = right if number is left else left, self._evaluate(number, chunk, {}, {}, {})[0]
                    if isinstance(op, ast.Div) and value == 0:
                        raise self._error("This divides by zero", right.col_offset)
                    last, sides = Step(_STEPS[type(op)], numbers=(value,)), [vector]
                else:
                    last, sides = Step(_STEPS[type(op)]), [left, right]
                parts = [self.steps(chunk, states, sources, side) for side in sides]
                return None if None in parts else (*chain(*parts), last)
            case ast.Call(args=args):
                method = self._method(node, chunk.tensor)
                parts = [self.steps(chunk, states, sources, argument) for argument in args]
                here = dataclasses.replace(self._chunk_of(node, chunk, sources), start=0)
                return None if None in parts else method.in_steps(parts, _state(node, method, chunk, states), here)
        raise AssertionError(f"unchecked node {ast.dump(node)}")

    def number(self, name: str, chunk: Chunk) -> float:
        """Return a coefficient's value in one tensor."""
        return self._number_in(name, chunk.tensor)

    def _observed(
        self, call: ast.Call, chunk: Chunk, deltas: Mapping[str, Tensor], states: States, sources: Mapping[str, str]
    ) -> Iterable[Tensor | ndarray]:
        """Return what a method observes: one argument after the other in the same memory, where that will do."""
        if self._methods[id(call)].counts and getattr(deltas, "fused", False):
            steps = [self.steps(chunk, states, sources, argument) for argument in call.args]
            if None not in steps:
                return map(deltas.run_array, steps)
        return self._arguments(call, chunk, deltas, states, sources)[0]

    def _arguments(
        self, call: ast.Call, chunk: Chunk, deltas: Mapping[str, Tensor], states: States, sources: Mapping[str, str]
    ) -> tuple[list[Tensor], Chunk]:
        values = [self._evaluate(argument, chunk, deltas, states, sources)[0] for argument in call.args]
        return values, self._chunk_of(call, chunk, sources)

    def _chunk_of(self, call: ast.Call, chunk: Chunk, sources: Mapping[str, str]) -> Chunk:
        """Add what a method is given about its arguments and of the model."""
        named = tuple("+".join(sources[name] for name in self._names_in(argument)) for argument in call.args)
        return dataclasses.replace(chunk, sources=named, layers=self._layers)
