"""Choosing coefficients: what is wanted, and the strategies that find it.

Every public subclass of `Search` in a module of this folder is exported from here, and so is each that an installed
package names under the entry-point group ``tva.searches``; YAML names both as ``tva.search.NAME``.
"""

from __future__ import annotations

import importlib
from typing import Any

from tva.plugins import installed, modules_in
from tva.search.base import Choice, Problem, Search, choose
from tva.search.candidate import SCALING, Candidate
from tva.search.goals import NORMALIZED, Constraint, Objective, Rule, Scores, score

__all__ = [
    "NORMALIZED",
    "SCALING",
    "Candidate",
    "Choice",
    "Constraint",
    "Objective",
    "Problem",
    "Rule",
    "Scores",
    "Search",
    "choose",
    "score",
]


def searches_in(package: str) -> dict[str, type[Search]]:
    """Return the public searches that the modules of a package define, by class name.

    Raises:
        ValueError: Two modules define a search of the same name.
    """
    found: dict[str, type[Search]] = {}
    for name in modules_in(package):
        module = importlib.import_module(f"{package}.{name}")
        for kind in vars(module).values():
            if not (isinstance(kind, type) and issubclass(kind, Search)) or kind is Search:
                continue
            if kind.__module__ != module.__name__ or kind.__name__.startswith("_"):
                continue
            if kind.__name__ in found:
                raise ValueError(
                    f"{found[kind.__name__].__module__} and {module.__name__} both define the search "
                    f"{kind.__name__!r}; rename one."
                )
            found[kind.__name__] = kind
    return found


SEARCHES = searches_in(__name__)
globals().update(SEARCHES)
__all__ += ["SEARCHES", *sorted(SEARCHES)]


def __getattr__(name: str) -> Any:
    """Load a search that an installed package provides, when it is first named."""
    point = installed("tva.searches").get(name)
    if point is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kind = point.load()
    if not (isinstance(kind, type) and issubclass(kind, Search)):
        raise TypeError(
            f"The entry point {name} = {point.value} in tva.searches must be a subclass of tva.search.Search; found "
            f"{kind!r}."
        )
    globals()[name] = kind
    return kind
