"""LightningModules to fine-tune and edit: an encoder whose weights are the task's, under a head that is frozen."""

from tva.models.classifier import FrozenHeadClassifier
from tva.models.clip import ClipClassifier
from tva.models.vision import VisionClassifier

__all__ = ["ClipClassifier", "FrozenHeadClassifier", "VisionClassifier"]
