"""Find what extends tva: the modules of a folder, the entry points of installed packages, and dotted paths."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from tva.errors import some


def modules_in(package: str) -> list[str]:
    """Return the names of a package's own modules, sorted, without importing them.

    Example:
        >>> "ties" in modules_in("tva.merge.methods")
        True
    """
    path = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))


@lru_cache
def installed(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of an entry-point group by name, not loaded.

    Args:
        group: ``tva.merge_methods``, ``tva.checkpoint_formats``, ``tva.searches``, ``tva.commands``, ``tva.data_sets``,
            ``tva.metrics`` or ``tva.scorers``.

    Raises:
        ValueError: Two installed packages use the same name.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        if point.name in found and found[point.name].value != point.value:
            both = some([found[point.name].value, point.value])
            raise ValueError(f"Two installed packages define {point.name!r} in {group}: {both}. Uninstall one of them.")
        found[point.name] = point
    return found


def load(path: str) -> Any:
    """Return the object at a dotted path.

    Raises:
        ValueError: There is no such module, or no such name in it.

    Example:
        >>> load("math.tau") > 6
        True
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and something it imports is not
        raise ValueError(
            f"{path}: there is no module {error.name!r}. Install it, or run where it can be imported."
        ) from error
    except AttributeError as error:
        raise ValueError(f"{path}: the module {module} has no {name!r}.") from error
