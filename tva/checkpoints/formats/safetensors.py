"""Open safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tva.checkpoints.atomic import begins_as_text
from tva.checkpoints.formats.compressed import decoded
from tva.checkpoints.lazy import Entry, Info, LazyWeights, OpenFile, Stored
from tva.checkpoints.spec import SAFETENSORS_DTYPES, Spec
from tva.errors import some


def open_safetensors(path: Path) -> LazyWeights:
    """Open a safetensors file; see `tva.open_weights`."""
    try:
        with safe_open(path, framework="numpy") as checked:  # the library checks every offset in the header
            metadata = checked.metadata()
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no safetensors file, or is damaged or cut off ({error}; it has {path.stat().st_size} bytes"
            f"{begins_as_text(path)}). Write it again from its source."
        ) from error
    file = OpenFile(path)
    length = int.from_bytes(file.read(0, 8), "little")
    header = json.loads(file.read(8, length))
    header.pop("__metadata__", None)
    unknown = {fields["dtype"] for fields in header.values()} - SAFETENSORS_DTYPES.keys()
    if unknown:
        raise ValueError(
            f"{path} holds tensors of dtype {some(sorted(unknown))}, which no torch dtype here stands for."
        )
    entries: dict[str, Entry] = {
        name: Stored(
            file, 8 + length + fields["data_offsets"][0], Spec(SAFETENSORS_DTYPES[fields["dtype"]], fields["shape"])
        )
        for name, fields in header.items()
    }
    if metadata and "tva.encoded" in metadata:
        info = Info(path, f"task vector file, compressed: {metadata.get('tva.encoding')}")
        return LazyWeights(info, decoded(path, entries, metadata["tva.encoded"]), metadata)
    # Tied weights: the library's save_model keeps one tensor, and the other names for it in the metadata.
    tied = {name: kept for name, kept in (metadata or {}).items() if name not in entries and kept in entries}
    entries |= {name: entries[kept] for name, kept in tied.items()}
    return LazyWeights(Info(path, "safetensors file"), entries, metadata)
