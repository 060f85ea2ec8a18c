"""Assemble a page: its contents and their order; ``templates/`` holds the layout."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tva.report.audits import audit_tables
from tva.report.curves import coefficient_map, curves
from tva.report.render import draw, library
from tva.report.scores import compared, dots, matrix
from tva.report.series import Content, axes, coefficient, formula, interval, is_feasible, number, symbol
from tva.report.table import Column, cells
from tva.report.tradeoffs import planes
from tva.report.vega import Chart

if TYPE_CHECKING:
    from jinja2 import Environment

ABOUT = {
    "cosine": "The angle between every pair of task vectors: 0 is a right angle, 1 the same direction.",
    "signs": "The share of elements that two task vectors move in opposite directions, among those that both move.",
    "disentanglement": "The share of predictions that the other vector changes, over a square of coefficients.",
    "norms": "The Euclidean norm of each task vector, and of the edit, by block of layers.",
    "linearity": "What the vectors' effects one by one would add up to, against what was measured.",
    "blame": "The metric when one block of layers is left out of the edit: which layers carry the effect.",
    "gradient_ascent": "Training on the target with the loss negated, stopped by the same constraints.",
    "average": "The uniform average of the fine-tuned models.",
    "endpoints": "Every fine-tuned model on every task.",
    "joint": "One model that was fine-tuned on all tasks together.",
    "relearn": "Whether what was forgotten comes back: the same few training steps from the edited model and the base.",
    "int8": "Whether it comes back when linear weights are rounded to 8-bit integers, one scale for each output.",
}
MATRICES = {"cosine": ("cosine of the task vectors", True), "signs": ("share of opposite signs", False)}
MATRICES |= {"disentanglement": ("disentanglement error", False)}


def edit_page(content: Content, notices: Sequence[str] = ()) -> str:
    """Make the page of one edit.

    Args:
        content: An ``edit.json``.
        notices: Shown before everything else.
    """
    extra = {**content["baselines"], **{k: v for k, v in content["diagnostics"].items() if k not in MATRICES}}
    extra |= audit_tables(content)
    return _render(
        "edit.html",
        title=formula(content),
        content=content,
        notices=notices,
        state=state_of(content),
        feasible=is_feasible(content),
        headline=list(_headline(content)),
        before=before_table(content),
        dots=list(dots(content)),
        curves=_searched(content),
        no_curve=_no_curve(content),
        planes=list(planes(content)),
        matrices=_matrices(content),
        extra={name: _table(found) for name, found in extra.items()},
        lineage=_lineage(content),
    )


def charts_of(content: Content) -> list[Chart]:
    """Return all charts of an edit's page, in its order."""
    return [*dots(content), *_searched(content), *planes(content), *_matrices(content)]


def _searched(content: Content) -> list[Chart]:
    return [*curves(content), *coefficient_map(content)]


def _matrices(content: Content) -> list[Chart]:
    diagnostics = {name: found for name, found in content["diagnostics"].items() if found.get("rows")}
    return [
        matrix(f"matrix-{name}", title, diagnostics[name], _matrix_text(name, diagnostics[name]), signed)
        for name, (title, signed) in MATRICES.items()
        if name in diagnostics
    ]


def comparison_page(contents: Mapping[str, Content], notices: Sequence[str] = ()) -> str:
    """Make the page of several edits side by side.

    Args:
        contents: An ``edit.json`` for every run, by the run's name.
        notices: Shown before everything else.
    """
    tasks = list(dict.fromkeys(task for content in contents.values() for task in content["tasks"]))
    rows = []
    for run, content in contents.items():
        cells = []
        for task in tasks:
            entry = content["tasks"].get(task)
            if entry is None:
                cells.append(None)
                continue
            metric = entry["metric"]
            cells.append(
                {
                    "metric": metric,
                    "base": number(entry["base"]["value"], metric),
                    "edited": number(entry["edited"]["value"], metric),
                    "interval": interval(entry["edited"], metric),
                    "role": entry["role"],
                }
            )
        rows.append(
            {"run": run, "content": content, "formula": formula(content), "state": state_of(content), "cells": cells}
        )
    return _render(
        "compare.html",
        title=f"{len(contents)} edits side by side",
        notices=[*differences(contents), *notices],
        tasks=tasks,
        rows=rows,
        charts=list(compared(contents)),
        lineages={run: _lineage(content) for run, content in contents.items()},
    )


