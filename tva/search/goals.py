"""What the user wants, as text: constraints such as ``photos/accuracy >= 0.95 * base``, and objectives.

Nothing here knows how a model is evaluated: scores come in as plain numbers, so every rule can be tested by hand.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tva.errors import some

Scores = Mapping[str, Mapping[str, float]]  # task -> metric -> value
Rule = Literal["largest", "best"]

NORMALIZED = "normalized_"  # before a metric: divided by that of the task's own fine-tuned model

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@dataclass(frozen=True)
class Constraint:
    """A condition such as ``imagenet/accuracy >= 0.95 * base``, where ``base`` is that metric of the base model.

    Attributes:
        text: As written.
        task: Name of the task before the slash.
        metric: Name of the metric after it.
    """

    text: str
    task: str
    metric: str
    _compare: str
    _bound: ast.expr

    @classmethod
    def parse(cls, text: str, tasks: Collection[str]) -> Constraint:
        """Read a constraint.

        Args:
            text: ``TASK/METRIC >= EXPRESSION`` (or ``<=``, ``>``, ``<``) with numbers, ``base`` and + - * /
                on the right.
            tasks: Names of the tasks that will be evaluated.

        Raises:
            ValueError: It is no such condition, or names a task that is not evaluated.

        Example:
            >>> constraint = Constraint.parse("photos/accuracy >= 0.95 * base", tasks=["photos"])
            >>> constraint.bound({"photos": {"accuracy": 0.8}})
            0.76
        """
        found = re.fullmatch(r"\s*([\w.-]+)/([\w.-]+)\s*(>=|<=|>|<)\s*(.+)", text)
        if not found:
            raise ValueError(
                f"A constraint must read like 'imagenet/accuracy >= 0.95 * base' (task/metric, >= or <=, numbers and "
                f"'base'); found {text!r}."
            )
        task, metric, compare, bound = found.groups()
        if task not in tasks:
            raise ValueError(
                f"The constraint {text!r} is on the task {task!r}, which is not among the controls and targets: "
                f"{some(tasks, 8) or 'none is given'}. Add a data module under controls.{task}, or drop the constraint."
            )
        try:
            tree = ast.parse(bound.strip(), mode="eval").body
            value = _evaluate_bound(tree, 1.0)
        except (SyntaxError, ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"The right side of the constraint {text!r} must be made of numbers, 'base' and + - * /."
            ) from error
        if metric == "accuracy" and value > 2 and "base" not in bound:
            raise ValueError(f"The constraint {text!r} has a percentage: an accuracy is from 0 to 1, such as 0.95.")
        return cls(text.strip(), task, metric, compare, tree)

    def bound(self, base: Scores) -> float:
        """Compute the right side from the base model's scores."""
        return _evaluate_bound(self._bound, score(base, self.task, self.metric))

    @property
    def above(self) -> bool:
        """whether the metric must be above its bound."""
        return self._compare.startswith(">")

    @property
    def slope(self) -> float:
        """How much the bound moves with the base's metric: 0.95 for ``0.95 * base``.

        Raises:
            ValueError: The bound is no straight line in ``base``.
        """
        try:
            at = [_evaluate_bound(self._bound, base) for base in (0.0, 1.0, 2.0)]
        except ZeroDivisionError:
            at = [0.0, 1.0, 0.0]
        if not math.isclose(at[2] - at[1], at[1] - at[0], abs_tol=1e-12):
            raise ValueError(
                f"A confidence needs a bound of the form 'number * base + number'; the right side of {self.text!r} is "
                f"not one."
            )
        return at[1] - at[0]

    @property
    def offset(self) -> float:
        """The bound's part that does not depend on the base: 0.5 for ``base + 0.5``."""
        return _evaluate_bound(self._bound, 0.0)

    def holds(self, scores: Scores, base: Scores, slack: float = 0.0) -> bool:
        """Whether scores meet this constraint by ``slack`` or more, in the metric's unit; NaN never does."""
        worse = -slack if self.above else slack
        return _COMPARE[self._compare](score(scores, self.task, self.metric) + worse, self.bound(base))

    def holds_at_base(self, base: Mapping[str, Any]) -> bool:
        """Whether no edit at all meets this constraint, given the base's evaluations by task."""
        before = {self.task: base[self.task].metrics}
        return self.holds(before, before)

    def shortfall(self, scores: Scores, base: Scores, slack: float = 0.0) -> float:
        """How far scores are from meeting this constraint, in the metric's unit; 0 when it holds."""
        if self.holds(scores, base, slack):
            return 0.0
        gap = slack + abs(score(scores, self.task, self.metric) - self.bound(base))
        return gap if math.isfinite(gap) else math.inf


