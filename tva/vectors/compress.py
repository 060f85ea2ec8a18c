"""Compress a task vector file: by an encoding's name, to an error, or to a size; one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tva._torch import torch
from tva.checkpoints import (
    Fingerprint,
    HashedWeights,
    LazyWeights,
    Spec,
    TensorHash,
    atomic_path,
    check_own,
    open_weights,
    protect,
)
from tva.checkpoints.fingerprint import sealed
from tva.checkpoints.shards import Shard
from tva.console import progress
from tva.errors import some
from tva.sizes import parse_bytes
from tva.vectors.blockwise import block_sizes, check_whole, encoders
from tva.vectors.content import check_content
from tva.vectors.encoder import Encoder
from tva.vectors.encoding import PARAMETERS, Encoding, check_names, encoded_header, relative_error
from tva.vectors.header import read_origin


@dataclass
class Share:
    """The tensors of one encoding.

    Attributes:
        tensors: How many.
        elements: Their elements.
        num_bytes: Their size as they are stored.
        squared_error: Of what is read back.
        squared_norm: Of what was to be stored.
    """

    tensors: int = 0
    elements: int = 0
    num_bytes: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0

    @property
    def error(self) -> float:
        """Relative error."""
        return relative_error(self.squared_error, self.squared_norm)

    def add(self, other: Share) -> None:
        """Count another's in."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class CompressReport:
    """What `compress` wrote.

    Attributes:
        output: The file.
        shares: What is stored how, by encoding.
        largest_error: The largest relative error of a tensor, and its name.
        float32_bytes: Size of the tensors in float32.
        num_bytes: Size of the file, with its header.
        seconds: Wall time.
        whole: All tensors.
        error: Their relative error.
    """

    output: Path
    shares: dict[str, Share]
    largest_error: tuple[float, str]
    float32_bytes: int
    num_bytes: int
    seconds: float
    whole: Share
    error: float


def compress(
    vector: str | os.PathLike[str],
    output: str | os.PathLike[str],
    encoding: str | None = None,
    max_error: float | None = None,
    max_size: str | None = None,
    max_memory: str | None = None,
) -> CompressReport:
    r"""Write a task vector in fewer bytes, by one of the last three options; every command reads the file.

    The error is :math:`\|\hat\tau - \tau\| / \|\tau\|`, measured on what is read back. A budget chooses among exact,
    bf16, fp16, int8, sign, top_k and low_rank of several densities and ranks.

    Args:
        vector: A task vector file that is not compressed.
        output: The file to write; its name ends in ``.safetensors``, preferably in ``.tv.safetensors``.
        encoding: ``bf16``, ``fp16``, ``int8``, ``sign``, ``top_k(density=0.1)`` or ``low_rank(rank=16)``. Tensors with
            fewer than two dimensions, and those that would not be smaller than in bf16, are stored in bf16.
        max_error: Maximum relative error of each tensor, and so of the whole vector, such as 0.01. Each tensor gets the
            smallest encoding within it.
        max_size: Maximum size of the file, as a percentage of the tensors' size in float32 (``5%``) or in bytes
            (``20MB``). Starting from the smallest encodings, the step that lowers the squared error most per byte is
            taken as long as it fits; if all tensors fit exactly, nothing is lost.
        max_memory: Limit on the anonymous memory of this process, such as ``512MiB``; pages of mapped files do not
            count. exact, bf16, fp16, int8 and sign are then encoded by blocks of rows. The other encodings need a whole
            tensor in memory; if it does not fit, it is an error.

    Returns:
        What was written.

    Raises:
        ValueError: No task vector, or one that is compressed or not finite; an option cannot be understood, or no
            encoding is small enough.
        OSError: A file cannot be read, or there is no room.
    """
    started = time.monotonic()
    vector, output = os.fspath(vector), os.fspath(output)
    asked = {"encoding": encoding, "max_error": max_error, "max_size": max_size}
    given = {key: value for key, value in asked.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"Give one of encoding, max_error and max_size; found {some(given) or 'none'}.")
    if not output.endswith(".safetensors"):
        raise ValueError(f"output must end in .safetensors, best in .tv.safetensors; found {output!r}.")
    weights = HashedWeights(open_weights(vector))
    read_origin(weights)
    if "tva.encoded" in weights.metadata:
        before = weights.metadata.get("tva.encoding", "unknown")  # a stranger's header may lack it
        raise ValueError(
            f"{vector} is compressed already ({before}): another encoding would add its "
            f"error to that one, and not be measured against the vector itself. Compress the vector that it was made "
            f"from; if that is gone, TaskVector.load({vector!r}).save(DENSE) writes one that can be."
        )
    protect([output], {"vector": vector})
    check_own(output, "vector")
    float32_bytes = 4 * sum(weights.spec(name).shape.numel() for name in weights)
    if encoding is not None:
        wanted = Encoding.parse(encoding)
        text, chosen = str(wanted), suited(weights, wanted)
    elif max_error is not None:
        if not 0 <= max_error < 1:
            raise ValueError(f"max_error is a relative error, from 0 (exact) to below 1; found {max_error}.")
        check_whole(weights, max_memory, "max_error")
        text = f"max_error={max_error:g}"
        chosen = {name: encoder.cheapest(max_error) for name, encoder in _encoders(weights, "measuring")}
    else:
        text = f"max_size={max_size}"
        check_whole(weights, max_memory, "max_size")
        chosen = _fit(weights, parse_size(max_size, float32_bytes), float32_bytes, text)
    shares, largest, size = write_encoded(weights, Path(output), text, chosen, "compressing", max_memory)
    whole = Share()
    for share in shares.values():
        whole.add(share)
    return CompressReport(
        Path(output), shares, largest, float32_bytes, size, time.monotonic() - started, whole, whole.error
    )


