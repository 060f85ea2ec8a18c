"""MXFP4, as gpt-oss stores experts: blocks of 32 four-bit floats that share a power of two, in ``NAME_blocks`` and
``NAME_scales``.

The tensors are stored as [expert, out, groups, 16 bytes]; the model has them as [expert, in, out].

Source: Open Compute Project, "OCP microscaling formats (MX) specification", version 1.0, 2023.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tva._torch import Tensor, torch
from tva.checkpoints.dequantized import ByUnit, Dequantized
from tva.checkpoints.lazy import LazyWeights

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
GROUP = 32
BIAS = 127  # of the exponent
LARGEST_EXPONENT = 2  # of 6.0, the largest value


@dataclass(frozen=True, eq=False)
class Mxfp4(ByUnit):
    """Four-bit floats with a shared exponent, stored transposed."""

    def matrix(self, index: int) -> Tensor:
        rows, columns = self.sizes[-1], self.sizes[-2]  # as stored
        count = rows * columns // 2
        packed = self.parts["codes"].slice(index * count, (index + 1) * count)
        scales = self.parts["scales"].slice(index * rows * columns // GROUP, (index + 1) * rows * columns // GROUP)
        table = torch.tensor(VALUES, dtype=torch.float64)
        both = torch.stack([packed & 15, packed >> 4], 1).reshape(-1, GROUP)  # the first of two is in the low bits
        return torch.ldexp(table[both.long()], scales.int()[:, None] - BIAS).reshape(rows, columns).T

    def codes(self, values: Tensor) -> dict[str, Tensor]:
        groups = values.transpose(-1, -2).reshape(-1, GROUP)
        largest = groups.abs().amax(1)
        exponents = torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT  # floor(log2), as the specification says
        exponents = exponents.masked_fill_(largest == 0, 0).clamp_(-BIAS, 254 - BIAS)
        scaled = torch.ldexp(groups, -exponents[:, None].int())
        table = torch.tensor(VALUES[:8], dtype=torch.float64)
        chosen = torch.bucketize(scaled.abs(), (table[1:] + table[:-1]) / 2) | (scaled < 0).long() << 3
        packed = (chosen[:, 0::2] | chosen[:, 1::2] << 4).to(torch.uint8)
        return {"codes": packed, "scales": (exponents + BIAS).to(torch.uint8)}


def find(weights: LazyWeights, config: Mapping[str, Any]) -> dict[str, Dequantized]:
    """Return the tensors of this kind by the names of their weights; see `tva.checkpoints.quant_blocks.find`.

    Raises:
        ValueError: Blocks and scales do not fit together.
    """
    found: dict[str, Dequantized] = {}
    for name in weights:
        match = re.fullmatch(r"(?P<target>.+)_blocks", name)
        scales = f"{match['target']}_scales" if match else ""
        if match is None or scales not in weights or weights.spec(name).dtype_name != "uint8":
            continue
        shape, groups = weights.spec(name).sizes, weights.spec(scales)
        if len(shape) < 3 or shape[-1] != GROUP // 2 or groups.sizes != shape[:-1] or groups.dtype_name != "uint8":
            raise ValueError(
                f"{weights.path} holds {name!r} of shape {list(shape)} and {scales!r} of shape {list(groups.sizes)} in "
                f"{groups.dtype_name}; MXFP4 has blocks of 16 bytes and a scale of one byte for each. Copy it again."
            )
        names = {"codes": name, "scales": scales}
        sizes = (*shape[:-3], shape[-2] * GROUP, shape[-3])
        found[match["target"]] = Mxfp4("MXFP4", names, {r: weights.entry(n) for r, n in names.items()}, sizes)
    return found
