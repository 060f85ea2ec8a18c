"""Recognize quantized checkpoints, whose tensors are codes and scales, which no arithmetic on weights applies to."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tva._torch import Tensor
from tva.checkpoints.folder import model_config
from tva.checkpoints.foreign import shown
from tva.checkpoints.lazy import LazyWeights
from tva.checkpoints.spec import dtype_name

CODES = ("int8", "uint8", "int32", "uint32", "float8")  # the first letters of dtypes that hold codes

# The format's name, the name of a tensor that only it has, and what holds the codes, as seen from that tensor.
FORMATS = (
    ("bitsandbytes 4-bit", r"(?P<module>.+)\.weight\.(absmax|quant_map|nested_absmax|quant_state\..+)", "weight"),
    ("bitsandbytes int8", r"(?P<module>.+)\.SCB", "weight"),
    ("FP8 or int8 with scales", r"(?P<module>.+)\.(weight_scale(_inv)?|scale_weight)", "weight"),
    ("GPTQ or AWQ", r"(?P<module>.+)\.(scales|qzeros|g_idx)", "qweight"),
    ("compressed-tensors", r"(?P<module>.+)\.(weight_scale|weight_shape)", "weight_packed"),
    ("MXFP4", r"(?P<module>.+)_scales", "_blocks"),
)


def check_not_quantized(weights: Mapping[str, Tensor], what: str) -> None:
    """Refuse quantized weights, where they are opened for arithmetic.

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
            f"the weights. Give the checkpoint that it was quantized from, or dequantize it first (in transformers: "
            f"from_pretrained, dequantize() and save_pretrained)."
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
    config = model_config(weights.path).get("quantization_config") if isinstance(weights, LazyWeights) else None
    if not isinstance(config, Mapping):
        return None
    codes = [name for name in weights if _dtype(weights, name).startswith(CODES) and len(weights.spec(name).sizes) > 1]
    return (shown(config.get("quant_method", "by config.json")).strip("'"), codes[0]) if codes else None
