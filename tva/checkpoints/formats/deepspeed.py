"""Folders of DeepSpeed ZeRO, stages 1 to 3: the full-precision weights from the partitions that each rank has written.

The layout is that of DeepSpeed's own ``zero_to_fp32.py``, which executes the pickles; here they are read inert.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tva._torch import torch
from tva.checkpoints.folder import weights_file
from tva.checkpoints.foreign import ForeignFileError, is_plain_name, read_bytes, shown
from tva.checkpoints.formats.pytorch import load_torch
from tva.checkpoints.inert_pickle import Inert
from tva.checkpoints.lazy import Entry, Info, Joined, LazyWeights, Which
from tva.errors import some

Part = tuple[Entry, int, int]


def matches(path: Path) -> bool:
    """Return whether a folder was written by DeepSpeed; beside a whole model (as transformers saves) it is a copy."""
    if not path.is_dir() or weights_file(path) is not None:
        return False
    return (path / "latest").exists() or any(path.glob("*mp_rank_*_model_states.pt"))


def open(path: Path, which: Which = "checkpoint") -> LazyWeights:
    """Open a folder of DeepSpeed: the one with ``latest`` in it, or the tagged one that it names.

    Returns:
        Parameters in float32 as the optimizer holds them, frozen ones and buffers in their stored dtypes.

    Raises:
        ValueError: The model was split other than over data-parallel ranks, or the files do not add up.
    """
    folder = tagged = path
    if (folder / "latest").exists():
        name = read_bytes(folder / "latest", 4096).decode(errors="replace").strip()
        tagged = folder / name
        if not is_plain_name(name) or not tagged.is_dir():
            raise FileNotFoundError(
                f"{folder / 'latest'} names {shown(name)}, which is not a folder in {folder}. Copy it there."
            )
    names = sorted(path.name for path in tagged.iterdir())
    other = [n for n in names if re.search(r"mp_rank_(?!00_)\d+_|^layer_|^expp_rank_|expert", n)]
    if other:
        raise _refused(folder, f"the model is split over tensor, pipeline or expert ranks ({some(other)})")
    model_files = _by_rank(tagged, "model_states.pt")
    if not model_files:
        raise _refused(folder, f"no '*mp_rank_00_model_states.pt' is in {tagged}")
    optimizer_files = _by_rank(tagged, "optim_states.pt")
    models = [_load(folder, path) for path in model_files]
    if any(model.get("ds_autoep_layers") or model.get("autoep_layers") for model in models):
        raise _refused(folder, "experts are partitioned over ranks of their own")
    try:
        if optimizer_files:
            stage, entries = _zero_entries(folder, models, [_load(folder, path) for path in optimizer_files])
        else:
            stage, entries = 0, dict(models[0]["module"])
    except (ForeignFileError, FileNotFoundError):
        raise
    except Exception as error:  # a stranger's bytes are parsed: they may provoke any
        raise _refused(folder, f"{type(error).__name__}: {str(error)[:200]} in reading its parts") from error
    if kinds := sorted({type(name).__name__ for name in entries} - {"str"}):
        raise _refused(folder, f"its parts are named by {some(kinds)} where names must be text")
    left = [name for name, entry in entries.items() if not isinstance(entry, Entry)]
    entries = {name.removeprefix("_forward_module."): e for name, e in entries.items() if isinstance(e, Entry)}
    notes = [f"left out as they are not tensors: {some(left)}"] if left else []
    return LazyWeights(Info(tagged, f"DeepSpeed checkpoint, ZeRO stage {stage}", notes=tuple(notes)), entries)


def _refused(folder: Path, reason: str) -> ForeignFileError:
    return ForeignFileError(
        f"{folder} is a DeepSpeed checkpoint that cannot be read: {reason}. Convert it where deepspeed is installed: "
        f"python {folder / 'zero_to_fp32.py'} {folder} OUTPUT --safe_serialization, and open OUTPUT."
    )


def _by_rank(folder: Path, ending: str) -> list[Path]:
    """List the files of one kind by data-parallel rank; the one without a rank is rank 0."""
    ranks = {}
    for path in folder.glob(f"*mp_rank_00_{ending}"):
        found = re.search(r"zero_pp_rank_(\d+)_", path.name)
        ranks[int(found[1]) if found else 0] = path
    count = max(ranks, default=-1) + 1
    if count > len(ranks):
        missing = itertools.islice((rank for rank in itertools.count() if rank not in ranks), 3)
        raise FileNotFoundError(
            f"{folder} lacks the '…_{ending}' of {count - len(ranks)} of {count} ranks, the first of them "
            f"{some(itertools.takewhile(lambda rank: rank < count, missing))}. Copy them there."
        )
    return [ranks[rank] for rank in sorted(ranks)]


def _load(folder: Path, path: Path) -> Mapping[str, Any]:
    content, _ = load_torch(path)
    if not isinstance(content, Mapping):
        raise _refused(folder, f"{path.name} holds {content!r}" if isinstance(content, Inert) else shown(content))
    return content


def _zero_entries(
    folder: Path, models: list[Mapping[str, Any]], optimizers: list[Mapping[str, Any]]
) -> tuple[int, dict[str, Any]]:
    states = [content["optimizer_state_dict"] for content in optimizers]
    stage = states[0]["zero_stage"]
    stage = stage.args[0] if isinstance(stage, Inert) else stage  # an Enum in some versions
    if not isinstance(stage, int):
        raise _refused(folder, f"its ZeRO stage is {shown(stage)}")
    counts = states[0]["partition_count"]
    counts = set(counts) if isinstance(counts, list) else {counts}
    if len(counts) != 1:
        raise _refused(folder, f"parameter groups are split over different numbers of ranks ({some(counts)})")
    if counts != {len(states)}:
        raise FileNotFoundError(
            f"{folder} was written by {counts.pop()} ranks, and {len(states)} '…_optim_states.pt' are there. Copy the "
            f"others."
        )
    entries = {name: models[0]["module"][name] for name in models[0]["buffer_names"] if name in models[0]["module"]}
    if stage in (1, 2):
        groups = [state["single_partition_of_fp32_groups"] for state in states]
        entries.update(_frozen_whole(folder, models[0]))
        if {len(rank) for rank in groups} != {len(models[0]["param_shapes"])}:
            raise _refused(folder, f"{len(groups[0])} groups are stored, of {len(models[0]['param_shapes'])} shapes")
        for number, shapes in enumerate(models[0]["param_shapes"]):
            entries.update(_split_whole(folder, shapes, [rank[number] for rank in groups]))
    elif stage == 3:
        if len(models) != len(states):
            raise FileNotFoundError(
                f"{folder} has {len(models)} '…_model_states.pt' for {len(states)} ranks. Copy all."
            )
        for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
            parts = [model["frozen_param_fragments"][name] for model in models]
            each, sizes = -(-torch.Size(shape).numel() // len(models)), [part.shape.numel() for part in parts]
            if set(sizes) != {each}:  # DeepSpeed pads a parameter to a multiple of the ranks
                raise _refused(folder, f"{name!r} of {torch.Size(shape).numel()} elements is stored as {some(sizes)}")
            entries[name] = _joined([(part, 0, each) for part in parts], torch.Size(shape))
        shapes = {name: shape for group in models[0]["param_shapes"] for name, shape in group.items()}
        entries.update(_split_each(folder, shapes, [state["fp32_flat_groups"] for state in states]))
    else:
        raise _refused(folder, f"its ZeRO stage is {stage}")
    for name, source in models[0].get("shared_params", {}).items():
        if source in entries:
            entries[name] = entries[source]
    others = {name: entry for name, entry in models[0]["module"].items() if name not in entries}
    if stage == 3 and others:  # there the module's own tensors are empty
        raise _refused(folder, f"{some(others)} are in no partition")
    return stage, {**entries, **others}  # stage 1 keeps frozen parameters only in the module


def _frozen_whole(folder: Path, model: Mapping[str, Any]) -> Mapping[str, Entry]:
    """Stages 1 and 2: frozen parameters are stored whole, with their shapes in another place."""
    fragments, shapes = model.get("frozen_param_fragments") or {}, model.get("frozen_param_shapes") or {}
    odd = [name for name in shapes.keys() & fragments.keys() if fragments[name].shape != torch.Size(shapes[name])]
    if odd or shapes.keys() - fragments.keys():
        raise _refused(folder, f"frozen parameters do not have their shapes: {some(odd or shapes.keys())}")
    return fragments


def _split_whole(folder: Path, shapes: Mapping[str, Any], ranks: list[Entry]) -> dict[str, Entry]:
    """Stages 1 and 2: a group's parameters follow one another, and the ranks hold equal stretches of that."""
    parts = [(entry, 0, entry.shape.numel()) for entry in ranks]
    sizes = [stop for _, _, stop in parts]
    stored, each = sum(sizes), max(sizes)
    if sizes != [min(each, max(0, stored - rank * each)) for rank in range(len(ranks))]:  # only an end may be cut off
        raise _refused(folder, f"the ranks hold {', '.join(map(str, sizes))} elements of a group, and not {each} each")
    entries: dict[str, Entry] = {}
    position = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        entries[name] = _joined(_stretch(parts, position, position + size), torch.Size(shape))
        position += size
    align = 2 * len(ranks)  # DeepSpeed pads a group to a multiple of this, and no more
    if not position <= stored <= -(-position // align) * align:
        raise _refused(folder, f"a group of {position} elements is stored as {stored}")
    return entries


def _split_each(folder: Path, shapes: Mapping[str, Any], ranks: list[list[Entry]]) -> dict[str, Entry]:
    """Stage 3: each parameter is split over the ranks, which hold their parts one after the other."""
    parts = [[(entry, 0, entry.shape.numel()) for entry in groups] for groups in ranks]
    stored = {sum(stop for _, _, stop in groups) for groups in parts}
    entries: dict[str, Entry] = {}
    position = 0
    for name, shape in shapes.items():
        each = -(-torch.Size(shape).numel() // len(ranks))
        cut = [part for groups in parts for part in _stretch(groups, position, position + each)]
        entries[name] = _joined(cut, torch.Size(shape))
        position += each
    if stored != {position}:
        raise _refused(folder, f"parameters of {position} elements a rank are stored as {some(sorted(stored))}")
    return entries


def _stretch(parts: list[Part], start: int, stop: int) -> list[Part]:
    """Cut elements ``start`` to ``stop`` out of parts that follow one another."""
    cut = []
    position = 0
    for entry, first, last in parts:
        low, high = max(start, position), min(stop, position + last - first)
        if low < high:
            cut.append((entry, first + low - position, first + high - position))
        position += last - first
    return cut


def _joined(parts: list[Part], shape: torch.Size) -> Joined:
    dtype = parts[0][0].dtype if parts else torch.float32
    return Joined(tuple(parts), dtype, shape)
