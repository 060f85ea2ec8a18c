"""What the charts show, read from the contents of an ``edit.json``: which coefficients varied, and what they scored."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCALING = "scaling_coef"
Content = Mapping[str, Any]  # an edit.json


@dataclass(frozen=True)
class Point:
    """One evaluation under one choice of the coefficients.

    Attributes:
        coefs: Coefficient to value.
        value: Of the metric.
        low: Lower end of its 95% interval, where one is known.
        high: Upper end.
        num_examples: Examples it is from.
        is_base: Whether this is the base model itself.
    """

    coefs: Mapping[str, Any]
    value: float
    low: float | None
    high: float | None
    num_examples: int
    is_base: bool


def points(content: Content, task: str, split: str = "val") -> list[Point]:
    """Return a task's reported metric for every choice of coefficients: of each the evaluation with the most examples.

    Example:
        >>> entry = {"model": "edited", "coefficients": {"scaling_coef": 0.5}, "task": "a", "split": "val"}
        >>> entries = [entry | {"metric": "accuracy", "num_examples": n, "value": n / 10} for n in (2, 8, 4)]
        >>> [p.value for p in points({"tasks": {"a": {"metric": "accuracy"}}, "evaluations": entries}, "a")]
        [0.8]
    """
    metric = content["tasks"][task]["metric"]
    found: dict[str, Point] = {}
    for entry in content["evaluations"]:
        wanted = entry["task"], entry["split"], entry["metric"] == metric, entry["model"] in ("base", "edited")
        if wanted != (task, split, True, True) or entry["value"] is None:
            continue
        key = json.dumps(entry["coefficients"], sort_keys=True) if entry["model"] == "edited" else "base"
        if key in found and found[key].num_examples > entry["num_examples"]:
            continue
        found[key] = Point(
            entry["coefficients"],
            entry["value"],
            entry.get("low"),
            entry.get("high"),
            entry["num_examples"],
            entry["model"] == "base",
        )
    return list(found.values())


def axes(content: Content) -> list[str]:
    """Return the names of the coefficients with more than one value on validation data.

    Coefficients that always changed together are listed once, by the first one's name.
    """
    taken = [point.coefs for task in content["tasks"] for point in points(content, task) if not point.is_base]
    columns = {
        name: [json.dumps(coefs.get(name)) for coefs in taken]
        for name in dict.fromkeys(name for coefs in taken for name in coefs)
        if all(isinstance(coefs.get(name), (int, float)) for coefs in taken)
    }
    found: dict[tuple[str, ...], str] = {}
    for name, column in columns.items():
        if len(set(column)) > 1:
            found.setdefault(tuple(column), name)
    return list(found.values())


def curve(content: Content, task: str, axis: str) -> list[tuple[float, Point]]:
    """Return pairs of coefficient and evaluation in ascending order; the base is at 0 of ``scaling_coef``."""
    found = [(float(p.coefs[axis]), p) for p in points(content, task) if p.coefs.get(axis) is not None]
    return sorted((pair for pair in found if axis == SCALING or not pair[1].is_base), key=lambda pair: pair[0])


def is_feasible(content: Content) -> bool:
    """Whether a coefficient met the constraints on validation data; if not, the report is about the closest one."""
    return all(entry["split"] != "val" for entry in content["tasks"].values())


def symbol(axis: str) -> str:
    """Return a coefficient's display name."""
    return "λ" if axis == SCALING else axis


def is_share(metric: str) -> bool:
    """Whether a metric is shown as a percentage."""
    return metric.endswith("accuracy")


def number(value: float | None, metric: str = "") -> str:
    """Format a metric's value.

    Example:
        >>> number(0.1234, "accuracy"), number(3.14159, "loss"), number(None)
        ('12.3%', '3.142', '–')
    """
    if value is None:
        return "–"
    return f"{value:.1%}" if is_share(metric) else f"{value:.4g}"


def interval(entry: Mapping[str, Any] | Point, metric: str) -> str:
    """Format a 95% interval; empty where none is known."""
    low, high = (entry.low, entry.high) if isinstance(entry, Point) else (entry.get("low"), entry.get("high"))
    return "" if low is None or high is None else f"[{number(low, metric)}, {number(high, metric)}]"


def coefficient(value: Any) -> str:
    """Format a coefficient: a number, or one by group of tensors."""
    return f"{value:g}" if isinstance(value, (int, float)) else json.dumps(value)


def formula(content: Content) -> str:
    """Write the edited weights as a formula.

    Example:
        >>> formula({"recipe": "s*a - b", "coefficients": {"scaling_coef": 0.5, "s": 2.0}})
        'base + 0.5 · (s*a - b), s = 2'
    """
    coefs = dict(content["coefficients"])
    whole = coefs.pop(SCALING, 1.0)
    others = "".join(f", {name} = {coefficient(value)}" for name, value in coefs.items())
    return f"base + {coefficient(whole)} · ({content['recipe']}){others}"
