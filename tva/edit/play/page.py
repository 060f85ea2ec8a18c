"""The page of ``tva play``: sliders, and beside them what the edit does, on this machine only."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tva.edit.play.model import Playground, Slider, View
from tva.edit.play.prompt_box import PromptBox, render_part
from tva.report.edit_report import ConstraintReport
from tva.report.run_files import PAGE
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
  .playing tr { display: grid; grid-template-columns: 1fr 3.8rem 5rem 4.4rem; border-bottom: 1px solid var(--line); }
  .playing th, .playing td { border: 0; padding-right: 0; } .playing tr > :last-child { grid-column: 1 / -1; }
}
.buttons { display: flex; gap: 0.6rem; flex-wrap: wrap; } .q-btn { text-transform: none; }
.asked { width: 100%; margin-bottom: 0.6rem; } .sampling { width: 7.5rem; } .asking .buttons { align-items: center; }
.answer { width: auto; min-width: min(100%, 26rem); margin-top: 0.8rem; }
.answer caption { text-align: left; font-weight: 600; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 0.75rem; }
.beside figure { margin: 0.8rem 0 0; padding: 0.6rem; background: var(--panel); border: 1px solid var(--line); }
.beside figure { border-radius: 10px; } .written { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.4rem 0 0; }
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
    ui.add_head_html("<script>document.documentElement.lang = 'en'</script>")
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
                if box is not None and done == asked[0]:
                    await box.refresh()
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

    with ui.element():  # within the <main> that NiceGUI makes
        ui.html(heading_html(page), sanitize=False)
        sliders, values = {}, {}
        for slider in playground.sliders:
            sliders[slider.name], values[slider.name] = _slider(ui, slider, moved)
        with ui.element("div").classes("buttons"):
            chosen = {slider.name: slider.chosen for slider in playground.sliders}
            ui.button("as chosen", on_click=lambda: set_all(chosen), color=None).props("outline no-caps")
            ui.button("base (λ = 0)", on_click=lambda: set_all({SCALING: 0.0}), color=None).props("outline no-caps")
        pace = ui.label().classes("soft")
        table = ui.html(sanitize=False)
        ui.html(proof_html(content, page.run), sanitize=False)
        box = PromptBox(ui, playground, coefs) if playground.input in ("text", "prompt") else None
        examples = ui.html(sanitize=False)
    show(playground.at())


def _slider(ui: Any, slider: Slider, moved: Callable[[str, float], Any]) -> tuple[Any, Any]:
    name = "λ" if slider.name == SCALING else slider.name
    span = slider.high - slider.low
    with ui.element("div").classes("setting"):
        ui.label(name)
        drawn = ui.slider(
            min=slider.low,
            max=slider.high,
            step=span / 100,
            value=slider.chosen,
            on_change=lambda event: moved(slider.name, event.value),
        )
        # a mark close to the chosen value would be written over it
        ends = {at for at in (0.0, slider.low, slider.high) if abs(at - slider.chosen) > 0.2 * span}
        marks = {**{at: f"{at:g}" for at in ends}, slider.chosen: f"chosen {slider.chosen:.4g}"}
        drawn.props["aria-label"] = name
        drawn.props["marker-labels"] = [{"value": at, "label": text} for at, text in marks.items()]
        return drawn, ui.label(f"{slider.chosen:.4g}").classes("value")


def heading_html(page: Page) -> str:
    """Return the formula, and how far what is below can be trusted, as HTML."""
    sizes = {row.task: row.num_examples for row in page.playground.at().rows}
    recorded = page.playground.content["sizes"]
    fewer = any(size < recorded.get(task, {}).get("val", 0) for task, size in sizes.items())
    chosen = "The edit was chosen on such data; what it does is shown on test data in the report."
    if not is_feasible(page.playground.content):
        chosen = "No coefficient was feasible on such data: as chosen stands for the closest."
    return render_part("heading", page.run, formula(page.playground.content), sizes, chosen, fewer)


def proof_html(content: Any, run: str) -> str:
    """Return where the proof is, as HTML."""
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    return render_part("proof", content["verdict"].rstrip("."), str(folder / PAGE))


def table_html(view: View) -> str:
    """Return a table with one row per task: base, edited and live metric, and its constraints."""
    rows = [
        {
            "task": row.task,
            "role": row.role,
            "metric": row.metric,
            **{name: number(getattr(row, name), row.metric) for name in ("base", "edited", "live")},
            "constraints": [_constraint(each) for each in view.constraints if each.task == row.task],
        }
        for row in view.rows
    ]
    return render_part("table", rows, view.rough)


def _constraint(each: ConstraintReport) -> dict[str, Any]:
    value, bound = (number(value, each.metric) for value in (each.value, each.bound))
    limit = None if each.limit is None else number(each.limit, each.metric)
    return {"text": each.text, "holds": each.holds, "value": value, "bound": bound, "limit": limit}


def examples_html(view: View) -> str:
    """Return a few examples of each task with what base, edited and present model predict."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for example in view.examples:
        kind = "" if example.label is None else "passes" if example.live == example.label else "fails"
        image = None if example.image is None else base64.b64encode(example.image).decode()
        tasks.setdefault(example.task, []).append({**vars(example), "kind": kind, "image": image})
    return render_part("examples", tasks)
