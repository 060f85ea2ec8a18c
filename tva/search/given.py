"""A coefficient that is given, not searched."""

from __future__ import annotations

from tva.search.base import Choice, Problem, Search
from tva.search.candidate import Candidate


class Given(Search):
    """Use one coefficient of the whole recipe; nothing is evaluated on validation data.

    Args:
        scaling_coef: The coefficient.
    """

    def __init__(self, scaling_coef: float = 1.0) -> None:
        super().__init__()
        self.scaling_coef = scaling_coef

    def run(self, problem: Problem | None = None) -> Choice:
        """Return the coefficient; the problem is not needed."""
        return Choice(Candidate.of(scaling_coef=self.scaling_coef), True, "it was given")
