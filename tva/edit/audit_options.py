"""The audits that an edit can be asked for, and how relearning trains."""

from dataclasses import dataclass
from typing import Literal, get_args

Audit = Literal["relearn", "int8"]


@dataclass(frozen=True)
class Relearn:
    """How the audit ``relearn`` trains the edited model and the base on a target.

    Args:
        steps: Optimizer steps, at least 1.
        examples: Train on at most this many training examples of the target, drawn by ``seed``.
        learning_rate: Constant learning rate; that of the target's own fine-tuning is a fair one.
        optimizer: ``"AdamW"`` without weight decay, or plain ``"SGD"``.
        seed: Of the examples, their order and dropout.
    """

    steps: int = 20
    examples: int = 64
    learning_rate: float = 1e-4
    optimizer: Literal["AdamW", "SGD"] = "AdamW"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.examples < 1 or not self.learning_rate > 0:
            raise ValueError(
                f"relearn needs steps and examples of at least 1 and a learning_rate above 0; found steps "
                f"{self.steps}, examples {self.examples}, learning_rate {self.learning_rate}."
            )


def audit_of(metric: str) -> tuple[Audit, str] | None:
    """Return the audit that a constraint's metric is of, and the metric itself; None where it is of none.

    Example:
        >>> audit_of("int8_accuracy"), audit_of("accuracy")
        (('int8', 'accuracy'), None)
    """
    for audit in get_args(Audit):
        if metric.startswith(f"{audit}_"):
            return audit, metric.removeprefix(f"{audit}_")
    return None
