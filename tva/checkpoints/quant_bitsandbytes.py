"""The 4-bit format of bitsandbytes, nf4 and fp4: two codes a byte, into a table of 16 values, times the block's absmax.

The scales of blocks may be quantized too (double quantization): ``map[code] * nested_absmax + nested_offset``.

Source: Dettmers et al., "QLoRA: efficient finetuning of quantized LLMs", NeurIPS 2023.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tva._torch import Tensor, torch
from tva.checkpoints.dequantized import Dequantized
from tva.checkpoints.foreign import check_form, parse_json
from tva.checkpoints.lazy import LazyWeights

STATE = r"(?P<target>.+)\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4)"
FORM = {"blocksize": int, "shape": [int], "nested_blocksize": (int, None), "nested_offset": (float, None)}


@dataclass(frozen=True, eq=False)
class FourBit(Dequantized):
    """Codes into a table, times the largest magnitude of their block."""

    block: int
    nested_block: int = 0  # 0 where the scales of blocks are not quantized
    offset: float = 0.0

    def slice(self, start: int, stop: int) -> Tensor:
        if start == stop:
            return torch.empty(0, dtype=torch.float64)
        packed = self._bytes(start // 2, -(-stop // 2))
        table = self.parts["table"].read().double()
        both = torch.stack([packed >> 4, packed & 15], 1).reshape(-1)  # the first of two is in the high bits
        values = table[both[start % 2 : start % 2 + stop - start].long()]
        low = start // self.block
        scales = self._scales(low, -(-stop // self.block))
        return values.mul_(scales[torch.arange(start, stop) // self.block - low])

    def _bytes(self, start: int, stop: int) -> Tensor:
        entry = self.parts["codes"]
        width = entry.spec.itemsize  # codes may be stored in words of another dtype
        words = entry.slice(start // width, -(-stop // width)).view(torch.uint8)
        return words[start % width : start % width + stop - start]

    def _scales(self, low: int, high: int) -> Tensor:
        scales = self.parts["scales"].slice(low, high)
        if not self.nested_block:
            return scales.double()
        first = low // self.nested_block
        nested = self.parts["nested"].slice(first, -(-high // self.nested_block)).double()
        values = self.parts["nested_table"].read().double()[scales.long()]
        return values.mul_(nested[torch.arange(low, high) // self.nested_block - first]).add_(self.offset)

    def codes(self, values: Tensor) -> dict[str, Tensor]:
        flat, padding = values.reshape(-1), -values.numel() % self.block
        blocks = torch.nn.functional.pad(flat, (0, padding)).reshape(-1, self.block)
        absmax = blocks.abs().amax(1)
        new = self._nested(absmax) if self.nested_block else {"scales": absmax.to(self.parts["scales"].dtype)}
        # As bitsandbytes does, codes are chosen by the scales before these are quantized.
        scaled = blocks.div_(absmax.masked_fill(absmax == 0, 1)[:, None]).reshape(-1)[: len(flat)]
        chosen = _nearest(self.parts["table"].read().double(), scaled)
        packed = torch.nn.functional.pad(chosen, (0, len(chosen) % 2)).reshape(-1, 2)
        stored = self.parts["codes"]
        data = (packed[:, 0] << 4 | packed[:, 1]).to(torch.uint8)
        data = torch.nn.functional.pad(data, (0, stored.spec.num_bytes - len(data)))
        return {"codes": data.view(stored.dtype), **new}

    def _nested(self, absmax: Tensor) -> dict[str, Tensor]:
        flat = absmax - self.offset
        blocks = torch.nn.functional.pad(flat, (0, -len(flat) % self.nested_block)).reshape(-1, self.nested_block)
        largest = blocks.abs().amax(1).to(self.parts["nested"].dtype)
        scaled = blocks / largest.double().masked_fill(largest == 0, 1)[:, None]
        chosen = _nearest(self.parts["nested_table"].read().double(), scaled.reshape(-1)[: len(flat)])
        return {"scales": chosen.to(torch.uint8), "nested": largest}


def _nearest(table: Tensor, values: Tensor) -> Tensor:
    ordered, order = table.sort()
    middles = (ordered[1:] + ordered[:-1]) / 2
    return order[torch.bucketize(values, middles)]


def find(weights: LazyWeights, config: Mapping[str, Any]) -> dict[str, Dequantized]:
    """Return the tensors of this kind by the names of their weights; see `tva.checkpoints.quant_blocks.find`."""
    found: dict[str, Dequantized] = {}
    for name in weights:
        match = re.fullmatch(STATE, name)
        if match is not None and match["target"] in weights:
            found[match["target"]] = _entry(weights, match["target"], name, match["kind"])
    return found


def _entry(weights: LazyWeights, target: str, state: str, kind: str) -> FourBit:
    where = f"{weights.path}: {state}"
    facts = parse_json(bytes(weights[state].to(torch.uint8).tolist()), where, dict)
    check_form(facts, FORM, where)
    names = {"codes": target, "scales": f"{target}.absmax", "table": f"{target}.quant_map", "state": state}
    nested = facts.get("nested_blocksize") or 0
    if nested:
        names |= {"nested": f"{target}.nested_absmax", "nested_table": f"{target}.nested_quant_map"}
    lacking = [name for name in names.values() if name not in weights]
    sizes, block = tuple(facts.get("shape") or ()), facts.get("blocksize") or 0
    if lacking or not sizes or block < 2 or nested < 0 or min(sizes) < 1:
        raise ValueError(
            f"{where} describes a 4-bit tensor, which takes shape, blocksize and the tensors "
            f"{', '.join(names.values())}; {', '.join(lacking) or 'shape or blocksize'} is missing. Save it again."
        )
    entry = FourBit(
        f"bitsandbytes {kind}",
        names,
        {role: weights.entry(name) for role, name in names.items()},
        sizes,
        block,
        nested,
        float(facts.get("nested_offset") or 0.0),
    )
    count, blocks = entry.spec.numel(), -(-entry.spec.numel() // block)
    sizes_ok = -(-count // 2) <= entry.parts["codes"].spec.num_bytes and entry.parts["scales"].spec.numel() == blocks
    sizes_ok &= entry.parts["table"].spec.numel() == 16
    if nested:
        sizes_ok &= entry.parts["nested"].spec.numel() == -(-blocks // nested)
        sizes_ok &= entry.parts["nested_table"].spec.numel() == 256
    if not sizes_ok:
        raise ValueError(
            f"{where} gives the shape {list(sizes)} in blocks of {block}, which its codes, scales and tables do not "
            f"have. Copy the checkpoint again."
        )
    return entry
