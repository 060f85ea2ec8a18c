"""The language of recipes, such as ``-toxic`` or ``0.3 * (a + b - c)``: read, and checked in every part.

A recipe is written in Python's expression syntax and read with `ast`; it is never run as code. Every part is either a
task vector or a number: vectors add to vectors, numbers scale vectors, and anything else is refused at the place in the
text where it stands.
"""

import ast
import dataclasses
import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

import numpy

from tva.errors import RecipeError, some
from tva.layers import Coefficient
from tva.merge import Method, find_method, method_names

Kind = Literal["vector", "number"]
MAX = float(numpy.finfo(numpy.float32).max)
MOST_LEVELS = 16  # of methods in one another: each level may read all vectors once more
_DOTTED = re.compile(r"\w+(\.\w+)*")
BASE = "base"  # the base's own weights, in a recipe
SYMBOLS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def _check_options(kind: type[Method], options: Mapping[str, Any]) -> None:
    """Check that numbers are given where a method's options are numbers, and the like."""
    for field in dataclasses.fields(kind):
        if field.name not in options:
            continue
        value, number = options[field.name], isinstance(options[field.name], int | float)
        parts = value if isinstance(value, list | tuple) else ()
        wanted = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
        fits, what = {
            "str": (isinstance(value, str), "a text in quotes"),
            "bool": (number and value in (0, 1), "True or False"),  # a coefficient is a number
            "int": (number and value % 1 == 0, "a whole number"),
            "float": (number and abs(value) <= MAX, "a number"),
            "Sequence[float]": (all(isinstance(part, int | float) for part in parts), "numbers, such as (1, 0.5)"),
            "Sequence[str]": (all(isinstance(part, str) for part in parts), "texts in quotes"),
        }.get("str" if wanted.startswith("Literal") else wanted, (True, ""))
        if not fits:
            raise ValueError(f"{field.name} must be {what}; found {value!r}.")


