"""Apply a recipe to checkpoint files within a stated memory, and verify or revert what was written."""

from tva.compose.apply import ComposeReport, compose
from tva.compose.recipe import Recipe
from tva.compose.revert import RevertReport, revert
from tva.compose.verify import VerifyReport, verify

__all__ = ["ComposeReport", "Recipe", "RevertReport", "VerifyReport", "compose", "revert", "verify"]
