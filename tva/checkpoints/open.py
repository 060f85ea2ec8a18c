"""The door to checkpoints: `open_weights` finds out the format and gives one read-only mapping, executing nothing."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path

from tva.checkpoints.formats.deepspeed import is_zero, open_zero
from tva.checkpoints.formats.pytorch import Which, open_torch
from tva.checkpoints.formats.safetensors import open_safetensors
from tva.checkpoints.formats.torch_distributed import is_distributed, open_distributed
from tva.checkpoints.hub import fetch, is_hub
from tva.checkpoints.lazy import Info, LazyWeights
from tva.checkpoints.names import KeyMap, canonical_names, map_names
from tva.errors import some


def open_weights(
    path: str | os.PathLike[str], prefix: str = "", *, which: Which = "checkpoint", key_map: KeyMap = ()
) -> LazyWeights:
    """Open a checkpoint as a read-only mapping, reading no tensor yet and executing nothing.

    Args:
        path: A ``.safetensors`` file; a PyTorch ``.pt``, ``.pth`` or ``.bin`` state dict; a Lightning ``.ckpt``; an
            ``.index.json`` of shards; a folder with any of these, of ``torch.distributed.checkpoint`` (FSDP, FSDP2) or
            of DeepSpeed ZeRO; or ``hf://owner/name@revision/file`` on the hub (revision and file may be left out).
        prefix: Keep only the names under this prefix, and strip it.
        which: Of a Lightning checkpoint that a weight-averaging callback has written, the ``"raw"`` or the
            ``"averaged"`` weights; ``"checkpoint"`` is what Lightning loads, the averaged. ``info.which`` says which.
        key_map: Regular expressions and replacements for names, applied last; see `tva.checkpoints.map_names`.

    Returns:
        Names to tensors on the CPU in their stored dtypes. ``info`` says what was read and how names were changed;
        ``spec(name)`` gives dtype and shape without reading, ``slice(name, start, stop)`` reads a part.

    Raises:
        FileNotFoundError: Nothing is there, or a shard is missing.
        ValueError: It is no checkpoint, is damaged, is a pickled module, is an adapter (see `open_adapter`),
            or has nothing under ``prefix``.

    Example:
        >>> import tempfile, torch
        >>> from tva.checkpoints import save_weights
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights({"encoder.w": torch.ones(2)}, f"{folder}/m.safetensors")
        ...     dict(open_weights(f"{folder}/m.safetensors", prefix="encoder."))
        {'w': tensor([1., 1.])}
    """
    weights = open_any(find(path), which)
    if which != "checkpoint" and weights.info.which != which:
        raise ValueError(f"{weights.path} is a {weights.info.format}, which holds one set of weights; leave out which.")
    names = canonical_names(list(weights))
    changed = sum(new != old for new, old in names.items())
    note = [f"dropped what wrappers add ('module.', '_orig_mod') from {changed} of {len(names)} names"]
    weights = weights.renamed(names, *(note if changed else []))
    if prefix:
        kept = {name[len(prefix) :]: name for name in weights if name.startswith(prefix)}
        if not kept:
            prefixes = sorted({name.split(".")[0] + "." for name in weights if "." in name})
            raise ValueError(
                f"{path} holds no weights under {prefix!r}; its prefixes are {some(prefixes) or 'none'}. Pass one of "
                f"those."
            )
        weights = weights.renamed(kept, f"kept {len(kept)} of {len(weights)} names, those under {prefix!r}, without it")
    if key_map:
        names = map_names(weights, key_map)
        changed = sum(new != old for new, old in names.items())
        weights = weights.renamed(names, f"key_map renamed {changed} of {len(names)} names")
    return weights


def find(path: str | os.PathLike[str]) -> Path:
    """Find a checkpoint on this machine, downloading it from the hub where it is on none.

    Raises:
        FileNotFoundError: Nothing is there.
    """
    if is_hub(path):
        return fetch(path)
    path = Path(path)
    if not path.exists():
        there = path.parent.is_dir()
        names = sorted(p.name for p in path.parent.iterdir() if not p.name.startswith(".")) if there else []
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
        holds = f"{path.parent} holds {some(near or names) or 'nothing'}{' and others' * bool(near)}"
        found = holds if there else f"{path.parent} does not exist"
        raise FileNotFoundError(f"A checkpoint was expected at {path}, but nothing is there ({found}). Check the path.")
    return path


def open_any(path: Path, which: Which = "checkpoint") -> LazyWeights:
    """Open a file or folder as it is, with the names that are in it."""
    if path.is_dir():
        return _open_folder(path, which)
    if path.name.endswith(".index.json"):
        return _open_sharded(path)
    if path.suffix == ".safetensors":
        weights = open_safetensors(path)
    elif path.suffix in {".pt", ".pth", ".bin", ".ckpt"}:
        weights = open_torch(path, which)
    else:
        raise ValueError(
            f"{path} is no checkpoint that can be read: its name must end in .safetensors, .pt, .pth, .bin or .ckpt, "
            f"or it must be a folder."
        )
    if path.stem == "adapter_model":
        raise ValueError(_is_adapter(path.parent))
    return weights


def _is_adapter(folder: Path) -> str:
    return (
        f"{folder} is a PEFT adapter, which is no model without its base. Open it with its base: "
        f"tva.checkpoints.open_adapter({str(folder)!r}, open_weights(BASE))."
    )


def _open_folder(folder: Path, which: Which) -> LazyWeights:
    names = sorted(p.name for p in folder.iterdir())
    if is_distributed(folder):
        return open_distributed(folder)
    for ending in (".safetensors", ".bin"):
        known = "model" if ending == ".safetensors" else "pytorch_model"
        for candidates in (
            [known + ending],
            [f"{known}{ending}.index.json"],
            [name for name in names if name.endswith(f"{ending}.index.json")],
        ):
            found = [name for name in candidates if name in names]
            if len(found) == 1:
                return open_any(folder / found[0], which)
    if is_zero(folder):
        return open_zero(folder)
    if "adapter_config.json" in names:
        raise ValueError(_is_adapter(folder))
    files = [name for name in names if Path(name).suffix in {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}]
    if len(files) == 1:
        return open_any(folder / files[0], which)
    raise ValueError(
        f"{folder} is no checkpoint folder: it must hold model.safetensors or pytorch_model.bin, or an index of their "
        f"shards, or one checkpoint and no other, or be written by torch.distributed.checkpoint or DeepSpeed; it holds "
        f"{some(names) or 'nothing'}."
    )


def _open_sharded(index: Path) -> LazyWeights:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of shards: JSON with a 'weight_map' was expected ({error!r})."
        ) from error
    missing = [shard for shard in shards if Path(shard).name != shard or not (index.parent / shard).exists()]
    if missing:
        raise FileNotFoundError(
            f"{index} names {len(shards)} shards, and {len(missing)} of them are not beside it: {some(missing)}. Copy "
            f"them there."
        )
    opened = {shard: open_any(index.parent / shard) for shard in shards}
    lacking = [name for name, shard in weight_map.items() if name not in opened[shard]]
    if lacking:
        raise ValueError(
            f"{index} says that {some(f'{name} is in {weight_map[name]}' for name in lacking)}, but it is not there. "
            f"The index and the shards are of different checkpoints; take both from one source."
        )
    tied = {name: shard for shard, weights in opened.items() for name in weights.ties()}
    weight_map = {**tied, **weight_map}
    unlisted = [name for weights in opened.values() for name in weights if name not in weight_map]
    notes = [f"left out {len(unlisted)} tensors that the index does not list: {some(unlisted)}"] if unlisted else []
    entries = {name: opened[shard].entry(name) for name, shard in weight_map.items()}
    kinds = {weights.info.format for weights in opened.values()}
    info = Info(index.parent, f"{' and '.join(sorted(kinds))}, {len(shards)} shards", notes=tuple(notes))
    headers = [weights.metadata for weights in opened.values()]
    common = {key: text for key, text in headers[0].items() if all(other.get(key) == text for other in headers)}
    return LazyWeights(info, entries, common)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the header metadata of a safetensors file, without its tensors.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is no safetensors file.
    """
    return open_weights(path).metadata
