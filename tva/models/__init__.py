"""LightningModules to fine-tune and edit: networks whose weights are the task's, without heads of their own."""

from tva.models.classifier import FrozenHeadClassifier
from tva.models.clip import ClipClassifier
from tva.models.language import CausalLM, LanguageModel, Seq2SeqLM
from tva.models.text import TextClassifier
from tva.models.vision import VisionClassifier

__all__ = [
    "CausalLM",
    "ClipClassifier",
    "FrozenHeadClassifier",
    "LanguageModel",
    "Seq2SeqLM",
    "TextClassifier",
    "VisionClassifier",
]
