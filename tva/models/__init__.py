"""LightningModules to fine-tune and edit: with heads that belong to the task, or with their own."""

from tva.models.classifier import FrozenHeadClassifier
from tva.models.clip import ClipClassifier
from tva.models.language import CausalLM, LanguageModel, Seq2SeqLM
from tva.models.text import TextClassifier
from tva.models.trained import TimmModel, TrainedModel, TransformersModel
from tva.models.vision import VisionClassifier

__all__ = [
    "CausalLM",
    "ClipClassifier",
    "FrozenHeadClassifier",
    "LanguageModel",
    "Seq2SeqLM",
    "TextClassifier",
    "TimmModel",
    "TrainedModel",
    "TransformersModel",
    "VisionClassifier",
]
