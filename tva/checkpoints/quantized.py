"""Recognize quantized checkpoints: what is dequantized as it is read, and what is refused.

The tensors of a quantized checkpoint are codes and scales, which no arithmetic on weights applies to.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tva._torch import Tensor
from tva.checkpoints.dequantized import Dequantized
from tva.checkpoints.folder import model_config
from tva.checkpoints.foreign import shown
from tva.checkpoints.lazy import Entry, LazyWeights
from tva.checkpoints.spec import dtype_name
from tva.errors import some

CODES = ("int8", "uint8", "int32", "uint32", "float8")  # the first letters of dtypes that hold codes
SCHEMES = ("quant_blocks", "quant_bitsandbytes", "quant_mxfp4", "quant_packed")  # modules that dequantize
ADVICE = (
    "Give the checkpoint that it was quantized from, or dequantize it first (in transformers: from_pretrained, "
    "dequantize() and save_pretrained)."
)

# The format's name, the name of a tensor that only it has, and what holds the codes, as seen from that tensor.
FORMATS = (
    ("bitsandbytes 4-bit", r"(?P<module>.+)\.weight\.(absmax|quant_map|nested_absmax|quant_state\..+)", "weight"),
    ("bitsandbytes int8", r"(?P<module>.+)\.SCB", "weight"),
    ("FP8 or int8 with scales", r"(?P<module>.+)\.(weight_scale(_inv)?|scale_weight)", "weight"),
    ("GPTQ or AWQ", r"(?P<module>.+)\.(scales|qzeros|g_idx)", "qweight"),
    ("compressed-tensors", r"(?P<module>.+)\.(weight_scale|weight_shape)", "weight_packed"),
    ("MXFP4", r"(?P<module>.+)_scales", "_blocks"),
    ("an unknown scheme", r"(?P<module>.+)\.\w*(scale|zero_point|absmax|codebook)\w*", "weight"),
)


def dequantized(weights: LazyWeights) -> LazyWeights:
    """Return weights whose quantized tensors are dequantized as they are read; others are as they were.

    Raises:
        ValueError: Codes and scales do not fit together, or in a way that is not supported.
    """
    mark = re.compile(r"(scale|SCB|quant_state|_blocks$|qweight$|weight_packed$)")
    if not any(mark.search(name) for name in weights):
        return weights
    config = quantization_config(weights)
    found: dict[str, Dequantized] = {}
    for module in SCHEMES:
        found |= importlib.import_module(f"tva.checkpoints.{module}").find(weights, config)
    if not found:
        return weights
    used = {name: target for target, entry in found.items() for name in entry.names.values()}
    _check_complete(weights, found, used)
    entries: dict[str, Entry] = {}
    for name in weights:
        if name not in used:
            entries[name] = weights.entry(name)
        else:
            entries.setdefault(used[name], found[used[name]])
    counts = Counter(entry.scheme for entry in found.values())
    notes = [f"dequantized {count} tensors of {scheme}" for scheme, count in counts.items()]
    info = replace(weights.info, notes=(*weights.info.notes, *notes))
    return LazyWeights(info, entries, weights.metadata)


def _check_complete(weights: LazyWeights, found: Mapping[str, Dequantized], used: Mapping[str, str]) -> None:
    """Refuse tensors that a known scheme does not account for: a weight given twice, or further scales."""
    twice = [target for target in found if target in weights and target not in used]
    if twice:
        raise ValueError(f"{weights.path} holds {some(twice)} both as codes and as weights. Leave one of them out.")
    modules = {target.removesuffix(".weight"): entry for target, entry in found.items()}
    for name in weights:
        module, _, last = name.rpartition(".")
        module = module.removesuffix(".weight")
        if name not in used and module in modules and re.search(r"scale|zero_point|absmax|SCB|quant|bits", last):
            raise ValueError(
                f"{weights.path} is quantized ({modules[module].scheme}), and holds {name!r} too, which that scheme "
                f"does not have: what it does to the weights is not known. {ADVICE}"
            )


def quantization_config(weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Return what the ``config.json`` beside some weights says of quantization; empty where it says nothing."""
    model = model_config(weights.path) if isinstance(weights, LazyWeights) else {}
    parts = [model, *(part for part in model.values() if isinstance(part, Mapping))]
    configs = [part[key] for part in parts for key in ("quantization_config", "compression_config") if key in part]
    return next((config for config in configs if isinstance(config, Mapping)), {})


def check_not_quantized(weights: Mapping[str, Tensor], what: str) -> None:
    """Refuse quantized weights that are not dequantized as they are read, where arithmetic begins.

    Plain casts to float8, without scales, are weights.

    Args:
        weights: A state dict, in memory or from `tva.open_weights`; nothing of it is read.
        what: What to call it in the error.

    Raises:
        ValueError: It is quantized; the error names the format, the first such tensor and what to do.
    """
    found = _by_names(weights) or _by_config(weights)
    if found is not None:
        kind, name = found
        raise ValueError(
            f"{what} is quantized ({kind}): {name!r} holds codes, and arithmetic on codes and scales is not that on "
            f"the weights. {ADVICE}"
        )


def _dtype(weights: Mapping[str, Tensor], name: str) -> str:
    return dtype_name(weights.spec(name).dtype_name if isinstance(weights, LazyWeights) else weights[name].dtype)


def _by_names(weights: Mapping[str, Tensor]) -> tuple[str, str] | None:
    for name in weights:
        for kind, pattern, codes in FORMATS:
            match = re.fullmatch(pattern, name)
            holder = match["module"] + (codes if codes.startswith("_") else f".{codes}") if match else ""
            if holder in weights and _dtype(weights, holder).startswith(CODES):
                return kind, holder
    return None


def _by_config(weights: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Find codes of a format without known names, by what ``config.json`` says."""
    config = quantization_config(weights)
    if not config or not isinstance(weights, LazyWeights):
        return None
    codes = [name for name in weights if _dtype(weights, name).startswith(CODES) and len(weights.spec(name).sizes) > 1]
    return (shown(config.get("quant_method", "by config.json")).strip("'"), codes[0]) if codes else None
