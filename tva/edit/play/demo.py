"""Base beside edited model on one input, in Gradio: what the ``app.py`` that ``tva push --space`` writes opens."""

import importlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import torch

from tva.checkpoints import canonical_state_dict, fingerprint, open_weights
from tva.edit.play.answers import MOST_CHARACTERS, MOST_TOKENS, Answers, Choice, Sampling

FACTS, BASE, EDITED, HEADS = "demo.json", "base.safetensors", "edited.safetensors", "heads.safetensors"
PATHS = ("name", "path", "tokenizer", "pretrained", "weights")  # options of tva's models that may name a file or folder
INSIDE = "model/"  # where those are in the folder of a demo
LOCAL = "local-dir:"


class Demo:
    """A model with the weights of its base and of its edit.

    Args:
        folder: What ``tva push --space`` wrote.

    Attributes:
        input: What it is asked with: ``"image"``, ``"text"`` or ``"prompt"``.
        tasks: Names of its tasks, of a classifier.
        title: Of the page.
        about: Some lines of Markdown for it.

    Raises:
        ValueError: The weights are not those that the demo was written with.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        folder = Path(folder)
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self.input, self.title, self.about = facts["input"], facts["title"], facts["about"]
        self.tasks = list(facts["tasks"])
        heads = open_weights(folder / HEADS) if (folder / HEADS).exists() else {}
        choices = {task: Choice(head=heads.get(task), **given) for task, given in facts["tasks"].items()}
        self._answers = Answers(_make_model(folder, facts["model"]), choices)
        self._lock = threading.Lock()
        live = canonical_state_dict(self._answers.model.state_dict())
        self._states = []
        for name, expected in (("base", facts["base"]), ("edited", facts["edited"])):
            file = folder / (BASE if name == "base" else EDITED)
            state = dict(open_weights(file)) if file.exists() else {key: live[key].clone() for key in live}
            found = fingerprint(state).digest
            if found != expected:
                raise ValueError(
                    f"The {name} weights are not those that the demo was written with: their fingerprint is {found}, "
                    f"and {FACTS} says {expected}. Write it again with tva push --space."
                )
            self._states.append(state)
        self._live = live

    def answer(
        self,
        given: Any,
        task: str | None = None,
        max_new_tokens: int = 20,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> tuple[Any, Any]:
        """Return the answers of base and edited model: class probabilities, or what a language model writes.

        Args:
            given: A PIL image or a text.
            task: Of a classifier; by default the first.
            max_new_tokens: See `tva.edit.play.answers.Sampling`, as for the rest.
            temperature: See there.
            top_p: See there.
            seed: See there.

        Raises:
            ValueError: The input is empty or too long, or a setting is out of range.
        """
        if given is None:
            raise ValueError("Choose an image first.")
        sampling = Sampling(int(max_new_tokens), float(temperature), float(top_p), int(seed))
        found = []
        with self._lock:
            for state in self._states:
                self._put(state)
                if self.input == "prompt":
                    found.append(self._answers.text(given, sampling))
                else:
                    found.append(self._answers.classes(given)[task or self.tasks[0]])
        return found[0], found[1]

    @torch.no_grad()
    def _put(self, state: dict[str, Any]) -> None:
        for name, tensor in state.items():
            self._live[name].copy_(tensor)


def _make_model(folder: Path, given: dict[str, Any]) -> Any:
    package, _, name = given["class_path"].rpartition(".")
    if package.partition(".")[0] != "tva":
        raise ValueError(f"A demo holds a model of tva; found {given['class_path']}.")
    options = dict(given["init_args"])
    for option in PATHS:
        value = options.get(option)
        if isinstance(value, str) and value.removeprefix(LOCAL).startswith(INSIDE):
            start = LOCAL if value.startswith(LOCAL) else ""
            options[option] = f"{start}{folder / value.removeprefix(LOCAL)}"
    return getattr(importlib.import_module(package), name)(**options)


def make_page(folder: str | os.PathLike[str]) -> Any:
    """Return the Gradio page of a demo, which ``launch()`` serves."""
    import gradio as gr

    demo = Demo(folder)
    if demo.input == "prompt":
        given = Sampling()
        inputs = [
            gr.Textbox(label="Prompt", lines=2, max_length=MOST_CHARACTERS),
            gr.Slider(1, MOST_TOKENS, given.max_new_tokens, step=1, label="new tokens, at most"),
            gr.Slider(0, 2, given.temperature, label="temperature"),
            gr.Slider(0.05, 1, given.top_p, label="top p"),
            gr.Number(given.seed, precision=0, label="seed"),
        ]
    else:
        box = gr.Image(type="pil") if demo.input == "image" else gr.Textbox(label="Text", max_length=MOST_CHARACTERS)
        inputs = [box, gr.Dropdown(demo.tasks, value=demo.tasks[0], label="task")]

    def answer(given: Any, *values: Any) -> tuple[Any, Any]:
        task = () if demo.tasks else (None,)
        try:
            return demo.answer(given, *task, *values)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    shown = gr.Textbox if demo.input == "prompt" else gr.Label
    outputs = [shown(label="base"), shown(label="edited")]
    return gr.Interface(
        answer, inputs, outputs, title=demo.title, description=demo.about, flagging_mode="never", api_name="predict"
    )
