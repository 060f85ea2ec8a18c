"""torch and its `Tensor`, loaded when something of them is first used.

torch takes more than a second and 0.3 GB to load, and reading headers, parsing recipes and the fused arithmetic need
none of it: modules on the way there take torch from here.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):  # as jsonargparse asks of everything in a module
                raise AttributeError(name)
            return getattr(importlib.import_module("torch"), name)

    class _AnyTensor(type):
        def __instancecheck__(cls, value: Any) -> bool:
            return torch_is_loaded() and isinstance(value, torch.Tensor)

    class Tensor(metaclass=_AnyTensor):
        """Stands for `torch.Tensor` in annotations and for ``isinstance``."""

    torch = _Torch()

__all__ = ["Tensor", "load_torch", "num_threads", "torch", "torch_is_loaded", "torch_version"]


def torch_is_loaded() -> bool:
    """Whether anything has loaded torch."""
    return hasattr(sys.modules.get("torch"), "Tensor")  # which is there when it is whole


def load_torch() -> None:
    """Load torch, if nothing has."""
    importlib.import_module("torch")


def num_threads() -> int:
    """Return the number of threads that torch uses, or would use, for one operation."""
    if torch_is_loaded():
        return torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, int(asked)) if asked.isdigit() and int(asked) else cores


def torch_version() -> str:
    """Return ``torch.__version__``, without loading torch."""
    if torch_is_loaded():
        return sys.modules["torch"].__version__
    package = importlib.util.find_spec("torch")
    spec = importlib.util.spec_from_file_location(
        "_torch_version", f"{package.submodule_search_locations[0]}/version.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.__version__)
