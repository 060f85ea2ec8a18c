r"""PEFT LoRA adapters as fine-tuned weights: each base tensor plus its low-rank product, computed when it is read.

:math:`\Delta W = s\,BA` with :math:`s = \alpha/r`, or :math:`\alpha/\sqrt r` (rsLoRA). What changes the weights in any
other way is refused by name, never approximated.

Source: Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022; Kalajdzievski, "A rank stabilization
scaling factor for fine-tuning with LoRA", 2023.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tva._torch import Tensor, torch
from tva.arithmetic import add_scaled
from tva.checkpoints.fingerprint import tensor_digest
from tva.checkpoints.formats import pytorch, safetensors
from tva.checkpoints.lazy import Entry, Info, InMemory, LazyWeights, Which
from tva.checkpoints.names import ADVICE, CopyOf, KeyMap, NameFilter, match_names
from tva.checkpoints.open import find, open_weights
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


BLOCK = 2**16  # elements of a low-rank product that are computed at a time


def open_finetuned(
    path: str | os.PathLike[str],
    base: Mapping[str, Tensor],
    *,
    key_map: KeyMap = (),
    which: Which = "checkpoint",
    only: NameFilter | None = None,
    advice: str = ADVICE,
) -> LazyWeights:
    """Open a fine-tuned checkpoint, or a LoRA adapter, under its base's names, reading no tensor yet.

    Args:
        path: What `tva.open_weights` reads, or an adapter's folder.
        base: The base's weights.
        key_map: Regular expressions and replacements for the checkpoint's names; see `tva.checkpoints.map_names`.
        which: Of a checkpoint that holds two sets of weights; see `tva.open_weights`.
        only: Which names of either side take part; the others are in no result.
        advice: What an error about names advises.

    Returns:
        The base's names to the fine-tuned tensors; those of an adapter in float32. Of names that share one tensor in
        either file, or hold equal ones, it is enough that the other has one. ``info.notes`` says how names matched.

    Raises:
        MismatchError: The names cannot be matched.
    """
    found = find(path)
    if (found / "adapter_config.json").exists():
        return open_adapter(path, base, key_map=key_map, dtype=torch.float32, only=only, advice=advice)
    only = only or NameFilter()
    whole = open_weights(path, which=which)
    notes = only.note(whole, "")
    weights = whole.renamed({name: name for name in only.kept(whole)}, *notes)
    base_names = only.kept(base)
    ties = base.ties() if isinstance(base, LazyWeights) else {}
    try:
        match = match_names(weights, base_names, key_map, advice=advice)
    except MismatchError:  # a tied tensor may have one name on one side, and two on the other
        own, copies = weights.ties(), (_copies(weights), _copies(base))
        once, base_once = [n for n in weights if n not in own], [n for n in base_names if n not in ties]
        match = match_names(once, base_once, key_map, copies=copies, advice=advice)
    tied = {alias: kept for alias, kept in ties.items() if alias in base_names and kept in match.names}
    names = {**match.names, **{alias: match.names[kept] for alias, kept in tied.items() if alias not in match.names}}
    same = all(new == old for new, old in match.names.items())
    return weights.renamed(names, *([] if same else [match.text]))


def _copies(weights: Mapping[str, Tensor]) -> CopyOf:
    """Return how copies are found among weights: of one dtype and shape first, then of equal bits."""

    def copy_of(name: str, others: Iterable[str]) -> str | None:
        mine = weights[name]
        alike = (other for other in others if _form(weights, other) == (mine.dtype, mine.shape))
        digest = tensor_digest(mine)
        return next((other for other in alike if tensor_digest(weights[other]) == digest), None)

    return copy_of


def _form(weights: Mapping[str, Tensor], name: str) -> tuple[torch.dtype, torch.Size]:
    like = weights.entry(name) if isinstance(weights, LazyWeights) else weights[name]
    return like.dtype, like.shape


def open_adapter(
    path: str | os.PathLike[str],
    base: Mapping[str, Tensor],
    *,
    key_map: KeyMap = (),
    dtype: torch.dtype | None = None,
    only: NameFilter | None = None,
    advice: str = ADVICE,
) -> LazyWeights:
    """Open a PEFT LoRA adapter together with its base as the fine-tuned weights, reading no tensor yet.

    Args:
        path: The adapter's folder (``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``), or
            ``hf://owner/name``.
        base: The base's weights, from `tva.open_weights` or in memory; left unchanged.
        key_map: Regular expressions and replacements for the adapter's names; see `tva.checkpoints.map_names`.
        dtype: Of the tensors that the adapter moves; by default the base's. Where the base is float16 or bfloat16,
            ``torch.float32`` keeps what rounding to it would lose of a small delta.
        only: Which names of either side take part; a left-out tensor of the base is not in the result.
        advice: What an error about names advises.

    Returns:
        The base's names to its tensors, those that the adapter moves with their delta added: in float32 (float64 where
        an input is) and rounded once.

    Raises:
        FileNotFoundError: A file is missing.
        MismatchError: A name or shape is not the base's.
        ValueError: It is no LoRA adapter, or a variant that is not supported.
    """
    folder = find(path)
    folder = folder.parent if folder.is_file() else folder
    config = _read_config(folder)
    weights = _open_tensors(folder)
    low_rank, full = _sort(folder, weights)
    targets = {**{f"{module}.weight": module for module in low_rank}, **{name: name for name in full}}
    only = only or NameFilter()
    left_out = only.note(targets, "")
    base_names = only.kept(base)
    match = match_names(only.kept(targets), base_names, key_map, subset=True, advice=advice)
    entries = {name: base.entry(name) if isinstance(base, LazyWeights) else InMemory(base[name]) for name in base_names}
    for name, target in match.names.items():
        start = full.get(target, entries[name])
        if start.shape != entries[name].shape:
            raise MismatchError(
                f"{folder} holds {target!r} of shape {list(start.shape)}; the base's is {list(entries[name].shape)}."
            )
        factors = low_rank.get(targets[target])
        if factors is not None:
            start = _adapted(folder, config, targets[target], start, *factors, dtype or start.dtype)
        entries[name] = start
    source = f" of {base.path}" if isinstance(base, LazyWeights) else ""
    notes = (*left_out, match.text, f"{len(match.names)} of {len(entries)} tensors{source} are the adapter's")
    return LazyWeights(Info(folder, "LoRA adapter with its base", notes=notes), entries)


@dataclass(frozen=True)
class _Adapted(Entry):
    """A base tensor plus ``scaling * b @ a``."""

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


def _adapted(
    folder: Path, config: Mapping[str, Any], module: str, base: Entry, a: Entry, b: Entry, embedding: bool, dtype: Any
) -> _Adapted:
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    if a.shape[:1] != (rank,) or b.shape[1:2] != (rank,) or b.shape[2:].numel() != 1:
        raise ValueError(
            f"{folder} says that {module!r} has rank {rank}, but its factors are {list(a.shape)} and {list(b.shape)}."
        )
    transposed = embedding or (bool(config.get("fan_in_fan_out")) and len(a.shape) == 2)
    shape = torch.Size((*a.shape[1:], *b.shape[:1]) if transposed else (*b.shape[:1], *a.shape[1:]))
    if shape != base.shape:
        raise MismatchError(
            f"{folder} gives {module!r} a delta of shape {list(shape)} (fan_in_fan_out: {transposed}), but the base's "
            f"weight is {list(base.shape)}. Is it of this base? Grouped convolutions are not supported."
        )
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return _Adapted(base, a, b, scaling, transposed, dtype, base.shape)


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """Choose a module's value as peft does: that of the first pattern that matches the end of its name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no PEFT adapter: adapter_config.json is missing.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Copy the adapter again.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ValueError(f"{path} is of peft_type {kind!r}; LORA alone is supported. {_merge(config)}")
    if not config.get("r") or not config.get("lora_alpha"):
        raise ValueError(f"{path} must give r and lora_alpha; found {config.get('r')} and {config.get('lora_alpha')}.")
    refused = [f"{name}={value!r}" for name, value in config.items() if value and name not in KNOWN]
    if config.get("bias", "none") != "none":
        refused.append(f"bias={config['bias']!r}")
    if config.get("init_lora_weights") not in HARMLESS_STARTS:
        refused.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if refused:
        raise ValueError(f"{path} uses {', '.join(refused)}, which is not supported. {_merge(config)}")
    return config


