"""Charts of one edit, and of several, as Vega-Lite specifications; each with its numbers as a table and a sentence.

A specification is plain JSON, drawn by the library in the page; https://vega.github.io/vega-lite/docs/ documents it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tva.page.series import (
    SCALING,
    Content,
    Point,
    axes,
    coefficient,
    curve,
    interval,
    is_share,
    number,
    points,
    symbol,
)

PALETTE = ["#2f6fde", "#d1661f", "#14936a", "#a84fb0", "#a98600", "#1f9bc4", "#d04a6a", "#737a85"]
MODELS = {"base": "#737a85", "edited": "#2f6fde", "fine-tuned": "#14936a", "random": "#d1661f"}
CONFIG = {
    "background": "transparent",
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
    "axis": {
        "tickCount": 7,
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "gridColor": "currentColor",
        "gridOpacity": 0.12,
        "domainColor": "currentColor",
        "domainOpacity": 0.4,
        "tickColor": "currentColor",
        "tickOpacity": 0.4,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 130,
    },
    "legend": {
        "labelColor": "currentColor",
        "labelFontSize": 12,
        "labelLimit": 220,
        "title": None,
        "orient": "top",
        "direction": "horizontal",
        "columns": 2,
        "symbolSize": 70,
        "symbolOpacity": 1,
    },
    "text": {"color": "currentColor", "fontSize": 12},
    "rule": {"color": "currentColor"},
    "view": {"stroke": None},
    "range": {"category": PALETTE},
}
MARK = {"type": "point", "filled": True, "size": 170, "stroke": "white", "strokeWidth": 1, "opacity": 1}  # of test data
DIVERGING, SEQUENTIAL = {"scheme": "blueorange", "domain": [-1, 1]}, {"scheme": "blues", "domainMin": 0}


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: Identifies it in the page.
        title: Its heading.
        text: What it shows, for those who do not see it.
        spec: Vega-Lite, without a width.
        columns: Headings of its numbers.
        rows: Its numbers, formatted.
    """

    name: str
    title: str
    text: str
    spec: Mapping[str, Any]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def _spec(height: Any, layers: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": height,
        "config": CONFIG,
        "layer": list(layers),
        **more,
    }


def _quantity(field: str, title: str | None, metric: str = "", **more: Any) -> dict[str, Any]:
    axis = {"title": title, "format": "~%" if is_share(metric) else "~g"}
    return {"field": field, "type": "quantitative", "scale": {"zero": False, "nice": True}, "axis": axis, **more}


