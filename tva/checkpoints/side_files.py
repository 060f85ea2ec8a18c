"""Files that go with an edited model besides its weights: configuration, tokenizer, code, sub-folders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from tva._torch import torch
from tva.checkpoints.dequantized import EDITED
from tva.checkpoints.folder import is_undo, weights_file
from tva.checkpoints.foreign import read_json
from tva.checkpoints.formats.sentence_transformers import MODULES, part_of_names
from tva.checkpoints.hub import fetch_beside, is_hub
from tva.checkpoints.spec import dtype_name

WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".ot",
    ".npz",
    ".distcp",
)
OF_MODELS = WEIGHTS[:5]  # of a folder's own files these hold the weights that were edited, or a copy of them
OF_QUANTIZATION = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
OF_TRAINING = (  # names of files and folders that belong to a training run
    ".*", "__pycache__", "runs", "logs", "wandb", "lightning_logs", "checkpoint-*", "global_step*", "*.log", "latest",
    "optimizer*", "scheduler*", "rng_state*", "events.out.tfevents*", "zero_to_fp32.py", "trainer_state.json",
    "training_args.json", "all_results.json", "adapter_config.json", "edit.json", "report.html",
)  # fmt: skip


def model_folder(base: Path) -> Path | None:
    """Return the folder of a base with what describes it: itself, or that of a file beside a ``config.json``."""
    if base.is_dir():
        return base
    return base.parent if (base.parent / "config.json").is_file() else None


def side_files(
    base: Path,
    dtype: torch.dtype | str | None = None,
    untied: bool = False,
    dequantized: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> tuple[dict[str, bytes | Path], list[str]]:
    """Find what is beside a model's weights.

    Args:
        base: The base model's folder, or its file; of a file's folder the sub-folders do not belong to it.
        dtype: Dtype of the edited model if it is not the base's: ``config.json`` then says so.
        untied: Whether the edit moved tied embeddings apart: ``config.json`` then says so.
        dequantized: Whether the base is quantized and the edited model is not: ``config.json`` then says nothing of
            quantization.
        changes: Other values in ``config.json``.

    Returns:
        Path in the folder to the file, or to contents that differ from it; and what is left out, other than copies of
        the weights themselves: weights of other parts of the model, and what a training run left.
    """
    folder = model_folder(base)
    if folder is None:
        return {}, []
    found: dict[str, bytes | Path] = {}
    left_out, edited = [], set(part_of_names(folder).values()) if base.is_dir() else set()
    for path in _files(folder, base.is_dir()):
        name = path.relative_to(folder).as_posix()
        if any(fnmatch(path.name, pattern) for pattern in OF_TRAINING):
            left_out += [] if path.name.startswith((".", "__")) else [name]
        elif path.suffix in WEIGHTS or name.endswith(".index.json"):
            own = "/" not in name or path.parent.relative_to(folder).as_posix() in edited
            left_out += [name] if path.suffix in WEIGHTS and not (own and path.suffix in OF_MODELS) else []
        elif not (dequantized and path.name in OF_QUANTIZATION):
            found[name] = _inside(folder, path)
    if (dtype is not None or untied or dequantized or changes) and "config.json" in found:
        config = read_json(folder / "config.json", dict) | dict(changes or {})
        for part in (config, *(part for key, part in config.items() if key.endswith("_config"))):
            if isinstance(part, dict):
                part |= _changes(part, dtype or (EDITED if dequantized else None), untied)
                for key in ("quantization_config", "compression_config") if dequantized else ():
                    part.pop(key, None)
        if untied:
            config["tie_word_embeddings"] = False
        found["config.json"] = json.dumps(config, indent=2).encode()
    return found, left_out


def _changes(config: Mapping[str, Any], dtype: torch.dtype | str | None, untied: bool) -> dict[str, Any]:
    changed: dict[str, Any] = {} if dtype is None else dict.fromkeys(("torch_dtype", "dtype"), dtype_name(dtype))
    if untied:
        changed["tie_word_embeddings"] = False
    return {key: value for key, value in changed.items() if key in config}


def fetch_side_files(base: str) -> None:
    """Download what `side_files` finds of a base on the hub, and the weights of a model's other sub-folders.

    Args:
        base: Path of the base; nothing is done if it is on this machine.
    """
    if not is_hub(base):
        return

    def choose(names: list[str]) -> list[str]:
        paths = [PurePosixPath(name) for name in names]
        plain = [path for path in paths if not any(fnmatch(p, of) for p in path.parts for of in OF_TRAINING)]
        modules = {path.parent for path in plain if path.name == "config.json"} if MODULES in names else set()
        wanted = [path for path in plain if path.suffix not in WEIGHTS and not path.name.endswith(".index.json")]
        wanted += [path for path in plain if path.name == "model.safetensors" and path.parent in modules]
        return [path.as_posix() for path in wanted]

    fetch_beside(base, choose)


def weights_stem(base: Path) -> str:
    """Return the file name, without ending, that a loader expects of the weights in a model's folder."""
    known = base
    if base.is_dir():
        files = [path for path in base.glob("*.safetensors") if not is_undo(path.name)]
        known = weights_file(base) or (files[0] if len(files) == 1 else base)
    elif model_folder(base) is None:
        return "model"
    stem, found, _ = known.name.partition(".safetensors")
    return stem if found and "-of-" not in stem else "model"


def _files(folder: Path, deep: bool) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_file() or any(fnmatch(path.name, pattern) for pattern in OF_TRAINING):
            yield path
        elif deep and path.is_dir() and not path.is_symlink():
            yield from _files(path, deep)


def _inside(folder: Path, path: Path) -> Path:
    """Return a file of a folder, which may not be a link that leads out of it, but for the hub's cache.

    Raises:
        ValueError: It leads elsewhere, so that a file of this machine would be copied into the output.
    """
    roots = [folder.resolve(), *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    if path.is_symlink() and not any(path.resolve().is_relative_to(root.resolve()) for root in roots):
        raise ValueError(
            f"{path} is a link to {path.resolve()}, outside of {folder}, and would be copied beside the output. Put a "
            f"copy of the file in its place, or remove the link."
        )
    return path
