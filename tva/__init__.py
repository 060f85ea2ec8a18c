"""Edit trained networks by arithmetic on their weights, and prove what the edit did.

    τ_t   = θ_finetuned − θ_base            a task vector: what fine-tuning on task t learned
    θ_new = θ_base + λ · recipe(τ_1 … τ_k)   negate to forget, add to combine, C + (B − A) to infer a task

What is named here loads when first used: torch with the arithmetic, Lightning and open_clip only with models.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tva.version import __version__

if TYPE_CHECKING:
    from tva.checkpoints import Fingerprint, fingerprint, open_weights, save_weights
    from tva.edit.trainer import edit_model
    from tva.errors import MismatchError, NoEffectError
    from tva.report.edit_report import EditReport
    from tva.vectors.header import Origin
    from tva.vectors.task_vector import TaskVector

_MODULES = {
    "tva.report.edit_report": ["EditReport"],
    "tva.errors": ["MismatchError", "NoEffectError"],
    "tva.vectors.header": ["Origin"],
    "tva.vectors.task_vector": ["TaskVector"],
    "tva.edit.trainer": ["edit_model"],
    "tva.checkpoints": ["Fingerprint", "fingerprint", "open_weights", "save_weights"],
}
__all__ = [
    "EditReport",
    "Fingerprint",
    "MismatchError",
    "NoEffectError",
    "Origin",
    "TaskVector",
    "__version__",
    "edit_model",
    "fingerprint",
    "open_weights",
    "save_weights",
]

_here = Path(__file__).parent
if not (_here / "callbacks").is_dir():  # a checkout: the callbacks are in a folder of their own beside this one
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'tva' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
