"""Single experts as parts of a fused tensor, for adapters on the first where the base holds the second.

transformers 5 keeps the experts of a mixture in one tensor, ``experts.gate_up_proj`` [expert, 2 · inner, hidden] with
the gate's rows before the up projection's, and ``experts.down_proj`` [expert, hidden, inner]; its version 4 and most
folders have ``experts.3.gate_proj.weight`` and so on, in Mixtral ``w1``, ``w3`` and ``w2``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tva._torch import Tensor, torch
from tva.checkpoints.lazy import Entry
from tva.errors import MismatchError, some

SINGLE = re.compile(r"(?:^|.*\.)experts\.\d+\.(?P<kind>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
FUSED = re.compile(r"(?P<experts>(?:.*\.)?experts)\.(?P<kind>gate_up_proj|down_proj)")
KINDS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
OTHER_ORDER = ("gpt_oss",)  # gate and up take turns, and inputs come first


@dataclass(frozen=True)
class Rows(Entry):
    """A stretch of a tensor as a matrix."""

    source: Entry
    start: int
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def written_dtype(self) -> str:
        return self.source.written_dtype

    @property
    def in_parts(self) -> bool:
        return self.source.in_parts

    @property
    def held_bytes(self) -> int:
        return self.source.held_bytes

    def slice(self, start: int, stop: int) -> Tensor:
        return self.source.slice(self.start + start, self.start + stop)


@dataclass(frozen=True)
class Stacked(Entry):
    """Tensors of equal size, one after the other, as one of a wider dtype."""

    parts: tuple[Entry, ...]
    dtype: torch.dtype
    shape: torch.Size

    @property
    def written_dtype(self) -> str:
        wide = any(part.dtype == self.dtype and part.written_dtype != part.spec.dtype_name for part in self.parts)
        return self.parts[0].written_dtype if wide else self.spec.dtype_name

    @property
    def in_parts(self) -> bool:
        return all(part.in_parts for part in self.parts)

    @property
    def held_bytes(self) -> int:
        return max(part.held_bytes for part in self.parts)

    def slice(self, start: int, stop: int) -> Tensor:
        size = self.parts[0].shape.numel()
        found = [torch.empty(0, dtype=self.dtype)]
        for index in range(start // size, -(-stop // size)):
            low, high = max(start, index * size), min(stop, (index + 1) * size)
            found.append(self.parts[index].slice(low - index * size, high - index * size).to(self.dtype))
        return torch.cat(found)


def single_experts(
    entries: Mapping[str, Entry], targets: Collection[str], model_type: object
) -> tuple[dict[str, Entry], dict[str, list[str]]]:
    """Split fused experts where an adapter changes single ones.

    Args:
        entries: The base's tensors.
        targets: What the adapter changes, by its own names.
        model_type: The one in the base's ``config.json``.

    Returns:
        The tensors with single experts in place of fused ones, and the names of these by that of the fused one; both as
        they were where there is nothing to split.

    Raises:
        MismatchError: The base's experts are fused in an order that is not known.
    """
    wanted = {match["kind"] for target in targets if (match := SINGLE.fullmatch(target))}
    fused = {name: match for name in entries if (match := FUSED.fullmatch(name)) and len(entries[name].shape) == 3}
    if not wanted or not fused or any(SINGLE.fullmatch(name) for name in entries):
        return dict(entries), {}
    if model_type in OTHER_ORDER:
        raise MismatchError(
            f"The adapter changes single experts, and those of the base ({model_type}) are fused in another order: "
            f"{some(fused)}. Merge the adapter where it was trained, and give the merged model."
        )
    split: dict[str, Entry] = {name: entry for name, entry in entries.items() if name not in fused}
    names: dict[str, list[str]] = {}
    for name, match in fused.items():
        kinds, (experts, rows, columns) = KINDS[match["kind"]], entries[name].shape
        rows //= len(kinds)
        for index in range(experts * len(kinds)):
            kind = kinds[index % len(kinds)]
            kind = MIXTRAL[kind] if wanted <= {*MIXTRAL.values()} else kind
            single = f"{match['experts']}.{index // len(kinds)}.{kind}.weight"
            split[single] = Rows(entries[name], index * rows * columns, torch.Size((rows, columns)))
            names.setdefault(name, []).append(single)
    return split, names


def fused_again(
    entries: Mapping[str, Entry], moved: Mapping[str, Entry], split: Mapping[str, Entry], names: Mapping[str, list[str]]
) -> dict[str, Entry]:
    """Return the base's tensors with what an adapter changes, experts fused as in the base."""
    found = {}
    for name, entry in entries.items():
        singles = names.get(name, [])
        if any(single in moved for single in singles):
            parts = tuple(moved.get(single, split[single]) for single in singles)
            dtype = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
            found[name] = Stacked(parts, dtype, entry.shape)
        else:
            found[name] = moved.get(name, entry)
    return found
