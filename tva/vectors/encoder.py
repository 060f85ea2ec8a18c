r"""Encode deltas, and measure the relative error :math:`\|\hat\tau - \tau\| / \|\tau\|` of what is read back.

Source: Liu et al., "BitDelta: your fine-tune may only be worth one bit", NeurIPS 2024 (``sign``, without distillation);
Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011 (``low_rank`` of large matrices).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy

from tva._torch import Tensor, torch
from tva.checkpoints import Spec
from tva.checkpoints.compressed import BLOCK, KINDS, PLAIN, matrix_shape, part_name
from tva.checkpoints.lazy import Entry, InMemory
from tva.merge.linalg import leading
from tva.merge.order_statistics import PASSES, Threshold, num_kept
from tva.vectors.encoding import Encoding, check_names, encoded_header, relative_error

DENSITIES = (1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)  # that a budget chooses from
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
LARGE = 1024  # from this smaller side on, a matrix is decomposed by random projections
OVERSAMPLE, POWER_ITERATIONS = 8, 3
_BINS = 2**15  # values of the upper 16 bits of a magnitude in float32
SUMS_OFF_BY = 1e-6  # of the squared norm, by which rounding may move a bound, whatever the BLAS
CHUNK = 2**20  # elements whose error is measured at a time


@dataclass(frozen=True)
class Coded:
    """A tensor as it is stored.

    Attributes:
        encoding: How.
        shape: Of the tensor.
        tensors: Its parts, by their names in the file.
        squared_error: Of what is read back, in float64.
        squared_norm: Of the tensor.
        squared_read: Of what is read back.
    """

    encoding: Encoding
    shape: torch.Size
    tensors: Mapping[str, Tensor]
    squared_error: float
    squared_norm: float
    squared_read: float

    @property
    def error(self) -> float:
        """Relative error."""
        return relative_error(self.squared_error, self.squared_norm)


class Encoder:
    """One delta, and what its encodings have in common.

    Args:
        name: The tensor's.
        delta: Any floating dtype; left unchanged.

    Attributes:
        squared_norm: Of the flattened delta.
        finite: Whether every element is a number.
    """

    def __init__(self, name: str, delta: Tensor) -> None:
        if delta.is_complex():
            raise ValueError(
                f"{name!r} is complex, and complex deltas are stored exactly only. Leave the encoding out, or the "
                f"tensor by exclude."
            )
        self.name, self.delta = name, delta.detach().cpu().contiguous()
        self.spec = Spec(delta.dtype, delta.shape)
        self.flat = self.delta.reshape(-1)
        self.squared_norm = math.fsum(float(chunk.square().sum()) for _, chunk in self._wide_chunks())
        self.finite = bool(torch.isfinite(self.flat).all())
        self._factors: tuple[Tensor, Tensor, Tensor] | None = None

    def _wide_chunks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self.flat.numel(), CHUNK):
            yield start, self.flat[start : start + CHUNK].double()

    def encode(self, encoding: Encoding) -> Coded:
        """Encode, read back and measure."""
        if encoding.name in PLAIN:
            tensors = {self.name: self.delta.to(encoding.specs(self.name, self.spec)[self.name].dtype)}
            entry: Entry = InMemory(tensors[self.name])
        else:
            parts = getattr(self, f"_{encoding.name}")(encoding)
            stored = {part: InMemory(tensor) for part, tensor in parts.items()}
            entry = KINDS[encoding.name](repr(self.name), self.spec.shape, stored)
            tensors = {part_name(self.name, encoding.name, part): tensor for part, tensor in parts.items()}
        errors, reads = [], []
        for start, chunk in self._wide_chunks():
            read = entry.slice(start, start + len(chunk)).double()
            reads.append(float(read.square().sum()))
            errors.append(float((read - chunk).square().sum()))
        return Coded(encoding, self.spec.shape, tensors, math.fsum(errors), self.squared_norm, math.fsum(reads))

    def check(self, coded: Coded) -> None:
        """Refuse what cannot be read back.

        Raises:
            ValueError: The delta is not finite, or too large for the encoding's numbers.
        """
        if not self.finite:
            raise ValueError(
                f"A task vector must be finite, but the delta of {self.name!r} holds NaN or infinity. Check that both "
                f"models are sound (a diverged fine-tuning?)."
            )
        if not math.isfinite(coded.squared_error):
            raise ValueError(
                f"The delta of {self.name!r} does not fit {coded.encoding}: its largest element is "
                f"{float(self.delta.abs().max()):.3g}. Choose bf16, or exact."
            )

    # --- the encodings, each as the parts that `tva.checkpoints.compressed` reads

    def _rows(self) -> Tensor:
        return self.delta.float().reshape(matrix_shape(self.spec.shape))

    def _int8(self, _: Encoding) -> dict[str, Tensor]:
        rows = self._rows()
        scale = rows.abs().amax(1) / 127
        levels = (rows / scale.where(scale > 0, 1)[:, None]).round_().clamp_(-127, 127)
        return {"values": levels.to(torch.int8).reshape(self.spec.shape), "scale": scale}

    def _sign(self, _: Encoding) -> dict[str, Tensor]:
        rows = self._rows()
        bits = numpy.packbits((rows >= 0).reshape(-1).numpy(), bitorder="little")
        return {"bits": torch.from_numpy(bits), "scale": rows.abs().mean(1, dtype=torch.float64).float()}

    def _top_k(self, encoding: Encoding) -> dict[str, Tensor]:
        """Keep exactly the number asked for; of elements that equal the smallest one kept, the first."""
        flat, threshold = self._rows().reshape(-1), Threshold(encoding.size)
        for pass_number in range(PASSES):
            for start in range(0, len(flat), CHUNK):
                threshold.observe(flat[start : start + CHUNK], pass_number)
            threshold.finish(pass_number)
        magnitude = flat.abs()
        above = (magnitude > threshold.value).nonzero().reshape(-1)
        tied = (magnitude == threshold.value).nonzero().reshape(-1)
        index = torch.cat([above, tied[: num_kept(encoding.size, len(flat)) - len(above)]]).sort().values
        kept = flat[index]
        scale = kept.abs().amax(0, keepdim=True)
        starts = torch.searchsorted(index, torch.arange(-(-len(flat) // BLOCK) + 1) * BLOCK)
        values = (kept / scale.where(scale > 0, 1)).half()
        return {"start": starts, "scale": scale, "index": (index % BLOCK).to(torch.uint16), "values": values}

    def _low_rank(self, encoding: Encoding) -> dict[str, Tensor]:
        """Scale both factors' columns to the largest value 1, so that float16 holds them to 11 bits."""
        rank = min(int(encoding.size), *matrix_shape(self.spec.shape))
        left, values, right = (factor[..., :rank] for factor in self.factors(rank))
        peaks = [factor.abs().amax(0) for factor in (left, right)]
        left, right = (f / peak.where(peak > 0, 1) for f, peak in zip((left, right), peaks, strict=True))
        scale = (values * peaks[0] * peaks[1]).float()
        return {"scale": scale, "left": left.half().contiguous(), "right": right.T.half().contiguous()}

    def factors(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Decompose into left vectors, singular values and right vectors, at least ``rank``, the same each time.

        Exact up to a smaller side of 1,024, by random projections (seed 0, three power iterations) beyond.
        """
        shape = matrix_shape(self.spec.shape)
        width = min(max(rank, RANKS[-1]), *shape)
        if self._factors is None or len(self._factors[1]) < width:
            matrix = self.delta.reshape(shape)
            exact = min(shape) <= max(LARGE, 4 * width)
            self._factors = leading(matrix.double(), width) if exact else projected(matrix.float(), width)
        return self._factors

    # --- choosing

    def candidates(self) -> list[Encoding]:
        """List what a budget may choose, smallest first; the last is exact."""
        found = [Encoding(name) for name in ("exact", "fp16", "bf16", "int8", "sign")]
        count, nonzero = len(self.flat), int(torch.count_nonzero(self.flat))
        densities = sorted({*DENSITIES, max(1, nonzero) / count} if count else ())
        found += [Encoding("top_k", density) for density in densities if density <= DENSITIES[-1]]
        side = min(matrix_shape(self.spec.shape))
        found += [Encoding("low_rank", rank) for rank in RANKS if rank <= side and side > 1]
        sizes = {encoding: encoding.num_bytes(self.spec) for encoding in found}
        exact = sizes.pop(found[0])
        smaller = sorted((encoding for encoding, size in sizes.items() if size < exact), key=sizes.get)
        return [*smaller, found[0]]

    def unavoidable(self, encoding: Encoding) -> float:
        """Return what the squared error is not below: what the rank cannot hold, or what is in smaller elements."""
        if encoding.name == "low_rank":
            kept = float(self.factors(int(encoding.size))[1][: int(encoding.size)].square().sum())
        elif encoding.name == "top_k":
            counts, energies = self._largest
            count = num_kept(encoding.size, len(self.flat))
            position = int(torch.searchsorted(counts, count))
            above = (0, 0.0) if position == 0 else (int(counts[position - 1]), float(energies[position - 1]))
            bound = torch.tensor((_BINS - position) << 16, dtype=torch.int32).view(torch.float32)  # of this bin
            kept = above[1] + (count - above[0]) * float(bound.double().square())
        else:
            return 0.0
        return max(0.0, self.squared_norm - kept)

    def least_error(self, encoding: Encoding) -> float:
        """Return a lower bound of the squared error: `unavoidable`, less what its own sums may be off by."""
        return max(0.0, self.unavoidable(encoding) - SUMS_OFF_BY * self.squared_norm)

    @cached_property
    def _largest(self) -> tuple[Tensor, Tensor]:
        """Count elements, and add up their squares, down to each value of the upper 16 bits, from the largest on."""
        bits = self.flat.float().abs().view(torch.int32) >> 16
        weights = self.flat.double().square()
        counts, energies = (torch.bincount(bits, w, minlength=_BINS).flip(0).cumsum(0) for w in (None, weights))
        return counts, energies

    @cached_property
    def _gram_norm(self) -> float:
        r"""Norm of the Gram matrix, :math:`(\sum \sigma_i^4)^{1/2}`; infinite where it costs as much as decomposing."""
        shape = matrix_shape(self.spec.shape)
        if min(shape) > LARGE:
            return math.inf
        rows = self._rows() if shape[0] <= shape[1] else self._rows().T
        return float(torch.linalg.matrix_norm(rows @ rows.T))

    def cheapest(self, max_error: float) -> Encoding:
        """Choose the smallest encoding whose relative error is at most ``max_error``."""
        limit = max_error**2 * self.squared_norm
        slack = limit + SUMS_OFF_BY * self.squared_norm
        for encoding in self.candidates():
            # before decomposing: r of the squared singular values add up to r^½ (Σσ⁴)^½ at most
            at_most = math.sqrt(encoding.size) * self._gram_norm if encoding.name == "low_rank" else math.inf
            if self.squared_norm - at_most > slack:
                continue
            if self.unavoidable(encoding) <= slack and self.encode(encoding).squared_error <= limit:
                break
        return encoding


def projected(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets of a large matrix by random projections, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    basis = matrix @ torch.randn(matrix.shape[1], rank + OVERSAMPLE, generator=generator)
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(basis).Q
        basis = matrix @ torch.linalg.qr(matrix.T @ basis).Q
    basis = torch.linalg.qr(basis).Q  # [rows, rank + oversample]
    left, values, right = leading((basis.T @ matrix).double(), rank)
    return basis.double() @ left, values, right


def encode_all(
    deltas: Mapping[str, Tensor], encoding: str, buffers: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Encode tensors in memory.

    Args:
        deltas: Names to deltas.
        encoding: What a user writes.
        buffers: Names that do not count for the vector's norm.

    Returns:
        The tensors to store, and what their file's header says more.

    Raises:
        ValueError: There is no such encoding, or a delta does not fit it.
    """
    wanted = Encoding.parse(encoding)
    tensors: dict[str, Tensor] = {}
    names: list[str] = []
    done = {}
    for name, delta in deltas.items():
        encoder = Encoder(name, delta)
        done[name] = encoder.encode(wanted.suited(encoder.spec))
        encoder.check(done[name])
        names += done[name].tensors
        tensors |= done[name].tensors
    check_names(names)
    facts = {name: (coded.encoding, coded.shape, coded.error) for name, coded in done.items()}
    total = [math.fsum(getattr(coded, key) for coded in done.values()) for key in ("squared_error", "squared_norm")]
    norm = math.sqrt(math.fsum(coded.squared_read for name, coded in done.items() if name not in buffers))
    return tensors, encoded_header(str(wanted), facts, relative_error(*total), norm)
