"""PyTorch files: state dicts (``.pt``, ``.pth``, ``.bin``) and Lightning checkpoints (``.ckpt``)."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tva._torch import Tensor, torch
from tva.checkpoints.foreign import content_of, read_start, shown
from tva.checkpoints.inert_pickle import Inert, check_pickle, load_archive
from tva.checkpoints.lazy import Entry, Info, InMemory, LazyWeights, OpenFile, Which
from tva.errors import some

ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
ZIP, PICKLE = b"PK\x03\x04", b"\x80"


def matches(path: Path) -> bool:
    """Return whether a file begins as ``torch.save`` writes it: a zip archive, or before torch 1.6 a pickle."""
    if path.is_dir():
        return False
    start = read_start(path, 9)
    pickled = start[:1] == PICKLE and 2 <= start[1] <= pickle.HIGHEST_PROTOCOL if len(start) > 1 else False
    return (start.startswith(ZIP) or pickled) and start[8:] != b"{"  # which is the first byte of a safetensors header


def open(path: Path, which: Which = "checkpoint") -> LazyWeights:
    """Open a PyTorch file; see `tva.open_weights`."""
    content, inert = load_torch(path)
    averaged = isinstance(content, Mapping) and "averaging_state" in content and "current_model_state" in content
    part, which_info = _choose_averaged(path, content, averaged, which)
    notes = [f"classes not loaded: {some(sorted(inert))}"] if inert else []
    if part is None:
        part = _only_part(path, content)
        if part not in ("", "state_dict"):
            notes.append(f"the weights are those under {part!r}")
        others = [key for key, value in content.items() if key != part and state_entries(value)] if part else []
        if others:
            notes.append(f"took the weights under {part!r}, and left those under {some(others)}")
    found = state_entries(content[part] if part else content)
    if not found:
        raise ValueError(f"{path} holds no tensors under {part!r}, but {_describe(content[part])}.")
    entries, left = found
    if left:
        notes.append(f"left out as they are not tensors: {some(left)}")
    lightning = isinstance(content, Mapping) and "pytorch-lightning_version" in content
    options = content.get("hyper_parameters") if lightning else None
    tangent = isinstance(options, Mapping) and options.get("tangent") is True  # as tva.models have it
    header = content.get("tva") if lightning else None  # as `tva edit` writes it
    known = {k: v for k, v in header.items() if isinstance(v, str)} if isinstance(header, Mapping) else {}
    return LazyWeights(
        Info(path, "Lightning checkpoint" if lightning else "PyTorch file", which_info, tuple(notes)),
        entries,
        {**known, **({"tva.kind": "tangent"} if tangent else {})},
    )


def load_torch(path: Path) -> tuple[Any, set[str]]:
    """Read a PyTorch file without executing it.

    Returns:
        What was saved, with an `Entry` for each tensor of state dicts, and the names of the classes not loaded.

    Raises:
        ValueError: It is not a PyTorch file, is damaged, or is of the format before torch 1.6 and holds other objects.
    """
    file = OpenFile(path)
    start = file.read(0, min(4, file.size))
    if start == ZIP:
        try:
            return load_archive(file)
        except Exception as error:  # a stranger's bytes are parsed: they may provoke any
            raise ValueError(
                f"{path} is not a PyTorch checkpoint, or is damaged ({_reason(error)}; it has {file.size} bytes). "
                f"Write it again from its source."
            ) from error
    if not start.startswith(PICKLE):
        content = content_of(path)
        found = f"it is {content}" if content else f"it has {file.size} bytes"
        raise ValueError(f"{path} is not a PyTorch checkpoint ({found}). Give the checkpoint itself.")
    try:
        return _load_old(path, file), set()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it is not a PyTorch checkpoint, or one of the format before torch 1.6 that holds "
            f"pickled objects other than tensors, which could run code when loaded ({_reason(error)}). "
            f"{conversion(path)}"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{path} is not a PyTorch checkpoint, or is damaged ({_reason(error)}). Write it again from its source."
        ) from error


def _load_old(path: Path, file: OpenFile) -> Any:
    """Read the format before torch 1.6, which mixes pickles and bytes, whole by torch."""
    data = io.BytesIO(file.read(0, file.size))
    for _ in range(4):  # a magic number, the version, the machine, and what was saved
        check_pickle(data)
    del data
    with path.open("rb") as opened:  # by the path torch goes by its ending
        return _in_memory(torch.load(opened, map_location="cpu", weights_only=True))


def _in_memory(content: Any) -> Any:
    if isinstance(content, Tensor):
        plain = content.layout == torch.strided and content.device.type == "cpu" and not content.is_quantized
        return InMemory(content) if plain else content
    if isinstance(content, Mapping):
        return {key: _in_memory(value) for key, value in content.items()}
    return content


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__


def conversion(path: Path, key: str = "") -> str:
    """Return how a pickled module becomes a state dict."""
    part = f"[{key!r}]" if key else ""
    return (
        f"If you trust the file, convert it where its classes can be imported:\n"
        f"    import torch\n"
        f'    model = torch.load("{path}", map_location="cpu", weights_only=False){part}\n'
        f'    torch.save(model.state_dict(), "{path.with_name(path.stem + "-state-dict.pt")}")'
    )


def state_entries(state: Any) -> tuple[dict[str, Entry], list[str]] | None:
    """Return a state dict's tensors.

    Returns:
        The tensors and the names of extra state (``…_extra_state``, not a tensor), or None if it is not a state dict.
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
        raise ValueError(
            f"{path} does not hold both raw and averaged weights, so that there are no {which} ones to choose: as "
            f"Lightning's WeightAveraging callback writes them, they are under 'current_model_state' and 'state_dict' "
            f"with 'averaging_state' beside them, and it holds {_describe(content)}. Leave out which to read what is "
            f"there."
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
        f"and {_what_is_wrong(content)}"
    )


