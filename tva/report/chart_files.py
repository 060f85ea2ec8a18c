"""The charts of edits as files of their own, for slides and papers."""

import html
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from tva.report.page import charts_of
from tva.report.render import draw, draw_pdf, draw_png
from tva.report.scores import compared
from tva.report.series import Content
from tva.report.vega import Chart

Format = Literal["png", "svg", "pdf"]


def chart_files(contents: Mapping[str, Content], format: Format = "png") -> Iterator[tuple[str, bytes]]:
    """Draw every chart that the pages of these edits show, and of several the charts that compare them.

    Args:
        contents: An ``edit.json`` for every run, by the run's name.
        format: ``png`` for slides, in twice the resolution of a screen; ``svg`` or ``pdf`` for papers.

    Yields:
        The name of a file and its bytes. Of several runs the name begins with the run's.
    """
    many = len(contents) > 1
    for run, content in contents.items():
        for chart in charts_of(content):
            name = f"{run.replace('/', '-')}-{chart.name}" if many else chart.name
            yield f"{name}.{format}", _drawn(chart, format)
    for chart in compared(contents) if many else ():
        yield f"comparison-{chart.name}.{format}", _drawn(chart, format)


def _drawn(chart: Chart, format: Format) -> bytes:
    spec: dict[str, Any] = {**chart.spec, "title": {"text": chart.title, "anchor": "start", "fontWeight": "normal"}}
    spec["config"] = {**chart.spec["config"], "background": "white"}
    if format == "svg":
        said = f"<title>{html.escape(chart.title)}</title><desc>{html.escape(chart.text)}</desc>"
        opening, end, rest = draw(spec, chart.name).partition(">")
        return f'{opening} role="img"{end}{said}{rest}'.encode()
    return draw_png(spec) if format == "png" else draw_pdf(spec)
