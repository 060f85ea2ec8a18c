"""The names of a task vector, matched to those of a base or of another vector by the one rule of `match_names`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from tva._torch import Tensor
from tva.checkpoints import Fingerprint, match_names, tensor_digest
from tva.checkpoints.names import CopyOf, KeyMap
from tva.vectors.header import Origin

Part = Callable[[str], Tensor | None]  # a name to its delta, or to None where the vector does not move it


def match_vector(
    names: Collection[str],
    base: Collection[str],
    origin: Origin,
    part: Part,
    key_map: KeyMap = (),
    copy_in_base: CopyOf | None = None,
) -> tuple[dict[str, str], str] | None:
    """Match the names of a task vector to a base's.

    Args:
        names: All names of the vector, moved or not.
        base: The base's names, or those of another vector.
        origin: Where the vector comes from, with the digests by which tied tensors are known.
        part: Returns a delta.
        key_map: Regular expressions and replacements that are applied to ``names`` first.
        copy_in_base: Finds equal tensors in the base.

    Returns:
        The base's names to the vector's, and what was done; None where the names are equal.

    Raises:
        MismatchError: No mapping fits, or several do.
    """
    if set(names) == set(base) and not key_map:
        return None
    order = [*(name for name in (origin.base.tensors if origin.base else ()) if name in names)]
    order += [name for name in names if name not in set(order)]

    def copy_of(name: str, others: Iterable[str]) -> str | None:
        tensors = origin.base.tensors if origin.base else {}
        alike = [other for other in others if name in tensors and tensors.get(other) == tensors[name]]
        return next((other for other in alike if _same(part(name), part(other))), None)

    def never(name: str, others: Iterable[str]) -> str | None:
        return None

    found = match_names(order, base, key_map, copies=(copy_of, copy_in_base or never))
    return dict(found.names), found.text


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and tensor_digest(one) == tensor_digest(other)


def renamed_origin(origin: Origin, names: Mapping[str, str]) -> Origin:
    """Return an origin whose base has other names: new names to present ones."""
    if origin.base is None or not origin.base.tensors:
        return origin
    known = origin.base.tensors
    renamed = {new: known[old] for new, old in names.items() if old in known}
    return replace(origin, base=Fingerprint.from_tensors(renamed))
