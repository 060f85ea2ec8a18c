r"""Compose LoRA adapters into a LoRA adapter, without ever making a dense delta.

A linear recipe stacks the factors: :math:`\sum_t c_t s_t B_t A_t` has the sum of the ranks. Any other recipe is
computed in the core space: with orthonormal :math:`U` of :math:`[s_1 B_1 \dots s_T B_T]` and :math:`V` of
:math:`[A_1; \dots; A_T]`, each adapter is :math:`U M_t V^\top` without loss, where :math:`M_t = (U^\top s_t B_t)(A_t
V)` has as many rows and columns as the ranks add up to; the recipe merges the :math:`M_t`. There a method may give
another edit than on the dense deltas: it selects, or averages, over the elements and singular values of the cores.

Source: Panariello et al., "Accurate and efficient low-rank model merging in core space", NeurIPS 2025.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tva._torch import Tensor, torch
from tva.arithmetic import is_edited
from tva.checkpoints import Fingerprint, LazyWeights, NameFilter, fingerprint, open_adapter, open_weights
from tva.checkpoints.lora import read_config
from tva.checkpoints.lora_entries import Adapted, NewRows
from tva.checkpoints.lora_write import NewFactors, check_new_folder, truncated, write_adapter
from tva.checkpoints.open import find
from tva.compose.recipe import Recipe
from tva.errors import MismatchError, NoEffectError, some
from tva.merge import Chunk
from tva.vectors.header import Origin
from tva.vectors.task_vector import TaskVector


@dataclass
class AdapterReport:
    """What `compose` wrote as an adapter.

    Attributes:
        output: The adapter's folder.
        modules: Modules with factors.
        whole: Tensors that are saved whole.
        ranks: Smallest and largest rank of a module.
        error: Relative error of recompressing, in the Frobenius norm over all modules; 0 where nothing was cut off.
        worst: The module with the largest relative error, and that error.
        core: Whether the recipe was computed in the core space.
        num_bytes: Size of the weights file.
        seconds: Wall time.
        notes: What was decided in reading the adapters.
    """

    output: Path
    modules: int
    whole: int
    ranks: tuple[int, int]
    error: float
    worst: tuple[str, float]
    core: bool
    num_bytes: int
    seconds: float
    notes: list[str] = field(default_factory=list)


@dataclass
class Opened:
    """One adapter of a recipe.

    Attributes:
        config: Its configuration.
        low_rank: The base's names to what its factors change.
        whole: The base's names to deltas of tensors that are saved whole, float64.
        fingerprint: Of its tensors.
        notes: What was decided in reading it.
    """

    config: Mapping[str, Any]
    low_rank: dict[str, Adapted]
    whole: dict[str, Tensor]
    fingerprint: Fingerprint
    notes: str


def compose_adapter(
    base: str,
    vectors: Mapping[str, str],
    recipe: Recipe,
    output: Path,
    scaling_coef: float,
    *,
    rank: int | None = None,
    key_map: Mapping[str, str] | None = None,
    only: NameFilter | None = None,
) -> AdapterReport:
    """Compose adapters into an adapter.

    Args:
        base: Checkpoint of their base, of which only shapes and modules that are saved whole are read.
        vectors: Names to adapters.
        recipe: Any expression that does not need dense weights.
        output: New or empty folder.
        scaling_coef: Of the whole recipe.
        rank: Largest rank of a module; by default a linear recipe has the sum of the ranks, exactly.
        key_map: For the adapters' names.
        only: Which names take part.

    Raises:
        MismatchError: The adapters change one module in ways that cannot be one adapter.
        ValueError: A vector is not an adapter, or of a kind that is not low-rank.
        NoEffectError: The result is zero.
    """
    started = time.monotonic()
    check_new_folder(output)
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1; found {rank}.")
    _check_recipe(recipe)
    weights, only = open_weights(base), only or NameFilter()
    opened = {name: _open(vectors[name], weights, key_map or {}, only) for name in recipe.vectors}
    only.check_used()
    modules = _modules(vectors, opened)
    core = rank is not None or not recipe.is_linear
    spaces = {name: Space.of(parts) for name, parts in modules.items()} if core else {}
    whole, merged = _evaluate(recipe, weights, opened, spaces)
    factors, errors = [], {}
    for name, parts in modules.items():
        if core:
            b, a, error = truncated(spaces[name].left, merged[name] * scaling_coef, spaces[name].right, rank)
            errors[name] = (error, float((merged[name] * scaling_coef).square().sum()))
        else:
            b, a = _stacked(name, parts, recipe, scaling_coef)
        if len(a):
            factors.append(_factors(name, next(iter(parts.values())), b, a, parts.values()))
    if not factors or not any(bool(each.b.count_nonzero()) and bool(each.a.count_nonzero()) for each in factors):
        raise NoEffectError(f"The recipe {recipe.text} gives an adapter that changes nothing. Check its coefficients.")
    saved = {name: weights[name].double() + scaling_coef * delta for name, delta in whole.items()}
    saved = {name: tensor.to(_dtype(weights.spec(name).dtype)) for name, tensor in saved.items()}
    about = {"recipe": recipe.text, "coefs": recipe.coefs, "scaling_coef": scaling_coef}
    num_bytes = write_adapter(output, factors, saved, _facts(opened, base), json.dumps(about))
    relative = {name: math.sqrt(error / norm) for name, (error, norm) in errors.items() if norm}
    worst = max(relative, key=lambda name: relative[name], default="")
    total = math.fsum(norm for _, norm in errors.values())
    ranks = [each.rank for each in factors]
    return AdapterReport(
        output,
        len(factors),
        len(saved),
        (min(ranks), max(ranks)),
        math.sqrt(math.fsum(error for error, _ in errors.values()) / total) if total else 0.0,
        (worst, relative.get(worst, 0.0)),
        not recipe.is_linear,
        num_bytes,
        time.monotonic() - started,
        [each.notes for each in opened.values()],
    )


def _check_recipe(recipe: Recipe) -> None:
    needs = "the base's own weights" if recipe.uses_base else some(recipe.files)
    if recipe.uses_base or recipe.files:
        raise ValueError(
            f"The recipe {recipe.text} needs {needs}, which have no form in the space of adapters. Leave --as lora "
            f"out, which writes the edited model."
        )


def _open(path: str, base: LazyWeights, key_map: Mapping[str, str], only: NameFilter) -> Opened:
    """Open one adapter, and refuse what is not a sum of low-rank and whole changes."""
    folder = find(path)
    folder = folder.parent if folder.is_file() else folder
    if not (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{path} is not a PEFT adapter, and --as lora composes adapters only. Make one of a checkpoint with tva "
            f"extract --base BASE --finetuned CHECKPOINT --rank 16 --output FOLDER, or leave --as lora out."
        )
    weights = open_adapter(folder, base, key_map=key_map, only=only)
    low_rank, whole, seen = {}, {}, set()
    for name in weights:
        entry = weights.entry(name)
        if entry is base.entry(name) or id(entry) in seen:  # the second name of tied weights
            continue
        seen.add(id(entry))
        if isinstance(entry, Adapted):
            _check_low_rank(folder, name, entry, base)
            low_rank[name] = entry
        elif is_edited(entry.spec) and not torch.equal(entry.read(), base[name]):
            if isinstance(entry, NewRows):
                raise ValueError(_not_low_rank(folder, name, "holds trained tokens of"))
            whole[name] = entry.read().double() - base[name].double()
    sides = {f"{name}.{side}": getattr(entry.factors, side).read() for name, entry in low_rank.items() for side in "ab"}
    return Opened(read_config(folder), low_rank, whole, fingerprint({**sides, **whole}), str(weights.info))


def _check_low_rank(folder: Path, name: str, entry: Adapted, base: LazyWeights) -> None:
    if entry.factors.magnitude is not None:
        raise ValueError(_not_low_rank(folder, name, "is DoRA, which scales the outputs of"))
    if entry.base is not base.entry(name) and not torch.equal(entry.base.read(), base[name]):
        raise ValueError(_not_low_rank(folder, name, "has, beside its factors, another weight for"))


def _not_low_rank(folder: Path, name: str, why: str) -> str:
    return (
        f"{folder} {why} {name!r}: that is not a low-rank change, and cannot be a part of a LoRA adapter. Leave --as "
        f"lora out, which writes the edited model."
    )


def _modules(vectors: Mapping[str, str], opened: Mapping[str, Opened]) -> dict[str, dict[str, Adapted]]:
    """Return by the base's name which vectors change it by factors, and check that these can be added."""
    found: dict[str, dict[str, Adapted]] = {}
    for key, adapter in opened.items():
        for name, entry in adapter.low_rank.items():
            found.setdefault(name, {})[key] = entry
    for name, parts in found.items():
        both = [vectors[key] for key, adapter in opened.items() if name in adapter.whole]
        first, *others = parts.values()
        if both:
            raise MismatchError(
                f"{name!r} is saved whole in {some(both)}, and has low-rank factors in {vectors[next(iter(parts))]}: "
                f"one adapter cannot hold both. Leave --as lora out, or leave the name out by exclude."
            )
        form = (first.module, first.transposed, first.factors.embedding)
        if any((each.module, each.transposed, each.factors.embedding) != form for each in others):
            names = some(sorted({each.module for each in parts.values()}))
            raise MismatchError(
                f"The adapters change {name!r} as different modules ({names}) or layouts, so that one adapter does not "
                f"fit all. Train them on the same model class, or leave --as lora out."
            )
    return found


