"""A finished edit opened again: coefficients to metrics, constraints and predictions on cached validation batches."""

import io
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor

from tva.edit.gate import verdict_on
from tva.edit.options import EditOptions
from tva.edit.play.answers import Answers, Sampling, choice_of, input_of
from tva.edit.run import without_head
from tva.edit.session import open_session
from tva.evaluation.batch_cache import through_cache
from tva.evaluation.log import EvaluationLog
from tva.evaluation.result import Evaluation
from tva.report.edit_report import ConstraintReport
from tva.search import SCALING, Candidate, Grid

SEED = 0  # of the validation examples that are taken
NUM_SHOWN = 6  # examples a task
NUM_GLANCED = 64  # examples a task that are enough for a rough view


@dataclass(frozen=True)
class Slider:
    """A coefficient that can be set.

    Attributes:
        name: Its name in the recipe; ``scaling_coef`` for that of the whole recipe.
        low: Least value.
        high: Largest value.
        chosen: The edit's own value.
    """

    name: str
    low: float
    high: float
    chosen: float


@dataclass(frozen=True)
class Row:
    """One metric of one task, of the base, the edited model and the present one, on the same examples."""

    task: str
    role: str
    metric: str
    num_examples: int
    base: float
    edited: float
    live: float


@dataclass(frozen=True)
class Example:
    """One validation example.

    Attributes:
        task: Its task.
        image: A PNG, where the batch holds images.
        label: Its class; None where the batch does not tell.
        base: Class that the base predicts.
        edited: That of the edited model.
        live: That of the present one.
    """

    task: str
    image: bytes | None
    label: str | None
    base: str
    edited: str
    live: str


@dataclass(frozen=True)
class View:
    """What one setting of the coefficients does.

    Attributes:
        coefs: The setting.
        rows: One for each task, targets first.
        constraints: Whether each holds on these examples.
        examples: A few predictions.
        time_s: What it took.
        rough: Whether it is from a few examples only, without constraints and predictions.
    """

    coefs: Mapping[str, float]
    rows: Sequence[Row]
    constraints: Sequence[ConstraintReport]
    examples: Sequence[Example]
    time_s: float
    rough: bool = False


@dataclass(frozen=True)
class Answer:
    """What base and edited model answer to a text that was typed.

    Attributes:
        coefs: The setting of the edited model.
        classes: By task each class with its probability under the base and under the edited model.
        texts: What base and edited model write after it, of a language model.
        time_s: What it took.
    """

    coefs: Mapping[str, float]
    classes: Mapping[str, Sequence[tuple[str, float, float]]]
    texts: tuple[str, str] | None
    time_s: float


