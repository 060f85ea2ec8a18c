"""Fine-tuned weights under their base's names: of a checkpoint, or of a PEFT LoRA adapter together with its base."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from tva._torch import Tensor, torch
from tva.checkpoints.experts import fused_again, single_experts
from tva.checkpoints.fingerprint import copies_in, form_of
from tva.checkpoints.folder import model_config, weights_file
from tva.checkpoints.formats import pytorch, safetensors
from tva.checkpoints.formats.gguf import check_both_gguf
from tva.checkpoints.lazy import Entry, Info, InMemory, LazyWeights, Which
from tva.checkpoints.lora import (
    EMBEDDINGS,
    HEADS,
    AdapterTensors,
    adapted,
    orientations,
    read_config,
    sort_tensors,
    with_tokens,
)
from tva.checkpoints.names import ADVICE, KeyMap, NameFilter, NameMatch, match_names
from tva.checkpoints.open import find, open_weights
from tva.checkpoints.quantized import check_not_quantized
from tva.errors import MismatchError, some

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


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
        path: What `tva.open_weights` reads, or an adapter's folder or file.
        base: The base's weights.
        key_map: Regular expressions and replacements for the checkpoint's names; see `tva.checkpoints.map_names`.
        which: Which weights of a checkpoint that holds two sets; see `tva.open_weights`.
        only: Which names of either side take part; the others are in no result.
        advice: What an error about names advises.

    Returns:
        The base's names to the fine-tuned tensors; those of an adapter in float32. Of names that share one tensor in
        either file, or hold equal ones, it is enough that the other has one. ``info.notes`` says how names matched.

    Raises:
        MismatchError: The names cannot be matched.
    """
    found = find(path)
    folder = found.parent if found.name in ADAPTER_FILES else found
    if (folder / "adapter_config.json").exists():
        return open_adapter(folder, base, key_map=key_map, dtype=torch.float32, only=only, advice=advice)
    only = only or NameFilter()
    whole = open_weights(path, which=which)
    check_not_quantized(base, "the base" if not isinstance(base, LazyWeights) else str(base.path))
    check_not_quantized(whole, str(whole.path))
    _refuse_unmerged(whole)
    check_both_gguf(whole, base, key_map)
    notes = only.note(whole, "")
    weights = whole.renamed({name: name for name in only.kept(whole)}, *notes)
    base_names = only.kept(base)
    ties = base.ties() if isinstance(base, LazyWeights) else {}
    what = f"{whole.path} on {base.path if isinstance(base, LazyWeights) else 'the base'}"
    try:
        match = match_names(weights, base_names, key_map, advice=advice)
    except MismatchError:  # a tied tensor may have one name on one side, and two on the other
        own, copies = weights.ties(), (copies_in(weights), copies_in(base))
        once, base_once = [n for n in weights if n not in own], [n for n in base_names if n not in ties]
        try:
            match = match_names(once, base_once, key_map, copies=copies, advice=advice)
        except MismatchError as error:
            advised = _converted(weights, base) if str(error).startswith("No single prefix") else ""
            raise MismatchError(f"{what}: {error}{advised}") from error
    tied = {alias: kept for alias, kept in ties.items() if alias in base_names and kept in match.names}
    names = {**match.names, **{alias: match.names[kept] for alias, kept in tied.items() if alias not in match.names}}
    same = all(new == old for new, old in match.names.items())
    return weights.renamed(names, *([] if same else [match.text]))


def _converted(weights: LazyWeights, base: Mapping[str, Tensor]) -> str:
    """Return what to do where transformers keeps a model in memory under other names than in its folder."""
    sides = [(name, form_of(side, name)[1].numel()) for side in (weights, base) for name in side]
    counts = [sum(count for _, count in part) for part in (sides[: len(weights)], sides[len(weights) :])]
    config = model_config(base.path) if isinstance(base, LazyWeights) else {}
    experts = any(re.search(r"\bexperts\b", name) for name, _ in sides)
    if counts[0] != counts[1] or not (experts or config.get("architectures")):
        return ""
    what = "experts are one tensor each in one and fused in the other" if experts else "the names differ"
    return (
        f" Both hold {counts[0]} elements, and {what}: transformers has other names in memory than in the folders that "
        f"it saves. Load the fine-tuned weights into the model that the base is of (from_pretrained, load_state_dict), "
        f"save that with save_pretrained, and give the folder."
    )


