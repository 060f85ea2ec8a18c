"""Safetensors files, task vector files among them.

Source: the format is described at https://github.com/huggingface/safetensors#format
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tva.checkpoints.compressed import decoded
from tva.checkpoints.fingerprint import check_header
from tva.checkpoints.foreign import content_of, read_start
from tva.checkpoints.lazy import Entry, Info, LazyWeights, OpenFile, Stored, Which
from tva.checkpoints.spec import SAFETENSORS_DTYPES, Spec
from tva.errors import some

ENDINGS = (".safetensors",)
LARGEST_HEADER = 100_000_000  # bytes, of the safetensors library


def matches(path: Path) -> bool:
    """Return whether a file begins as a safetensors file does: the header's length, and its first bracket."""
    if path.is_dir():
        return False
    start = read_start(path, 9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= LARGEST_HEADER


def open(path: Path, which: Which = "checkpoint", *, as_stored: bool = False) -> LazyWeights:
    """Open a safetensors file; see `tva.open_weights`.

    Args:
        path: The file.
        which: Counts for other formats only.
        as_stored: Give the tensors as they are in the file: parts of encoded ones, and no aliases.

    Raises:
        ValueError: It is damaged, by its form or by the fingerprint of its header.
    """
    file = OpenFile(path)
    try:
        with safe_open(path, framework="numpy") as checked:  # the library checks every offset in the header
            metadata = checked.metadata()
    except (SafetensorError, OSError) as error:
        content = content_of(path)
        found = f"it is {content}" if content else f"it has {file.size} bytes"
        raise ValueError(
            f"{path} is not a safetensors file, or is damaged or cut off ({error}; {found}). Write it again from its "
            f"source."
        ) from error
    check_header(path, metadata or {})
    length = int.from_bytes(file.read(0, 8), "little")
    header = json.loads(file.read(8, length))
    header.pop("__metadata__", None)
    unknown = {fields["dtype"] for fields in header.values()} - SAFETENSORS_DTYPES.keys()
    if unknown:
        raise ValueError(
            f"{path} holds tensors of dtype {some(sorted(unknown))}, which tva cannot read. Convert them to one of "
            f"{', '.join(SAFETENSORS_DTYPES)}."
        )
    entries: dict[str, Entry] = {
        name: Stored(
            file, 8 + length + fields["data_offsets"][0], Spec(SAFETENSORS_DTYPES[fields["dtype"]], fields["shape"])
        )
        for name, fields in header.items()
    }
    if as_stored:
        return LazyWeights(Info(path, "safetensors file"), entries, metadata)
    if metadata and "tva.encoded" in metadata:
        info = Info(path, f"task vector file, compressed: {metadata.get('tva.encoding')}")
        return LazyWeights(info, decoded(path, entries, metadata["tva.encoded"]), metadata)
    # Tied weights: the library's save_model keeps one tensor, and the other names for it in the metadata.
    others = {key: text for key, text in (metadata or {}).items() if key != "format" and not key.startswith("tva.")}
    tied = {name: kept for name, kept in others.items() if name not in entries and kept in entries}
    entries |= {name: entries[kept] for name, kept in tied.items()}
    return LazyWeights(Info(path, "safetensors file"), entries, metadata)
