"""LightningDataModules: one task each, with splits, class names and prompt templates."""

from tva.data.image_task import ImageTask
from tva.data.language_task import LanguageTask
from tva.data.text_task import TextTask

__all__ = ["ImageTask", "LanguageTask", "TextTask"]