class Expression:
    """A recipe's text as a tree whose every part is known to be a task vector or a number.

    Args:
        text: The expression.
        vectors: Names that are task vectors.
        coefs: Names that are numbers, with their values as given.
        with_base: Whether ``base`` names the base's own weights, where nothing else has that name.

    Attributes:
        text: The expression as written.
        vectors: Names of the task vectors it uses, in order of appearance.
        coefs: Names of the coefficients it uses, with their values as given.
        uses_base: Whether the base's own weights are in it.

    Raises:
        RecipeError: It is not an expression of task vectors, or uses an unknown name.
    """

    def __init__(
        self,
        text: str,
        vectors: Collection[str],
        coefs: Mapping[str, Coefficient] | None = None,
        with_base: bool = False,
    ) -> None:
        self.text = text
        self._with_base, self.uses_base = with_base, False
        self._known = set(vectors)
        self._values = dict(coefs or {})
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
        if not text.strip():
            raise RecipeError("A recipe must be an expression of task vectors, such as 'a + b'; found nothing.")
        self._numbers: set[int] = set()  # parts that are no vectors
        self._methods: dict[int, Method] = {}
        self._by_group: dict[int, dict[str, ast.expr]] = {}  # options that have coefficients by group, of each call
        self._levels: dict[int, int] = {}  # of methods in one another, at each
        self._observers: list[ast.Call] = []  # calls that must see the deltas first, inner before outer
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
            kind = self._check(self._tree)
        except SyntaxError as error:
            end = len(text.strip().encode())
            raise self._error(f"This is not an expression ({error.msg})", (error.offset or end + 1) - 1) from error
        except (RecursionError, MemoryError) as error:
            raise RecipeError(
                f"A recipe must not nest hundreds of levels deep, and this one of {len(text.strip()):,} characters "
                f"does; each + is a level. Write a sum of many vectors as their number times mean(a, b, …)."
            ) from error
        if kind != "vector":
            raise self._error(f"A recipe must give a task vector, but this is a number; known {self._names()}", 0)

    def _names_in(self, node: ast.expr) -> Iterator[str]:
        known = self._known | {BASE} if self.uses_base else self._known
        return (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in known)

    def _check(self, node: ast.expr) -> Kind:
        kind = self._kind(node)
        if kind == "number":
            self._numbers.add(id(node))
        return kind

    def _kind(self, node: ast.expr) -> Kind:
        match node:
            case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
                if node.value > MAX:
                    raise self._error("This number is beyond what float32 can hold", node.col_offset)
                return "number"
            case ast.Name(id=name) if name in self._known:
                if name not in self.vectors:
                    self.vectors.append(name)
                return "vector"
            case ast.Name(id=name) if name in self._values:
                value = self._values[name]
                if not isinstance(value, Mapping) and not abs(value) <= MAX:
                    raise self._error(
                        f"The coefficient {name!r} must be a finite number; found {value}", node.col_offset
                    )
                self.coefs[name] = value if isinstance(value, Mapping) else float(value)
                return "number"
            case ast.Name(id=name) if name == BASE and self._with_base:
                self.uses_base = True
                return "vector"
            case ast.Name(id=name):
                near = self._nearest(name) or f" If it is a coefficient, give its value: --coefs.{name} NUMBER"
                raise self._error(f"{name!r} is unknown; known {self._names()}.{near}", node.col_offset)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
                return self._check(node.operand)
            case ast.BinOp() if type(node.op) in SYMBOLS:
                return self._check_operator(node)
            case ast.Call(func=ast.Name() | ast.Attribute()) if _DOTTED.fullmatch(name := ast.unparse(node.func)):
                return self._check_call(node, name)
        raise self._error(
            "Only names, numbers, + - * /, parentheses and functions are allowed here", getattr(node, "col_offset", 0)
        )

    def _check_operator(self, node: ast.BinOp) -> Kind:
        left, right = self._check(node.left), self._check(node.right)
        symbol = SYMBOLS[type(node.op)]
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
        try:
            kind = find_method(name)
        except (ValueError, ImportError) as error:
            raise self._error(f"This merge method cannot be used: {error}", node.col_offset) from error
        if kind is None:
            known = method_names()
            raise self._error(
                f"There is no function {name!r}; known are {', '.join(known)}.{self._nearest(name, known)} Others must "
                f"be installed, or named by a dotted path, such as my_package.Median",
                node.col_offset,
            )
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
        self._methods[id(node)] = method = self._make(node, kind, options)
        by_group = {word.arg: word.value for word in node.keywords if self._has_groups(word.value)}
        if by_group:
            self._check_by_group(method, by_group)
            self._by_group[id(node)] = by_group
        level = 1 + max(self._levels.get(id(inner), 0) for inner in ast.walk(node))
        self._levels[id(node)] = level
        if level > MOST_LEVELS:
            raise self._error(f"At most {MOST_LEVELS} methods may be in one another", node.col_offset)
        if method.num_passes:
            self._observers.append(node)
        return "vector"

    def _make(self, node: ast.Call, kind: type[Method], options: Mapping[str, Any], where: str = "") -> Method:
        try:
            _check_options(kind, options)
            return kind(**options)
        except (TypeError, ValueError) as error:
            raise self._error(f"{where}{error} Written as {kind.usage}", node.col_offset) from error

    def _has_groups(self, node: ast.expr) -> bool:
        names = (part.id for part in ast.walk(node) if isinstance(part, ast.Name))
        return any(isinstance(self._values.get(name), Mapping) for name in names)

    def _check_by_group(self, method: Method, by_group: Mapping[str, ast.expr]) -> None:
        types = {field.name: str(field.type) for field in dataclasses.fields(method)}
        for name, node in by_group.items():
            if method.over_model or types[name] not in ("float", "Sequence[float]"):
                why = f"{method.name} looks at the whole model at once" if method.over_model else "it is not a number"
                raise self._error(
                    f"The option {name!r} must be the same in all tensors, for {why}; this coefficient is given by "
                    f"group",
                    node.col_offset,
                )

    def _option(self, node: ast.expr, tensor: str | None = None) -> Any:
        """Return an option's value in a tensor; without one that of the first group, where it differs."""
        if isinstance(node, ast.Name) and node.id in self._values:
            value = self._values[node.id]
            if tensor is not None:
                return self._number_in(node.id, tensor)
            self.coefs[node.id] = value if isinstance(value, Mapping) else float(value)
            first = next(iter(value.values()), 0.0) if isinstance(value, Mapping) else value
            return float(first if isinstance(first, int | float) else first[0] if first else 0.0)
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(self._option(part, tensor) for part in node.elts)
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError) as error:  # TypeError: a dict with a list as key
            found = ast.unparse(node)
            raise self._error(
                f"An option must be a number, a text in quotes or a coefficient with a value; found {found}",
                node.col_offset,
            ) from error

    # --- errors

    def _error(self, problem: str, offset: int) -> RecipeError:
        text = self.text.strip()
        # ast counts bytes of UTF-8; a caret stands under a character
        column = len(text.encode()[:offset].decode(errors="ignore"))
        problem = problem if problem.endswith(("?", ".")) else f"{problem}."
        before, after = text[:column], text[column:]
        before = f"…{before[-60:]}" if len(before) > 100 else before  # what is far away helps nobody
        after = f"{after[:100]}…" if len(after) > 140 else after
        return RecipeError(f"{problem}\n  {before}{after}\n  {' ' * len(before)}^")

    def _operator_offset(self, node: ast.BinOp) -> int:
        between = self.text.strip().encode()[node.left.end_col_offset : node.right.col_offset].decode(errors="ignore")
        return node.left.end_col_offset + between.index(SYMBOLS[type(node.op)])

    def _names(self) -> str:
        vectors = f"task vectors are {some(sorted(self._known), 8)}" if self._known else "task vectors: none"
        return vectors + (f", coefficients {some(sorted(self._values), 8)}" if self._values else "")

    def _nearest(self, name: str, known: Collection[str] | None = None) -> str:
        near = difflib.get_close_matches(name, sorted(known or (self._known | self._values.keys())), n=1, cutoff=0.5)
        return f" Did you mean {near[0]!r}?" if near else ""
