"""Decoded examples that are kept, as bytes in a memory-mapped file that all workers share, within a budget."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class SampleCache:
    """The first rows of a table of examples of one shape, each written when first decoded.

    A file in the temporary folder (``TMPDIR``), gone with this object; the system may drop its pages from memory and
    read them again. Copies in worker processes, forked or spawned, read and write the same file. Its space is taken at
    once, so that a full disk is an error here and not in the middle of training.

    Args:
        num_rows: Examples.
        example: One of them, which gives shape and dtype.
        max_bytes: What the file may take; rows beyond are decoded each time.

    Raises:
        ValueError: The temporary folder has no room.
    """

    def __init__(self, num_rows: int, example: np.ndarray, max_bytes: int) -> None:
        self.shape, self.dtype = example.shape, example.dtype
        self.num_rows = min(num_rows, max_bytes // (max(1, example.nbytes) + 1))  # and a byte: whether it is there
        self.num_bytes = self.num_rows * (example.nbytes + 1)
        folder = tempfile.mkdtemp(prefix="tva-examples-")
        weakref.finalize(self, _remove, folder, os.getpid())
        self._path = Path(folder) / "examples"
        with open(self._path, "wb") as file:
            if self.num_bytes:
                self._reserve(file.fileno())
        self._open()

    def _reserve(self, descriptor: int) -> None:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, self.num_bytes)
            else:
                os.truncate(descriptor, self.num_bytes)
        except OSError as error:
            free = shutil.disk_usage(self._path.parent).free
            raise ValueError(
                f"Decoded examples were to take {self.num_bytes / 2**20:.0f} MiB in {self._path.parent.parent}, where "
                f"{free / 2**20:.0f} MiB are free ({error.strerror}). Lower the task's cache, or set TMPDIR to a "
                f"folder with room."
            ) from error

    def _open(self) -> None:
        size = self.num_bytes - self.num_rows
        if self.num_rows:
            whole = np.memmap(self._path, np.uint8, "r+", shape=(self.num_bytes,))
        else:
            whole = np.empty(0, np.uint8)
        self._rows = whole[:size].view(self.dtype).reshape(self.num_rows, *self.shape)
        self._there = whole[size:]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_rows", "_there")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def take(self, rows: Sequence[int], decode: Callable[[int], np.ndarray]) -> np.ndarray:
        """Return examples, decoding and keeping those that are not there.

        Args:
            rows: Their numbers, from 0.
            decode: Makes the example of a number.

        Returns:
            A copy, shape (rows, *shape).

        Raises:
            ValueError: An example has another shape than the first.
        """
        taken = np.empty((len(rows), *self.shape), self.dtype)
        for position, row in enumerate(rows):
            if row < self.num_rows and self._there[row]:
                taken[position] = self._rows[row]
                continue
            decoded = decode(row)
            if decoded.shape != self.shape:
                raise ValueError(
                    f"Examples of one task must have one shape after the model's image_transform; the first has "
                    f"{self.shape}, number {row} has {decoded.shape}. Resize and crop in the transform."
                )
            taken[position] = decoded
            if row < self.num_rows:
                self._rows[row] = decoded
                self._there[row] = 1  # after its row: another worker reads it in a later epoch, if at all
        return taken


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker may outlive its copy of the cache
        shutil.rmtree(folder, ignore_errors=True)


class Decoder:
    """A model's image transform in two halves: to what is kept, and from there to a batch of inputs.

    A transform that ends in ToTensor and Normalize, as those of open_clip and timm do, is cut before these, so that a
    byte is kept for each value, and a batch is converted at once. Of any other the whole result is kept.

    Args:
        transform: From a PIL image to a tensor.
    """

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform
        steps = list(getattr(transform, "transforms", []))
        kinds = [type(step).__name__ for step in steps]
        cut = next((at for at, kind in enumerate(kinds) if kind in ("ToTensor", "MaybeToTensor")), None)
        self._head, self._tail = None, []
        if cut is not None and set(kinds[cut + 1 :]) <= {"Normalize"}:
            self._head, self._tail = steps[:cut], steps[cut + 1 :]

    def decode(self, image: Any) -> np.ndarray:
        """Return what is kept of a PIL image: (height, width, 3) bytes where the transform could be cut."""
        if self._head is None:
            return np.asarray(self.transform(image))
        for step in self._head:
            image = step(image)
        return np.asarray(image)

    def finish(self, kept: np.ndarray) -> Tensor:
        """Turn what is kept, shape (batch, ...), into inputs, bit for bit those of the whole transform."""
        images = torch.from_numpy(kept)
        if self._head is None:
            return images
        images = images.permute(0, 3, 1, 2).contiguous().to(torch.get_default_dtype()).div_(255)
        for step in self._tail:
            images = step(images)  # (batch, 3, height, width)
        return images
