"""The tables of edits as rows, CSV and LaTeX."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from tva.report.series import number

Table = Literal["tasks", "constraints", "evaluations"]
MODELS = ("base", "edited", "finetuned", "random")
_LATEX = str.maketrans({character: f"\\{character}" for character in "&%$#_{}"} | {"\\": r"\textbackslash{}"})


def table_rows(content: Mapping[str, Any], table: Table = "tasks") -> list[dict[str, Any]]:
    """Return one table of an edit as flat rows, every row with the same keys.

    Args:
        content: An ``edit.json``.
        table: ``"tasks"``: before and after, with intervals; ``"constraints"``; or ``"evaluations"``: every number of
            the search.
    """
    if table == "constraints":
        return [dict(constraint) for constraint in content["constraints"]]
    if table == "evaluations":
        names = list(dict.fromkeys(name for entry in content["evaluations"] for name in entry["coefficients"]))
        flat = []
        for entry in content["evaluations"]:
            kept = {key: entry.get(key) for key in ("model", "task", "split", "num_examples", "metric")}
            values = {key: entry.get(key) for key in ("value", "low", "high")}
            flat.append({**kept, **{name: entry["coefficients"].get(name) for name in names}, **values})
        return flat
    return [_task_row(name, task) for name, task in content["tasks"].items()]


def _task_row(name: str, task: Mapping[str, Any]) -> dict[str, Any]:
    row = {"task": name, **{key: task[key] for key in ("role", "split", "metric", "num_examples")}}
    for model in MODELS:
        found = task.get(model) or {}
        row |= {model: found.get("value"), f"{model}_low": found.get("low"), f"{model}_high": found.get("high")}
    comparison = task.get("comparison") or {}
    return {**row, "normalized": task.get("normalized"), **{k: comparison.get(k) for k in ("ratio", "p_value")}}


def all_rows(contents: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the tasks of several edits, with the run's name and coefficients before each row."""
    rows = []
    for run, content in contents.items():
        coefficients = ", ".join(f"{name} {value:g}" for name, value in content["coefficients"].items())
        first = {"run": run, "recipe": content["recipe"], "coefficients": coefficients, "holds": content["holds"]}
        rows += [{**first, **row} for row in table_rows(content)]
    return rows


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a header; what is not known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_latex(contents: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the tasks of edits as a LaTeX table (booktabs), values as in the terminal, edited ones with interval.

    Example:
        >>> print(_line(["50% & more", "a_b"]))
        50\\% \\& more & a\\_b \\\\
    """
    head = ["run", "task", "role", "metric", "base", "fine-tuned", "edited", "random"]
    lines = [f"\\begin{{tabular}}{{{'l' * 4 + 'r' * 4}}}", "\\toprule", _line(head), "\\midrule"]
    for run, content in contents.items():
        for name, task in content["tasks"].items():
            values = [_value(task, label) for label in ("base", "finetuned", "edited", "random")]
            lines.append(_line([run, name, task["role"], task["metric"], *values]))
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _value(task: Mapping[str, Any], label: str) -> str:
    found = task.get(label)
    if not found:
        return "–"
    shown = number(found["value"], task["metric"])
    if label != "edited" or found.get("low") is None:
        return shown
    return f"{shown} ({number(found['low'], task['metric'])}–{number(found['high'], task['metric'])})"


def _line(cells: Iterable[str]) -> str:
    return " & ".join(cell.translate(_LATEX) for cell in cells) + r" \\"
