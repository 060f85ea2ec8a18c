"""The Pareto front of an edit, targets against controls, from the evaluations of its search."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tva.checkpoints import check_export, write_export
from tva.report.export import to_csv
from tva.report.series import Content, Point, points

HEADINGS = {".csv": "target,control\n", ".json": '[\n {\n  "target": "",\n  "control": ""'}
SUFFIXES = tuple(HEADINGS)


def front(content: Content, target: str, control: str) -> list[tuple[Point, Point]]:
    """Return the undominated points of a search on validation data, from the best for the control on.

    A point is dominated if another is as good for both tasks and better for one. The base is one of the points. What is
    good for a control is its metric's direction; for a target that of the objective, or without one that in which the
    edit moved it.

    Args:
        content: An ``edit.json``.
        target: A task.
        control: Another.

    Returns:
        Pairs of the target's and the control's score under the same coefficients.
    """
    up, keep = _wants_more(content, target), content["tasks"][control]["higher_is_better"]
    at = {id_of(point): point for point in points(content, control)}
    pairs = [(point, at[id_of(point)]) for point in points(content, target) if id_of(point) in at]
    ranked = sorted(
        pairs, key=lambda pair: (-pair[1].value if keep else pair[1].value, -pair[0].value if up else pair[0].value)
    )
    found: list[tuple[Point, Point]] = []
    for pair in ranked:
        last = found[-1][0].value if found else None
        if last is None or (pair[0].value > last if up else pair[0].value < last):
            found.append(pair)
    return found


def id_of(point: Point) -> str:
    """Return a key that identifies a point within a search."""
    return "base" if point.is_base else json.dumps(point.coefs, sort_keys=True)


def _wants_more(content: Content, target: str) -> bool:
    """Return whether an edit means a target's metric to be larger."""
    entry, asked = content["tasks"][target], content["search"].get("maximize")
    if asked is not None:
        return bool(asked)
    change = entry["edited"]["value"] - entry["base"]["value"]
    return bool(change > 0) if change else bool(entry["higher_is_better"])


def pairs_of(content: Content) -> list[tuple[str, str]]:
    """Return the pairs of a target and a control."""
    roles = {
        role: [t for t, entry in content["tasks"].items() if entry["role"] == role] for role in ("target", "control")
    }
    return [(target, control) for control in roles["control"] for target in roles["target"]]


def front_rows(content: Content) -> list[dict[str, Any]]:
    """Return the fronts of all pairs of a target and a control as flat rows, every row with the same keys."""
    found = [(pair, front(content, *pair)) for pair in pairs_of(content)]
    names = list(dict.fromkeys(name for _, line in found for point, _ in line for name in point.coefs))
    rows = []
    for (target, control), line in found:
        for gained, kept in line:
            rows.append(
                {"target": target, "control": control, **{name: gained.coefs.get(name) for name in names}}
                | _columns("target", gained, content["tasks"][target]["metric"])
                | _columns("control", kept, content["tasks"][control]["metric"])
            )
    return rows


def _columns(role: str, point: Point, metric: str) -> dict[str, Any]:
    return {
        f"{role}_metric": metric,
        f"{role}_value": point.value,
        f"{role}_low": point.low,
        f"{role}_high": point.high,
        f"{role}_num_examples": point.num_examples,
    }


def check_front(path: str | os.PathLike[str], num_targets: int, num_controls: int) -> None:
    """Raise if a front cannot be written to a path.

    Raises:
        ValueError: Its name does not end in one of `SUFFIXES`, or there is no pair of tasks.
        FileExistsError: A file is there that is not an earlier front.
    """
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"front must be the name of a file that ends in .csv or .json; found {os.fspath(path)!r}.")
    check_export(path, HEADINGS[Path(path).suffix])
    if not num_targets or not num_controls:
        raise ValueError(
            f"A front is of targets against controls; found {num_targets} targets and {num_controls} controls. Give at "
            f"least one of each, or leave front out."
        )


def write_front(content: Content, path: str | os.PathLike[str]) -> Sequence[dict[str, Any]]:
    """Write the front of an edit to a file, CSV or JSON, and return its rows.

    Raises:
        ValueError: See `check_front`.
    """
    roles = [entry["role"] for entry in content["tasks"].values()]
    check_front(path, roles.count("target"), roles.count("control"))
    rows = front_rows(content)
    text = to_csv(rows) if Path(path).suffix == ".csv" else json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    write_export(path, text)
    return rows
