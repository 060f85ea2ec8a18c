"""Lightning callbacks; this folder installs and imports as ``tva.callbacks``."""

from tva.callbacks.control_evaluation import ControlEvaluation
from tva.callbacks.curvature_penalty import CurvaturePenalty
from tva.callbacks.gradient_ascent import GradientAscent
from tva.callbacks.merge_statistics import MergeStatistics
from tva.callbacks.scaling_curve import ScalingCurve
from tva.callbacks.task_vector import TaskVectorCallback
from tva.callbacks.writer import SavedVector

__all__ = [
    "ControlEvaluation",
    "CurvaturePenalty",
    "GradientAscent",
    "MergeStatistics",
    "SavedVector",
    "ScalingCurve",
    "TaskVectorCallback",
]
