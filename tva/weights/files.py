"""Open checkpoints of several formats as one read-only mapping, and write safetensors files whole or not at all.

Nothing in a checkpoint is ever executed: safetensors holds no code, and PyTorch files are read with
``weights_only=True``, memory-mapped, so that only the tensors that are asked for are read from disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tva.state_dict import some


class LazyWeights(Mapping[str, Tensor]):
    """A read-only mapping of names to tensors that are read when asked for.

    Attributes:
        path: The file or folder.
        metadata: Header metadata of a safetensors file, else empty.
    """

    def __init__(
        self, path: Path, readers: Mapping[str, Callable[[], Tensor]], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self.metadata = dict(metadata or {})
        self._readers = dict(readers)

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __repr__(self) -> str:
        return f"LazyWeights({str(self.path)!r}, {len(self)} tensors)"

    def _renamed(self, names: Mapping[str, str]) -> LazyWeights:
        return LazyWeights(self.path, {new: self._readers[old] for new, old in names.items()}, self.metadata)


def canonical_names(names: list[str]) -> dict[str, str]:
    """Map canonical names to the given ones, dropping what wrappers add.

    ``torch.compile`` adds ``_orig_mod`` anywhere in a name; ``DistributedDataParallel`` adds ``module.`` in front of
    every name.

    Example:
        >>> canonical_names(["module.net._orig_mod.weight"])
        {'net.weight': 'module.net._orig_mod.weight'}
    """
    wrapped = bool(names) and all(name.startswith("module.") for name in names)
    canonical = {}
    for name in names:
        short = name.removeprefix("module.") if wrapped else name
        short = ".".join(part for part in short.split(".") if part != "_orig_mod")
        if short in canonical:
            raise ValueError(f"{canonical[short]!r} and {name!r} would both be called {short!r}; rename one of them.")
        canonical[short] = name
    return canonical


def canonical_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename a module's state dict as `open_weights` would, and keep its tensors alone (no extra state)."""
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {new: state[old] for new, old in canonical_names(list(state)).items()}


def open_weights(path: str | os.PathLike[str], prefix: str = "") -> LazyWeights:
    """Open a checkpoint as a read-only mapping, reading no tensor yet and executing nothing.

    Args:
        path: A ``.safetensors`` file; a PyTorch ``.pt``, ``.pth`` or ``.bin`` state dict; a Lightning ``.ckpt`` (its
            ``state_dict``, which holds the averaged weights when a weight-averaging callback ran); or a folder with
            ``model.safetensors`` or ``pytorch_model.bin``, whole or sharded with an index.
        prefix: Keep only the names under this prefix, and strip it.

    Returns:
        Names to tensors on the CPU in their stored dtypes.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is no checkpoint, is damaged, holds pickled code, or has nothing under ``prefix``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights({"encoder.w": torch.ones(2)}, f"{folder}/m.safetensors")
        ...     dict(open_weights(f"{folder}/m.safetensors", prefix="encoder."))
        {'w': tensor([1., 1.])}
    """
    path = Path(path)
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else None
        found = f"{path.parent} does not exist" if near is None else f"{path.parent} holds {some(near) or 'nothing'}"
        raise FileNotFoundError(f"A checkpoint was expected at {path}, but nothing is there ({found}). Check the path.")
    weights = _open_folder(path) if path.is_dir() else _open_file(path)
    weights = weights._renamed(canonical_names(list(weights)))
    if not prefix:
        return weights
    kept = {name[len(prefix) :]: name for name in weights if name.startswith(prefix)}
    if not kept:
        prefixes = sorted({name.split(".")[0] + "." for name in weights if "." in name})
        raise ValueError(
            f"{path} holds no weights under {prefix!r}; its prefixes are {some(prefixes) or 'none'}. Pass one of those."
        )
    return weights._renamed(kept)


def _open_file(path: Path) -> LazyWeights:
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in {".pt", ".pth", ".bin", ".ckpt"}:
        return _open_torch(path)
    raise ValueError(
        f"{path} is no checkpoint that can be read: its name must end in .safetensors, .pt, .pth, .bin or .ckpt, "
        f"or it must be a folder."
    )


def _open_folder(folder: Path) -> LazyWeights:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return _open_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            shards: dict[str, LazyWeights] = {}
            readers = {}
            for tensor, shard in json.loads(index.read_text())["weight_map"].items():
                if shard not in shards:
                    if not (folder / shard).exists():
                        raise FileNotFoundError(f"{index} names the shard {shard}, which is not in {folder}.")
                    shards[shard] = _open_file(folder / shard)
                readers[tensor] = shards[shard]._readers[tensor]
            return LazyWeights(folder, readers)
    raise ValueError(
        f"{folder} is no checkpoint folder: it must hold model.safetensors or pytorch_model.bin, or an index of their "
        f"shards; it holds {some(sorted(p.name for p in folder.iterdir())) or 'nothing'}."
    )


def _open_safetensors(path: Path) -> LazyWeights:
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no safetensors file, or is damaged ({error}). Write it again from its source."
        ) from error
    readers = {name: lambda name=name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no __iter__)
    return LazyWeights(path, readers, file.metadata())


def _open_torch(path: Path) -> LazyWeights:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is no PyTorch checkpoint, or holds pickled objects other than tensors, which could "
            f"run code when loaded ({str(error).splitlines()[0]}). If you trust it, load it yourself and write its "
            f"state_dict() with tva.weights.save_weights."
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError) as error:  # damaged: any of these
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no PyTorch checkpoint, or is damaged ({reason}).") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        found = some(content) if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(
            f"{path} holds no state dict: a mapping of names to tensors was expected, alone or under 'state_dict', "
            f"and it holds {found}."
        )
    return LazyWeights(path, {name: lambda name=name: state[name] for name in state})


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:  # torch's format before 1.6 is no zip file and cannot be mapped
        return file.read(4) == b"PK\x03\x04"


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the header metadata of a safetensors file, without its tensors.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is no safetensors file.
    """
    return open_weights(path).metadata


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its name on success and is removed on failure.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(f"{folder}/a.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     [file.name for file in Path(folder).iterdir()]
        ['a.txt']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors would leave files to their owner alone
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_weights(
    weights: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a state dict as one safetensors file: whole under its name, or not at all.

    Args:
        weights: Names to tensors; tensors that share memory (tied weights) are written once a name.
        path: Ends in ``.safetensors``; its folder is made if need be.
        metadata: Text for the header.
    """
    seen: set[int] = set()
    ready = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if pointer in seen else tensor  # safetensors refuses shared memory
        seen.add(pointer)
    with atomic_path(path) as temporary:
        save_file(ready, temporary, metadata=dict(metadata or {}))