def _refuse_unmerged(weights: LazyWeights) -> None:
    factors = [name for name in weights if re.search(r"\.lora_(embedding_)?[AB]\b", name)]
    if factors:
        raise ValueError(
            f"{weights.path} holds a model together with its LoRA factors ({some(factors)}), and not the scale of "
            f"their product. Merge them before saving (model.merge_and_unload() of peft), or give the adapter's folder."
        )


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

    The weights are those of peft's ``merge_and_unload``: where names of the base are tied, an adapter of the embedding
    moves all of them. An adapter of the tied head only is refused, as its merged model is not the model that was
    trained.

    Args:
        path: The adapter's folder (``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``), or
            ``hf://owner/name``.
        base: The base's weights, from `tva.open_weights` or in memory; left unchanged.
        key_map: Regular expressions and replacements for the adapter's names; see `tva.checkpoints.map_names`.
        dtype: Dtype of the tensors that the adapter moves; by default the base's. If the base is float16 or bfloat16,
            ``torch.float32`` keeps what rounding would lose of a small delta.
        only: Which names of either side take part; a left-out tensor of the base is not in the result.
        advice: What an error about names advises.

    Returns:
        The base's names to its tensors, those that the adapter moves with their delta added: in float32 (float64 where
        an input is) and rounded once.

    Raises:
        FileNotFoundError: A file is missing.
        MismatchError: A name or shape is not the base's.
        ValueError: It is not a LoRA adapter, or a variant that is not supported.
    """
    folder = find(path)
    folder = folder.parent if folder.is_file() else folder
    config = read_config(folder)
    check_not_quantized(base, "the base" if not isinstance(base, LazyWeights) else str(base.path))
    check_both_gguf(folder, base, key_map)
    tensors = sort_tensors(folder, config, _open_tensors(folder))
    modules = {f"{module}.weight": module for module in tensors.low_rank}
    model = model_config(base.path) if isinstance(base, LazyWeights) else {}
    only = only or NameFilter()
    targets = list(dict.fromkeys([*modules, *tensors.whole, *tensors.tokens]))
    left_out = only.note(targets, "")
    kept = only.kept(base)
    stored = {name: base.entry(name) if isinstance(base, LazyWeights) else InMemory(base[name]) for name in kept}
    entries, fused = single_experts(stored, targets, model.get("model_type"))
    match = _match(folder, only.kept(targets), tensors, entries, key_map, advice)
    shapes = {name: entry.shape for name, entry in entries.items()}
    turned = orientations(
        folder,
        config,
        model,
        {modules[t]: (tensors.low_rank[modules[t]], n, shapes[n]) for n, t in match.names.items() if t in modules},
        shapes,
    )
    moved: dict[str, Entry] = {}
    for name, target in match.names.items():
        start = tensors.whole.get(target, entries[name])
        if start.shape != shapes[name]:
            raise MismatchError(_other_shape(folder, target, start.shape, shapes[name]))
        if target in tensors.tokens:
            start = with_tokens(folder, config, target, start, tensors.tokens[target])
        if target in modules:
            module = modules[target]
            factors = tensors.low_rank[module]
            wide = start.dtype if dtype is None or start.dtype == torch.float64 else dtype
            start = adapted(folder, config, module, start, factors, turned.get(module), wide)
        moved[name] = start
    tensors.check_used(folder, {*match.names.values(), *(target for target in targets if not only.keeps(target))})
    ties = _move_ties(folder, base, moved, match.names, tensors, model, set(kept))
    source = f" of {base.path}" if isinstance(base, LazyWeights) else ""
    notes = [*left_out, match.text, f"{len(match.names)} of {len(entries)} tensors{source} are the adapter's"]
    notes += [f"tied, and moved together: {some(ties)}"] if ties else []
    if (merged := weights_file(folder)) is not None:
        notes.append(f"the model in {merged.name} beside the adapter was not read; give that file if you mean it")
    changed = fused_again(stored, moved, entries, fused)
    return LazyWeights(Info(folder, "LoRA adapter with its base", notes=tuple(notes)), changed)


def _open_tensors(folder: Path) -> LazyWeights:
    for name, module in zip(ADAPTER_FILES, (safetensors, pytorch), strict=True):
        if (folder / name).exists():
            return module.open(folder / name)
    raise FileNotFoundError(f"{folder} holds neither adapter_model.safetensors nor adapter_model.bin. Copy it there.")


def _other_shape(folder: Path, name: str, found: torch.Size, shape: torch.Size) -> str:
    text = f"{folder} holds {name!r} of shape {list(found)}; the base's is {list(shape)}."
    if found[1:] == shape[1:] and name.split(".")[-2:-1] and name.split(".")[-2] in EMBEDDINGS | HEADS:
        return (
            f"{text} The vocabularies have {found[0]} and {shape[0]} entries: resize the base's "
            f"(resize_token_embeddings) and save it, or take the base that the adapter was trained on."
        )
    return f"{text} Take the base that the adapter was trained on."


def _match(
    folder: Path, targets: list[str], tensors: AdapterTensors, base: Collection[str], key_map: KeyMap, advice: str
) -> NameMatch:
    """Match an adapter's names; where they do not match, name a head that the base does not have."""
    try:
        return match_names(targets, base, key_map, subset=True, advice=advice)
    except MismatchError as error:
        heads = [target for target in targets if _module(target) in HEADS and target not in base]
        if heads and _matches([t for t in targets if t not in heads], base, key_map):
            raise MismatchError(
                f"{folder} changes {some(heads)}, which the base does not store: it is tied to the input embeddings, "
                f"so that merging would change those too. {_untie(heads)}"
            ) from error
        whole = [target for target in targets if target in tensors.whole]
        if whole and _matches([t for t in targets if t not in whole], base, key_map):
            raise MismatchError(
                f"{folder} holds {len(whole)} tensors of its own beside the low-rank factors, which the base does not "
                f"have: {some(whole)}. It was trained on a model with another head (its task_type says which): save "
                f"the base with that head (save_pretrained of transformers) and give that. {advice}."
            ) from error
        raise MismatchError(f"{folder}: {error}") from error


