"""Metrics of texts that a model wrote and those wanted: Matthews' correlation, F1 of a label, F1 of words."""

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Texts = Sequence[str]


def text_matthews(preds: Texts, target: Texts) -> float:
    r"""Compute Matthews' correlation of labels that were written with those wanted, in [-1, 1].

    A text that is not a label is a class of its own, so that it is always wrong. 0 where one side is constant.

    Source: Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", Computational
    Biology and Chemistry 2004: :math:`R_K` from right answers and the counts of each side.

    Example:
        >>> text_matthews(["yes", "no", "yes", "no"], ["yes", "no", "no", "no"])
        0.5773502691896258
    """
    count, right = len(target), sum(ours == theirs for ours, theirs in zip(preds, target, strict=True))
    ours, theirs = Counter(preds), Counter(target)
    above = right * count - sum(ours[label] * theirs[label] for label in theirs)
    sides = [count**2 - sum(number**2 for number in side.values()) for side in (ours, theirs)]
    below = (sides[0] * sides[1]) ** 0.5
    return above / below if below else 0.0


def text_f1(positive: str, preds: Texts, target: Texts) -> float:
    """Compute the F1 score of one label, in [0, 1]; 0 where neither side has it.

    Args:
        positive: The label.
        preds: What was written.
        target: What is wanted.

    Example:
        >>> text_f1("yes", ["yes", "no", "yes"], ["yes", "yes", "no"])
        0.5
    """
    both = sum(ours == theirs == positive for ours, theirs in zip(preds, target, strict=True))
    total = Counter(preds)[positive] + Counter(target)[positive]
    return 2 * both / total if total else 0.0


def text_f1_accuracy(positive: str, preds: Texts, target: Texts) -> float:
    """Compute the mean of `text_f1` and of the part that is right, as GLUE does for MRPC.

    Args:
        positive: The label.
        preds: What was written.
        target: What is wanted.
    """
    right = sum(ours == theirs for ours, theirs in zip(preds, target, strict=True)) / len(target)
    return (text_f1(positive, preds, target) + right) / 2


def token_f1(preds: Texts, target: Texts) -> Tensor:
    """Compute the F1 score of the words of each text, in [0, 1], without case, punctuation and articles.

    Source: Rajpurkar et al., "SQuAD: 100,000+ questions for machine comprehension of text", EMNLP 2016.

    Example:
        >>> token_f1(["The red house."], ["a house"])
        tensor([0.6667])
    """
    scores = []
    for ours, theirs in zip(map(_words, preds), map(_words, target), strict=True):
        both = sum((Counter(ours) & Counter(theirs)).values())
        total = len(ours) + len(theirs)
        scores.append(2 * both / total if total else 1.0)
    return torch.tensor(scores)


def _words(text: str) -> list[str]:
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


WHOLE: dict[str, Callable[..., Any]] = {"text_matthews": text_matthews, "token_f1": token_f1}
OF_A_LABEL: dict[str, Callable[..., Any]] = {"text_f1": text_f1, "text_f1_accuracy": text_f1_accuracy}
for _function in (*WHOLE.values(), *OF_A_LABEL.values()):
    _function.higher_is_better = True


def find_text_metric(name: str) -> Callable[..., Any] | None:
    """Return a metric of texts, ``text_matthews``, ``token_f1``, ``text_f1:LABEL`` or ``text_f1_accuracy:LABEL``.

    Raises:
        ValueError: The label is missing.
    """
    kind, _, label = name.partition(":")
    if kind in OF_A_LABEL:
        if not label:
            raise ValueError(f"The metric {kind} is of one label: write {kind}:LABEL, such as {kind}:equivalent.")
        function = functools.partial(OF_A_LABEL[kind], label)
        function.higher_is_better = True
        return function
    return WHOLE.get(name)
