"""Open a checkpoint of any format as one read-only mapping, executing nothing."""

import difflib
import importlib
import os
import re
from pathlib import Path
from typing import Any

from tva.checkpoints.folder import is_undo, weights_file
from tva.checkpoints.foreign import content_of, is_plain_name, read_json, shown
from tva.checkpoints.hub import fetch, is_hub
from tva.checkpoints.lazy import Info, LazyWeights, Which
from tva.checkpoints.names import KeyMap, canonical_names, map_names
from tva.checkpoints.quantized import dequantized
from tva.errors import some
from tva.plugins import installed, modules_in

FORMATS = "tva.checkpoints.formats"
OF_RANK = r"(?:world_size_(?P<size>\d+)_)?rank_?\d+[_.](?!mp_rank)"  # one process's part, by its file's name
ENDINGS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}  # by which the one checkpoint of a folder is found


def open_weights(
    path: str | os.PathLike[str], prefix: str = "", *, which: Which = "checkpoint", key_map: KeyMap = ()
) -> LazyWeights:
    """Open a checkpoint as a read-only mapping, reading no tensor yet and executing nothing.

    Args:
        path: A safetensors file; a GGUF file (through the package ``gguf``); a PyTorch state dict; a Lightning
            checkpoint; an ``.index.json`` of shards; a folder with any of these, of ``torch.distributed.checkpoint``
            (FSDP, FSDP2) or of DeepSpeed ZeRO; or ``hf://owner/name@revision/file`` on the hub (revision and file may
            be left out). The content of a file decides its format, not its name.
        prefix: Keep only the names under this prefix, and strip it.
        which: Of a Lightning checkpoint from a weight-averaging callback, the ``"raw"`` or the ``"averaged"`` weights;
            ``"checkpoint"`` is what Lightning loads: the averaged. ``info.which`` has it.
        key_map: Regular expressions and replacements for names, applied last; see `tva.checkpoints.map_names`.

    Returns:
        Names to tensors on the CPU in their stored dtypes; quantized ones, which are stored as codes and scales, under
        the names of their weights and in float64. ``info`` says what was read and how names were changed;
        ``spec(name)`` gives dtype and shape without reading, ``slice(name, start, stop)`` reads a part.

    Raises:
        FileNotFoundError: Nothing is there, or a shard is missing.
        ValueError: It is not a checkpoint, is damaged, is a pickled module, is an adapter (see `open_adapter`), or
            has nothing under ``prefix``.

    Example:
        >>> import tempfile, torch
        >>> from tva.checkpoints import save_weights
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights({"encoder.w": torch.ones(2)}, f"{folder}/m.safetensors")
        ...     dict(open_weights(f"{folder}/m.safetensors", prefix="encoder."))
        {'w': tensor([1., 1.])}
    """
    weights = dequantized(open_any(find(path), which))
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
    """Return the path of a checkpoint on this machine, downloading it if the path is on the hub.

    Raises:
        FileNotFoundError: The path does not exist.
    """
    if is_hub(path):
        return fetch(path)
    path = Path(path).expanduser()
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r} has a NUL character, which no file's name has. Check the path.")
    if not path.exists():
        there = path.parent.is_dir()
        names = sorted(p.name for p in path.parent.iterdir() if not p.name.startswith(".")) if there else []
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
        holds = f"{path.parent} holds {some(near or names) or 'nothing'}{' and others' * bool(near)}"
        found = holds if there else f"{path.parent} does not exist"
        raise FileNotFoundError(f"A checkpoint was expected at {path}, but nothing is there ({found}). Check the path.")
    return path