def _sides(entry: Adapted) -> tuple[Tensor, Tensor]:
    """Return ``scaling * B`` [out, rank] and ``A`` [rank, in · kernel] in float64."""
    b, a = entry.factors.b.read().double().flatten(1), entry.factors.a.read().double().flatten(1)
    return b * entry.scaling, a


@dataclass
class Space:
    """The core space of one module.

    Attributes:
        left: U, orthonormal columns (out, k).
        right: V, orthonormal columns (in · kernel, l).
        cores: By vector its M, shape (k, l).
    """

    left: Tensor
    right: Tensor
    cores: dict[str, Tensor]

    @classmethod
    def of(cls, parts: Mapping[str, Adapted]) -> Space:
        """Return the space of the adapters that change a module."""
        sides = {key: _sides(entry) for key, entry in parts.items()}
        left = _basis(torch.cat([b for b, _ in sides.values()], 1))
        right = _basis(torch.cat([a for _, a in sides.values()], 0).T)
        return cls(left, right, {key: (left.T @ b) @ (a @ right) for key, (b, a) in sides.items()})


def _basis(columns: Tensor) -> Tensor:
    """Return the left singular vectors of a tall matrix, those of no singular value left out."""
    q, r = torch.linalg.qr(columns)
    u, values, _ = torch.linalg.svd(r, full_matrices=False)
    return q @ u[:, values > values[:1] * 1e-14]