def _merge(config: Any) -> str:
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return (
        f"Merge it where peft is installed (PeftModel.from_pretrained(base, ADAPTER).merge_and_unload(), base "
        f"{base!r}) and open the merged model."
    )


def _open_tensors(folder: Path) -> LazyWeights:
    if (folder / "adapter_model.safetensors").exists():
        return safetensors.open(folder / "adapter_model.safetensors")
    if (folder / "adapter_model.bin").exists():
        return pytorch.open(folder / "adapter_model.bin")
    raise FileNotFoundError(f"{folder} holds neither adapter_model.safetensors nor adapter_model.bin. Copy it there.")


def _sort(folder: Path, weights: LazyWeights) -> tuple[dict[str, tuple[Entry, Entry, bool]], dict[str, Entry]]:
    """Sort an adapter's tensors into factors by module, (A, B, of an embedding?), and whole tensors by name."""
    factors: dict[str, dict[str, Entry]] = {}
    full: dict[str, Entry] = {}
    unknown = []
    for name in weights:
        short = name.removeprefix("base_model.model.")
        found = re.fullmatch(r"(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))", short)
        if found:
            factors.setdefault(found[1], {})[found[2] or found[3] + " of an embedding"] = weights.entry(name)
        elif short == name or re.search(r"(^|\.)lora_", short):
            unknown.append(name)
        else:  # saved whole: a module of modules_to_save, or the base of an adapted embedding
            full[re.sub(r"(?<=\.)(modules_to_save|base_layer)\.", "", short)] = weights.entry(name)
    broken = [module for module, pair in factors.items() if pair.keys() not in ({"A", "B"}, _EMBEDDING)]
    if unknown or broken or not factors:
        parts = [f"the tensors {some(unknown)} are of no supported kind"] if unknown else []
        parts += [f"{some(broken)} lacks A or B"] if broken else []
        raise ValueError(f"{folder} is no plain LoRA adapter: {'; '.join(parts) or 'it holds no lora_A and lora_B'}.")
    low_rank = {
        module: (pair["A"], pair["B"], False) if "A" in pair else (*(pair[key] for key in sorted(_EMBEDDING)), True)
        for module, pair in factors.items()
    }
    return low_rank, full


_EMBEDDING = {"A of an embedding", "B of an embedding"}
