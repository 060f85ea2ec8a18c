"""PyTorch files: state dicts (``.pt``, ``.pth``, ``.bin``) and Lightning checkpoints (``.ckpt``)."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tva._torch import Tensor, torch
from tva.checkpoints.atomic import begins_as_text
from tva.checkpoints.formats.inert_pickle import DAMAGED, Inert, load_archive
from tva.checkpoints.lazy import Entry, Info, InMemory, LazyWeights, OpenFile
from tva.errors import some

Which = Literal["checkpoint", "raw", "averaged"]


def open_torch(path: Path, which: Which = "checkpoint") -> LazyWeights:
    """Open a PyTorch file; see `tva.open_weights`."""
    content, inert = load_torch(path)
    averaged = isinstance(content, Mapping) and "averaging_state" in content and "current_model_state" in content
    part, which_info = _choose_averaged(path, content, averaged, which)
    notes = [f"classes not loaded: {some(sorted(inert))}"] if inert else []
    if part is None:
        part = _only_part(path, content)
        if part not in ("", "state_dict"):
            notes.append(f"the weights under {part!r} were taken")
    entries = state_entries(content[part] if part else content)
    if not entries:
        raise ValueError(f"{path} holds no tensors under {part!r}, but {_describe(content[part])}.")
    entries, left = entries
    if left:
        notes.append(f"left out as they are no tensors: {some(left)}")
    lightning = isinstance(content, Mapping) and "pytorch-lightning_version" in content
    options = content.get("hyper_parameters") if lightning else None
    tangent = isinstance(options, Mapping) and options.get("tangent") is True  # as tva.models have it
    return LazyWeights(
        Info(path, "Lightning checkpoint" if lightning else "PyTorch file", which_info, tuple(notes)),
        entries,
        {"tva.kind": "tangent"} if tangent else None,
    )


def load_torch(path: Path) -> tuple[Any, set[str]]:
    """Read a PyTorch file without executing it.

    Returns:
        What was saved, with an `Entry` for each tensor of state dicts, and the names of the classes not loaded.

    Raises:
        ValueError: It is no PyTorch file, is damaged, or is of the format before torch 1.6 and holds other objects.
    """
    file = OpenFile(path)
    if file.size >= 4 and file.read(0, 4) == b"PK\x03\x04":
        try:
            return load_archive(file)
        except DAMAGED as error:
            raise ValueError(
                f"{path} is no PyTorch checkpoint, or is damaged ({_reason(error)}; it has {file.size} bytes). Write "
                f"it again from its source."
            ) from error
    if as_text := begins_as_text(path):
        raise ValueError(f"{path} is no PyTorch checkpoint (it has {file.size} bytes{as_text}). Take the file itself.")
    try:  # the format before torch 1.6 mixes pickles and bytes; torch reads it whole
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is no PyTorch checkpoint, or one of the format before torch 1.6 that holds pickled "
            f"objects other than tensors, which could run code when loaded ({_reason(error)}). {conversion(path)}"
        ) from error
    except DAMAGED as error:
        raise ValueError(f"{path} is no PyTorch checkpoint, or is damaged ({_reason(error)}).") from error
    return _in_memory(content), set()


def _in_memory(content: Any) -> Any:
    if isinstance(content, Tensor):
        return InMemory(content)
    if isinstance(content, Mapping):
        return {key: _in_memory(value) for key, value in content.items()}
    return content


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def conversion(path: Path, key: str = "") -> str:
    """Say how a pickled module becomes a state dict."""
    part = f"[{key!r}]" if key else ""
    return (
        f"If you trust the file, convert it where its classes can be imported:\n"
        f"    import torch\n"
        f'    model = torch.load("{path}", map_location="cpu", weights_only=False){part}\n'
        f'    torch.save(model.state_dict(), "{path.with_name(path.stem + "-state-dict.pt")}")'
    )


def state_entries(state: Any) -> tuple[dict[str, Entry], list[str]] | None:
    """Take a state dict's tensors.

    Returns:
        The tensors and the names of extra state (``…_extra_state``, which is no tensor), or None: it is no state dict.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        return None
    entries = {name: value for name, value in state.items() if isinstance(value, Entry)}
    left = [name for name in state if name not in entries]
    if not entries or not all(name.rpartition(".")[2] == "_extra_state" for name in left):
        return None
    return entries, left


def _choose_averaged(path: Path, content: Any, averaged: bool, which: Which) -> tuple[str | None, str]:
    """Choose by Lightning's WeightAveraging keys; None leaves the choice to what else is there."""
    if averaged:  # Lightning loads state_dict, where the callback has put the average
        return ("current_model_state", "raw") if which == "raw" else ("state_dict", "averaged")
    if which != "checkpoint":
        keys = some(content) if isinstance(content, Mapping) else _describe(content)
        raise ValueError(
            f"{path} does not hold both raw and averaged weights, so the {which} ones cannot be told: they are under "
            f"'current_model_state' and 'state_dict' with 'averaging_state' beside them, as Lightning's "
            f"WeightAveraging callback writes them, and it holds {keys}. Leave out which to read what is there."
        )
    return None, "as stored"


def _only_part(path: Path, content: Any) -> str:
    """Find the state dict: the content itself, its ``state_dict``, or the one entry that is one."""
    if isinstance(content, Inert):
        raise ValueError(
            f"{path} is refused: it holds {content!r}, not weights, and making objects could run code when loaded. "
            f"{conversion(path)}"
        )
    if state_entries(content):
        return ""
    if isinstance(content, Mapping):
        if state_entries(content.get("state_dict")):
            return "state_dict"
        parts = [key for key, value in content.items() if isinstance(key, str) and state_entries(value)]
        if len(parts) == 1 and "state_dict" not in content:
            return parts[0]
        if len(parts) > 1:
            raise ValueError(
                f"{path} holds {len(parts)} state dicts, {some(parts)}, and none of them is 'state_dict'. Save the one "
                f"you mean to a file of its own."
            )
        for key in ("state_dict", "model", "module", "net"):
            if isinstance(content.get(key), Inert):
                raise ValueError(
                    f"{path} is refused: its {key!r} is {content[key]!r}, and making objects could run code when "
                    f"loaded. {conversion(path, key)}"
                )
    raise ValueError(
        f"{path} holds no state dict: a mapping of names to tensors was expected, alone or under 'state_dict', "
        f"and it holds {_describe(content)}."
    )


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return some(content) or "nothing"
    return repr(content) if isinstance(content, Inert) else f"a {type(content).__name__}"