def differences(contents: Mapping[str, Content]) -> Iterator[str]:
    """Yield how the runs differ besides their edits, which makes their numbers hard to compare."""
    bases = {run: content["base"]["fingerprint"] for run, content in contents.items()}
    if len(set(bases.values())) > 1:
        named = "; ".join(f"{run}: {(digest or 'unknown')[:12]}" for run, digest in bases.items())
        yield (f"These edits start from different bases ({named}): differences are not due to the edits only.")
    without = [run for run, content in contents.items() if not is_feasible(content)]
    if without:
        yield (
            f"No coefficient met the constraints of {' and '.join(without)}: those numbers are of the closest, on "
            f"validation data, and no edit was made."
        )
    tasks = dict.fromkeys(task for content in contents.values() for task in content["tasks"])
    for task in tasks:
        having = {run: content for run, content in contents.items() if task in content["tasks"]}
        metrics = {content["tasks"][task]["metric"] for content in having.values()}
        digests = {content.get("data", {}).get(task, {}).get("test") for content in having.values()} - {None}
        if len(metrics) > 1:
            yield f"{task} is measured by {' and '.join(sorted(metrics))}: those numbers cannot be compared."
        if len(digests) > 1:
            yield f"{task} was not evaluated on the same test data in all runs."


def state_of(content: Content) -> dict[str, str]:
    """Return the verdict in one word, with the color it is shown in."""
    if not is_feasible(content):
        return {"name": "refused", "word": "No feasible coefficient", "sign": "✕"}
    if not content["holds"]:
        return {"name": "refused", "word": "Refused", "sign": "✕"}
    if not content["constraints"]:
        return {"name": "open", "word": "Not checked", "sign": "○"}
    return {"name": "holds", "word": "Holds", "sign": "✓"}


def _headline(content: Content) -> Iterator[dict[str, str]]:
    for task, entry in sorted(content["tasks"].items(), key=lambda pair: pair[1]["role"] != "target"):
        metric = entry["metric"]
        before, after = entry["base"]["value"], entry["edited"]["value"]
        yield {
            "task": task,
            "role": entry["role"],
            "metric": metric,
            "before": number(before, metric),
            "after": number(after, metric),
            "interval": interval(entry["edited"], metric),
        }


def before_table(content: Content) -> dict[str, Any]:
    """Return every task before and after: what the page, the terminal and a notebook show.

    Returns:
        ``heads`` of the numbers; ``mean``, a sentence on the mean over targets, or empty; and for every task a row with
        its ``cells``: pairs of a number and its small print.
    """
    heads = {"base": "base", "edited": "edited", "finetuned": "fine-tuned", "random": "random vector"}
    present = {label for entry in content["tasks"].values() for label in heads if label in entry}
    columns = [_score(label, head) for label, head in heads.items() if label in present]
    columns.append(
        Column(
            "normalized",
            lambda entry: number(entry["normalized"], "accuracy"),
            small=lambda entry: interval(ends(entry), "accuracy"),
        )
    )
    columns.append(Column("of base", _ratio, small=_ratio_interval))
    rows = []
    for (task, entry), shown in zip(
        content["tasks"].items(), cells(columns, list(content["tasks"].values())), strict=True
    ):
        constraints = [{**c, "shown": _constraint(c)} for c in content["constraints"] if c["task"] == task]
        words = {key: entry[key] for key in ("role", "metric", "split")}
        rows.append({"task": task, **words, "n": count_of(entry), "cells": shown, "constraints": constraints})
    return {"heads": [column.heading for column in columns], "rows": rows, "mean": mean_of(content)}