class Playground:
    """A model in memory that is edited again for every setting of the coefficients.

    Args:
        trainer: Trainer that evaluates.
        model: The model that was edited, with its base's weights unless ``base`` is given.
        content: The run's ``edit.json``.
        options: The options it was edited with; the ranges of their search are those of the sliders.
        num_examples: Validation examples per task, the first of a seeded order; all where there are fewer.

    Attributes:
        sliders: The coefficients that can be set.
        input: What a user can type: ``"text"`` that is classified, or a ``"prompt"`` that is continued. ``"image"`` and
            None take no text.

    Raises:
        ValueError: The edit cannot be made again from these options, or base or vectors are not what they were.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        content: Mapping[str, Any],
        options: EditOptions,
        num_examples: int = 500,
    ) -> None:
        _check(trainer, content, options, num_examples)
        self.content = content
        self._lock = threading.Lock()  # one model
        goal = without_head(options, model).checked()
        metrics = {task: [entry["metric"]] for task, entry in content["tasks"].items()}
        for constraint in goal.constraints:
            metrics[constraint.task].append(constraint.metric)
        self._session = open_session(trainer, model, goal, EvaluationLog(None), metrics)
        self._check_inputs()
        given = {name: value for name, value in content["coefficients"].items() if isinstance(value, (int, float))}
        ranges = (options.search or Grid()).ranges
        self.sliders = [_slider(name, value, ranges.get(name)) for name, value in given.items()]
        model = self._session.editor.model
        self.input = input_of(model)
        self._sizes, choices = {}, {}
        for task, datamodule in options.tasks.items():
            self._sizes[task] = min(num_examples, self._of_base(task).num_examples)
            choice = None if self.input in ("prompt", None) else choice_of(model, datamodule)
            choices |= {} if choice is None else {task: choice}
        if not choices and self.input != "prompt":
            self.input = None
        self.answers = Answers(model, choices)
        self._base = self._evaluate({**given, SCALING: 0.0})
        self._edited = self._evaluate(given)
        self._shown = [shown for task in options.tasks for shown in self._choose_examples(task)]

    def _of_base(self, task: str) -> Evaluation:
        return self._session.evaluator.base(task, "val")

    def _check_inputs(self) -> None:
        facts = self._session.evaluator.facts
        inputs = {"the base": (self.content["base"]["fingerprint"], facts["base"])} | {
            f"the vector {name}": (entry["deltas"], facts["vectors"].get(name))
            for name, entry in self.content["vectors"].items()
        }
        for name, (before, now) in inputs.items():
            if before != now:
                raise ValueError(
                    f"{name.capitalize()} is not what the run was made with: its fingerprint is {now}, and was "
                    f"{before}. Make the edit again, or give the files it was made with."
                )

    def _evaluate(self, coefs: Mapping[str, float], most: int | None = None) -> dict[str, Evaluation]:
        state = self._session.state_of(Candidate(tuple(coefs.items())), "live")
        found = {}
        for task, size in self._sizes.items():
            size = size if most is None else min(size, most)
            part = size < self._of_base(task).num_examples
            window = ({task: (0, size)}, SEED) if part else ()
            found |= self._session.evaluator([state], [task], "val", *window)[0]
        return found

    def _choose_examples(self, task: str) -> list[tuple[str, int, bytes | None, int | None]]:
        """Take examples of the first batch: half of them, if there are, where the edit changed the prediction."""
        base, edited = self._base[task].predicted, self._edited[task].predicted
        if base is None or edited is None:
            return []
        size, total = self._sizes[task], self._of_base(task).num_examples
        part = ((0, size), SEED) if size < total else None
        editor, cache = self._session.editor, self._session.evaluator.cache
        datamodule = editor.datamodules[task]
        with through_cache(datamodule, "val", cache, editor.trainer.strategy.root_device, part):
            batch = next(iter(datamodule.val_dataloader()))
        images, labels = batch if isinstance(batch, (list, tuple)) and len(batch) == 2 else (None, None)
        count = min(size, len(labels) if isinstance(labels, Tensor) else size)
        changed = np.flatnonzero(base[:count] != edited[:count])[: NUM_SHOWN // 2].tolist()
        others = [row for row in range(count) if row not in changed][: NUM_SHOWN - len(changed)]
        known = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
        return [
            (task, row, _png(images[row]) if images is not None else None, int(labels[row]) if known else None)
            for row in sorted([*changed, *others])
        ]

    def at(self, coefs: Mapping[str, float] | None = None) -> View:
        """Set the model to a state and return what it does.

        Args:
            coefs: Values by name; those left out are the edit's own.

        Raises:
            ValueError: The recipe has no such coefficient.
        """
        started = time.monotonic()
        everything = self._setting(coefs)
        with self._lock:
            live = self._evaluate(everything)
        rows = self._rows(live)
        confidence = self._session.options.confidence
        constraints = [
            verdict_on(c, live[c.task], self._base[c.task], None, confidence) for c in self._session.goal.constraints
        ]
        examples = [
            Example(
                task,
                image,
                None if label is None else self._class(task, label),
                *(self._class(task, int(found[task].predicted[row])) for found in (self._base, self._edited, live)),
            )
            for task, row, image, label in self._shown
        ]
        return View(everything, rows, constraints, examples, time.monotonic() - started)

    def glance(self, coefs: Mapping[str, float] | None = None) -> View:
        """Return roughly what a state does, from the first examples of each task only; constraints need all of `at`.

        Args:
            coefs: As in `at`.
        """
        started = time.monotonic()
        everything = self._setting(coefs)
        with self._lock:
            live = self._evaluate(everything, NUM_GLANCED)
        return View(everything, self._rows(live), [], [], time.monotonic() - started, rough=True)

    def answer(self, text: str, coefs: Mapping[str, float] | None = None, sampling: Sampling | None = None) -> Answer:
        """Return what base and edited model answer to a text.

        Args:
            text: Classified by each task's classes, or continued by a language model.
            coefs: As in `at`.
            sampling: How a prompt is continued; by default at most 20 tokens, at temperature 1 and seed 0.

        Raises:
            ValueError: The model takes no text, or not this one.
        """
        started = time.monotonic()
        everything = self._setting(coefs)
        if self.input not in ("text", "prompt"):
            raise ValueError(f"{type(self.answers.model).__name__} takes no text that can be typed.")
        state = self._session.state_of(Candidate(tuple(everything.items())), "live")
        with self._lock:
            found = []
            for vector, coef in ((None, 0.0), (state.vector(), state.scaling_coef)):
                self._session.editor.set(vector, coef, state.statistics)
                if self.input == "prompt":
                    found.append(self.answers.text(text, sampling or Sampling()))
                else:
                    found.append(self.answers.classes(text))
        if self.input == "prompt":
            return Answer(everything, {}, (found[0], found[1]), time.monotonic() - started)
        base, live = found
        classes = {task: [(name, base[task][name], live[task][name]) for name in base[task]] for task in base}
        return Answer(everything, classes, None, time.monotonic() - started)

    @property
    def base_is_given(self) -> bool:
        """Whether the base's weights are others than those that the model is made with."""
        return self._session.options.base is not None

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights of the base and of the chosen edit, under the model's names."""
        state = self._session.state_of(Candidate(tuple(self._setting(None).items())), "edited")
        found = []
        with self._lock:
            for vector, coef in ((None, 0.0), (state.vector(), state.scaling_coef)):
                self._session.editor.set(vector, coef, state.statistics)
                live = self._session.editor.state()
                found.append({name: tensor.detach().cpu().clone() for name, tensor in live.items()})
        return found[0], found[1]

    def _setting(self, coefs: Mapping[str, float] | None) -> dict[str, float]:
        everything = {slider.name: slider.chosen for slider in self.sliders}
        unknown = sorted((coefs or {}).keys() - everything.keys())
        if unknown:
            raise ValueError(f"There is no coefficient {unknown[0]!r} to set; there are {', '.join(everything)}.")
        return everything | dict(coefs or {})

    def _rows(self, live: Mapping[str, Evaluation]) -> list[Row]:
        return [
            Row(
                task,
                entry["role"],
                entry["metric"],
                live[task].num_examples,
                *(found[task].metrics[entry["metric"]] for found in (self._base, self._edited, live)),
            )
            for task, entry in self.content["tasks"].items()
        ]

    def _class(self, task: str, index: int) -> str:
        names = getattr(self._session.editor.datamodules[task], "class_names", [])
        return str(names[index]) if index < len(names) else str(index)