def _evaluate_bound(node: ast.expr, base: float) -> float:
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return float(node.value)
        case ast.Name(id="base"):
            return base
        case ast.UnaryOp(op=ast.USub()):
            return -_evaluate_bound(node.operand, base)
        case ast.BinOp() if type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](_evaluate_bound(node.left, base), _evaluate_bound(node.right, base))
    raise ValueError(ast.dump(node))


def score(scores: Scores, task: str, metric: str) -> float:
    """Look up one number.

    Raises:
        ValueError: The task has no such metric.
    """
    if metric not in scores[task]:
        raise ValueError(f"{task} has no metric {metric!r}; it has {some(scores[task], 8)}.")
    return scores[task][metric]


@dataclass(frozen=True)
class Objective:
    """What to make large or small: ``TASK/METRIC``, ``mean(TASK/METRIC, …)``, or ``mean(METRIC)`` over all targets.

    Attributes:
        text: As written.
        terms: (task, metric) pairs whose mean is taken; the metric ``normalized_accuracy`` is divided by that of the
            task's own fine-tuned model (and divides it where lower is better), as is every other with that prefix.
        maximize: Whether larger is better.
    """

    text: str
    terms: tuple[tuple[str, str], ...]
    maximize: bool

    @classmethod
    def parse(cls, text: str, *, maximize: bool, targets: Collection[str], tasks: Collection[str]) -> Objective:
        """Read an objective.

        Args:
            text: ``TASK/METRIC``, ``mean(TASK/METRIC, …)`` or ``mean(METRIC)``.
            maximize: Whether larger is better.
            targets: Tasks that ``mean(METRIC)`` is taken over.
            tasks: All tasks that will be evaluated.

        Raises:
            ValueError: It is none of these, or names a task that is not evaluated.

        Example:
            >>> objective = Objective.parse("mean(accuracy)", maximize=True, targets=["a", "b"], tasks=["a", "b", "c"])
            >>> objective.value({"a": {"accuracy": 0.5}, "b": {"accuracy": 1.0}})
            0.75
        """
        found = re.fullmatch(r"\s*mean\((.*)\)\s*", text)
        parts = [part.strip() for part in (found[1].split(",") if found else [text])]
        if found and len(parts) == 1 and re.fullmatch(r"[\w.-]+", parts[0]):
            if not targets:
                raise ValueError(f"The objective {text!r} is a mean over the targets, but none is given.")
            parts = [f"{target}/{parts[0]}" for target in targets]
        terms = []
        for part in parts:
            pair = re.fullmatch(r"([\w.-]+)/([\w.-]+)", part)
            if not pair:
                raise ValueError(
                    f"An objective must read 'TASK/METRIC', 'mean(TASK/METRIC, …)' or 'mean(METRIC)'; found {text!r}."
                )
            if pair[1] not in tasks:
                raise ValueError(
                    f"The objective {text!r} is on the task {pair[1]!r}, not among {some(tasks, 8) or 'none'}."
                )
            terms.append((pair[1], pair[2]))
        return cls(text.strip(), tuple(terms), maximize)

    @property
    def tasks(self) -> list[str]:
        """The tasks it is taken over."""
        return [task for task, _ in self.terms]

    @property
    def normalized(self) -> list[str]:
        """The tasks whose fine-tuned model it needs."""
        return [task for task, metric in self.terms if metric.startswith(NORMALIZED)]

    def worsens(self, base: Mapping[str, Any]) -> bool:
        """Whether it makes the targets worse, such as a small accuracy or a large loss.

        Args:
            base: The base's evaluations by task, which know the direction of their metrics.

        Raises:
            ValueError: It makes some better and some worse.
        """
        worse = {
            self.maximize != (metric.startswith(NORMALIZED) or base[task].higher(metric)) for task, metric in self.terms
        }
        if len(worse) > 1:
            raise ValueError(
                f"Learned coefficients make all targets better or all worse, but the objective {self.text!r} asks for "
                f"both. Name metrics of one direction."
            )
        return worse.pop()

    def value(self, scores: Scores) -> float:
        """Compute the objective."""
        return sum(score(scores, task, metric) for task, metric in self.terms) / len(self.terms)
