"""What a model answers to one input of a user: class probabilities of an image or a text, or a prompt continued."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from tva.models.classifier import FrozenHeadClassifier
from tva.models.generation import write_texts

Input = Literal["image", "text", "prompt"]
MOST_CHARACTERS = 4000  # of a text that is typed
MOST_TOKENS = 200  # that are written after a prompt


@dataclass(frozen=True)
class Sampling:
    """How a prompt is continued.

    Attributes:
        max_new_tokens: At most 200.
        temperature: What logits are divided by; 0 always takes the likeliest token.
        top_p: Draw from the likeliest tokens that together have this probability.
        seed: Of the draws, which are the same for base and edited model.

    Raises:
        ValueError: A value is out of range.
    """

    max_new_tokens: int = 20
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (1 <= self.max_new_tokens <= MOST_TOKENS and self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"max_new_tokens must be from 1 to {MOST_TOKENS}, temperature at least 0 and top_p in (0, 1]; found "
                f"{self.max_new_tokens}, {self.temperature} and {self.top_p}."
            )


@dataclass(frozen=True)
class Choice:
    """What a classifier chooses between on one task.

    Attributes:
        class_names: In the order of the logits.
        head: The head of the task, shape (classes, features), of a model that gets one for each task.
        max_length: Tokens of a text at most, as the data cut it.
    """

    class_names: list[str]
    head: Tensor | None = None
    max_length: int | None = None


class Answers:
    """What a model answers, with whatever weights it has.

    Args:
        model: The model.
        choices: What it chooses between, by task; of a language model it is empty.
    """

    def __init__(self, model: L.LightningModule, choices: Mapping[str, Choice]) -> None:
        self.model, self.choices = model, choices

    def classes(self, given: Any) -> dict[str, dict[str, float]]:
        """Return by task the probability of each class.

        Args:
            given: A text, or a PIL image.

        Raises:
            ValueError: The text is empty or too long.
        """
        found = {}
        with _evaluating(self.model):
            for task, choice in self.choices.items():
                if choice.head is not None:
                    self.model.head = choice.head.to(self.model.device)
                logits = self.model(self._inputs(given, choice).to(self.model.device))[0]
                values = logits.double().softmax(dim=-1).tolist()
                others = map(str, range(len(choice.class_names), len(values)))  # that the head has, and nobody named
                found[task] = dict(zip([*choice.class_names, *others], values, strict=True))
        return found

    def _inputs(self, given: Any, choice: Choice) -> Tensor:
        if not isinstance(given, str):
            return self.model.image_transform(given.convert("RGB"))[None]
        longest = min(length for length in (choice.max_length, self.model.max_length, 512) if length)
        ids = self.model.tokenizer(checked_text(given), truncation=True, max_length=longest)["input_ids"]
        return torch.tensor([ids])

    def text(self, prompt: str, sampling: Sampling) -> str:
        """Return what the model writes after a prompt, of which the end counts where it is too long.

        Raises:
            ValueError: The prompt is empty or too long.
        """
        model = self.model
        ids = model.tokenizer(checked_text(prompt))["input_ids"]
        if not model.encoder_decoder and len(ids) > 1 and ids[-1] == model.tokenizer.eos_token_id:
            ids = ids[:-1]
        room = max(1, (model.max_length or 1024) - (0 if model.encoder_decoder else sampling.max_new_tokens))
        with _evaluating(model):
            tokens = torch.tensor([ids[-room:]], device=model.device)
            return write_texts(model, tokens, [0], {**asdict(sampling), "top_k": None})[0]


def checked_text(text: str) -> str:
    """Return a text that was typed.

    Raises:
        ValueError: It is empty or too long.
    """
    if not text.strip() or len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"Type a text of 1 to {MOST_CHARACTERS:,} characters; found {len(text) if text.strip() else 'none'}."
        )
    return text


def input_of(model: L.LightningModule) -> Input | None:
    """Return what a user can give to a model; None where it is not known how the model takes it."""
    if getattr(model, "scores_texts", False):
        return "prompt" if callable(getattr(model.network, "generate", None)) else None
    if not (isinstance(model, FrozenHeadClassifier) or getattr(model, "kind", "").endswith("-classification")):
        return None
    if getattr(model, "kind", "") == "token-classification" or getattr(model, "num_labels", 0) == 1:
        return None
    return "image" if hasattr(model, "image_transform") else "text" if hasattr(model, "tokenizer") else None


def choice_of(model: L.LightningModule, datamodule: L.LightningDataModule) -> Choice | None:
    """Return what a model chooses between on a task that it has just been set up for; None if not among classes.

    A task of pairs of texts is left out: one text is no pair.
    """
    names = list(getattr(datamodule, "class_names", None) or [])
    if not names or getattr(datamodule, "second_column", None) is not None:
        return None
    head = model.head.detach().clone() if isinstance(model, FrozenHeadClassifier) else None
    return Choice(names, head, getattr(datamodule, "max_length", None))


@contextmanager
def _evaluating(model: L.LightningModule) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