def ends(entry: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the ends of the interval of a task's normalized score."""
    return {"low": entry.get("normalized_low"), "high": entry.get("normalized_high")}


def mean_of(content: Content) -> str:
    """Return a sentence on the mean over the targets of the normalized score, where there is one."""
    found = content.get("means", {}).get("normalized")
    if not found:
        return ""
    mean = f"{number(found['value'], 'accuracy')} {interval(found, 'accuracy')}".rstrip()
    return f"normalized, mean of {', '.join(found['tasks'])}: {mean}"


def count_of(entry: Mapping[str, Any]) -> str:
    """Return how many examples a task's numbers are of, and of how many groups where these are the unit."""
    groups = f" in {entry['num_groups']:,} groups" if entry.get("num_groups") else ""
    return f"{entry['num_examples']:,}{groups}" if entry["num_examples"] else "–"


def _score(label: str, heading: str) -> Column:
    return Column(
        heading,
        lambda entry: number(entry[label]["value"], entry["metric"]) if label in entry else "–",
        small=lambda entry: interval(entry[label], entry["metric"]) + _chance(entry, label) if label in entry else "",
    )


def _chance(entry: Mapping[str, Any], label: str) -> str:
    if label != "edited" or entry.get("chance") is None:
        return ""
    below = ", below it: inverted, not gone" if entry["below_chance"] else ""
    return f" chance {number(entry['chance'], entry['metric'])}{below}"


def _ratio(entry: Mapping[str, Any]) -> str:
    before, after = entry["base"]["value"], entry["edited"]["value"]
    found = (entry["comparison"] or {}).get("ratio")
    return number(after / before if found is None and before > 0 else found, "accuracy")


def _ratio_interval(entry: Mapping[str, Any]) -> str:
    found = entry["comparison"] or {}
    within = interval({"low": found.get("ratio_low"), "high": found.get("ratio_high")}, "accuracy")
    p_value = found.get("p_value")
    return within if p_value is None else f"{within} p = {p_value:.2g}"


def _constraint(constraint: Mapping[str, Any]) -> str:
    metric = constraint.get("metric", constraint["text"].split("/")[1].split()[0])
    limit = constraint["limit"]
    shown = f"{number(constraint['value'], metric)} against {number(constraint['bound'], metric)}"
    return shown if limit is None else f"{shown}, at its confidence limit {number(limit, metric)}"


def _no_curve(content: Content) -> str:
    searched = axes(content)
    if content["rule"] == "given":
        return f"λ = {coefficient(content['coefficients']['scaling_coef'])} was given, so nothing was searched."
    if not searched:
        return f"{content['search']['strategy']} evaluated a single choice of coefficients, so there is no curve."
    return f"{' and '.join(map(symbol, searched))} were searched together; the numbers are in edit.json."


def _matrix_text(name: str, found: Mapping[str, Any]) -> str:
    pairs = [
        (value, a, b)
        for place, (a, cells) in enumerate(found["rows"].items())
        for b, value in list(cells.items())[(place + 1 if name != "disentanglement" else 0) :]
        if value is not None
    ]
    if not pairs:
        return ABOUT[name]
    (low, *first), (high, *second) = min(pairs), max(pairs)
    return (
        f"{ABOUT[name]} Smallest {number(low)} ({first[0]}, {first[1]}), largest {number(high)} "
        f"({second[0]}, {second[1]})."
    )


def _table(found: Mapping[str, Any]) -> dict[str, Any]:
    rows = found.get("rows", {})
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = {
        name: [cell if isinstance(cell := row.get(column), str) else number(cell) for column in columns]
        for name, row in rows.items()
    }
    return {"columns": columns, "rows": cells, "reason": found.get("reason", "")}


def _shared(content: Content, task: str, split: str) -> str:
    count = content["sizes"].get(task, {}).get("shared") if split == "test" else None
    return f", {count:,} of them among its validation examples" if count else ""


def _lineage(content: Content) -> dict[str, Any]:
    base = content["base"]
    inputs = [("base", base["path"] or f"the weights of {content.get('model', 'the model')}", base["fingerprint"], "")]
    for name, vector in content["vectors"].items():
        step = f", step {vector['step']:,}" if vector.get("step") is not None else ""
        inputs.append((name, vector["path"], vector["fingerprint"], f"norm {vector['norm']:.4g}{step}"))
    if content.get("edited"):
        inputs.append(("edited", content["edited"]["path"], content["edited"]["fingerprint"], "written by this edit"))
    data = [
        (
            task,
            split + (f" ({revision})" if (revision := content["tasks"][task].get("revision")) else ""),
            f"{content['sizes'].get(task, {}).get(split, 0):,}{_shared(content, task, split)}",
            digest,
        )
        for task, splits in content.get("data", {}).items()
        for split, digest in splits.items()
    ]
    search = content["search"]
    facts = {
        "rule": content["rule"],
        "objective": content["objective"],
        "confidence": content["confidence"],
        "search": search["strategy"],
        "examples evaluated": f"{search['num_forward']:,}",
        "evaluations reused": search["num_reused"] or None,
        "BatchNorm statistics": content["statistics"],
        **{name: value for name, value in content.get("names", {}).items() if name in ("include", "exclude")},
        "seed": content["seed"],
        "seed of the random vector": content["random_seed"],
        "model": content.get("model"),
        "precision": content.get("precision"),
        "versions": ", ".join(f"{name} {version}" for name, version in content["versions"].items()),
        "made": content.get("created"),
    }
    facts = {name: ", ".join(value) if isinstance(value, list) else value for name, value in facts.items()}
    facts = {name: value for name, value in facts.items() if value is not None}
    return {"inputs": inputs, "data": data, "facts": facts, "command": content["command"]}


@functools.cache
def environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("tva.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(template: str, **facts: Any) -> str:
    page = environment().get_template(template)
    return page.render(**facts, draw=_drawn, about=ABOUT, library=library) + "\n"


def _drawn(chart: Chart) -> str:
    return draw(chart.spec, chart.name)
