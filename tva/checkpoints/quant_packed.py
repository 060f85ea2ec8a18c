"""Integers of 4 or 8 bits packed into words of 32, with a scale and a zero for each group: AWQ, GPTQ and the
``pack-quantized`` format of compressed-tensors.

The weight is ``(code - zero) * scale``. AWQ and GPTQ store it as [in, out], the model has it as [out, in].

Source: Lin et al., "AWQ: activation-aware weight quantization", MLSys 2024; Frantar et al., "GPTQ: accurate
post-training quantization for generative pre-trained transformers", ICLR 2023.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tva._torch import Tensor, torch
from tva.checkpoints.dequantized import ByUnit, Dequantized
from tva.checkpoints.foreign import shown
from tva.checkpoints.lazy import LazyWeights
from tva.errors import some

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word of AWQ the codes of eight neighbours are
ADVICE = "Give the checkpoint that it was quantized from, or dequantize it first."


def unpack(words: Tensor, bits: int, order: tuple[int, ...] = ()) -> Tensor:
    """Return the codes in words of 32 bits, along the last dimension; the first is in the lowest bits.

    Args:
        words: Int32, shape (…, words).
        bits: Bits per code.
        order: Which code of a word is the first, the second …; by default as they are.
    """
    count = 32 // bits
    shifts = torch.tensor(order or range(count), dtype=torch.int64) * bits
    return (words.long()[..., None] >> shifts & 2**bits - 1).flatten(-2)


@dataclass(frozen=True, eq=False)
class Packed(ByUnit):
    """Packed integers of AWQ or GPTQ."""

    bits: int
    group: int
    awq: bool
    zero: int  # what is added to a stored zero

    def matrix(self, index: int) -> Tensor:
        order = AWQ_ORDER if self.awq else ()
        words, zeros = self.parts["codes"].read(), self.parts["zeros"].read()
        # Along the outputs in AWQ, along the inputs in GPTQ: [in, out] in either case.
        codes = unpack(words, self.bits, order) if self.awq else unpack(words.T, self.bits).T
        zeros = (unpack(zeros, self.bits, order) + self.zero) % 2**self.bits  # 0 less 1 is stored as the largest
        groups = self.parts.get("groups")
        rows = groups.read().long() if groups else torch.arange(len(codes)) // self.group
        return ((codes - zeros[rows]).double() * self.parts["scales"].read().double()[rows]).T


@dataclass(frozen=True, eq=False)
class Rows(Dequantized):
    """Packed integers of compressed-tensors, symmetric, row by row."""

    bits: int

    def rows(self, first: int, last: int) -> Tensor:
        words, width = self.parts["codes"].spec.sizes[1], self.sizes[1]
        packed = self.parts["codes"].slice(first * words, last * words).reshape(-1, words)
        codes = unpack(packed, self.bits)[:, :width] - 2 ** (self.bits - 1)
        groups = self.parts["scales"].spec.sizes[1]
        scales = self.parts["scales"].slice(first * groups, last * groups).reshape(-1, groups).double()
        return codes.double().mul_(scales.repeat_interleave(-(-width // groups), 1)[:, :width])


def find(weights: LazyWeights, config: Mapping[str, Any]) -> dict[str, Dequantized]:
    """Return the tensors of this kind by the names of their weights; see `tva.checkpoints.quant_blocks.find`.

    Raises:
        ValueError: ``config.json`` does not say how they are packed, or in a way that is not supported.
    """
    found: dict[str, Dequantized] = {}
    for name in weights:
        match = re.fullmatch(r"(?P<module>.+)\.(?P<kind>qweight|weight_packed)", name)
        if match is None or weights.spec(name).dtype_name != "int32":
            continue
        entry = _packed if match["kind"] == "qweight" else _rows
        found[f"{match['module']}.weight"] = entry(weights, config, match["module"])
    return found


def _packed(weights: LazyWeights, config: Mapping[str, Any], module: str) -> Packed:
    method, bits = config.get("quant_method"), config.get("bits", config.get("w_bit"))
    names = {"codes": f"{module}.qweight", "scales": f"{module}.scales", "zeros": f"{module}.qzeros"}
    group = config.get("group_size", config.get("q_group_size"))
    awq = method == "awq"
    plain = awq and bits == 4 and str(config.get("version", "gemm")).lower() == "gemm"
    plain |= method == "gptq" and bits in (4, 8) and config.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2")
    if not plain or not isinstance(group, int) or not names.keys() <= {r for r, n in names.items() if n in weights}:
        said = {key: config[key] for key in ("quant_method", "bits", "group_size", "version") if key in config}
        raise ValueError(
            f"{weights.path} is quantized (GPTQ or AWQ): {names['codes']!r} holds codes, and config.json says "
            f"{shown(said)}. AWQ with 4 bits (gemm) and GPTQ with 4 or 8 bits are read, with their scales and zeros. "
            f"{ADVICE}"
        )
    if not awq and f"{module}.g_idx" in weights:
        names["groups"] = f"{module}.g_idx"
    factor, codes = 32 // bits, weights.spec(names["codes"]).sizes
    sizes = (codes[1] * factor, codes[0]) if awq else (codes[1], codes[0] * factor)
    group = sizes[1] if group == -1 else group
    groups = -(-sizes[1] // max(1, group))
    fits = weights.spec(names["scales"]).sizes == (groups, sizes[0])
    fits &= weights.spec(names["zeros"]).sizes == (groups, sizes[0] // factor)
    fits &= "groups" not in names or weights.spec(names["groups"]).sizes == (sizes[1],)
    if not fits:
        raise ValueError(
            f"{weights.path}: scales and zeros of {module!r} do not have the shapes of codes for a weight of "
            f"{list(sizes)} in groups of {group}. {ADVICE}"
        )
    zero = 0 if awq or config.get("checkpoint_format") == "gptq_v2" else 1  # the older format stores the zero less 1
    parts = {role: weights.entry(name) for role, name in names.items()}
    return Packed("AWQ" if awq else "GPTQ", names, parts, sizes, bits, group, awq, zero)


def _rows(weights: LazyWeights, config: Mapping[str, Any], module: str) -> Rows:
    names = {"codes": f"{module}.weight_packed", "scales": f"{module}.weight_scale", "shape": f"{module}.weight_shape"}
    groups = config.get("config_groups")
    settings = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    setting = settings[0] if len(settings) == 1 and isinstance(settings[0], Mapping) else {}
    bits, group = setting.get("num_bits"), setting.get("group_size")
    more = [f"{module}.{kind}" for kind in ("weight_zero_point", "weight_g_idx") if f"{module}.{kind}" in weights]
    if (
        not all(name in weights for name in names.values())
        or bits not in (4, 8)
        or more
        or not setting.get("symmetric")
    ):
        raise ValueError(
            f"{weights.path} is quantized (compressed-tensors): {names['codes']!r} holds codes, in a way that is not "
            f"supported{f' ({some(more)} is there)' * bool(more)}. One group of settings with 4 or 8 bits, symmetric "
            f"and in the order of the inputs, is read. {ADVICE}"
        )
    sizes = tuple(weights[names["shape"]].tolist())
    codes, scales = weights.spec(names["codes"]).sizes, weights.spec(names["scales"]).sizes
    fits = len(sizes) == 2 and codes == (sizes[0], -(-sizes[1] * bits // 32)) and scales[:1] == sizes[:1]
    fits = fits and len(scales) == 2 and sizes[1] == scales[1] * (group if group and group > 0 else sizes[1])
    if not fits:
        raise ValueError(
            f"{weights.path}: codes and scales of {module!r}, {list(codes)} and {list(scales)}, are not those of a "
            f"weight of {list(sizes)} with {bits} bits. {ADVICE}"
        )
    return Rows("compressed-tensors", names, {r: weights.entry(n) for r, n in names.items()}, sizes, bits)