def suited(weights: LazyWeights, encoding: Encoding) -> dict[str, Encoding]:
    """Choose one encoding, and bf16 for what it is not meant for."""
    return {name: encoding.suited(weights.spec(name)) for name in weights}


def _encoders(weights: LazyWeights, doing: str | None) -> Iterator[tuple[str, Encoder]]:
    """Read tensor by tensor.

    Raises:
        ValueError: One is not finite.
    """
    for name in weights if doing is None else progress(list(weights), doing):
        for encoder in encoders(weights, name, max(1, weights.spec(name).numel())):
            yield name, encoder


def write_encoded(
    weights: LazyWeights,
    output: Path,
    text: str,
    chosen: Mapping[str, Encoding],
    doing: str | None = None,
    max_memory: str | None = None,
) -> tuple[dict[str, Share], tuple[float, str], int]:
    """Encode and write, whole or not at all.

    Args:
        weights: The opened vector.
        output: Where.
        text: What was asked for.
        chosen: The encoding of each tensor.
        doing: What a progress bar says; without it there is none.
        max_memory: See `compress`.

    Returns:
        The shares by encoding, the largest error with its tensor, and the file's size.
    """
    specs, sizes = _layout(weights, chosen), block_sizes(weights, chosen, max_memory)
    errors, buffers = dict.fromkeys(weights, 0.0), read_origin(weights)[1]
    squares: list[float] = []  # of what is read back, without buffers
    shares: dict[str, Share] = {}

    def header() -> dict[str, str]:
        coded = {name: (chosen[name], weights.spec(name).shape, errors[name]) for name in weights}
        total = [sum(getattr(share, key) for share in shares.values()) for key in ("squared_error", "squared_norm")]
        own = encoded_header(text, coded, relative_error(*total), math.sqrt(math.fsum(squares)))
        content = Fingerprint.from_tensors(digests)
        return {"format": "pt", **sealed({**weights.metadata, **own}, content.digest)}

    digests: dict[str, str] = {}
    with atomic_path(output) as temporary, temporary.open("r+b") as file:
        shard = Shard(temporary, specs)
        file.write(shard.header(header()))
        for name in weights if doing is None else progress(list(weights), doing):
            how, spec = chosen[name], weights.spec(name)
            hashes = {part: TensorHash(specs[part]) for part in how.specs(name, spec)}
            places, blocks = dict(shard.offsets), []
            for encoder in encoders(weights, name, sizes[name]):
                coded = encoder.encode(how)
                encoder.check(coded)
                for part, tensor in coded.tensors.items():
                    data = tensor.reshape(-1).view(torch.uint8).numpy()
                    file.seek(places[part])
                    places[part] += file.write(data)
                    hashes[part].update(data)
                blocks.append((coded.squared_error, coded.squared_norm, coded.squared_read))
                del encoder, coded  # before the next block is read
            error, norm, read = (math.fsum(each) for each in zip(*blocks, strict=True))
            errors[name] = relative_error(error, norm)
            digests |= {part: each.hexdigest() for part, each in hashes.items()}
            squares += [] if name in buffers else [read]
            shares.setdefault(str(how), Share()).add(Share(1, spec.numel(), how.num_bytes(spec), error, norm))
        if isinstance(weights, HashedWeights):
            check_content(weights)
        file.seek(0)
        file.write(shard.header(header()))
    largest = max(((error, name) for name, error in errors.items()), default=(0.0, ""))
    return shares, largest, output.stat().st_size


def _layout(weights: LazyWeights, chosen: Mapping[str, Encoding]) -> dict[str, Spec]:
    """Return every tensor of the file: wide elements first, so that each is aligned."""
    parts = [item for name in weights for item in chosen[name].specs(name, weights.spec(name)).items()]
    check_names([name for name, _ in parts])
    return dict(sorted(parts, key=lambda item: -item[1].dtype.itemsize))


# --- to a size

Option = tuple[int, float, Encoding]  # bytes in the file, squared error of what is read back, how


