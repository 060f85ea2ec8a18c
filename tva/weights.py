"""The old name of `tva.checkpoints`, for one release."""

import warnings
from typing import Any

from tva import checkpoints


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    warnings.warn("tva.weights is now tva.checkpoints; import from there.", DeprecationWarning, stacklevel=2)
    return getattr(checkpoints, name)