def _evaluate(
    recipe: Recipe, base: LazyWeights, opened: Mapping[str, Opened], spaces: Mapping[str, Space]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the recipe on the tensors that are saved whole, and on the cores."""
    shapes: dict[str, Any] = {name: space.left.shape[1:] + space.right.shape[1:] for name, space in spaces.items()}
    shapes |= {name: delta.shape for adapter in opened.values() for name, delta in adapter.whole.items()}
    rest = {name: "frozen" for name in base if name not in shapes}
    vectors = {}
    for key, adapter in opened.items():
        found = {name: space.cores[key] for name, space in spaces.items() if key in space.cores} | adapter.whole
        deltas = {name: found.get(name, torch.zeros(shape, dtype=torch.float64)) for name, shape in shapes.items()}
        vectors[key] = TaskVector(deltas, {}, rest, Origin(finetuned=adapter.fingerprint.digest))
    if not shapes:
        recipe.bind(base.keys())
        return {}, {}
    deltas = recipe.evaluate(vectors).deltas
    return {n: d for n, d in deltas.items() if n not in spaces}, {n: d for n, d in deltas.items() if n in spaces}


def _stacked(name: str, parts: Mapping[str, Adapted], recipe: Recipe, scaling_coef: float) -> tuple[Tensor, Tensor]:
    """Return the factors of a linear recipe one beside the other; those with the coefficient 0 are left out."""
    shape = tuple(next(iter(parts.values())).shape)
    coefs = {key: scaling_coef * recipe.coef_of(key, Chunk(name, shape=shape)) for key in parts}
    sides = [(coefs[key] * b, a) for key, (b, a) in ((k, _sides(e)) for k, e in parts.items()) if coefs[key]]
    if not sides:
        return torch.empty(0, 0), torch.empty(0, 0)
    return torch.cat([b for b, _ in sides], 1), torch.cat([a for _, a in sides], 0)


def _factors(name: str, like: Adapted, b: Tensor, a: Tensor, parts: Any) -> NewFactors:
    wide = any(torch.float64 in (each.factors.a.dtype, each.factors.b.dtype) for each in parts)
    dtype = torch.float64 if wide else torch.float32
    a = a.reshape(-1, *like.factors.a.shape[1:]).to(dtype)
    b = b.reshape(*b.shape, *like.factors.b.shape[2:]).to(dtype)
    return NewFactors(like.module, a, b, like.factors.embedding, like.transposed)


def _dtype(stored: torch.dtype) -> torch.dtype:
    return torch.float64 if stored == torch.float64 else torch.float32


def _facts(opened: Mapping[str, Opened], base: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"base_model_name_or_path": base.removeprefix("hf://")}
    for key in ("base_model_name_or_path", "task_type"):
        values = [adapter.config.get(key) for adapter in opened.values()]
        if values[0] and values.count(values[0]) == len(values):
            facts[key] = values[0]
    return facts
