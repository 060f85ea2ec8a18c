"""Write a safetensors file whose header is known last."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tva._torch import Tensor, torch
from tva.checkpoints.atomic import make_room
from tva.checkpoints.spec import NAMES_OF_DTYPES, Spec, encode_header

RESERVED = 2**26  # bytes of disk that are taken at once
AHEAD = 2  # chunks that may wait to be written while others are computed


class LateHeaderFile:
    """A safetensors file whose tensors are written before its header is known; room for the header is left in front.

    A thread writes while the next chunks are computed; what goes wrong there is raised by a later `write`, or `close`.

    Args:
        path: Where to write.
        specs: All tensors that may be written.
        metadata: At least as long as what `close` will be given.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        total = 8 * sum(spec.numel() for spec in specs.values())
        longest = max(NAMES_OF_DTYPES, key=lambda dtype: len(NAMES_OF_DTYPES[dtype]))
        largest = {name: Spec(longest, spec.sizes) for name, spec in specs.items()}
        header = encode_header(largest, metadata, offsets=dict.fromkeys(specs, (total, total)))
        self._room = len(header) - 8 + 256
        self._file = path.open("wb", buffering=0)
        self._kept: dict[str, Spec] = {}
        self._offsets: dict[str, tuple[int, int]] = {}
        self._end = self._start = self._reserved = 0
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def begin(self) -> None:
        """Start a tensor."""
        self._start = self._end

    def write(self, chunk: Tensor) -> None:
        """Write the next elements of the tensor; they may not change until `AHEAD` more chunks were."""
        data = memoryview(chunk.contiguous().reshape(-1).view(torch.uint8).numpy())
        self._waiting.append(self._thread.submit(self._store, data, 8 + self._room + self._end))
        self._end += data.nbytes
        self._wait(AHEAD)

    def _wait(self, left: int) -> None:
        while len(self._waiting) > left:
            self._waiting.popleft().result()

    def _store(self, data: memoryview, offset: int) -> None:
        if offset + data.nbytes > self._reserved:
            self._reserved = offset + max(data.nbytes, RESERVED)
            with contextlib.suppress(OSError):  # a full disk fails when it is written to, if at all
                make_room(self._file.fileno(), self._reserved)
        self._file.seek(offset)
        while data.nbytes:
            data = data[self._file.write(data) :]

    def skip(self, num_bytes: int) -> None:
        """Write zeros, which take no time and, on most file systems, no space."""
        self._end += num_bytes

    def keep(self, name: str, spec: Spec) -> None:
        """End the tensor."""
        self._kept[name], self._offsets[name] = spec, (self._start, self._end)

    def drop(self) -> None:
        """Forget the tensor."""
        self._end = self._start

    def close(self, metadata: Mapping[str, str] | None = None) -> None:
        """Write the header, if the file is to be used, and close."""
        try:
            if metadata is not None:
                self._wait(0)
                header = encode_header(self._kept, metadata, self._room, self._offsets)
                self._store(memoryview(header), 0)  # first: where nothing has been written yet, it reserves room
                self._file.truncate(8 + self._room + self._end)  # a skipped end has not been written
        finally:
            self._thread.shutdown(cancel_futures=True)
            self._file.close()
