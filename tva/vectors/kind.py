"""Kinds of task vectors: those of ordinary networks, and those that mean something only in another network.

A module says what kind its vectors are of by an attribute ``vector_kind``; ordinary networks have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tva.errors import MismatchError, some

if TYPE_CHECKING:
    from torch import nn

TANGENT = "tangent"
KEY = "tva.kind"  # in the headers of vectors and of weights


def kind_of(module: nn.Module) -> str | None:
    """Return the kind of a model's task vectors, or None for an ordinary network.

    Raises:
        ValueError: Its parts say different things.
    """
    found = {kind for part in module.modules() if (kind := getattr(part, "vector_kind", None)) is not None}
    if len(found) > 1:
        raise ValueError(f"A model's task vectors are of one kind, but its parts say {some(sorted(found))}.")
    return next(iter(found), None)


def name_of(kind: str | None) -> str:
    """Return the display name of a kind."""
    return kind or "ordinary"


def check_kinds(kinds: Mapping[str, str | None], override: str) -> str | None:
    """Check that vectors, and what they are used with, are of one kind, and return it.

    Args:
        kinds: What each is called, to its kind.
        override: What to do if the mixture is meant.

    Raises:
        MismatchError: There are several kinds.
    """
    by_kind: dict[str | None, list[str]] = {}
    for name, kind in kinds.items():
        by_kind.setdefault(kind, []).append(name)
    if len(by_kind) > 1:
        found = "; ".join(f"{name_of(kind)}: {', '.join(names[:3])}" for kind, names in by_kind.items())
        raise MismatchError(
            f"Task vectors go only with their own kind (a tangent vector is a linearized network's), but here are "
            f"several: {found}. Fine-tune and edit with one setting of tangent; or {override}."
        )
    return next(iter(by_kind), None)
