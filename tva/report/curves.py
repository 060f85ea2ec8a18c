"""Charts of the search: each metric against the coefficient, or over two of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tva.report.series import (
    Content,
    Point,
    axes,
    coefficient,
    curve,
    interval,
    is_feasible,
    is_share,
    number,
    points,
    symbol,
)
from tva.report.vega import MARK, PALETTE, Chart, by_metric, known, label_of, make_row, make_spec, quantity, tooltip


def curves(content: Content) -> Iterator[Chart]:
    """Each metric against the coefficient, on the data it was chosen on, with the choice and its test result."""
    searched = axes(content)
    if len(searched) != 1:
        return
    (axis,) = searched
    chosen = content["coefficients"].get(axis)
    for position, (metric, tasks) in enumerate(by_metric(content).items()):
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
    letter, word = symbol(axis), "chosen" if is_feasible(content) else "closest"
    tried, tested, sentences = [], [], []
    for task, line in lines.items():
        entry = content["tasks"][task]
        label = {"task": label_of(content, task), "role": entry["role"]}
        tried += [make_row(point, metric, coef=at, n=point.num_examples, **label) for at, point in line]
        if entry["split"] == "test":
            tested.append(make_row(entry["edited"], metric, coef=chosen, n=entry["num_examples"], **label))
        (first, start), (last, end) = line[0], line[-1]
        sentences.append(
            f"{task} goes from {number(start.value, metric)} at {letter} = {first:g} to {number(end.value, metric)} at "
            f"{last:g}"
        )
    bounds = [
        {"task": label_of(content, c["task"]), "value": c["val_bound"], "shown": number(c["val_bound"], metric)}
        for c in content["constraints"]
        if c["task"] in lines and c.get("metric") == metric and c.get("val_bound") is not None
    ]
    order = [label_of(content, task) for task in lines]
    color = {"field": "task", "type": "nominal", "sort": order, "legend": {"columns": 2}}
    color["scale"] = {"domain": order, "range": [PALETTE[number % len(PALETTE)] for number in range(len(order))]}
    fades = {"condition": {"param": "pick", "value": 1}, "value": 0.15}
    x = quantity("coef", f"{letter}, on validation data", scale={"nice": False})
    y = quantity("value", metric, metric)
    dash = {
        "field": "role",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": ["target", "control"], "range": [[1, 0], [5, 3]]},
    }
    tips = tooltip(("task", "task"), ("coef", letter), ("shown", metric), ("n", "examples"))
    band = {
        "mark": {"type": "area", "opacity": 0.16, "aria": False},
        "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
    }
    layers: list[dict[str, Any]] = [
        *known("low", tried, {"x": x, "color": color}, band),
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
        at = {"values": [{"coef": chosen, "label": f"{word}: {letter} = {coefficient(chosen)}"}]}
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
        layers += known("low", tested, {"x": x, "color": color}, bar)
        layers.append(
            {
                "data": {"values": tested},
                "mark": {**MARK, "shape": "diamond"},
                "encoding": {
                    "x": x,
                    "y": y,
                    "color": color,
                    "tooltip": tooltip(("task", "on test data"), ("shown", metric), ("n", "examples")),
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
                    "tooltip": tooltip(("task", "bound of"), ("shown", metric)),
                },
            }
        )
    return Chart(
        name,
        f"{metric} against {letter}",
        f"On validation data {'; '.join(sentences)}. {word.capitalize()}: {letter} = {coefficient(chosen)}.",
        make_spec(300, layers),
        ("task", letter, metric, "95% interval", "examples"),
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
    rows = [make_row(p, metric, x=p.coefs[first], y=p.coefs[second], n=p.num_examples) for p in tried]
    x, y = (quantity(field, symbol(name), scale={"zero": False}) for field, name in (("x", first), ("y", second)))
    color = {
        "field": "value",
        "type": "quantitative",
        "scale": {"scheme": "viridis", "zero": False},
        "legend": {"title": f"{task} {metric}", "format": "~%" if is_share(metric) else "~g", "gradientLength": 160},
    }
    tips = tooltip(("x", symbol(first)), ("y", symbol(second)), ("shown", metric), ("n", "examples"))
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
    choice = "choice" if is_feasible(content) else "closest"
    yield Chart(
        "map",
        f"{task} {metric} over {symbol(first)} and {symbol(second)}",
        f"{len(tried)} choices of {' and '.join(map(symbol, searched))} were tried on validation data{others}; {task} "
        f"ranges from {number(min(values), metric)} to {number(max(values), metric)}. The ring is the {choice}.",
        make_spec(320, layers),
        (*map(symbol, searched), metric, "95% interval"),
        [
            (*(coefficient(p.coefs[name]) for name in searched), number(p.value, metric), interval(p, metric))
            for p in tried
        ],
    )
