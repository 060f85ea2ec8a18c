"""Take a LoRA adapter from two checkpoints: the leading singular triplets of every matrix's delta, the rest stated."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tva._torch import Tensor, load_torch, torch
from tva.arithmetic import is_edited
from tva.checkpoints import LazyWeights, NameFilter, open_weights
from tva.checkpoints.folder import model_config
from tva.checkpoints.lazy import Which
from tva.checkpoints.lora import CONV1D, CONV1D_MODELS, EMBEDDINGS, HEADS
from tva.checkpoints.lora_write import NewFactors, check_new_folder, write_adapter
from tva.errors import NoEffectError, some
from tva.merge.linalg import leading
from tva.sizes import check_memory
from tva.vectors.encoder import LARGE, projected
from tva.vectors.lazy import LazyTaskVector, untie

BYTES_HELD = 64  # an element of a matrix that is decomposed: three copies in float64, and what LAPACK takes
TABLES = EMBEDDINGS | {"wpe", "position_embeddings", "token_type_embeddings"}  # certainly of class Embedding
PERHAPS_TABLES = r"embed|relative_attention_bias|^pos"  # of that class or another: saved whole, which suits any


@dataclass
class ExtractedAdapter:
    """What `extract` wrote as an adapter.

    Attributes:
        output: The adapter's folder.
        modules: Modules with factors.
        whole: Names of modules that are saved whole: norms, convolutions and tables of an unknown class.
        ranks: Smallest and largest rank of a module.
        error: Relative error of the adapter, in the Frobenius norm over all that the fine-tuning moved.
        worst: The module with the largest relative error, and that error.
        left_out: Names of tensors that moved and that the adapter does not move: biases beside factors.
        num_bytes: Size of the weights file.
        seconds: Wall time.
        notes: What was decided in reading the inputs.
    """

    output: Path
    modules: int
    whole: list[str]
    ranks: tuple[int, int]
    error: float
    worst: tuple[str, float]
    left_out: list[str]
    num_bytes: int
    seconds: float
    notes: list[str] = field(default_factory=list)


def extract_adapter(
    base: str,
    finetuned: str,
    output: Path,
    rank: int,
    *,
    key_map: Mapping[str, str] | None,
    which: Which,
    only: NameFilter,
    max_memory: str | None = None,
) -> ExtractedAdapter:
    """Write a LoRA adapter that changes a base as its fine-tuning did, as nearly as a rank allows.

    Raises:
        NoEffectError: No matrix moved.
        ValueError: ``rank`` is not positive, or a tensor moved that no adapter can hold.
    """
    started = time.monotonic()
    if rank < 1:
        raise ValueError(f"rank must be at least 1; found {rank}.")
    check_new_folder(output)
    weights = open_weights(base)
    source = LazyTaskVector(finetuned, weights, key_map=key_map, which=which, only=only)
    only.check_used()
    config = model_config(weights.path)
    moved = _moved(weights, source, config)
    kinds = _kinds(weights, moved)
    _check_memory(weights, moved, max_memory)
    factors, errors, norm = [], {}, 0.0
    for name in [name for name, kind in kinds.items() if kind in ("matrix", "table", "left out")]:
        delta = _delta(weights, source, name)
        square = float(delta.square().sum())
        norm += square
        if kinds[name] == "left out":
            errors[name] = (square, square)
        else:
            each, error = _factored(name, delta, rank, kinds[name] == "table", config)
            factors.append(each)
            errors[name] = (error, square)
    if not factors:
        raise NoEffectError("No matrix differs between base and fine-tuned model: there is nothing of low rank.")
    modules = sorted({name.rpartition(".")[0] for name, kind in kinds.items() if kind == "whole"})
    names = [n for n in weights if n.rpartition(".")[0] in modules and n in source.weights]
    saved = {name: source.weights.entry(name).load() for name in names}
    norm += math.fsum(float(_delta(weights, source, name).square().sum()) for name in saved if name in moved)
    saved = {name: tensor.float() if is_edited(weights.spec(name)) else tensor for name, tensor in saved.items()}
    facts = {"base_model_name_or_path": base.removeprefix("hf://")}
    num_bytes = write_adapter(output, factors, saved, facts, json.dumps({"extracted": True, "rank": rank}))
    relative = {
        name: math.sqrt(error / square) for name, (error, square) in errors.items() if kinds[name] != "left out"
    }
    worst = max(relative, key=lambda name: relative[name])
    ranks = [each.rank for each in factors]
    notes = [str(info) for info in (weights.info, source.weights.info) if info.notes]
    return ExtractedAdapter(
        output,
        len(factors),
        modules,
        (min(ranks), max(ranks)),
        math.sqrt(math.fsum(error for error, _ in errors.values()) / norm),
        (worst, relative[worst]),
        [name for name, kind in kinds.items() if kind == "left out"],
        num_bytes,
        time.monotonic() - started,
        notes + _tied_note(weights, config, factors),
    )


def _check_memory(weights: LazyWeights, moved: list[str], max_memory: str | None) -> None:
    if max_memory is None:
        return
    load_torch()  # whose memory counts
    most = max(moved, key=lambda name: weights.spec(name).numel(), default="")
    need = BYTES_HELD * weights.spec(most).numel() if most else 0
    check_memory(need, max_memory, f"decomposing the largest matrix, {most!r},")


def _moved(base: LazyWeights, source: LazyTaskVector, config: Mapping[str, Any]) -> list[str]:
    tied = untie(base, [source])
    names = [n for n in base if n in source.weights and n not in tied and is_edited(base.spec(n))]
    moved = [n for n in names if not torch.equal(source.weights[n], base[n])]
    tables = [n for n in moved if _kind(n) in EMBEDDINGS]
    if config.get("tie_word_embeddings") and tables:  # stored twice: peft merges into the one tensor of the model
        first = source.weights[tables[0]]
        moved = [n for n in moved if _kind(n) not in HEADS or not torch.equal(source.weights[n], first)]
    return moved


def _kind(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _kinds(base: LazyWeights, moved: list[str]) -> dict[str, str]:
    """Return how an adapter holds each tensor: ``matrix``, ``table``, ``whole`` or ``left out``.

    Raises:
        ValueError: It cannot hold one.
    """
    kinds = {}
    for name in moved:
        module, _, last = name.rpartition(".")
        dims, kind = len(base.spec(name).sizes), _kind(name)
        weight = f"{module}.weight"
        if last == "weight" and dims == 2 and kind in TABLES:
            kinds[name] = "table"
        elif last == "weight" and dims == 2 and not re.search(PERHAPS_TABLES, kind):
            kinds[name] = "matrix"
        elif dims < 2 and last != "weight" and weight in base and len(base.spec(weight).sizes) == 2:
            kinds[name] = "left out"
        elif module and (last in ("weight", "bias") or weight in base):
            kinds[name] = "whole"
    homeless = [name for name in moved if name not in kinds]
    if homeless:
        raise ValueError(
            f"{some(homeless)} moved, and {'is' if len(homeless) == 1 else 'are'} not the weight of a module, which an "
            f"adapter could hold. Leave such names out by exclude, or extract a task vector (without rank)."
        )
    return kinds


def _delta(base: LazyWeights, source: LazyTaskVector, name: str) -> Tensor:
    delta = source.weights.entry(name).load().double() - base.entry(name).load().double()
    if not bool(delta.isfinite().all()):
        raise ValueError(f"The delta of {name!r} is NaN or infinite: a diverged fine-tuning? Take a sound checkpoint.")
    return delta


def _factored(name: str, delta: Tensor, rank: int, table: bool, config: Mapping[str, Any]) -> tuple[NewFactors, float]:
    """Return the best factors of a rank for a delta, and the squared norm of what they lack."""
    rank = min(rank, *delta.shape)
    small = min(delta.shape) <= max(LARGE, 4 * rank)
    left, values, right = leading(delta, rank) if small else projected(delta.float(), rank)
    kept = max(1, int((values > 0).sum()))
    root = values[:kept].sqrt()
    left, right = (left[:, :kept] * root).float(), (right[:, :kept] * root).float()
    error = float((delta - left.double() @ right.double().T).square().sum())
    turned = table or (config.get("model_type") in CONV1D_MODELS and _kind(name) in CONV1D)  # stored as [in, out]
    b, a = (right, left.T) if turned else (left, right.T)
    return NewFactors(name.removesuffix(".weight"), a, b, table, turned), error


def _tied_note(base: LazyWeights, config: Mapping[str, Any], factors: list[NewFactors]) -> list[str]:
    names = {f"{each.module}.weight" for each in factors if each.embedding}
    tied = bool(config.get("tie_word_embeddings")) or any(kept in names for kept in base.ties().values())
    if not names or not tied:
        return []
    return [
        f"{some(sorted(names))} is tied to the output layer: merge the adapter before use (merge_and_unload), as an "
        f"unmerged adapter moves the input embeddings only"
    ]