def open_any(path: Path, which: Which = "checkpoint") -> LazyWeights:
    """Open a file or folder as it is, with the names that are in it.

    Raises:
        ValueError: No format matches, or more than one.
    """
    of_rank = re.search(OF_RANK, path.name)
    if of_rank and of_rank["size"] not in (None, "1") and path.is_file():
        raise ValueError(_of_ranks(path, [path.name]))
    formats = _formats()
    matching = [name for name, module in formats.items() if module.matches(path)]
    if len(matching) > 1:
        raise ValueError(
            f"{path} matches more than one checkpoint format: {some(matching)}. Give the file or folder that you mean."
        )
    if matching:
        weights: LazyWeights = formats[matching[0]].open(path, which)
    elif path.is_dir():
        return open_any(_file_in(path), which)
    elif path.name.endswith(".index.json"):
        return _open_sharded(path)
    else:
        by_ending = [module for module in formats.values() if path.suffix in getattr(module, "ENDINGS", ())]
        if not by_ending:
            raise ValueError(_unknown(path))
        weights = by_ending[0].open(path, which)  # which says what is wrong
    if path.stem == "adapter_model":
        raise ValueError(_is_adapter(path.parent))
    return weights


def _formats() -> dict[str, Any]:
    """Return the modules of all formats by name: tva's own, then those of installed packages, each in order of name.

    Raises:
        ValueError: An installed package's format has the name of another.
    """
    modules = {name: importlib.import_module(f"{FORMATS}.{name}") for name in modules_in(FORMATS)}
    for name, point in sorted(installed("tva.checkpoint_formats").items()):
        if name in modules:
            raise ValueError(f"The checkpoint format {name!r} of {point.value} has the name of another. Rename it.")
        modules[name] = point.load()
    return modules


def _unknown(path: Path) -> str:
    content = content_of(path)
    found = f"it is {content}" if content else f"its content, of {path.stat().st_size} bytes, is not known"
    return (
        f"{path} is not a checkpoint that tva reads: {found}. It must be a safetensors file, a file of torch.save, an "
        f".index.json of shards, or a folder with one of these."
    )


def _is_adapter(folder: Path) -> str:
    return (
        f"{folder} is a PEFT adapter, which is not a model without its base. Give its folder as a fine-tuned model "
        f"together with the base: 'tva extract --base BASE --finetuned {folder} --output NAME.tv.safetensors', or in "
        f"Python tva.checkpoints.open_adapter({str(folder)!r}, open_weights(BASE))."
    )


def _of_ranks(path: Path, names: list[str]) -> str:
    return (
        f"{path} holds what each process of a sharded run saved of its own ({some(names)}), without a .metadata file: "
        f"nothing says how the parts of a tensor fit together. Merge them where they were written (of verl: python -m "
        f"verl.model_merger merge), or save with torch.distributed.checkpoint, and give that."
    )


def _file_in(folder: Path) -> Path:
    if (known := weights_file(folder)) is not None:
        return known
    names = sorted(path.name for path in folder.iterdir())
    ranks = [name for name in names if re.search(OF_RANK, name) and Path(name).suffix in ENDINGS]
    if len(ranks) > 1:
        raise ValueError(_of_ranks(folder, ranks))
    if "adapter_config.json" in names:
        raise ValueError(_is_adapter(folder))
    files = [name for name in names if Path(name).suffix in ENDINGS and not is_undo(name)]
    if len(files) != 1:
        raise ValueError(
            f"{folder} is not a checkpoint folder: it must hold model.safetensors or pytorch_model.bin, or an index of "
            f"their shards, or one checkpoint and no other, or be written by torch.distributed.checkpoint or "
            f"DeepSpeed; it holds {some(names) or 'nothing'}. Give one file in it, or another folder."
        )
    return folder / files[0]


def _open_sharded(index: Path) -> LazyWeights:
    content = read_json(index, {"weight_map": {str: str}})
    weight_map: dict[str, str] = content.get("weight_map") or {}
    if not weight_map:
        raise ValueError(f"{index} is not an index of shards: a 'weight_map' that names tensors was expected.")
    shards = sorted(set(weight_map.values()))
    foreign = [shard for shard in shards if not is_plain_name(shard) or shard.endswith(".index.json")]
    if foreign:
        raise ValueError(
            f"{index} names {', '.join(map(shown, foreign[:3]))} as a shard; a shard is a file beside the index, of a "
            f"plain name. Take index and shards from one source."
        )
    missing = [shard for shard in shards if not (index.parent / shard).exists()]
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
    """Return the header metadata of a checkpoint without reading its tensors; empty if it has none.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: It is not a checkpoint.
    """
    return open_weights(path).metadata
