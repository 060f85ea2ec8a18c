"""Figures of experiments: curves over the coefficient, pairs, and cosines of vectors, as SVG and PNG."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tva.checkpoints import write_export
from tva.paper.results import Made
from tva.paper.suite import Scale
from tva.report.render import draw, draw_png
from tva.report.series import SCALING, curve
from tva.report.vega import MARK, PALETTE, make_spec

Rows = list[dict[str, Any]]


def curve_rows(made: Sequence[Made]) -> Rows:
    """Return the mean over seeds of each task's score at each coefficient, with the lowest and highest seed."""
    found: dict[tuple[str, str, float], list[float]] = {}
    for each in made:
        for task, entry in each.content["tasks"].items():
            for coef, point in curve(each.content, task, SCALING):
                found.setdefault((each.name, f"{task} ({entry['role']})", coef), []).append(point.value)
    return [
        {
            "edit": edit,
            "task": task,
            "coef": coef,
            "value": statistics.fmean(values),
            "low": min(values),
            "high": max(values),
        }
        for (edit, task, coef), values in sorted(found.items())
    ]


def pair_rows(made: Sequence[Made]) -> Rows:
    """Return for each pair both tasks' scores, each divided by its own fine-tuned model's; means over seeds."""
    found: dict[str, list[tuple[float, float]]] = {}
    for each in made:
        tables = each.content["diagnostics"]
        for key, row in {**tables.get("pairs", tables.get("subsets", {})).get("rows", {})}.items():
            names = key.split(" + ")
            own = [each.content["tasks"][name].get("finetuned", {}).get("value") for name in names]
            if len(names) != 2 or not all(own) or row[names[0]] is None:
                continue
            found.setdefault(key, []).append((row[names[0]] / own[0], row[names[1]] / own[1]))
    return [
        {"pair": key, "first": statistics.fmean(x for x, _ in pairs), "second": statistics.fmean(y for _, y in pairs)}
        for key, pairs in found.items()
    ]


def cosine_rows(made: Sequence[Made]) -> Rows:
    """Return the mean over edits and seeds of the cosine of every two vectors."""
    found: dict[tuple[str, str], list[float]] = {}
    for each in made:
        for first, row in each.content["diagnostics"].get("cosine", {}).get("rows", {}).items():
            for second, value in row.items():
                found.setdefault((first, second), []).append(value)
    return [{"first": a, "second": b, "cosine": statistics.fmean(values)} for (a, b), values in found.items()]


def _axis(field: str, title: str, **more: Any) -> dict[str, Any]:
    return {"field": field, "type": "quantitative", "title": title, **more}


def curves_spec(rows: Rows) -> dict[str, Any]:
    """Describe the curves: one line a task, the band from the lowest to the highest seed."""
    x = _axis("coef", "scaling coefficient λ")
    color = {"field": "task", "type": "nominal"}
    encoding = {"x": x, "color": color, "detail": {"field": "edit"}}
    low = _axis("low", "score on validation data", scale={"zero": False})
    band = {**encoding, "y": low, "y2": {"field": "high"}}
    layers = [
        {"mark": {"type": "area", "opacity": 0.15}, "encoding": band},
        {"mark": {"type": "line"}, "encoding": {**encoding, "y": {**low, "field": "value"}}},
    ]
    return make_spec(320, layers, data={"values": rows})


def pairs_spec(rows: Rows) -> dict[str, Any]:
    """Describe the scatter of pairs."""
    scale = {"scale": {"zero": False}}
    place = {
        "x": _axis("first", "first task, edited / fine-tuned", **scale),
        "y": _axis("second", "second task, edited / fine-tuned", **scale),
    }
    layers = [
        {"mark": {**MARK, "size": 70, "color": PALETTE[0]}, "encoding": place},
        {"mark": {"type": "text", "dy": -10}, "encoding": {**place, "text": {"field": "pair"}}},
    ]
    return make_spec(420, layers, data={"values": rows})


def cosines_spec(rows: Rows) -> dict[str, Any]:
    """Describe the heat map of cosines."""
    names = list(dict.fromkeys(row["first"] for row in rows))
    place = {"type": "nominal", "sort": names, "title": None}
    encoding = {"x": {"field": "first", **place}, "y": {"field": "second", **place}}
    fill = {"field": "cosine", "type": "quantitative", "scale": {"scheme": "blues", "domainMin": 0}, "legend": None}
    text = {"field": "cosine", "format": ".2f"}
    ink = {"condition": {"test": "datum.cosine > 0.6", "value": "white"}, "value": "black"}
    layers = [
        {"mark": "rect", "encoding": {**encoding, "color": fill}},
        {"mark": {"type": "text"}, "encoding": {**encoding, "text": text, "color": ink}},
    ]
    return make_spec(60 + 40 * len(names), layers, data={"values": rows})


def figures_of(scale: Scale, made: Sequence[Made]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the figures of an experiment by name, those for which there are numbers."""
    groups: dict[str, list[Made]] = {}
    for each in made:
        groups.setdefault(each.name, []).append(each)
    start = f"{scale.experiment}-{scale.name}"
    for name, own in groups.items():
        rows = curve_rows(own)
        if len({row["coef"] for row in rows}) > 1:
            yield f"{start}-{name}-curve", curves_spec(rows)
    pairs, cosines = pair_rows(made), cosine_rows(made)
    if pairs:
        yield f"{start}-pairs", pairs_spec(pairs)
    if cosines:
        yield f"{start}-cosines", cosines_spec(cosines)


def write_figures(folder: Path, figures: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Write each figure as SVG and PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, spec in figures.items():
        for suffix, content in ((".svg", draw(spec, name).encode()), (".png", draw_png(spec))):
            files.append(write_export(folder / f"{name}{suffix}", content))
    return files
