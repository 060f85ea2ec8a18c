"""Numbers of an ``edit.json`` that tables and effects name, such as ``target.edited`` or ``control.base``."""

import itertools
import re
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from tva.errors import did_you_mean, some
from tva.report.series import Content, is_feasible

Quantity = Callable[[Content], "float | None"]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None


def _tasks(content: Content, role: str) -> dict[str, Any]:
    return {task: entry for task, entry in content["tasks"].items() if entry["role"] == role}


def _score(role: str, label: str) -> Quantity:
    return lambda content: mean(entry[label]["value"] for entry in _tasks(content, role).values() if label in entry)


def _divided(label: str) -> Quantity:
    """Return the mean over targets of a model's score divided by that of the task's own fine-tuned model."""

    def quantity(content: Content) -> float | None:
        found = [entry for entry in _tasks(content, "target").values() if label in entry and "finetuned" in entry]
        return mean(_ratio(entry, entry[label]["value"], entry["finetuned"]["value"]) for entry in found)

    return quantity


def _ratio(entry: Any, value: float, finetuned: float) -> float | None:
    above, below = (value, finetuned) if entry["higher_is_better"] else (finetuned, value)
    return above / below if below else None


def _baseline(name: str, label: Callable[[str], bool], role: str) -> Quantity:
    def quantity(content: Content) -> float | None:
        rows = content["baselines"].get(name, {}).get("rows", {})
        tasks = _tasks(content, role)
        return mean(row[task] for key, row in rows.items() if label(key) for task in tasks)

    return quantity


def _cosine(content: Content) -> float | None:
    rows = content["diagnostics"].get("cosine", {}).get("rows", {})
    return mean(rows[a][b] for a, b in itertools.combinations(rows, 2))


_ROLES, _LABELS = ("target", "control"), ("base", "edited", "random")


def _subsets(name: str, column: str, sizes: Callable[[int, int], bool] = lambda size, most: True) -> Quantity:
    """Return the mean of a column over the subsets of the given sizes; from the option ``each``."""

    def quantity(content: Content) -> float | None:
        rows = content["diagnostics"].get(name, {}).get("rows", {})
        counts = {key: key.count(" + ") + 1 for key in rows}
        most = max(counts.values(), default=0)
        return mean(rows[key][column] for key, size in counts.items() if sizes(size, most))

    return quantity


def _ensemble(content: Content) -> float | None:
    """Return the ensemble's mean score on the targets divided by the fine-tuned models'; from that baseline."""
    rows = content["baselines"].get("ensemble", {}).get("rows", {})
    tasks = {task: entry for task, entry in _tasks(content, "target").items() if "finetuned" in entry}
    return mean(
        _ratio(entry, row[task], entry["finetuned"]["value"]) for row in rows.values() for task, entry in tasks.items()
    )


def _best_part(content: Content) -> float | None:
    """Return the best of an analogy's parts, by its mean score on the targets; from the baseline ``parts``.

    It is the best on the reported split itself, which favors the parts.
    """
    rows = content["baselines"].get("parts", {}).get("rows", {})
    tasks = _tasks(content, "target")
    found = [mean(row[task] for task in tasks) for row in rows.values()]
    better = max if all(entry["higher_is_better"] for entry in tasks.values()) else min
    return better((value for value in found if value is not None), default=None)


QUANTITIES: dict[str, Quantity] = {
    **{f"{role}.{label}": _score(role, label) for role in _ROLES for label in _LABELS},
    "target.finetuned": _score("target", "finetuned"),
    "target.normalized": _divided("edited"),
    "target.normalized_base": _divided("base"),
    "target.normalized_random": _divided("random"),
    "scaling_coef": lambda content: float(content["coefficients"]["scaling_coef"]),
    "holds": lambda content: float(content["holds"]),
    "cosine.mean": _cosine,
    "pairs.normalized": _subsets("pairs", "normalized"),
    "pairs.coef": _subsets("pairs", "λ"),
    "subsets.normalized": _subsets("subsets", "normalized"),
    "subsets.pairs.normalized": _subsets("subsets", "normalized", lambda size, most: size == 2),
    "subsets.one.all": _subsets("subsets", "normalized, all tasks", lambda size, most: size == 1),
    "subsets.half.all": _subsets("subsets", "normalized, all tasks", lambda size, most: 2 * size == most),
    "subsets.whole.all": _subsets("subsets", "normalized, all tasks", lambda size, most: size == most),
    "target.ensemble": _ensemble,
    "target.best_part": _best_part,
} | {
    f"{role}.{name}": _baseline(baseline, label, role)
    for role in _ROLES
    for name, baseline, label in (
        ("ascent", "gradient_ascent", lambda key: key.endswith("stopped")),
        ("ascent_interpolated", "gradient_ascent", lambda key: "interpolated" in key),
        ("average", "average", lambda key: True),
        ("endpoints", "endpoints", lambda key: True),
        ("c_alone", "parts", lambda key: not re.search(" [−+] ", key)),  # C of an analogy C + (B − A)
        ("b_minus_a", "parts", lambda key: " − " in key),
        ("b_plus_c", "parts", lambda key: " + " in key),
    )
}


OF_TASK = re.compile(r"(?P<task>[\w-]+)/(?P<metric>\w+)[.](?P<model>base|edited|random)")


def is_quantity(name: str) -> bool:
    """Return whether there is a quantity of this name.

    Example:
        >>> is_quantity("target.edited"), is_quantity("wikitext/perplexity.base"), is_quantity("edited")
        (True, True, False)
    """
    return name in QUANTITIES or OF_TASK.fullmatch(name) is not None


def _of_task(content: Content, task: str, metric: str, model: str) -> float | None:
    """Return a metric of a task, not only the reported one, on the reported split."""
    if task not in content["tasks"]:
        return None
    split, found = content["tasks"][task]["split"], None
    for entry in content["evaluations"]:
        label = "base" if entry["coefficients"]["scaling_coef"] == 0 else entry["model"]
        if (label, entry["task"], entry["split"], entry["metric"]) == (model, task, split, metric):
            found = entry["value"]
    if found is None and float(content["coefficients"]["scaling_coef"]) == 0 and model != "base":
        return _of_task(content, task, metric, "base")
    return found


def check_quantity(name: str, where: str = "") -> None:
    """Check that there is a quantity of this name.

    Args:
        name: The name.
        where: What names it, for the message.

    Raises:
        ValueError: There is none.
    """
    if not is_quantity(name):
        raise ValueError(
            f"{where}There is no quantity {name!r}; there are {some(QUANTITIES, 60)}, and TASK/METRIC.MODEL for the "
            f"models base, edited and random.{did_you_mean(name, QUANTITIES)}"
        )


def quantity(name: str, content: Content) -> float | None:
    """Return a number of an edit; None if the edit does not have it or no coefficient was feasible.

    Raises:
        ValueError: There is no such quantity.
    """
    check_quantity(name)
    if (of_task := OF_TASK.fullmatch(name)) is not None:
        return _of_task(content, **of_task.groupdict()) if is_feasible(content) else None
    return QUANTITIES[name](content) if is_feasible(content) else None
