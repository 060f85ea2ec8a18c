"""Find merge methods by name: tva's own, those that installed packages add, and classes by dotted path."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from tva.merge.base import Method
from tva.plugins import installed, load, modules_in

FOLDER, GROUP = "tva.merge.methods", "tva.merge_methods"


def own_methods() -> dict[str, type[Method]]:
    """Return the methods in the files of the folder ``methods``, by name and in the order of names."""
    found: dict[str, type[Method]] = {}
    for module in modules_in(FOLDER):
        for value in vars(importlib.import_module(f"{FOLDER}.{module}")).values():
            if isinstance(value, type) and value.__module__ == f"{FOLDER}.{module}" and "name" in vars(value):
                if value.name in found:
                    raise ValueError(f"Two merge methods have the name {value.name!r}: {found[value.name]}, {value}.")
                found[value.name] = value
    return dict(sorted(found.items()))


def find_method(name: str) -> type[Method] | None:
    """Return the method of a name in a recipe, or None where there is none.

    Args:
        name: One of tva's own or of an entry point, or the dotted path of a class, such as ``my_package.Median``. The
            package is imported only then.

    Raises:
        ValueError: The package cannot be imported, lacks the class, or it is not a merge method.
    """
    from tva.merge import METHODS

    if name in METHODS:
        return METHODS[name]
    if "." in name:
        return _checked(name, load(name))
    point = installed(GROUP).get(name)
    return None if point is None else _checked(f"{name}, which is {point.value},", point.load())


def method_names() -> list[str]:
    """Return the names of tva's own methods and of those that installed packages add, in the order of names."""
    from tva.merge import METHODS

    return sorted({*METHODS, *installed(GROUP)})


def _checked(what: str, found: Any) -> type[Method]:
    if not (isinstance(found, type) and issubclass(found, Method) and dataclasses.is_dataclass(found)):
        raise ValueError(
            f"{what} must be a merge method: a frozen dataclass derived from tva.merge.Method; found {found!r:.80}."
        )
    return found
