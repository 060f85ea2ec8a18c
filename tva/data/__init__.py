"""LightningDataModules: one task each, with splits, class names and prompt templates."""

from tva.data.image_task import ImageTask

__all__ = ["ImageTask"]
