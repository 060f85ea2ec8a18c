"""Choosing coefficients: what is wanted, and the strategies that find it."""

from tva.search.base import SCALING, Candidate, Choice, Problem, Search, choose
from tva.search.goals import NORMALIZED, Constraint, Objective, Rule, Scores, score
from tva.search.grid import Bisect, Grid
from tva.search.learned import Learned
from tva.search.optuna import Optuna
from tva.search.race import Race

__all__ = [
    "NORMALIZED",
    "SCALING",
    "Bisect",
    "Candidate",
    "Choice",
    "Constraint",
    "Grid",
    "Learned",
    "Objective",
    "Optuna",
    "Problem",
    "Race",
    "Rule",
    "Scores",
    "Search",
    "choose",
    "score",
]
