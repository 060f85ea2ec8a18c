"""Charts of what the targets gain for what a control loses."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from tva.report.front import front, id_of
from tva.report.series import SCALING, Content, axes, curve, number, points, symbol
from tva.report.vega import MARK, PALETTE, Chart, by_metric, known, make_row, make_spec, quantity, tooltip


def planes(content: Content) -> Iterator[Chart]:
    """What the targets gain for what a control loses: one chart a control, those under a constraint first."""
    constrained = {constraint["task"] for constraint in content["constraints"]}
    controls = [task for task, entry in content["tasks"].items() if entry["role"] == "control"]
    controls.sort(key=lambda task: task not in constrained)
    for metric, tasks in by_metric(content).items():
        targets = [task for task in tasks if content["tasks"][task]["role"] == "target"]
        for control in controls[:4] if targets else []:
            yield _plane(content, control, targets, metric, f"plane-{metric}-{control}")


def _plane(content: Content, control: str, targets: Sequence[str], metric: str, name: str) -> Chart:
    kept = content["tasks"][control]
    below = kept["metric"]
    tried, tested, table, undominated = [], [], [], []
    for target in targets:
        for row in _tried(content, target, control, metric):
            tried.append(row)
            undominated += [row] if row["split"] != "validation" else []
            table.append((target, row["split"], row["at"], row["shown"], row["shown_x"]))
        entry = content["tasks"][target]
        for label in ("base", "edited", "random"):
            if label in entry and label in kept:
                row = make_row(entry[label], metric, task=target, x=kept[label]["value"], at=label, model=label)
                row |= {"x_low": kept[label].get("low"), "x_high": kept[label].get("high")}
                tested.append(row | {"shown_x": number(kept[label]["value"], below)})
                values = number(entry[label]["value"], metric), number(kept[label]["value"], below)
                table.append((target, entry["split"], label, *values))
    color = {"field": "task", "type": "nominal", "sort": list(targets)}
    color["scale"] = {"domain": list(targets), "range": PALETTE[: len(targets)]}
    color["legend"] = {"columns": 2} if len(targets) > 1 else None
    x = quantity("x", f"{control} {below} (control)", below)
    y = quantity("value", f"{targets[0] if len(targets) == 1 else 'targets'} {metric}", metric)
    tips = tooltip(("task", "task"), ("at", "at"), ("shown", metric), ("shown_x", f"{control} {below}"))
    shapes = {
        "field": "model",
        "type": "nominal",
        "scale": {"domain": ["base", "edited", "random"], "range": ["circle", "diamond", "cross"]},
        "legend": {"columns": 3, "symbolFillColor": "transparent", "symbolStrokeColor": "currentColor"},
    }
    layers = _bounds(content, control, x)
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
        ring = {"type": "point", "filled": False, "size": 90, "strokeWidth": 1.2, "aria": False}
        layers.append(
            {
                "data": {"values": undominated},
                "mark": ring,
                "encoding": {"x": x, "y": y, "color": color, "tooltip": tips},
            }
        )
    error = {"type": "rule", "strokeWidth": 1.5, "aria": False}
    up = {"mark": error, "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}}}
    across = {"mark": error, "encoding": {"y": y, "x": {**x, "field": "x_low"}, "x2": {"field": "x_high"}}}
    layers += [
        *known("low", tested, {"color": color}, up),
        *known("x_low", tested, {"color": color}, across),
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
        + f" on {kept['split']} data. {'; '.join(bounds) or 'No constraint is set on this control'}."
        + (f" Rings: the {len(undominated)} of {len(tried)} coefficients on the Pareto front." if tried else ""),
        make_spec(300, layers, resolve={"scale": {"shape": "shared"}}),
        ("task", "split", "at", metric, f"{control} {below}"),
        table,
    )


def _tried(content: Content, target: str, control: str, metric: str) -> Iterator[dict[str, Any]]:
    """Yield a row for every coefficient under which both tasks were evaluated on validation data."""
    at = {json.dumps(point.coefs, sort_keys=True): point for point in points(content, control)}
    axis, below = next(iter(axes(content)), SCALING), content["tasks"][control]["metric"]
    best = {id_of(point) for point, _ in front(content, target, control)}
    for place, (coef, point) in enumerate(curve(content, target, axis)):
        other = at.get(json.dumps(point.coefs, sort_keys=True))
        if other is not None:
            row = make_row(point, metric, task=target, x=other.value, at=f"{symbol(axis)} = {coef:g}", order=place)
            split = "validation, on the front" if id_of(point) in best else "validation"
            yield row | {"shown_x": number(other.value, below), "split": split}


def _bounds(content: Content, control: str, x: dict[str, Any]) -> list[dict[str, Any]]:
    metric, layers = content["tasks"][control]["metric"], []
    for c in content["constraints"]:
        if c["task"] == control and c.get("metric", metric) == metric:
            line = {"values": [{"x": c["bound"], "text": c["text"]}]}
            rule = {"type": "rule", "strokeDash": [5, 3], "strokeWidth": 1.5, "color": "#cf222e"}
            layers.append({"data": line, "mark": rule, "encoding": {"x": x, "tooltip": tooltip(("text", "must hold"))}})
    return layers