def _matches(targets: list[str], base: Collection[str], key_map: KeyMap) -> bool:
    if not targets:  # nothing is left to say otherwise
        return True
    try:
        match_names(targets, base, key_map, subset=True)
    except ValueError:
        return False
    return True


def _module(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _untie(names: list[str]) -> str:
    return (
        f"Untie the base: set tie_word_embeddings to false in its configuration, save it with a copy of the embeddings "
        f"as {names[0]!r}, and give that as the base."
    )


def _move_ties(
    folder: Path,
    base: Mapping[str, Tensor],
    moved: dict[str, Entry],
    targets: Mapping[str, str],
    tensors: AdapterTensors,
    model: Mapping[str, object],
    kept: set[str],
) -> list[str]:
    """Move the names that are tied to a moved embedding with it, in place.

    Returns:
        The names that were added.

    Raises:
        MismatchError: A tied name is moved otherwise than by its embedding.
    """
    added = []
    for names in _tied_groups(base, moved, model):
        group = names & kept
        inside = [name for name in group if name in moved]
        if not inside:
            continue
        lora = {name: tensors.low_rank.get(targets[name].removesuffix(".weight")) for name in inside}
        factors, only_tokens = lora[inside[0]], {targets[name] for name in inside} <= tensors.tokens.keys()
        if len(inside) == 1 and (factors.embedding if factors else only_tokens):
            for name in group - {inside[0]}:
                moved[name] = moved[inside[0]]
                added.append(name)
        elif any(lora.values()) or len(inside) < len(group):
            raise MismatchError(
                f"The base's {some(sorted(group))} are tied, and {folder} changes {some(inside)} otherwise than by "
                f"low-rank factors of the embedding, so that the tied names would have to differ. "
                f"{_untie([name for name in sorted(group) if _module(name) in HEADS] or inside)}"
            )
    return sorted(added)


def _tied_groups(base: Mapping[str, Tensor], moved: Mapping[str, Entry], model: Mapping[str, object]) -> list[set[str]]:
    """Return the groups of names of the base that are tied: one tensor under several names, or equal copies of it."""
    kept: dict[str, str] = dict(base.ties()) if isinstance(base, LazyWeights) else _shared(base)
    if _said_untied(model):
        return []
    if any(_module(name) in EMBEDDINGS | HEADS for name in moved):
        kept |= {name: other for name, other in _equal_embeddings(base).items() if name not in kept}
    groups: dict[str, set[str]] = {}
    for alias, name in kept.items():
        groups.setdefault(kept.get(name, name), {kept.get(name, name)}).add(alias)
    return list(groups.values())


def _said_untied(model: Mapping[str, object]) -> bool:
    text = model.get("text_config")
    said = [part.get("tie_word_embeddings") for part in (model, text) if isinstance(part, Mapping)]
    return False in said and True not in said


def _shared(base: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names of a state dict in memory that share the memory of another one."""
    first: dict[object, str] = {}
    found = {}
    for name, tensor in base.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and first.setdefault(place, name) != name:
            found[name] = first[place]
    return found


def _equal_embeddings(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the embeddings and heads that are equal copies of an embedding, with its name; no others are compared."""

    def shape(name: str) -> torch.Size:
        return weights.spec(name).shape if isinstance(weights, LazyWeights) else weights[name].shape

    names = [name for name in weights if name.endswith(".weight") and _module(name) in EMBEDDINGS | HEADS]
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda name: _module(name) in HEADS):  # the embeddings first
        for other in names:
            if other == name or other in found or _module(other) in HEADS or shape(name) != shape(other):
                continue
            if torch.equal(weights[name], weights[other]):
                found[name] = other
                break
    return found