def parse_size(text: str, float32_bytes: int) -> int:
    """Read a part of a size, or a size.

    Example:
        >>> parse_size("5%", 1000), parse_size("2 kB", 1000)
        (50, 2000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", str(text))
    try:
        size = int(float(found[1]) / 100 * float32_bytes) if found else parse_bytes(str(text), "max_size")
    except ValueError as error:
        raise ValueError(f"max_size must read like '5%' of the float32 size, or '20MB'; found {text!r}.") from error
    return size


def _fit(weights: LazyWeights, budget: int, float32_bytes: int, text: str) -> dict[str, Encoding]:
    """Choose the encodings of smallest error whose file is not larger than a budget, greedily.

    Where all tensors fit as they are, each gets the smallest encoding without any error. Else every tensor begins with
    its smallest encoding, and of the steps along the lower convex hulls of (bytes, squared error) of all tensors, the
    one that lowers the squared error most for each byte is made, as long as it fits.
    """
    exact = dict.fromkeys(weights, Encoding("exact"))
    if _file_size(weights, exact, text) <= budget:
        return {name: encoder.cheapest(0.0) for name, encoder in _encoders(weights, "measuring")}
    hulls = {name: _options(name, encoder, 4 * float32_bytes) for name, encoder in _encoders(weights, "measuring")}
    fixed = {key: value for key, value in weights.metadata.items() if not key.startswith("tva.encod")}
    size = (
        len(json.dumps({"__metadata__": {"format": "pt", **sealed(fixed, "0" * 32)}})) + 512
    )  # the rest of the header, at most
    size += sum(hull[0][0] for hull in hulls.values())
    if size > budget:
        raise ValueError(
            f"max_size is {budget:,} bytes ({_percent(budget, float32_bytes)} of the float32 size), but the smallest "
            f"file that can be written takes {size:,} ({_percent(size, float32_bytes)}), its header included."
        )
    steps = []  # convexity orders the steps of one tensor
    for name, hull in hulls.items():
        for position, (before, after) in enumerate(pairwise(hull), start=1):
            steps.append((_gain(before, after), name, position))
    at = dict.fromkeys(hulls, 0)
    for _, name, position in sorted(steps, key=lambda step: -step[0]):
        more = hulls[name][position][0] - hulls[name][at[name]][0]
        if position == at[name] + 1 and size + more <= budget:
            at[name], size = position, size + more
    return {name: hull[at[name]][2] for name, hull in hulls.items()}


def _file_size(weights: LazyWeights, chosen: Mapping[str, Encoding], text: str) -> int:
    specs = _layout(weights, chosen)
    coded = {name: (chosen[name], weights.spec(name).shape, 0.0) for name in weights}
    metadata = {"format": "pt", **sealed({**weights.metadata, **encoded_header(text, coded, 0.0, 0.0)}, "0" * 32)}
    return len(Shard(weights.path, specs).header(metadata)) + sum(spec.num_bytes for spec in specs.values())


def _options(name: str, encoder: Encoder, largest: int) -> list[Option]:
    """Return the lower convex hull of what a tensor's encodings cost and lose, each of its points measured.

    What is known of `low_rank` and `top_k` before they are measured is less than their errors. So a point that is above
    the hull of the measured ones stays above it, and need not be measured.
    """
    costs = {how: _cost(name, how, encoder.spec, largest) for how in encoder.candidates()}
    errors = {how: encoder.least_error(how) for how in costs}
    unmeasured = {how for how in costs if how.name in PARAMETERS}
    errors |= {how: encoder.encode(how).squared_error for how in costs if how not in unmeasured}
    while True:
        hull = _hull([(cost, errors[how], how) for how, cost in costs.items() if math.isfinite(errors[how])])
        todo = [how for _, _, how in hull if how in unmeasured]
        if not todo:
            return hull
        errors |= {how: encoder.encode(how).squared_error for how in todo}
        unmeasured.difference_update(todo)


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "–"


def _cost(name: str, encoding: Encoding, spec: Spec, largest: int) -> int:
    """Return the bytes that a tensor takes of a file at most, with what the header says of it."""
    fields = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [largest, largest]}
    parts = encoding.specs(name, spec)
    listed = json.dumps(json.dumps({name: [encoding.name, list(spec.shape), "0.000000e+00"]}))
    return encoding.num_bytes(spec) + len(listed) + sum(len(json.dumps({part: fields})) + 16 for part in parts)


def _hull(points: list[Option]) -> list[Option]:
    """Keep the lower convex hull of points (bytes, squared error), from the fewest bytes to the smallest error."""
    hull: list[Option] = []
    for point in sorted(points, key=lambda point: point[:2]):
        if hull and point[1] >= hull[-1][1]:
            continue
        if hull and point[0] == hull[-1][0]:
            hull.pop()
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _gain(first: Option, second: Option) -> float:
    return (first[1] - second[1]) / (second[0] - first[0])
