"""Choose the scaling coefficient: constraints on control tasks, objectives on targets, and the grid they are tried on.

Nothing here knows how a model is evaluated: scores come in as plain numbers, so every rule can be tested by hand.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from tva.state_dict import some

Scores = Mapping[str, Mapping[str, float]]  # task -> metric -> value
Rule = Literal["largest", "best"]

NORMALIZED = "normalized_accuracy"

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
            _evaluate_bound(tree, 1.0)
        except (SyntaxError, ValueError) as error:
            raise ValueError(
                f"The right side of the constraint {text!r} must be made of numbers, 'base' and + - * /."
            ) from error
        return cls(text.strip(), task, metric, compare, tree)

    def bound(self, base: Scores) -> float:
        """Compute the right side from the base model's scores."""
        return _evaluate_bound(self._bound, score(base, self.task, self.metric))

    @property
    def slope(self) -> float:
        """How much the bound moves with the base's metric: 0.95 for ``0.95 * base``."""
        return _evaluate_bound(self._bound, 1.0) - _evaluate_bound(self._bound, 0.0)

    def holds(self, scores: Scores, base: Scores, slack: float = 0.0) -> bool:
        """Whether scores meet this constraint by ``slack`` or more, in the metric's unit; NaN never does."""
        worse = -slack if self._compare.startswith(">") else slack
        return _COMPARE[self._compare](score(scores, self.task, self.metric) + worse, self.bound(base))

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
        terms: (task, metric) pairs whose mean is taken; the metric ``normalized_accuracy`` divides by the task's own
            fine-tuned model.
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
        return [task for task, metric in self.terms if metric == NORMALIZED]

    def value(self, scores: Scores) -> float:
        """Compute the objective."""
        return sum(score(scores, task, metric) for task, metric in self.terms) / len(self.terms)


class Search:
    """Base class of what tries coefficients; a subclass says which."""

    def coefficients(self) -> list[float]:
        """Give the coefficients to try, in ascending order."""
        raise TypeError(f"{type(self).__name__} does not say which coefficients to try; use tva.search.Grid.")


class Grid(Search):
    """Evenly spaced coefficients; by default the paper's 21 points 0, 0.05, …, 1.

    Args:
        start: First coefficient.
        stop: Last coefficient.
        num: How many, both ends included; at least 2.

    Example:
        >>> Grid(num=5).coefficients()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    def __init__(self, start: float = 0.0, stop: float = 1.0, num: int = 21) -> None:
        if num < 2 or not stop > start:
            raise ValueError(f"A grid must have 2 points or more and start < stop; found num={num}, {start} … {stop}.")
        self.start, self.stop, self.num = start, stop, num

    def coefficients(self) -> list[float]:
        # rounded, so that 0.15000000000000002 is printed and recorded as 0.15
        return [round(self.start + (self.stop - self.start) * step / (self.num - 1), 12) for step in range(self.num)]


@dataclass(frozen=True)
class Choice:
    """What a search chose.

    Attributes:
        scaling_coef: The coefficient; the closest to feasible if none is.
        feasible: Whether a coefficient other than 0 meets all constraints on the data it was chosen on.
        reason: One sentence for people.
    """

    scaling_coef: float
    feasible: bool
    reason: str


def choose(
    tried: Mapping[float, Scores],
    base: Scores,
    constraints: Collection[Constraint],
    objective: Objective | None,
    rule: Rule,
    slack: Mapping[tuple[float, str], float] | None = None,
) -> Choice:
    """Choose a coefficient from those tried.

    Args:
        tried: Scores on validation data for each coefficient.
        base: Scores of the base model on the same data.
        constraints: All must hold.
        objective: What the rule ``"best"`` makes large or small; ties go to the coefficient nearest 0.
        rule: ``"largest"``, the paper's for forgetting: the largest coefficient whose constraints hold. ``"best"``: the
            best objective among those.
        slack: By how much a constraint must hold to be believed, by (coefficient, constraint's text); 0 where missing.

    Returns:
        The choice. Coefficient 0 edits nothing and is never feasible, unless nothing else was tried.

    Source: Ilharco et al., ICLR 2023, section 3: "the largest λ such that the control accuracy is at least 95 % of the
    pre-trained model's"; the other rule is that of Ortiz-Jimenez et al., NeurIPS 2023.

    Example:
        >>> scores = {c: {"control": {"accuracy": 0.8 - 0.1 * c}} for c in (0.0, 0.3, 0.6)}
        >>> keep = Constraint.parse("control/accuracy >= 0.95 * base", tasks=["control"])
        >>> choose(scores, scores[0.0], [keep], None, "largest").scaling_coef
        0.3
    """
    edits = [coef for coef in tried if coef != 0] or list(tried)

    def needed(coef: float, constraint: Constraint) -> float:
        return (slack or {}).get((coef, constraint.text), 0.0)

    feasible = [coef for coef in edits if all(c.holds(tried[coef], base, needed(coef, c)) for c in constraints)]
    if not feasible:
        closest = min(edits, key=lambda coef: sum(c.shortfall(tried[coef], base, needed(coef, c)) for c in constraints))
        failing = [c.text for c in constraints if not c.holds(tried[closest], base, needed(closest, c))]
        return Choice(
            closest,
            False,
            f"no coefficient meets {some(failing)} on validation data; the closest is {closest:g}",
        )
    if rule == "largest":
        return Choice(max(feasible), True, "the largest coefficient whose constraints hold on validation data")
    if objective is None:
        raise ValueError("The rule 'best' needs an objective: pass minimize= or maximize=.")
    sign = -1.0 if objective.maximize else 1.0
    best = min(feasible, key=lambda coef: (sign * objective.value(tried[coef]), abs(coef)))
    verb = "maximizes" if objective.maximize else "minimizes"
    held = " among those whose constraints hold" if constraints else ""
    return Choice(best, True, f"it {verb} {objective.text} on validation data{held}")
