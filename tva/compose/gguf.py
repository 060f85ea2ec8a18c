"""Write the edit of a GGUF file as a GGUF file: a copy of the base, in which the moved tensors are written over."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tva.checkpoints import Elements, LazyWeights
from tva.checkpoints.atomic import atomic_path, can_write
from tva.checkpoints.formats.gguf import is_gguf
from tva.checkpoints.lazy import Stored
from tva.compose.requantize import Requantized

SUFFIX = ".gguf"


class GgufOutput:
    """A GGUF file being written; a `tva.compose.engine.Sink`.

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
        self.done: Mapping[str, Any] = {}
        entries = {name: base.entry(name) for name in base} | {
            name: part for entry in quantizer.quantized.values() for name, part in entry.stored.items()
        }
        self._places = {name: entry for name, entry in entries.items() if isinstance(entry, Stored)}
        self.sink, self.note = quantizer.into(self), quantizer.note

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Open the file under a temporary name; it gets its own where nothing is raised."""
        with atomic_path(self.path) as temporary:
            with can_write(self.path):
                shutil.copyfile(self._base.path, temporary)
            self._file = os.open(temporary, os.O_RDWR)
            try:
                yield
            finally:
                os.close(self._file)

    def write(self, name: str, start: int, chunk: Elements) -> None:
        """Write elements of a tensor in the place that it has in the base."""
        place = self._places[name]
        data, offset = memoryview(chunk.data), place.offset + start * place.spec.itemsize
        while data.nbytes:
            count = os.pwrite(self._file, data, offset)
            data, offset = data[count:], offset + count

    def finish(self, name: str, record: dict[str, Any]) -> None:
        """Do nothing."""
