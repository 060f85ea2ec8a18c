"""Float8 and int8 codes with one scale for each block, row or tensor, and those of bitsandbytes (``SCB``).

The weight is ``code * scale``; in bitsandbytes' int8 ``code * SCB / 127``. Scales of blocks are called
``weight_scale_inv`` by DeepSeek and transformers, those of rows and tensors ``weight_scale`` by compressed-tensors,
FBGEMM and ModelOpt, ``scale_weight`` by ComfyUI.

Source: DeepSeek-AI, "DeepSeek-V3 technical report", 2024 (blocks of 128 x 128); Dettmers et al., "LLM.int8()", 2022.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tva._torch import Tensor, torch
from tva.checkpoints.dequantized import Dequantized, in_blocks
from tva.checkpoints.lazy import Entry, LazyWeights

SCALES = r"(?P<module>.+?)(?P<kind>\.weight_scale_inv|\.weight_scale|\.scale_weight|\.SCB|_scale_inv)"
# Scales of activations, and what bitsandbytes says of the order of codes: no part of the weights.
BESIDE = (
    "input_scale",
    "scale_input",
    "output_scale",
    "activation_scale",
    "activation_scale_inv",
    "k_scale",
    "v_scale",
    "weight_format",
)
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}


@dataclass(frozen=True, eq=False)
class Blocks(Dequantized):
    """Codes times the scale of their block."""

    block: tuple[int, int]
    grid: tuple[int, int]  # blocks in each direction of one matrix
    divisor: float = 1.0

    def rows(self, first: int, last: int) -> Tensor:
        height, width = self.sizes[-2:]
        codes = self.parts["codes"].slice(first * width, last * width).reshape(-1, width).double()
        row = torch.arange(first, last)
        at = row // height * self.grid[0] + row % height // self.block[0]  # the row of blocks
        low, high = int(at[0]), int(at[-1]) + 1
        columns = self.grid[1]
        scales = self.parts["scales"].slice(low * columns, high * columns).reshape(-1, columns).double()
        wide = scales.div_(self.divisor).repeat_interleave(self.block[1], 1)[:, :width]
        return codes.mul_(wide[at - low])

    def codes(self, values: Tensor) -> dict[str, Tensor]:
        stored = self.parts["codes"].spec.dtype_name
        largest = LARGEST[stored]
        scales = in_blocks(values, self.block) * (self.divisor / largest)  # in bitsandbytes the largest magnitude
        scales = scales.masked_fill_(scales == 0, 1).to(self.parts["scales"].dtype)
        wide = scales.double().div(self.divisor)
        wide = wide.repeat_interleave(self.block[0], -2)[..., : values.shape[-2], :]
        wide = wide.repeat_interleave(self.block[1], -1)[..., : values.shape[-1]]
        codes = values.div(wide).clamp_(-largest, largest)
        codes = codes.round_() if stored == "int8" else codes
        return {"codes": codes.to(self.parts["codes"].dtype), "scales": scales}


def find(weights: LazyWeights, config: Mapping[str, Any]) -> dict[str, Dequantized]:
    """Return the tensors of this kind by the names of their weights.

    Args:
        weights: As stored.
        config: ``quantization_config``, or empty.

    Raises:
        ValueError: Codes and scales do not fit together.
    """
    found: dict[str, Dequantized] = {}
    for name in weights:
        match = re.fullmatch(SCALES, name)
        if match is None:
            continue
        module, kind = match["module"], match["kind"]
        target = module if kind == "_scale_inv" else f"{module}.weight"
        if target not in weights or weights.spec(target).dtype_name not in LARGEST:
            continue
        if (kind == ".SCB") > (weights.spec(target).dtype_name == "int8"):
            continue
        found[target] = _entry(weights, config, target, name, module)
    return found


def _entry(weights: LazyWeights, config: Mapping[str, Any], target: str, scales: str, module: str) -> Blocks:
    codes, scale = weights.spec(target), weights.spec(scales)
    blocks = config.get("weight_block_size") if scales.endswith("_scale_inv") else None
    grid = _grid(codes.sizes, scale.sizes)
    block = grid and _block(codes.sizes[-2:], grid, blocks)
    if block is None or not scale.is_floating_point() or scale.itemsize == 1:
        said = f", and config.json gives blocks of {blocks!r:.40}" if blocks else ""
        raise ValueError(
            f"{weights.path} holds the codes {target!r} of shape {list(codes.sizes)} with scales {scales!r} of shape "
            f"{list(scale.sizes)} in {scale.dtype_name}{said}: which scale belongs to which code is not known. Give "
            f"the checkpoint that it was quantized from, or dequantize it first."
        )
    int8 = scales.endswith(".SCB")
    scheme = "bitsandbytes int8" if int8 else f"{'int8' if codes.dtype_name == 'int8' else 'FP8'} with scales"
    names = {"codes": target, "scales": scales}
    names |= {beside: f"{module}.{beside}" for beside in BESIDE if f"{module}.{beside}" in weights}
    parts: dict[str, Entry] = {role: weights.entry(name) for role, name in names.items()}
    if "weight_format" in parts and bool(parts["weight_format"].read().count_nonzero()):
        raise ValueError(
            f"{weights.path} holds {names['weight_format']!r}, by which the codes of {target!r} are not stored row by "
            f"row. Save it with a present bitsandbytes, or give the checkpoint that it was quantized from."
        )
    return Blocks(scheme, names, parts, codes.sizes, block, grid, 127.0 if int8 else 1.0)


def _grid(sizes: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int] | None:
    if len(sizes) < 2:
        return None
    if all(size == 1 for size in scales) and sizes[:-2].count(1) == len(sizes) - 2:
        return 1, 1
    if len(scales) == 1 and len(sizes) == 2:
        return (scales[0], 1) if scales[0] == sizes[0] else None
    return (scales[-2], scales[-1]) if len(scales) == len(sizes) and scales[:-2] == sizes[:-2] else None


def _block(sizes: tuple[int, ...], grid: tuple[int, int], given: Any) -> tuple[int, int] | None:
    """Return the size of a block: as given, else 128, else the power of two that divides the tensor."""
    found = []
    for direction, (size, count) in enumerate(zip(sizes, grid, strict=True)):
        if isinstance(given, list | tuple) and len(given) == 2 and all(isinstance(b, int) and b > 0 for b in given):
            candidates = [given[direction]]
        else:
            exact = size // count if count and size % count == 0 else 0
            candidates = [size] if count == 1 else [1] if count == size else [128]
            candidates += [exact] if exact and exact & (exact - 1) == 0 else []
        fitting = [block for block in candidates if block and -(-size // block) == count]
        if not fitting:
            return None
        found.append(fitting[0])
    return found[0], found[1]
