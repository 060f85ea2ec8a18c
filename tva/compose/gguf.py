"""Write the edit of a GGUF file as a GGUF file: a copy of the base, in which the moved tensors are written over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tva.checkpoints import Elements, LazyWeights
from tva.checkpoints.atomic import can_write
from tva.checkpoints.formats.gguf import is_gguf
from tva.checkpoints.lazy import Stored
from tva.compose.requantize import Requantized

SUFFIX = ".gguf"


class GgufOutput:
    """A GGUF file being written, whole under its name or not at all; a `tva.compose.engine.Sink`.

    Args:
        path: Ends in ``.gguf``.
        base: The GGUF file that is edited.
        quantizer: Hands the codes on.

    Raises:
        ValueError: The base is not a GGUF file.
    """

    def __init__(self, path: Path, base: LazyWeights, quantizer: Requantized | None) -> None:
        if not is_gguf(base) or quantizer is None or path.suffix != SUFFIX:
            raise ValueError(
                f"A GGUF base, requantize and an output that ends in .gguf go together: the base is {base.path}, the "
                f"output {path}, requantize is {'on' if quantizer else 'off'}. Give all three; or without requantize a "
                f".safetensors file or a folder as the output."
            )
        self.path, self._base = path, base
        self._partial = path.with_name(f".{path.name}.partial")
        self.done: Mapping[str, Any] = {}
        entries = {name: base.entry(name) for name in base} | {
            name: part for entry in quantizer.quantized.values() for name, part in entry.stored.items()
        }
        self._places = {name: entry for name, entry in entries.items() if isinstance(entry, Stored)}
        self.sink, self.note = quantizer.into(self), quantizer.note

    def __enter__(self) -> GgufOutput:
        with can_write(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._base.path, self._partial)
        self._file = os.open(self._partial, os.O_RDWR)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)
        self._partial.unlink(missing_ok=True)

    def write(self, name: str, start: int, chunk: Elements) -> None:
        """Write elements of a tensor in the place that it has in the base."""
        place = self._places[name]
        data, offset = memoryview(chunk.data), place.offset + start * place.spec.itemsize
        while data.nbytes:
            count = os.pwrite(self._file, data, offset)
            data, offset = data[count:], offset + count

    def finish(self, name: str, record: dict[str, Any]) -> None:
        """Do nothing."""

    def commit(self) -> int:
        """Name the file, and return its size."""
        os.fsync(self._file)
        os.replace(self._partial, self.path)
        return self.path.stat().st_size