def _what_is_wrong(content: Any) -> str:
    """Name the entries that keep a mapping with tensors from being a state dict, with what to do."""
    part = content.get("state_dict", content) if isinstance(content, Mapping) else content
    values = list(part.values()) if isinstance(part, Mapping) else []
    in_place = bool(values) and all(isinstance(value, (Entry, Inert, Tensor)) for value in values)  # of tensors
    if not in_place and not any(isinstance(value, Entry) for value in values):
        return f"it holds {_describe(content)}. Give a file of weights."
    where = "it" if part is content else "its 'state_dict'"
    wrong = [
        f"{shown(name)} is {_kind(value)}" if isinstance(name, str) else f"the name {shown(name)} is not text"
        for name, value in part.items()
        if not isinstance(name, str) or (not isinstance(value, Entry) and name.rpartition(".")[2] != "_extra_state")
    ]
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return (
        f"in {where}, of {len(part)} entries, {', '.join(wrong[:3])}{more}. Save it again with plain tensors only, "
        f"and what else it holds beside them."
    )


_TENSORS = {
    "sparse": "a sparse tensor",
    "meta_tensor": "a tensor without data (on the meta device)",
    "DTensor": "a DTensor, one rank's part of a distributed tensor: save its full_tensor()",
    "qtensor": "a quantized tensor: dequantize() it",
    "quantized": "a quantized tensor: dequantize() it",
    "wrapper_subclass": "a tensor of a class of its own",
}


def _kind(value: Any) -> str:
    if isinstance(value, Inert):
        known = [text for part, text in _TENSORS.items() if part in value.name]
        return known[0] if known else repr(value)
    if isinstance(value, Tensor):
        return f"a tensor that is not plain ({value.layout}, on {value.device})"
    if isinstance(value, Mapping):
        return "a mapping"
    return "None" if value is None else shown(value)


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return (
            ", ".join(shown(key) for key in list(content)[:3])
            + (f" and {len(content) - 3} more" if len(content) > 3 else "")
            if content
            else "nothing"
        )
    return repr(content) if isinstance(content, Inert) else f"a {type(content).__name__}"
