"""The page of ``tva play``: sliders, and beside them what the edit does, on this machine alone; the door to NiceGUI."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tva.edit.play.model import Playground, View
from tva.report.series import formula, is_feasible, number
from tva.search import SCALING

HOST = "127.0.0.1"
STYLE = """
body { font-size: 16px; } .nicegui-content { display: block; padding: 0; }
.setting { display: grid; grid-template-columns: 5rem 1fr 4rem; align-items: center; margin: 1.2rem 0 2.2rem; }
.setting > * { min-width: 0; }
.setting .value { font-variant-numeric: tabular-nums; text-align: right; font-weight: 600; }
.setting .q-slider { width: calc(100% - 2rem); margin: 0 1rem; }
.shown { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.75rem; }
.shown figure { margin: 0; padding: 0.6rem; background: var(--panel); }
.shown figure { border: 1px solid var(--line); border-radius: 10px; }
.shown img { width: 4rem; height: 4rem; image-rendering: pixelated; border-radius: 6px; display: block; }
.shown figcaption { font-size: 0.86rem; overflow-wrap: anywhere; } .shown strong { display: block; font-size: 1rem; }
.q-slider__marker-labels { white-space: nowrap; font-size: 0.86rem; } .nicegui-content h2 { font-weight: 600; }
@media (max-width: 600px) {
  .playing tr { display: grid; grid-template-columns: 1fr 4rem 5.2rem 3.5rem; border-bottom: 1px solid var(--line); }
  .playing th, .playing td { border: 0; padding-right: 0; } .playing tr > :last-child { grid-column: 1 / -1; }
}
.buttons { display: flex; gap: 0.6rem; flex-wrap: wrap; } .q-btn { text-transform: none; }
"""


@dataclass(frozen=True)
class Page:
    """A page that can be served.

    Attributes:
        playground: What it shows.
        run: Folder of the edit.
        port: Its port on 127.0.0.1.
    """

    playground: Playground
    run: str
    port: int


def build(ui: Any, page: Page, style: str) -> None:
    from nicegui import run

    playground, content = page.playground, page.playground.content
    ui.add_css(style)
    coefs = {slider.name: slider.chosen for slider in playground.sliders}
    busy, asked = [False], [0]

    async def update() -> None:
        asked[0] += 1
        if busy[0]:  # the loop below takes the latest setting when it is done with the one before
            return
        busy[0] = True
        try:
            done = 0
            while done != asked[0]:
                done = asked[0]
                show_rough(await run.io_bound(playground.glance, dict(coefs)))
                if done == asked[0]:  # else the slider has moved on
                    show(await run.io_bound(playground.at, dict(coefs)))
        finally:
            busy[0] = False

    def show(view: View) -> None:
        table.set_content(table_html(view))
        examples.set_content(examples_html(view))
        pace.set_text(f"updated in {view.time_s:.2f} s")

    def show_rough(view: View) -> None:
        table.set_content(table_html(view))
        pace.set_text(f"≈ of the first {min(row.num_examples for row in view.rows)} examples, in {view.time_s:.2f} s …")

    async def moved(name: str, value: float) -> None:
        coefs[name] = float(value)
        values[name].set_text(f"{value:.4g}")
        await update()

    async def set_all(values_by_name: dict[str, float]) -> None:
        for name, value in values_by_name.items():
            sliders[name].set_value(value)

    with ui.element("main"):
        ui.html(heading_html(page), sanitize=False)
        sliders, values = {}, {}
        for slider in playground.sliders:
            name = "λ" if slider.name == SCALING else slider.name
            with ui.element("div").classes("setting"):
                ui.label(name)
                sliders[slider.name] = ui.slider(
                    min=slider.low,
                    max=slider.high,
                    step=(slider.high - slider.low) / 100,
                    value=slider.chosen,
                    on_change=lambda event, name=slider.name: moved(name, event.value),
                ).props(f'aria-label="{name}"')
                span = slider.high - slider.low  # a mark close to the chosen value would be written over it
                ends = {at for at in (0.0, slider.low, slider.high) if abs(at - slider.chosen) > 0.2 * span}
                marks = {at: f"{at:g}" for at in ends}
                marks[slider.chosen] = f"chosen {slider.chosen:.4g}"
                sliders[slider.name].props["marker-labels"] = [
                    {"value": at, "label": text} for at, text in marks.items()
                ]
                values[slider.name] = ui.label(f"{slider.chosen:.4g}").classes("value")
        with ui.element("div").classes("buttons"):
            chosen = {slider.name: slider.chosen for slider in playground.sliders}
            ui.button("as chosen", on_click=lambda: set_all(chosen)).props("outline no-caps")
            ui.button("base (λ = 0)", on_click=lambda: set_all({SCALING: 0.0})).props("outline no-caps")
        pace = ui.label().classes("soft")
        table = ui.html(sanitize=False)
        ui.html(f"<p class='soft'>{html.escape(_proof(content, page.run))}</p>", sanitize=False)
        examples = ui.html(sanitize=False)
    show(playground.at())


def heading_html(page: Page) -> str:
    """Write the formula, and how far what is below can be trusted."""
    sizes = {row.task: row.num_examples for row in page.playground.at().rows}
    recorded = page.playground.content["sizes"]
    fewer = any(size < recorded.get(task, {}).get("val", 0) for task, size in sizes.items())
    counts = ", ".join(f"{task} {count:,}" for task, count in sizes.items())
    chosen, proved = "The edit was chosen", "; what it does is shown on test data in the report."
    if not is_feasible(page.playground.content):
        chosen, proved = "No coefficient was feasible", ": as chosen stands for the closest."
    return (
        f"<h1>{html.escape(page.run)}</h1><p class='formula'>{html.escape(formula(page.playground.content))}</p>"
        f"<p class='notice'>{sum(sizes.values()):,} cached validation examples ({html.escape(counts)}): no proof. "
        f"{chosen} on such data{proved}"
        f"{' On fewer examples than it was chosen on, a constraint may fail that held.' if fewer else ''}</p>"
    )


def _proof(content: Any, run: str) -> str:
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    return f"The verdict of the report: {content['verdict'].rstrip('.')}. All of it is in {folder / 'report.html'}."


def table_html(view: View) -> str:
    """Write one row a task: base, edited and live metric, and its constraints."""
    rows = []
    for row in view.rows:
        cells = (number(value, row.metric) for value in (row.base, row.edited, row.live))
        base, edited, live = cells
        rows.append(
            f"<tr><th>{html.escape(row.task)}<small>{row.role}, {html.escape(row.metric)}</small></th>"
            f"<td class='num'>{base}</td><td class='num'>{edited}</td>"
            f"<td class='num edited live-value' data-task='{html.escape(row.task)}'>{'≈ ' * view.rough}{live}</td>"
            f"<td>{''.join(_constraints(view, row.task)) or ('…' if view.rough else '–')}</td></tr>"
        )
    heads = "<th>task</th><th class='num'>base</th><th class='num'>as chosen</th><th class='num'>now</th>"
    return (
        f"<div class='wide'><table class='playing'><thead><tr>{heads}<th>constraint, now</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _constraints(view: View, task: str) -> Iterator[str]:
    for each in view.constraints:
        if each.task == task:
            word, kind = ("holds", "passes") if each.holds else ("FAILS", "fails")
            limit = "" if each.limit is None else f", at the confidence limit {number(each.limit, each.metric)}"
            yield (
                f"<span class='{kind}'>{html.escape(each.text)} {word}</span><small>{number(each.value, each.metric)} "
                f"against {number(each.bound, each.metric)}{limit}</small>"
            )


def examples_html(view: View) -> str:
    """Write a few examples of each task with what base, edited and present model call them."""
    parts = []
    for task in dict.fromkeys(example.task for example in view.examples):
        figures = []
        for example in view.examples:
            if example.task != task:
                continue
            kind = "" if example.label is None else "passes" if example.live == example.label else "fails"
            sign = {"passes": "✓ ", "fails": "✕ "}.get(kind, "")
            data = None if example.image is None else base64.b64encode(example.image).decode()
            image = (
                ""
                if data is None
                else f"<img alt='{html.escape(example.label or task)}' src='data:image/png;base64,{data}'>"
            )
            truth = "" if example.label is None else f"is {html.escape(example.label)}; "
            figures.append(
                f"<figure>{image}<figcaption><strong class='{kind}'>{sign}{html.escape(example.live)}</strong>{truth}"
                f"base: {html.escape(example.base)}; as chosen: {html.escape(example.edited)}</figcaption></figure>"
            )
        parts.append(f"<h2>{html.escape(task)}</h2><div class='shown'>{''.join(figures)}</div>")
    said = "Up to half of them are ones that the chosen edit predicts otherwise than the base." if parts else ""
    return f"{''.join(parts)}<p class='soft'>{said}</p>"
