"""Draw Vega-Lite charts with vl-convert, without a browser or a network; the only importer of vl-convert."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tva.checkpoints import atomic_path, cache_folder

WIDTH = 620  # of a page's charts, in pixels
VERSION = "6.4"  # of Vega-Lite, as the specifications are written for


_drew_in: set[int] = set()  # ids of processes: this one's, and of those that it was forked from


_ELSEWHERE = """import json, sys, vl_convert
function, arguments, options = json.load(sys.stdin)
made = getattr(vl_convert, function)(*arguments, **options)
sys.stdout.buffer.write(made if isinstance(made, bytes) else made.encode())"""


def _convert(function: str, *arguments: Any, **options: Any) -> bytes:
    """Call a function of vl-convert; text is returned in UTF-8.

    Its JavaScript engine hangs or aborts in a process forked from one that has used it, where it runs in a new process.
    """
    import vl_convert

    if _drew_in - {os.getpid()}:
        called = json.dumps([function, arguments, options]).encode()
        return subprocess.run(
            [sys.executable, "-c", _ELSEWHERE], input=called, stdout=subprocess.PIPE, check=True
        ).stdout
    _drew_in.add(os.getpid())
    made: str | bytes = getattr(vl_convert, function)(*arguments, **options)
    return made if isinstance(made, bytes) else made.encode()


@functools.cache
def library() -> str:
    """Return the JavaScript that draws: Vega-Lite, Vega and vega-embed in one bundle, built once per process."""
    import vl_convert

    made = f"vega-lite-{VERSION}-vl-convert-{vl_convert.__version__}.js"
    file = cache_folder() / "page" / made
    if not file.exists():
        code = _convert("javascript_bundle", "window.vegaEmbed = vegaEmbed;", VERSION).decode()
        with atomic_path(file) as temporary:
            temporary.write_text(code.replace("</script", r"<\/script"), encoding="utf-8")
    return file.read_text(encoding="utf-8")


def draw(spec: Mapping[str, Any], name: str, width: int = WIDTH) -> str:
    """Draw a chart as SVG, for readers that run no scripts.

    Args:
        spec: Vega-Lite whose width is the page's.
        name: Keeps the identifiers of several charts in one page apart.
        width: In pixels.
    """
    svg = _shorten(_convert("vegalite_to_svg", {**spec, "width": width}, vl_version=VERSION).decode())
    return re.sub(r"\b((?:clip|gradient)[\w-]*\d+)\b", rf"{name}-\1", svg)


def _shorten(svg: str) -> str:
    """Remove the parts of an SVG that draw nothing, about half of it; the page describes the chart in words."""
    svg = re.sub(r'<(?:[^">]|"[^"]*")*>', lambda tag: _shorten_tag(tag[0]), svg).replace("<g></g>", "")
    for font in re.findall(r' font-family="[^"]*"', svg)[:1]:
        svg = svg.replace(font, "").replace("<svg ", f"<svg{font} ", 1)
    while svg != (outer := re.sub(r"<g>((?:(?!</?g\b).)*)</g>", r"\1", svg, flags=re.DOTALL)):
        svg = outer
    return _RUN.sub(_share, _CIRCLE.sub(r'<circle cx="\1" cy="\2" r="\3"', svg))


_INHERITED = re.compile(r' (?:fill|stroke|font|text)(?:-[a-z]+)*="[^"]*"')  # by the elements of a group
_RUN = re.compile(
    "|".join(
        f"(?:<{tag} [^<>]*{end}){{3,}}"
        for tag, end in [("line", "/>"), ("path", "/>"), ("circle", "/>"), ("text", ">[^<>]*</text>")]
    )
)
_CIRCLE = re.compile(
    r'<path transform="translate\(([^",]+),([^",]+)\)" d="M([\d.]+),0A\3,\3,0,1,1,-\3,0A\3,\3,0,1,1,\3,0"'
)


def _share(run: re.Match[str]) -> str:
    """Return elements of one kind in a group that has what they all have in common, such as their color."""
    tags = re.findall(r"<\w[^<>]*>", run[0])
    shared = sorted(set.intersection(*(set(_INHERITED.findall(tag)) for tag in tags)))
    if not shared:
        return run[0]
    drop = re.compile("|".join(map(re.escape, shared)))
    return f"<g{''.join(shared)}>{re.sub('<[^<>]*>', lambda tag: drop.sub('', tag[0]), run[0])}</g>"


def _shorten_tag(tag: str) -> str:
    """Return an element without defaults, with coordinates to a hundredth of a pixel; nothing if it draws nothing."""
    tag = re.sub(r' (?:aria-[a-z]+|role|class|pointer-events)="[^"]*"| (?:opacity|stroke-width)="1"', "", tag)
    tag = re.sub(r' (?:d|transform)="[^"]*"', lambda at: re.sub(r"\d+\.\d{3,}", _hundredths, at[0]), tag)
    tag = tag.replace(' transform="translate(0,0)"', "")
    return (
        ""
        if re.fullmatch(r'<path(?: fill="none")? d="(?:M0,0h[\d.]+v[\d.]+h-?[\d.]+Z)?"(?: display="none")?/>', tag)
        else tag
    )


def _hundredths(found: re.Match[str]) -> str:
    return f"{round(float(found[0]), 2):g}" if float(found[0]) < 1000 else found[0]


def draw_png(spec: Mapping[str, Any]) -> bytes:
    """Draw a chart as PNG, for slides and papers, with twice the pixels of `draw`."""
    return _convert("vegalite_to_png", {**spec, "width": WIDTH}, vl_version=VERSION, scale=2.0)


def draw_pdf(spec: Mapping[str, Any]) -> bytes:
    """Draw a chart as PDF, for papers; 72 pixels are an inch."""
    return _convert("vegalite_to_pdf", {**spec, "width": WIDTH}, vl_version=VERSION)
