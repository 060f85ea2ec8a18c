r"""Encode deltas in fewer bytes, and measure the relative error :math:`\|\hat\tau - \tau\| / \|\tau\|` of that.

==========================  ======================================================  ====================
name                        what is kept of a tensor                                part of float32
==========================  ======================================================  ====================
``exact``                   everything                                              100 %
``bf16``, ``fp16``          every element, rounded                                  50 %
``int8``                    every element on 255 levels of its row's largest        25 %
``sign``                    signs, and each row's mean magnitude                    3.1 %
``top_k(density=0.1)``      the largest elements and their places                   ``density``
``low_rank(rank=16)``       the leading singular triplets, in float16               rank · (1/rows + 1/columns) / 2
==========================  ======================================================  ====================

A row is what belongs to one index of the first dimension; a tensor of one dimension is one row.

Source: Liu et al., "BitDelta: your fine-tune may only be worth one bit", NeurIPS 2024 (``sign``, without distillation);
Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011 (``low_rank`` of large matrices).
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy
import torch
from torch import Tensor

from tva.merge.matrices import leading
from tva.merge.select import Threshold, check_density, num_kept
from tva.state_dict import some
from tva.weights import Spec, num_bytes
from tva.weights.encoded import BLOCK, KINDS, PLAIN, matrix_shape, part_name, part_specs
from tva.weights.lazy import Entry, InMemory

PARAMETERS = {"top_k": ("density", 0.1), "low_rank": ("rank", 16)}
DENSITIES = (1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)  # that a budget chooses from
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
LARGE = 1024  # from this smaller side on, a matrix is decomposed by random projections
OVERSAMPLE, POWER_ITERATIONS = 8, 3
_BINS = 2**15  # values of the upper 16 bits of a magnitude in float32
PIECE = 2**20  # elements whose error is measured at a time


@dataclass(frozen=True)
class Encoding:
    """How a tensor is stored.

    Attributes:
        name: Of the table above.
        size: ``density`` of top_k, ``rank`` of low_rank; 0 for the others.

    Example:
        >>> Encoding.parse("top_k(density=0.05)"), str(Encoding.parse("low_rank"))
        (Encoding(name='top_k', size=0.05), 'low_rank(rank=16)')
    """

    name: str
    size: float = 0

    @classmethod
    def parse(cls, text: str) -> Encoding:
        """Read what a user writes.

        Raises:
            ValueError: The name or its parameter is not known, or the parameter's value makes no sense.
        """
        found = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*(?:(\w+)\s*=\s*)?([^()=]*?)\s*\)\s*)?", text)
        names = [*PLAIN, *KINDS]
        name = found[1] if found else text.strip()
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ValueError(
                f"There is no encoding {name!r}; encodings are {', '.join(names)}."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )
        key, size = PARAMETERS.get(name, (None, 0))
        if found[3]:
            if key is None or found[2] not in (None, key):
                takes = f"takes {key} alone, as in {cls(name, size)}" if key else "takes no parameter"
                raise ValueError(f"The encoding {name} {takes}; found {text!r}.")
            try:
                size = int(found[3]) if key == "rank" else float(found[3])
            except ValueError:
                raise ValueError(f"{key} must be a number, as in {cls(name, size)}; found {text!r}.") from None
            if key == "density":
                check_density(size)
            elif size < 1:
                raise ValueError(f"rank must be 1 or more; found {text!r}.")
        return cls(name, size)

    def __str__(self) -> str:
        return f"{self.name}({PARAMETERS[self.name][0]}={self.size:g})" if self.name in PARAMETERS else self.name

    def specs(self, name: str, spec: Spec) -> dict[str, Spec]:
        """Give the names, dtypes and shapes of the tensors that take a tensor's place in the file."""
        if self.name in PLAIN:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name, spec.dtype)
            return {name: Spec(dtype, spec.shape)}
        size = 0
        if self.name == "top_k":
            size = num_kept(self.size, spec.shape.numel())
        elif self.name == "low_rank":
            size = min(int(self.size), *matrix_shape(spec.shape))
        return {part_name(name, self.name, part): s for part, s in part_specs(self.name, spec.shape, size).items()}

    def num_bytes(self, spec: Spec) -> int:
        """Give the size of a tensor so stored."""
        return sum(num_bytes(part) for part in self.specs("", spec).values())

    def suited(self, spec: Spec) -> Encoding:
        """Give this encoding, or bf16 for what it is not meant for.

        That is: tensors with fewer than two dimensions (biases, norms), which are few and matter much, and those that
        would take as many bytes as in bf16, or more.
        """
        bf16 = Encoding("bf16")
        small = len(spec.shape) < 2 or self.num_bytes(spec) >= bf16.num_bytes(spec)
        return bf16 if self.name not in PLAIN and small else self


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
        self.name, self.delta = name, delta.detach().cpu().contiguous()
        self.spec = Spec(delta.dtype, delta.shape)
        self.flat = self.delta.reshape(-1)
        self.squared_norm = math.fsum(float(piece.square().sum()) for _, piece in self._wide_pieces())
        self.finite = bool(torch.isfinite(self.flat).all())
        self._factors: tuple[Tensor, Tensor, Tensor] | None = None

    def _wide_pieces(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self.flat.numel(), PIECE):
            yield start, self.flat[start : start + PIECE].double()

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
        for start, piece in self._wide_pieces():
            read = entry.slice(start, start + len(piece)).double()
            reads.append(float(read.square().sum()))
            errors.append(float((read - piece).square().sum()))
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

    # --- the encodings, each as the parts that `tva.weights.encoded` reads

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
        """Keep exactly so many: of those that equal the smallest one kept, the first."""
        flat, threshold = self._rows().reshape(-1), Threshold(encoding.size)
        for sweep in (0, 1):
            for start in range(0, len(flat), PIECE):
                threshold.observe(flat[start : start + PIECE], sweep)
            threshold.finish(sweep)
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
        """Give both factors' columns the largest value 1, so that float16 holds them to 11 bits."""
        rank = min(int(encoding.size), *matrix_shape(self.spec.shape))
        left, values, right = (factor[..., :rank] for factor in self.factors(rank))
        peaks = [factor.abs().amax(0) for factor in (left, right)]
        left, right = (f / peak.where(peak > 0, 1) for f, peak in zip((left, right), peaks, strict=True))
        scale = (values * peaks[0] * peaks[1]).float()
        return {"scale": scale, "left": left.half().contiguous(), "right": right.T.half().contiguous()}

    def factors(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Decompose into left vectors, singular values and right vectors, at least so many; the same ones every time.

        Exact up to a smaller side of 1,024, by random projections (seed 0, three power iterations) beyond.
        """
        shape = matrix_shape(self.spec.shape)
        width = min(max(rank, RANKS[-1]), *shape)
        if self._factors is None or len(self._factors[1]) < width:
            matrix = self.delta.reshape(shape)
            exact = min(shape) <= max(LARGE, 4 * width)
            self._factors = leading(matrix.double(), width) if exact else _projected(matrix.float(), width)
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
        """Give what the squared error is not below: what the rank cannot hold, or what lies in smaller elements."""
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

    def estimate(self, encoding: Encoding) -> float:
        """Give the squared error, of low_rank and top_k without their rounding, which is 1e-3 or less of the norm."""
        known = encoding.name in PARAMETERS
        return self.unavoidable(encoding) if known else self.encode(encoding).squared_error

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
        slack = limit + 1e-6 * self.squared_norm  # the bounds are rounded
        for encoding in self.candidates():
            # before decomposing: r of the squared singular values add up to r^½ (Σσ⁴)^½ at most
            at_most = math.sqrt(encoding.size) * self._gram_norm if encoding.name == "low_rank" else math.inf
            if self.squared_norm - at_most > slack:
                continue
            if self.unavoidable(encoding) <= slack and self.encode(encoding).squared_error <= limit:
                break
        return encoding


def _projected(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give the leading singular triplets of a large matrix by random projections, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    basis = matrix @ torch.randn(matrix.shape[1], rank + OVERSAMPLE, generator=generator)
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(basis).Q
        basis = matrix @ torch.linalg.qr(matrix.T @ basis).Q
    basis = torch.linalg.qr(basis).Q  # [rows, rank + oversample]
    left, values, right = leading((basis.T @ matrix).double(), rank)
    return basis.double() @ left, values, right


def relative_error(squared_error: float, squared_norm: float) -> float:
    """Give the relative error; 0 for a zero tensor that is read back as such."""
    return math.sqrt(squared_error / squared_norm) if squared_norm else math.inf if squared_error else 0.0


def check_names(names: Sequence[str]) -> None:
    """Check that no tensor has the name of another one's part.

    Raises:
        ValueError: One does.
    """
    if len(set(names)) < len(names):
        twice = some(sorted({name for name in names if names.count(name) > 1}))
        raise ValueError(f"Two tensors would be stored as {twice}. Rename the one that is called like a part.")


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


def encoded_header(
    text: str, coded: Mapping[str, tuple[Encoding, torch.Size, float]], error: float, norm: float
) -> dict[str, str]:
    """Make what the header of a compressed vector says more than others; of one length whatever the errors.

    Args:
        text: What was asked for.
        coded: For each tensor its encoding, shape and relative error.
        error: Relative error of the whole.
        norm: Euclidean norm of what is read back, without buffers.
    """
    listed = {name: [how.name, list(shape), _fixed(own)] for name, (how, shape, own) in coded.items()}
    header = {"tva.encoding": text, "tva.encoding_error": _fixed(error), "tva.norm": _fixed(norm)}
    return {**header, "tva.encoded": json.dumps(listed)}


def _fixed(number: float) -> str:
    return f"{number if number > 1e-90 else 0.0:.6e}"
