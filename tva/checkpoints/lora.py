r"""The tensors of a PEFT LoRA adapter, and the delta of one module: :math:`\Delta W = s\,BA`.

:math:`s = \alpha/r`, or :math:`\alpha/\sqrt r` (rsLoRA). In DoRA the sum is scaled so that every output has the norm
that was trained. What changes weights in any other way is refused by name, never approximated.

Source: Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022; Kalajdzievski, "A rank stabilization
scaling factor for fine-tuning with LoRA", 2023; Liu et al., "DoRA: weight-decomposed low-rank adaptation", ICML 2024.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tva._torch import torch
from tva.checkpoints.foreign import check_form, read_json, shown
from tva.checkpoints.lazy import Entry, LazyWeights
from tva.checkpoints.lora_entries import Adapted, Factors, NewRows
from tva.checkpoints.names import canonical_names
from tva.errors import MismatchError, some
from tva.patterns import pattern_of

# Settings that the merged weights do not depend on, or that are used below. Any other one that is set is refused.
KNOWN = {
    "peft_type", "peft_version", "auto_mapping", "task_type", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "trainable_token_indices",
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
    "trainable_token_indices": ([int], {str: [int]}, None),
}
PREFIX = "base_model.model."  # of every name in an adapter's file
FACTOR = r"(.+)\.lora_(?:(embedding_)?([AB])|magnitude_vector)(?:\.(?!weight$)(\w+))??(?:\.weight)?"


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter.

    Attributes:
        low_rank: Module to its factors.
        whole: Name to a tensor that is saved whole, of a module of ``modules_to_save`` or below an adapted module.
        names: Names of ``whole`` and ``tokens`` to the names in the file.
        tokens: Name of an embedding's weight to the rows that take the place of some of its own.
    """

    low_rank: Mapping[str, Factors]
    whole: Mapping[str, Entry]
    names: Mapping[str, tuple[str, ...]]
    tokens: Mapping[str, Entry]

    def check_used(self, folder: Path, used: set[str]) -> None:
        """Check that every tensor of the adapter was used.

        Args:
            folder: The adapter's, for the error.
            used: Targets, as the base's tensors are called in the adapter.

        Raises:
            ValueError: A tensor was not used.
        """
        pairs = {f"{module}.weight": factors.names for module, factors in self.low_rank.items()}
        files = {name for target in used for name in pairs.get(target, ())}
        files |= {name for target in used for name in self.names.get(target, ())}
        every = {name for group in (*pairs.values(), *self.names.values()) for name in group}
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


def sort_tensors(folder: Path, config: Mapping[str, Any], weights: LazyWeights) -> AdapterTensors:
    """Sort an adapter's tensors into factors by module, and tensors that are saved whole.

    Raises:
        ValueError: One is of another kind, or a factor lacks the other.
    """
    factors: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    tokens: dict[str, str] = {}
    unknown, adapters = [], set()
    for full, name in canonical_names(list(weights)).items():  # without what wrappers add
        short = full.removeprefix(PREFIX)
        found = re.fullmatch(FACTOR, short)
        rows = re.fullmatch(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.(\w+))?", short)
        if found:
            pair, role = factors.setdefault(found[1], {}), found[3] or "magnitude"
            adapters.add(found[4] or "")
            if role in pair:
                unknown.append(name)
            pair[role] = name
            if found[2]:
                pair["embedding"] = ""
        elif rows:
            adapters.add(rows[2] or "")
            tokens[f"{rows[1]}.weight"] = name
        elif not full.startswith(PREFIX) or re.search(r"(^|\.)(lora|trainable_tokens)_", short):
            unknown.append(name)
        else:  # saved whole: a module of modules_to_save, or the base of an adapted module
            target = re.sub(r"(?<=\.)(modules_to_save(\.default)?|base_layer)\.", "", short)
            if target in whole:
                unknown.append(name)
            whole[target] = name
    broken = [module for module, pair in factors.items() if not {"A", "B"} <= pair.keys()]
    several = sorted(adapters) if len(adapters) > 1 else []
    if unknown or broken or several or not (factors or tokens):
        parts = [f"the tensors {some(unknown)} are of no supported kind"] if unknown else []
        parts += [f"{some(broken)} lacks A or B"] if broken else []
        parts += [f"it holds several adapters, {some(several)}"] if several else []
        raise ValueError(
            f"{folder} is not a plain LoRA adapter: {'; '.join(parts) or 'it holds no lora_A and lora_B'}. "
            f"{merge_advice({})}"
        )
    low_rank = {
        module: Factors(
            weights.entry(pair["A"]),
            weights.entry(pair["B"]),
            "embedding" in pair,
            tuple(filter(None, pair.values())),
            weights.entry(pair["magnitude"]) if "magnitude" in pair else None,
        )
        for module, pair in factors.items()
    }
    if bool(tokens) != bool(config.get("trainable_token_indices")):
        has = some(tokens.values()) or "no trainable_tokens_delta"
        ids = config.get("trainable_token_indices")
        raise ValueError(f"{folder} says trainable_token_indices={ids}, and holds {has}. {merge_advice(config)}")
    return AdapterTensors(
        low_rank,
        {target: weights.entry(name) for target, name in whole.items()},
        {t: tuple(group[t] for group in (whole, tokens) if t in group) for t in (*whole, *tokens)},
        {target: weights.entry(name) for target, name in tokens.items()},
    )


def with_tokens(folder: Path, config: Mapping[str, Any], target: str, base: Entry, rows: Entry) -> NewRows:
    """Return an embedding with the rows of the tokens that were trained.

    Raises:
        ValueError: The configuration does not say which rows they are, or the embedding does not have them.
    """
    given = config.get("trainable_token_indices")
    module = target.removesuffix(".weight")
    if isinstance(given, Mapping):
        given = next((ids for name, ids in given.items() if module == name or module.endswith(f".{name}")), None)
    ids = tuple(given or ())
    if (len(ids), *base.shape[1:]) != tuple(rows.shape) or not all(0 <= index < base.shape[0] for index in ids):
        raise ValueError(
            f"{folder} has {list(rows.shape)} trained rows of {target!r}, which is {list(base.shape)} in the base, and "
            f"adapter_config.json gives {len(ids)} trainable_token_indices for it. Take the base that it was trained "
            f"on, with as many tokens."
        )
    return NewRows(base, rows, ids)


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
        dtype: Dtype of the result.

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
    magnitude = factors.magnitude
    if (magnitude is not None) != bool(config.get("use_dora")) or (
        magnitude is not None and magnitude.spec.numel() != b.shape[0]
    ):
        found = "none" if magnitude is None else f"one of {list(magnitude.shape)}"
        raise ValueError(
            f"{folder} says use_dora={config.get('use_dora')}, and has {found} as the magnitude of {module!r}, whose "
            f"outputs are {b.shape[0]}. {merge_advice(config)}"
        )
    return Adapted(base, factors, module, scaling, transposed, dtype, base.shape)


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
        if pattern_of(rf"^(.*\.)?({pattern})$", where, steps=10**6).search(module):
            return value
    return default