def _known(
    field: str, rows: Sequence[Mapping[str, Any]], encoding: Mapping[str, Any], layer: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Make a layer of the rows that have a field, such as an interval; none where no row has it."""
    having = [row for row in rows if row.get(field) is not None]
    made = {"data": {"values": having}, **layer, "encoding": {**encoding, **layer["encoding"]}}
    return [made] if having else []


def _label(content: Content, task: str) -> str:
    return f"{task} ({content['tasks'][task]['role']})"


def _by_metric(content: Content) -> dict[str, list[str]]:
    """Group the tasks by the metric that is reported; each has an axis of its own."""
    found: dict[str, list[str]] = {}
    for task, entry in content["tasks"].items():
        found.setdefault(entry["metric"], []).append(task)
    return found


def _row(point: Point | Mapping[str, Any], metric: str, **more: Any) -> dict[str, Any]:
    """Make one row of a chart's data."""
    entry = vars(point) if isinstance(point, Point) else point
    shown = " ".join(filter(None, (number(entry["value"], metric), interval(entry, metric))))
    return {"value": entry["value"], "low": entry.get("low"), "high": entry.get("high"), "shown": shown, **more}


def _tooltip(*fields: tuple[str, str]) -> list[dict[str, str]]:
    return [{"field": field, "title": title} for field, title in fields]


# --- the curve


def curves(content: Content) -> Iterator[Chart]:
    """Each metric against the coefficient, on the data it was chosen on, with the choice and its test result."""
    searched = axes(content)
    if len(searched) != 1:
        return
    (axis,) = searched
    chosen = content["coefficients"].get(axis)
    for position, (metric, tasks) in enumerate(_by_metric(content).items()):
        lines = {task: curve(content, task, axis) for task in tasks}
        lines = {task: line for task, line in lines.items() if len(line) > 1}
        if lines:
            yield _curves(content, axis, chosen, metric, lines, f"curve-{position}")


def _curves(
    content: Content,
    axis: str,
    chosen: Any,
    metric: str,
    lines: Mapping[str, Sequence[tuple[float, Point]]],
    name: str,
) -> Chart:
    letter = symbol(axis)
    tried, tested, sentences = [], [], []
    for task, line in lines.items():
        entry = content["tasks"][task]
        label = {"task": _label(content, task), "role": entry["role"]}
        tried += [_row(point, metric, coef=at, n=point.num_examples, **label) for at, point in line]
        if entry["split"] == "test":
            tested.append(_row(entry["edited"], metric, coef=chosen, n=entry["num_examples"], **label))
        (first, start), (last, end) = line[0], line[-1]
        sentences.append(
            f"{task} goes from {number(start.value, metric)} at {letter} = {first:g} to {number(end.value, metric)} at "
            f"{last:g}"
        )
    bounds = [
        {"task": _label(content, c["task"]), "value": c["val_bound"], "shown": number(c["val_bound"], metric)}
        for c in content["constraints"]
        if c["task"] in lines and c.get("metric") == metric and c.get("val_bound") is not None
    ]
    order = [_label(content, task) for task in lines]
    color = {"field": "task", "type": "nominal", "sort": order, "legend": {"columns": 2}}
    color["scale"] = {"domain": order, "range": [PALETTE[number % len(PALETTE)] for number in range(len(order))]}
    fades = {"condition": {"param": "pick", "value": 1}, "value": 0.15}
    x = _quantity("coef", f"{letter}, chosen on validation data", scale={"nice": False})
    y = _quantity("value", metric, metric)
    dash = {
        "field": "role",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": ["target", "control"], "range": [[1, 0], [5, 3]]},
    }
    tips = _tooltip(("task", "task"), ("coef", letter), ("shown", metric), ("n", "examples"))
    band = {
        "mark": {"type": "area", "opacity": 0.16, "aria": False},
        "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
    }
    layers: list[dict[str, Any]] = [
        *_known("low", tried, {"x": x, "color": color}, band),
        {
            "data": {"values": tried},
            "encoding": {"x": x, "color": color},
            "layer": [
                {
                    "mark": {"type": "line", "strokeWidth": 2, "aria": False},
                    "encoding": {"y": y, "strokeDash": dash, "opacity": fades},
                },
                {
                    "params": [{"name": "pick", "select": {"type": "point", "fields": ["task"]}, "bind": "legend"}],
                    "mark": {"type": "point", "filled": True, "size": 36},
                    "encoding": {"y": y, "opacity": fades, "tooltip": tips},
                },
            ],
        },
    ]
    if chosen is not None:
        at = {"values": [{"coef": chosen, "label": f"chosen: {letter} = {coefficient(chosen)}"}]}
        right = chosen > sum(extent := [min(r["coef"] for r in tried), max(r["coef"] for r in tried)]) / 2
        layers += [
            {"data": at, "mark": {"type": "rule", "strokeDash": [3, 3], "opacity": 0.7}, "encoding": {"x": x}},
            {
                "data": at,
                "mark": {
                    "type": "text",
                    "align": "right" if right and extent[1] > extent[0] else "left",
                    "dx": -6 if right else 6,
                    "y": -6,
                },
                "encoding": {"x": x, "text": {"field": "label"}},
            },
        ]
    if tested and chosen is not None:
        bar = {
            "mark": {"type": "rule", "strokeWidth": 2, "aria": False},
            "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
        }
        layers += _known("low", tested, {"x": x, "color": color}, bar)
        layers.append(
            {
                "data": {"values": tested},
                "mark": {**MARK, "shape": "diamond"},
                "encoding": {
                    "x": x,
                    "y": y,
                    "color": color,
                    "tooltip": _tooltip(("task", "on test data"), ("shown", metric), ("n", "examples")),
                },
            }
        )
    if bounds:
        layers.append(
            {
                "data": {"values": bounds},
                "mark": {"type": "rule", "strokeDash": [2, 4], "strokeWidth": 2},
                "encoding": {
                    "y": y,
                    "color": color,
                    "tooltip": _tooltip(("task", "bound of"), ("shown", metric)),
                },
            }
        )
    return Chart(
        name,
        f"{metric} against {letter}",
        f"On validation data {'; '.join(sentences)}. Chosen: {letter} = {coefficient(chosen)}.",
        _spec(300, layers),
        ("task", letter, metric, "95 % interval", "examples"),
        [
            (task, f"{at:g}", number(point.value, metric), interval(point, metric), f"{point.num_examples:,}")
            for task, line in lines.items()
            for at, point in line
        ],
    )


def coefficient_map(content: Content) -> Iterator[Chart]:
    """The targets' metric over two coefficients that were searched together."""
    searched = axes(content)
    targets = [task for task, entry in content["tasks"].items() if entry["role"] == "target"]
    task = next((task for task in targets if len(points(content, task)) > 2), None)
    if len(searched) < 2 or task is None:
        return
    first, second = searched[:2]
    metric = content["tasks"][task]["metric"]
    tried = [point for point in points(content, task) if not point.is_base]
    rows = [_row(p, metric, x=p.coefs[first], y=p.coefs[second], n=p.num_examples) for p in tried]
    x, y = (_quantity(field, symbol(name), scale={"zero": False}) for field, name in (("x", first), ("y", second)))
    color = {
        "field": "value",
        "type": "quantitative",
        "scale": {"scheme": "viridis", "zero": False},
        "legend": {"title": f"{task} {metric}", "format": "~%" if is_share(metric) else "~g", "gradientLength": 160},
    }
    tips = _tooltip(("x", symbol(first)), ("y", symbol(second)), ("shown", metric), ("n", "examples"))
    layers = [
        {
            "data": {"values": rows},
            "mark": {"type": "circle", "size": 90, "opacity": 0.95},
            "encoding": {"x": x, "y": y, "color": color, "tooltip": tips},
        },
        {
            "data": {"values": [{"x": content["coefficients"].get(first), "y": content["coefficients"].get(second)}]},
            "mark": {"type": "point", "size": 320, "strokeWidth": 2.5, "color": "currentColor"},
            "encoding": {"x": x, "y": y},
        },
    ]
    others = f" ({len(searched)} coefficients were searched; two are drawn)" if len(searched) > 2 else ""
    values = [point.value for point in tried]
    yield Chart(
        "map",
        f"{task} {metric} over {symbol(first)} and {symbol(second)}",
        f"{len(tried)} choices of {' and '.join(map(symbol, searched))} were tried on validation data{others}; {task} "
        f"ranges from {number(min(values), metric)} to {number(max(values), metric)}. The ring is the choice.",
        _spec(320, layers),
        (*map(symbol, searched), metric, "95 % interval"),
        [
            (*(coefficient(p.coefs[name]) for name in searched), number(p.value, metric), interval(p, metric))
            for p in tried
        ],
    )


# --- the plane of targets and controls


def planes(content: Content) -> Iterator[Chart]:
    """What the targets gain for what a control loses: one chart a control, those under a constraint first."""
    constrained = {constraint["task"] for constraint in content["constraints"]}
    controls = [task for task, entry in content["tasks"].items() if entry["role"] == "control"]
    controls.sort(key=lambda task: task not in constrained)
    for metric, tasks in _by_metric(content).items():
        targets = [task for task in tasks if content["tasks"][task]["role"] == "target"]
        for control in controls[:4] if targets else []:
            yield _plane(content, control, targets, metric, f"plane-{metric}-{control}")


def _plane(content: Content, control: str, targets: Sequence[str], metric: str, name: str) -> Chart:
    kept = content["tasks"][control]
    below = kept["metric"]
    at = {json.dumps(point.coefs, sort_keys=True): point for point in points(content, control)}
    axis = next(iter(axes(content)), SCALING)
    tried, tested, table = [], [], []
    for target in targets:
        entry = content["tasks"][target]
        for place, (coef, point) in enumerate(curve(content, target, axis)):
            other = at.get(json.dumps(point.coefs, sort_keys=True))
            if other is None:
                continue
            shown = f"{symbol(axis)} = {coef:g}"
            tried.append(_row(point, metric, task=target, x=other.value, at=shown, order=place) | {"model": "tried"})
            tried[-1]["shown_x"] = number(other.value, below)
            table.append((target, "validation", shown, number(point.value, metric), number(other.value, below)))
        for label in ("base", "edited", "random"):
            if label in entry and label in kept:
                row = _row(entry[label], metric, task=target, x=kept[label]["value"], at=label, model=label)
                row |= {"x_low": kept[label].get("low"), "x_high": kept[label].get("high")}
                tested.append(row | {"shown_x": number(kept[label]["value"], below)})
                values = number(entry[label]["value"], metric), number(kept[label]["value"], below)
                table.append((target, entry["split"], label, *values))
    color = {"field": "task", "type": "nominal", "sort": list(targets)}
    color["scale"] = {"domain": list(targets), "range": PALETTE[: len(targets)]}
    color["legend"] = {"columns": 2} if len(targets) > 1 else None
    x = _quantity("x", f"{control} {below} (control)", below)
    y = _quantity("value", f"{targets[0] if len(targets) == 1 else 'targets'} {metric}", metric)
    tips = _tooltip(("task", "task"), ("at", "at"), ("shown", metric), ("shown_x", f"{control} {below}"))
    shapes = {
        "field": "model",
        "type": "nominal",
        "scale": {"domain": ["base", "edited", "random"], "range": ["circle", "diamond", "cross"]},
        "legend": {"columns": 3, "symbolFillColor": "transparent", "symbolStrokeColor": "currentColor"},
    }
    layers: list[dict[str, Any]] = []
    for c in content["constraints"]:
        if c["task"] == control and c.get("metric", below) == below:
            line = {"values": [{"x": c["bound"], "text": c["text"]}]}
            rule = {"type": "rule", "strokeDash": [5, 3], "strokeWidth": 1.5, "color": "#cf222e"}
            layers.append(
                {"data": line, "mark": rule, "encoding": {"x": x, "tooltip": _tooltip(("text", "must hold"))}}
            )
    if tried:
        layers.append(
            {
                "data": {"values": tried},
                "encoding": {"x": x, "y": y, "color": color, "order": {"field": "order"}},
                "layer": [
                    {"mark": {"type": "line", "strokeWidth": 1.5, "opacity": 0.6, "aria": False}},
                    {
                        "mark": {"type": "point", "filled": True, "size": 26, "opacity": 0.7},
                        "encoding": {"tooltip": tips},
                    },
                ],
            }
        )
    error = {"type": "rule", "strokeWidth": 1.5, "aria": False}
    up = {"mark": error, "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}}}
    across = {"mark": error, "encoding": {"y": y, "x": {**x, "field": "x_low"}, "x2": {"field": "x_high"}}}
    layers += [
        *_known("low", tested, {"color": color}, up),
        *_known("x_low", tested, {"color": color}, across),
        {
            "data": {"values": tested},
            "mark": MARK,
            "encoding": {"x": x, "y": y, "color": color, "shape": shapes, "tooltip": tips},
        },
    ]
    before, after = number(kept["base"]["value"], below), number(kept["edited"]["value"], below)
    bounds = [
        f"{c['text']} {'holds' if c['holds'] else 'fails'}" for c in content["constraints"] if c["task"] == control
    ]
    return Chart(
        name,
        f"{', '.join(targets)} against {control}",
        f"{control} goes from {before} to {after} while "
        + "; ".join(
            f"{target} goes from {number(content['tasks'][target]['base']['value'], metric)} to "
            f"{number(content['tasks'][target]['edited']['value'], metric)}"
            for target in targets
        )
        + f" on {kept['split']} data. {'; '.join(bounds) or 'No constraint is set on this control'}.",
        _spec(300, layers, resolve={"scale": {"shape": "shared"}}),
        ("task", "split", "at", metric, f"{control} {below}"),
        table,
    )


# --- before and after


def dots(content: Content) -> Iterator[Chart]:
    """Every task before and after, with its fine-tuned model and the random vector."""
    for position, (metric, tasks) in enumerate(_by_metric(content).items()):
        rows = [
            _row(content["tasks"][task][key], metric, task=task, model=label)
            for task in tasks
            for key, label in (
                ("base", "base"),
                ("edited", "edited"),
                ("finetuned", "fine-tuned"),
                ("random", "random"),
            )
            if key in content["tasks"][task]
        ]
        bounds = [
            {"task": c["task"], "value": c["bound"], "shown": c["text"], "model": "base"}
            for c in content["constraints"]
            if c["task"] in tasks and c.get("metric", metric) == metric
        ]
        present = [label for label in MODELS if any(row["model"] == label for row in rows)]
        yield _dots(
            f"dots-{position}",
            f"{metric} before and after",
            f"On {content['tasks'][tasks[0]]['split']} data: "
            + "; ".join(f"{r['task']}, {r['model']}: {r['shown']}" for r in rows)
            + ".",
            metric,
            rows,
            bounds,
            ("task", list(tasks)),
            {label: MODELS[label] for label in present},
        )


def _dots(
    name: str,
    title: str,
    text: str,
    metric: str,
    rows: Sequence[Mapping[str, Any]],
    bounds: Sequence[Mapping[str, Any]],
    group: tuple[str, Sequence[str]],
    colors: Mapping[str, str],
) -> Chart:
    field, order = group
    x = _quantity("value", metric, metric)
    offset = {"field": "model", "type": "nominal", "sort": list(colors), "scale": {"paddingOuter": 0.6}}
    y = {"field": field, "type": "nominal", "sort": list(order), "axis": {"title": None, "ticks": False}}
    color = {
        "field": "model",
        "type": "nominal",
        "scale": {"domain": list(colors), "range": list(colors.values())},
        "legend": {"columns": 4},
    }
    tips = _tooltip((field, field), ("model", "model"), ("shown", metric))
    bar = {
        "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.75, "aria": False},
        "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
    }
    layers: list[dict[str, Any]] = [
        *_known("low", rows, {"y": y, "yOffset": offset, "color": color}, bar),
        {
            "data": {"values": list(rows)},
            "mark": {"type": "point", "filled": True, "size": 75, "opacity": 1},
            "encoding": {"y": y, "yOffset": offset, "color": color, "x": x, "tooltip": tips},
        },
    ]
    if bounds:
        layers.append(
            {
                "data": {"values": list(bounds)},
                "mark": {"type": "tick", "thickness": 2, "color": "#cf222e", "size": 15 * len(colors)},
                "encoding": {"y": y, "x": x, "tooltip": _tooltip(("shown", "must hold"))},
            }
        )
    return Chart(
        name,
        title,
        text,
        _spec(len(order) * (15 * len(colors) + 12), layers),
        (field, "model", metric, "95 % interval"),
        [(r[field], r["model"], number(r["value"], metric), interval(r, metric)) for r in rows],
    )


# --- matrices


def matrix(name: str, title: str, found: Mapping[str, Any], text: str, signed: bool) -> Chart:
    """One number for every pair of names, such as cosines."""
    rows = [
        {"row": row, "column": column, "value": value, "shown": number(value)}
        for row, cells in found["rows"].items()
        for column, value in cells.items()
    ]
    order = list(found["rows"])
    columns = list(dict.fromkeys(row["column"] for row in rows))
    x = {
        "field": "column",
        "type": "nominal",
        "sort": columns,
        "axis": {"title": None, "labelAngle": -30, "orient": "top"},
    }
    y = {"field": "row", "type": "nominal", "sort": order, "axis": {"title": None}}
    peak = max((row["value"] for row in rows if row["value"] is not None), default=1.0)
    dark = "abs(datum.value) > 0.6" if signed else f"datum.value > {0.6 * peak:g}"
    ink = {"condition": {"test": dark, "value": "white"}, "value": "#111"}
    color = {
        "field": "value",
        "type": "quantitative",
        "scale": DIVERGING if signed else SEQUENTIAL,
        "legend": None,
    }
    layers = [
        {
            "mark": {"type": "rect", "cornerRadius": 2},
            "encoding": {"color": color, "tooltip": _tooltip(("row", "row"), ("column", "column"), ("shown", title))},
        },
        {"mark": {"type": "text", "aria": False}, "encoding": {"text": {"field": "shown"}, "color": ink}},
    ]
    return Chart(
        name,
        title,
        text,
        _spec({"step": 38}, layers, data={"values": rows}, encoding={"x": x, "y": y}),
        ("", *columns),
        [(row, *(number(cells.get(column)) for column in columns)) for row, cells in found["rows"].items()],
    )


# --- several runs


def compared(contents: Mapping[str, Content]) -> Iterator[Chart]:
    """For every task that several runs report the base and the edited model of each."""
    reported = [(task, c["tasks"][task]["metric"]) for c in contents.values() for task in c["tasks"]]
    shared = [pair for pair in dict.fromkeys(reported) if reported.count(pair) > 1]
    for position, (task, metric) in enumerate(shared):
        rows = [
            _row(content["tasks"][task][label], metric, run=run, model=label)
            for run, content in contents.items()
            if content["tasks"].get(task, {}).get("metric") == metric
            for label in ("base", "edited")
        ]
        yield _dots(
            f"task-{position}",
            f"{task} {metric}",
            f"{task}: " + "; ".join(f"{r['run']}, {r['model']}: {r['shown']}" for r in rows) + ".",
            metric,
            rows,
            [],
            ("run", list(contents)),
            {label: MODELS[label] for label in ("base", "edited")},
        )
