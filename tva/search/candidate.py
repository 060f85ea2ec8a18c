"""One value for every coefficient that is searched."""

from __future__ import annotations

from dataclasses import dataclass

SCALING = "scaling_coef"


@dataclass(frozen=True)
class Candidate:
    """One value for every coefficient that is searched.

    Attributes:
        coefs: (name, value) pairs; ``scaling_coef`` is the coefficient of the whole recipe.

    Example:
        >>> Candidate.of(scaling_coef=0.3).scaling_coef, str(Candidate.of(s=0.2, l=0.4))
        (0.3, 's = 0.2, l = 0.4')
    """

    coefs: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, **coefs: float) -> Candidate:
        """Make a candidate from keywords."""
        return cls(tuple(coefs.items()))

    @property
    def scaling_coef(self) -> float:
        """The coefficient of the whole recipe; 1 where it is not searched."""
        return dict(self.coefs).get(SCALING, 1.0)

    @property
    def size(self) -> float:
        """Distance from no edit: the sum of absolute values."""
        return sum(abs(value) for _, value in self.coefs)

    def __str__(self) -> str:
        if [name for name, _ in self.coefs] == [SCALING]:
            return f"{self.scaling_coef:g}"
        return ", ".join(f"{name} = {value:g}" for name, value in self.coefs)
