"""Lightning callbacks; this folder installs and imports as ``tva.callbacks``."""

from tva.callbacks.task_vector import TaskVectorCallback

__all__ = ["TaskVectorCallback"]
