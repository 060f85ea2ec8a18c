"""The box of the page in which a text is typed, and the answers of base and edited model beside each other."""

from collections.abc import Mapping
from typing import Any

from tva.edit.play.answers import MOST_CHARACTERS, MOST_TOKENS, Sampling
from tva.edit.play.model import Answer, Playground
from tva.report.page import environment
from tva.search import SCALING

MOST_CLASSES = 8  # of a task that are shown, the likeliest


class PromptBox:
    """A box for a text, and below it the answers, which are made again whenever a slider rests.

    Args:
        ui: NiceGUI's ``ui``.
        playground: What answers.
        coefs: The present setting, which the sliders change.
    """

    def __init__(self, ui: Any, playground: Playground, coefs: Mapping[str, float]) -> None:
        self.playground, self.coefs = playground, coefs
        prompts, self.asked = playground.input == "prompt", False
        with ui.element("section").classes("asking"):
            ui.html(f"<h2>{'Continue a prompt' if prompts else 'Classify a text'}</h2>", sanitize=False)
            label = "Prompt" if prompts else "Text"
            self.text = ui.textarea(label).props(f"outlined autogrow rows=2 maxlength={MOST_CHARACTERS}")
            self.text.classes("asked").on("keydown.ctrl.enter", self.ask)
            with ui.element("div").classes("buttons"):
                self.numbers = _numbers(ui) if prompts else {}
                ui.button("write" if prompts else "classify", on_click=self.ask, color=None).props("outline no-caps")
            self.answer = ui.html(sanitize=False)

    async def ask(self) -> None:
        """Answer the text that was typed."""
        self.asked = True
        await self.refresh()

    async def refresh(self) -> None:
        """Answer the text again, if one was asked about."""
        from nicegui import run

        if not self.asked:
            return
        try:
            sampling = self._sampling()
            answer = await run.io_bound(self.playground.answer, str(self.text.value or ""), dict(self.coefs), sampling)
        except ValueError as error:
            self.answer.set_content(render_part("mistake", str(error)))
        else:
            self.answer.set_content(answer_html(answer, sampling))

    def _sampling(self) -> Sampling:
        values = {name: number.value for name, number in self.numbers.items()}
        missing = [name for name, value in values.items() if value is None]
        if missing:
            raise ValueError(f"Give a number for {', '.join(missing)}.")
        whole = {name: int(values[name]) for name in ("max_new_tokens", "seed") if name in values}
        return Sampling(**{**values, **whole})


def _numbers(ui: Any) -> dict[str, Any]:
    given = Sampling()
    bounds = {
        "max_new_tokens": ("at most, tokens", {"min": 1, "max": MOST_TOKENS, "step": 1}),
        "temperature": ("temperature", {"min": 0, "step": 0.1}),
        "top_p": ("top p", {"min": 0.01, "max": 1, "step": 0.05}),
        "seed": ("seed", {"step": 1}),
    }
    return {
        name: ui.number(label, value=getattr(given, name), **bound).props("dense outlined").classes("sampling")
        for name, (label, bound) in bounds.items()
    }


def answer_html(answer: Answer, sampling: Sampling) -> str:
    """Return an answer as HTML: each task's likeliest classes, or the two texts."""
    coef = f"{answer.coefs.get(SCALING, 1.0):.4g}"
    if answer.texts is not None:
        settings = {name: f"{value:g}" for name, value in vars(sampling).items()}
        return render_part("texts", answer.texts, coef, settings)
    tasks = {}
    for task, rows in answer.classes.items():
        ordered = sorted(rows, key=lambda row: -max(row[1:]))
        shown = [(name, *(f"{100 * value:.1f}%" for value in values)) for name, *values in ordered[:MOST_CLASSES]]
        tasks[task] = (shown, len(rows) - len(shown))
    return render_part("classes", tasks, coef)


def render_part(part: str, *values: Any) -> str:
    """Render one macro of the template, which escapes every value."""
    return str(getattr(environment().get_template("play.html").module, part)(*values))
