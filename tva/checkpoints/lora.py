r"""The tensors of a PEFT LoRA adapter, and the delta of one module: :math:`\Delta W = s\,BA`.

:math:`s = \alpha/r`, or :math:`\alpha/\sqrt r` (rsLoRA). What changes weights in any other way is refused by name,
never approximated.

Source: Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022; Kalajdzievski, "A rank stabilization
scaling factor for fine-tuning with LoRA", 2023.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tva._torch import Tensor, torch
from tva.arithmetic import add_scaled
from tva.checkpoints.foreign import ForeignFileError, check_form, check_pattern, read_json, shown
from tva.checkpoints.lazy import Entry, LazyWeights
from tva.errors import MismatchError, some

# Settings that the merged weights do not depend on, or that are used below. Any other one that is set is refused.
KNOWN = {
    "peft_type", "peft_version", "auto_mapping", "task_type", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "rank_pattern", "alpha_pattern",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "bias", "runtime_config", "eva_config", "megatron_core", "qalora_group_size",
}  # fmt: skip
# How A and B start; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights as well.
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
FORM = {
    "peft_type": (str, None),
    "r": int,
    "lora_alpha": float,
    "rank_pattern": ({str: int}, None),
    "alpha_pattern": ({str: float}, None),
    "bias": (str, None),
}
BLOCK = 2**16  # elements of a low-rank product that are computed at a time


@dataclass(frozen=True)
class Factors:
    """The low-rank factors of one module, with the names of their tensors."""

    a: Entry  # [rank, in, …kernel]; of an embedding [rank, number of embeddings]
    b: Entry  # [out, rank, …]
    embedding: bool
    names: tuple[str, str]


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter.

    Attributes:
        low_rank: Module to its factors.
        whole: Name to a tensor that is saved whole, of a module of ``modules_to_save`` or below an adapted module.
        names: Names of ``whole`` to the names in the file.
    """

    low_rank: Mapping[str, Factors]
    whole: Mapping[str, Entry]
    names: Mapping[str, str]

    def check_used(self, folder: Path, used: set[str]) -> None:
        """Check that every tensor of the adapter was used.

        Args:
            folder: The adapter's, for the error.
            used: Targets, as the base's tensors are called in the adapter.

        Raises:
            ValueError: One was not.
        """
        pairs = {f"{module}.weight": factors.names for module, factors in self.low_rank.items()}
        files = {name for target in used for name in pairs.get(target, ())}
        files |= {self.names[target] for target in used if target in self.names}
        every = {name for pair in pairs.values() for name in pair} | {*self.names.values()}
        if every - files:
            raise ValueError(
                f"{folder} holds {len(every)} tensors, and {len(every - files)} of them would not be used: "
                f"{some(sorted(every - files))}. Merge the adapter with peft (merge_and_unload) and give the merged "
                f"model."
            )


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not of a LoRA adapter, or of a variant that is not supported.
    """
    path = folder / "adapter_config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} is not a PEFT adapter: adapter_config.json is missing. Copy it from where the adapter was saved."
        )
    config: dict[str, Any] = read_json(path, {"peft_type": (str, None)})
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path} is of peft_type {shown(kind)}; only LORA is supported. {merge_advice(config)}")
    if not config.get("r") or not config.get("lora_alpha"):
        found = f"{shown(config.get('r'))} and {shown(config.get('lora_alpha'))}"
        raise ValueError(f"{path} must give r and lora_alpha; found {found}. Copy the adapter again.")
    check_form(config, FORM, str(path))
    numbers = [*(config.get("rank_pattern") or {}).values(), config["r"]]
    numbers += [*(config.get("alpha_pattern") or {}).values(), config["lora_alpha"]]
    if not all(0 < abs(number) < 2**31 for number in numbers):
        raise ValueError(f"{path} has a rank or lora_alpha that is 0, infinite or above 2**31. Copy the adapter again.")
    refused = [f"{name}={_setting(value)}" for name, value in config.items() if value and name not in KNOWN]
    if config.get("bias") not in (None, "none"):
        refused.append(f"bias={_setting(config['bias'])}")
    start = config.get("init_lora_weights")
    if not isinstance(start, str | bool | None) or start not in HARMLESS_STARTS:
        refused.append(f"init_lora_weights={_setting(start)}")
    if refused:
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise ValueError(f"{path} uses {', '.join(refused[:5])}{more}, which is not supported. {merge_advice(config)}")
    return config


def _setting(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def merge_advice(config: Mapping[str, Any]) -> str:
    """Return what to do with an adapter that cannot be read: merge it."""
    base = config.get("base_model_name_or_path")
    of = f" of {shown(base)}" if isinstance(base, str) and base else ""
    return (
        f"Merge it where peft is installed (PeftModel.from_pretrained(base, ADAPTER).merge_and_unload(), with its base"
        f"{of}) and give the merged model."
    )


def sort_tensors(folder: Path, weights: LazyWeights) -> AdapterTensors:
    """Sort an adapter's tensors into factors by module, and tensors that are saved whole.

    Raises:
        ValueError: One is of another kind, or a factor lacks the other.
    """
    factors: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    unknown, adapters = [], set()
    for name in weights:
        short = name.removeprefix("base_model.model.")
        found = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(?:\.(\w+))??(?(2)|\.weight)", short)
        if found:
            pair = factors.setdefault(found[1], {})
            adapters.add(found[4] or "")
            if found[3] in pair or (("embedding" in pair) != bool(found[2]) and pair):
                unknown.append(name)
            pair[found[3]] = name
            if found[2]:
                pair["embedding"] = ""
        elif short == name or re.search(r"(^|\.)lora_", short):
            unknown.append(name)
        else:  # saved whole: a module of modules_to_save, or the base of an adapted module
            target = re.sub(r"(?<=\.)(modules_to_save(\.default)?|base_layer)\.", "", short)
            if target in whole:
                unknown.append(name)
            whole[target] = name
    broken = [module for module, pair in factors.items() if not {"A", "B"} <= pair.keys()]
    several = sorted(adapters) if len(adapters) > 1 else []
    if unknown or broken or several or not factors:
        parts = [f"the tensors {some(unknown)} are of no supported kind"] if unknown else []
        parts += [f"{some(broken)} lacks A or B"] if broken else []
        parts += [f"it holds several adapters, {some(several)}"] if several else []
        raise ValueError(
            f"{folder} is not a plain LoRA adapter: {'; '.join(parts) or 'it holds no lora_A and lora_B'}. "
            f"{merge_advice({})}"
        )
    low_rank = {
        module: Factors(weights.entry(pair["A"]), weights.entry(pair["B"]), "embedding" in pair, (pair["A"], pair["B"]))
        for module, pair in factors.items()
    }
    return AdapterTensors(low_rank, {target: weights.entry(name) for target, name in whole.items()}, whole)


@dataclass(frozen=True)
class Adapted(Entry):
    """A base tensor plus ``scaling * b @ a``, computed when it is read."""

    base: Entry
    a: Entry
    b: Entry
    scaling: float
    transposed: bool
    dtype: torch.dtype
    shape: torch.Size

    @property
    def in_parts(self) -> bool:
        return self.base.in_parts

    @property
    def held_bytes(self) -> int:
        factors = self.a.shape.numel() + self.b.shape.numel()
        return self.base.held_bytes + factors * (self.a.dtype.itemsize + torch.float32.itemsize)

    def slice(self, start: int, stop: int) -> Tensor:
        # A part of a matrix product may differ in its last bit from the same part of the whole: blocks of rows are
        # therefore always the same ones, whatever is asked for.
        a, b = self.a.read().flatten(1), self.b.read().flatten(1)  # [rank, in · kernel], [out, rank]
        wide = torch.float64 if torch.float64 in (a.dtype, b.dtype, self.base.dtype) else torch.float32
        left, right = (a.T, b.T) if self.transposed else (b, a)
        left, right = left.to(wide), right.to(wide)
        row = max(1, right.shape[1])
        rows = max(1, BLOCK // row)
        parts = [torch.empty(0, dtype=self.dtype)]
        for first in range(start // row // rows * rows, -(-stop // row), rows):
            last = min(first + rows, len(left))
            low, high = max(start, first * row), min(stop, last * row)
            delta = (left[first:last] @ right).mul_(self.scaling).reshape(-1)[low - first * row : high - first * row]
            parts.append(add_scaled(self.base.slice(low, high), delta, 1.0, dtype=self.dtype))
        return torch.cat(parts)


def adapted(
    folder: Path,
    config: Mapping[str, Any],
    module: str,
    base: Entry,
    factors: Factors,
    transposed: bool | None,
    dtype: torch.dtype,
) -> Adapted:
    """Return a base tensor with the delta of its module.

    Args:
        folder: The adapter's, for errors.
        config: The adapter's.
        module: The module's name in the adapter.
        base: The tensor that the delta is added to.
        factors: The module's.
        transposed: Whether the weight is stored as [in, out]; used where its shape does not say so.
        dtype: Of the result.

    Raises:
        MismatchError: The shapes do not fit.
    """
    a, b = factors.a, factors.b
    rank = _by_pattern(folder, config, "rank_pattern", module, config["r"])
    alpha = _by_pattern(folder, config, "alpha_pattern", module, config["lora_alpha"])
    if a.shape[:1] != (rank,) or b.shape[1:2] != (rank,) or b.shape[2:].numel() != 1:
        raise ValueError(
            f"{folder} says that {module!r} has rank {rank}, but its factors are {list(a.shape)} and {list(b.shape)}. "
            f"Copy the adapter again."
        )
    straight, turned = torch.Size((*b.shape[:1], *a.shape[1:])), torch.Size((*a.shape[1:], *b.shape[:1]))
    if transposed is None:
        transposed = factors.embedding or (len(a.shape) == 2 and straight != base.shape and turned == base.shape)
    if base.shape != (turned if transposed else straight):
        vocabulary = straight[1:] == base.shape[1:] or turned[1:] == base.shape[1:]
        advice = (
            "The vocabularies differ: resize the base's (resize_token_embeddings) and save it, or take the base that "
            "the adapter was trained on."
            if vocabulary and (factors.embedding or module.rpartition(".")[2] in HEADS)
            else "Take the base that the adapter was trained on; grouped convolutions are not supported."
        )
        raise MismatchError(
            f"{folder} gives {module!r} a delta of shape {list(turned if transposed else straight)}, but the base's "
            f"weight is {list(base.shape)}. {advice}"
        )
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Adapted(base, a, b, scaling, transposed, dtype, base.shape)


# The last part of the names of modules that models tie to one another.
EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings", "token_embedding"}
HEADS = {"lm_head", "embed_out", "decoder", "output", "output_projection"}
CONV1D = {"c_attn", "q_attn", "c_proj", "c_fc"}  # of transformers' GPT-2 family, where they are stored as [in, out]
CONV1D_MODELS = {"gpt2", "imagegpt", "openai-gpt", "decision_transformer", "clvp"}


def orientations(
    folder: Path,
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    modules: Mapping[str, tuple[Factors, str, torch.Size]],
    base: Mapping[str, torch.Size],
) -> dict[str, bool]:
    """Return for each square module whether its weight is stored as [in, out] (Conv1D) rather than [out, in] (Linear).

    The adapter's ``fan_in_fan_out`` is one for all modules, and peft overrides it for each by the module's class, so
    that it says little where an adapter has modules of both classes.

    Args:
        folder: The adapter's, for errors.
        config: The adapter's.
        model: The base's ``config.json``; empty if there is none.
        modules: Module to its factors, and the name and shape of the base's tensor.
        base: Names and shapes of the base.

    Raises:
        ValueError: Nothing says how a square weight is stored.
    """
    seen, square = set(), []
    for module, (factors, _, shape) in modules.items():
        if factors.embedding or len(factors.a.shape) != 2 or len(shape) != 2:
            continue
        if shape[0] == shape[1]:
            square.append(module)
        else:
            seen.add(tuple(shape) != (factors.b.shape[0], factors.a.shape[1]))
    flag = bool(config.get("fan_in_fan_out"))
    found = {}
    for module in square:
        kind = module.rpartition(".")[2]
        wide = {name: shape for name, shape in base.items() if re.search(r"\.(c_attn|c_fc)\.weight$", name)}
        wide = {name: shape for name, shape in wide.items() if len(shape) == 2 and shape[0] != shape[1]}
        if kind in CONV1D and wide:  # those of the base have more outputs than inputs
            found[module] = all(shape[1] > shape[0] for shape in wide.values())
        elif model.get("model_type") in CONV1D_MODELS:
            found[module] = kind in CONV1D
        elif seen <= {flag}:
            found[module] = flag
        else:
            raise ValueError(
                f"{folder} has modules whose weights are stored as [in, out] and as [out, in], and {module!r} is "
                f"square ({list(modules[module][2])}), so that nothing says how it is stored. {merge_advice(config)}"
            )
    return found


def _by_pattern(folder: Path, config: Mapping[str, Any], key: str, module: str, default: float) -> Any:
    """Choose a module's value as peft does: that of the first pattern that matches the end of its name."""
    for pattern, value in (config.get(key) or {}).items():
        where = f"{folder / 'adapter_config.json'}: {key}"
        check_pattern(pattern, where, len(module))
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except (re.error, RecursionError, OverflowError) as error:
            raise ForeignFileError(f"{where}: {shown(pattern)} is not a regular expression ({error}).") from error
    return default