def _check(trainer: L.Trainer, content: Mapping[str, Any], options: EditOptions, num_examples: int) -> None:
    if num_examples < 1:
        raise ValueError(f"At least 1 example per task is needed; found num_examples={num_examples}.")
    if trainer.world_size > 1:
        raise ValueError(
            f"Sliders are answered by one process, and the edit's trainer has {trainer.world_size}. Set devices: 1 "
            f"under trainer: in the edit's configuration."
        )
    if content["search"]["strategy"] == "Learned":
        raise ValueError(
            f"The coefficients of {content['recipe']!r} were learned, one for each group of tensors, and no slider "
            f"sets those. Play with an edit whose coefficients were searched or given."
        )
    tasks, recipe = options.tasks, options.recipe
    if tasks.keys() != content["tasks"].keys() or recipe.strip() != content["recipe"].strip():
        raise ValueError(
            f"The configuration is of another edit: it has the recipe {recipe!r} and the tasks "
            f"{', '.join(tasks)}; the run has {content['recipe']!r} and {', '.join(content['tasks'])}."
        )


def _slider(name: str, chosen: float, bounds: Sequence[float] | None) -> Slider:
    low, high = bounds or (0.0, max(1.0, 2 * chosen))
    return Slider(name, min(0.0, low, 2 * chosen), max(high, chosen), chosen)


def _png(image: Any) -> bytes | None:
    """Draw a tensor of shape (1 or 3, height, width), its least value black and its largest white."""
    if not isinstance(image, Tensor) or image.ndim != 3 or len(image) not in (1, 3):
        return None
    from PIL import Image

    image = image.float()
    low, high = image.min(), image.max()
    pixels = ((image - low) / (high - low).clamp(min=1e-12) * 255).round().byte().cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1).squeeze())).save(file, "PNG")
    return file.getvalue()
