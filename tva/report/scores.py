"""Charts of results: before and after, of one edit and of several; and matrices of task vectors."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tva.report.series import Content, interval, number
from tva.report.vega import MODELS, Chart, by_metric, known, make_row, make_spec, quantity, tooltip

DIVERGING, SEQUENTIAL = {"scheme": "blueorange", "domain": [-1, 1]}, {"scheme": "blues", "domainMin": 0}


def dots(content: Content) -> Iterator[Chart]:
    """Yield charts of every task before and after, with its fine-tuned model and the random vector."""
    for position, (metric, tasks) in enumerate(by_metric(content).items()):
        rows = [
            make_row(content["tasks"][task][key], metric, task=task, model=label)
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
    x = quantity("value", metric, metric)
    offset = {"field": "model", "type": "nominal", "sort": list(colors), "scale": {"paddingOuter": 0.6}}
    y = {"field": field, "type": "nominal", "sort": list(order), "axis": {"title": None, "ticks": False}}
    color = {
        "field": "model",
        "type": "nominal",
        "scale": {"domain": list(colors), "range": list(colors.values())},
        "legend": {"columns": 2},
    }
    tips = tooltip((field, field), ("model", "model"), ("shown", metric))
    bar = {
        "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.75, "aria": False},
        "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}},
    }
    layers: list[dict[str, Any]] = [
        *known("low", rows, {"y": y, "yOffset": offset, "color": color}, bar),
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
                "encoding": {"y": y, "x": x, "tooltip": tooltip(("shown", "must hold"))},
            }
        )
    return Chart(
        name,
        title,
        text,
        make_spec(len(order) * (15 * len(colors) + 12), layers),
        (field, "model", metric, "95% interval"),
        [(r[field], r["model"], number(r["value"], metric), interval(r, metric)) for r in rows],
    )


def matrix(name: str, title: str, found: Mapping[str, Any], text: str, signed: bool) -> Chart:
    """Draw one number for every pair of names, such as cosines."""
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
            "encoding": {"color": color, "tooltip": tooltip(("row", "row"), ("column", "column"), ("shown", title))},
        },
        {"mark": {"type": "text", "aria": False}, "encoding": {"text": {"field": "shown"}, "color": ink}},
    ]
    return Chart(
        name,
        title,
        text,
        make_spec(38 * len(order), layers, data={"values": rows}, encoding={"x": x, "y": y}),
        ("", *columns),
        [(row, *(number(cells.get(column)) for column in columns)) for row, cells in found["rows"].items()],
    )


def compared(contents: Mapping[str, Content]) -> Iterator[Chart]:
    """Yield one chart for each task that several runs report: base and edited model of every run."""
    reported = [(task, c["tasks"][task]["metric"]) for c in contents.values() for task in c["tasks"]]
    shared = [pair for pair in dict.fromkeys(reported) if reported.count(pair) > 1]
    for position, (task, metric) in enumerate(shared):
        rows = [
            make_row(content["tasks"][task][label], metric, run=run, model=label)
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
