"""The style that all charts share, and the parts of Vega-Lite they are built from.

A specification is plain JSON, drawn by the library in the page; https://vega.github.io/vega-lite/docs/ documents it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tva.report.series import Content, Point, interval, is_share, number

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
        "columnPadding": 26,  # fonts here may be wider than where the drawing without scripts was made
        "symbolOpacity": 1,
    },
    "text": {"color": "currentColor", "fontSize": 12},
    "rule": {"color": "currentColor"},
    "view": {"stroke": None},
    "range": {"category": PALETTE},
}
MARK = {"type": "point", "filled": True, "size": 170, "stroke": "white", "strokeWidth": 1, "opacity": 1}  # of test data


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


def make_spec(height: Any, layers: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": height,
        "config": CONFIG,
        "layer": list(layers),
        **more,
    }


def quantity(field: str, title: str | None, metric: str = "", **more: Any) -> dict[str, Any]:
    axis = {"title": title, "format": "~%" if is_share(metric) else "~g"}
    return {"field": field, "type": "quantitative", "scale": {"zero": False, "nice": True}, "axis": axis, **more}


def known(
    field: str, rows: Sequence[Mapping[str, Any]], encoding: Mapping[str, Any], layer: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Make a layer of the rows that have a field, such as an interval; none where no row has it."""
    having = [row for row in rows if row.get(field) is not None]
    made = {"data": {"values": having}, **layer, "encoding": {**encoding, **layer["encoding"]}}
    return [made] if having else []


def label_of(content: Content, task: str) -> str:
    return f"{task} ({content['tasks'][task]['role']})"


def by_metric(content: Content) -> dict[str, list[str]]:
    """Group the tasks by the metric that is reported; each has an axis of its own."""
    found: dict[str, list[str]] = {}
    for task, entry in content["tasks"].items():
        found.setdefault(entry["metric"], []).append(task)
    return found


def make_row(point: Point | Mapping[str, Any], metric: str, **more: Any) -> dict[str, Any]:
    """Make one row of a chart's data."""
    entry = vars(point) if isinstance(point, Point) else point
    shown = " ".join(filter(None, (number(entry["value"], metric), interval(entry, metric))))
    return {"value": entry["value"], "low": entry.get("low"), "high": entry.get("high"), "shown": shown, **more}


def tooltip(*fields: tuple[str, str]) -> list[dict[str, str]]:
    return [{"field": field, "title": title} for field, title in fields]
