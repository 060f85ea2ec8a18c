"""Encode a delta by blocks of its rows, so that a limit of memory holds; the same bytes are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tva._torch import load_torch
from tva.checkpoints import LazyWeights, Spec
from tva.checkpoints.compressed import PLAIN, matrix_shape
from tva.sizes import SLACK, anonymous_memory, check_memory, parse_bytes
from tva.vectors.encoder import CHUNK, Encoder
from tva.vectors.encoding import Encoding

MEASURED = 48  # bytes an element of the chunks in which errors are measured
HELD = {"top_k": 56, "low_rank": 40}  # bytes an element, beside the delta
SEARCHED = 72  # where all encodings are tried
LEAST = 4096  # elements of a block


def _unit(spec: Spec, encoding: Encoding) -> int | None:
    """Return how many elements blocks must be multiples of; None where a tensor is encoded as a whole."""
    if encoding.name in PLAIN:
        return 1
    return None if encoding.name in HELD else 8 * matrix_shape(spec.shape)[1]  # eight rows: whole bytes of signs


def _held(spec: Spec, encoding: Encoding, elements: int) -> int:
    each = spec.itemsize + HELD.get(encoding.name, 20)
    return each * elements + MEASURED * min(elements, CHUNK)


def check_whole(weights: LazyWeights, max_memory: str | None, what: str) -> None:
    """Check that a limit leaves room for trying all encodings on the largest tensor.

    Raises:
        ValueError: It does not.
    """
    if max_memory is not None and len(weights):
        load_torch()  # whose memory counts
        most = max(weights, key=lambda name: weights.spec(name).numel())
        need = weights.spec(most).numel() * SEARCHED
        check_memory(need, max_memory, f"{what} of the largest tensor, {most!r}, which is encoded in several ways,")


def block_sizes(weights: LazyWeights, chosen: Mapping[str, Encoding], max_memory: str | None) -> dict[str, int]:
    """Return how many elements of each tensor are encoded at once.

    Raises:
        ValueError: Even the smallest block does not fit the limit.
    """
    sizes = {name: max(1, weights.spec(name).numel()) for name in weights}
    if max_memory is None:
        return sizes
    load_torch()
    room = parse_bytes(max_memory, "max_memory") - anonymous_memory() - SLACK
    for name, length in sizes.items():
        spec, encoding = weights.spec(name), chosen[name]
        unit = _unit(spec, encoding)
        least = length if unit is None else min(length, max(unit, LEAST))
        check_memory(_held(spec, encoding, least), max_memory, f"encoding {name!r} as {encoding}")
        while unit is not None and sizes[name] > least and _held(spec, encoding, sizes[name]) > room:
            sizes[name] = max(least, -(-(sizes[name] // 2) // unit) * unit)
    return sizes


def encoders(weights: LazyWeights, name: str, size: int) -> Iterator[Encoder]:
    """Read a tensor as one encoder, or as one for each block of ``size`` elements.

    Raises:
        ValueError: It is not finite.
    """
    spec = weights.spec(name)
    length, columns = spec.numel(), matrix_shape(spec.shape)[1]
    for start in range(0, max(1, length), size):
        block = weights.slice(name, start, min(start + size, length))  # not mapped: the file may be cut meanwhile
        if size >= length:
            block = block.view(spec.shape)
        elif size % columns == 0:
            block = block.view(-1, columns)
        encoder = Encoder(name, block)
        if not encoder.finite:
            raise ValueError(
                f"A task vector must be finite, but the delta of {name!r} in {weights.path} holds NaN or infinity. "
                f"Check that both models are sound (a diverged fine-tuning?)."
            )
        yield encoder
