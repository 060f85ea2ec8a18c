"""Merge methods: how the deltas of several task vectors become one delta, as pure functions on tensors.

A method is one class in one file of this package, listed in `METHODS`; its fields are its parameters in a recipe.
"""

from tva.merge.dare import Dare
from tva.merge.linear import Analogy, Mean
from tva.merge.method import Method, Place
from tva.merge.sparse import Magnitude, Ties

METHODS: dict[str, type[Method]] = {
    "analogy": Analogy,
    "dare": Dare,
    "magnitude": Magnitude,
    "mean": Mean,
    "ties": Ties,
}

__all__ = ["METHODS", "Analogy", "Dare", "Magnitude", "Mean", "Method", "Place", "Ties"]
