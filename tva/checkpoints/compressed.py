"""Compressed tensors: the parts of each encoding, and how elements are read from them.

An encoded tensor ``NAME`` is several tensors ``NAME#ENCODING.PART`` of a plain safetensors file, whose header lists
under ``tva.encoded`` each tensor's encoding, shape and error. An element is computed from its own parts by the same
operations whatever is asked for together with it, so what is read does not depend on the chunks it is read in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy

from tva._torch import Tensor, torch
from tva.checkpoints.foreign import parse_json
from tva.checkpoints.lazy import Entry
from tva.checkpoints.spec import Spec
from tva.errors import some

BLOCK = 2**16  # elements that share one entry of ``top_k.start``, and that of a product are computed at a time
PLAIN = ("exact", "bf16", "fp16")  # the tensor itself, under its own name


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Return the rows (the first dimension; one where there is no second) and columns (all others) of a tensor."""
    return (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape.numel())


def part_specs(encoding: str, shape: torch.Size, size: int = 0) -> dict[str, Spec]:
    """Return the dtype and shape of every part of an encoded tensor.

    Args:
        encoding: One that consists of parts.
        shape: The tensor's.
        size: Elements kept by ``top_k``, rank of ``low_rank``.
    """
    rows, columns = matrix_shape(shape)
    count = rows * columns
    per_row, one = Spec(torch.float32, torch.Size([rows])), Spec(torch.float32, torch.Size([1]))
    if encoding == "int8":
        return {"values": Spec(torch.int8, shape), "scale": per_row}
    if encoding == "sign":
        return {"bits": Spec(torch.uint8, torch.Size([-(-count // 8)])), "scale": per_row}
    if encoding == "top_k":
        starts = Spec(torch.int64, torch.Size([-(-count // BLOCK) + 1]))
        kept = torch.Size([size])
        return {"start": starts, "scale": one, "index": Spec(torch.uint16, kept), "values": Spec(torch.float16, kept)}
    return {
        "scale": Spec(torch.float32, torch.Size([size])),
        "left": Spec(torch.float16, torch.Size([rows, size])),
        "right": Spec(torch.float16, torch.Size([size, columns])),
    }


@dataclass(frozen=True)
class Encoded(Entry):
    """A float32 tensor that is computed from parts.

    Attributes:
        label: What to call it in an error.
        shape: The tensor's.
        parts: The parts by their short names.
    """

    label: str
    shape: torch.Size
    parts: Mapping[str, Entry]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def in_parts(self) -> bool:
        return all(part.in_parts for part in self.parts.values())

    @property
    def stored_bytes(self) -> int:
        return sum(part.stored_bytes for part in self.parts.values())

    def _scales(self, start: int, stop: int) -> Tensor:
        """Return the scale of each element's row; a single one where all are in one row."""
        columns = max(1, matrix_shape(self.shape)[1])
        first, last = start // columns, -(-stop // columns)
        scales = self.parts["scale"].slice(first, last)
        if len(scales) == 1:
            return scales
        return scales.repeat_interleave(columns)[start - first * columns : stop - first * columns]


class Int8(Encoded):
    r"""Rounded to 255 levels: :math:`s_i q_{ij}` with the scale :math:`s_i = \max_j |\tau_{ij}| / 127` of each row."""

    def slice(self, start: int, stop: int) -> Tensor:
        return self.parts["values"].slice(start, stop).float().mul_(self._scales(start, stop))


class Sign(Encoded):
    r"""One bit an element: :math:`\pm s_i`, with the row's mean magnitude, which has the smallest error."""

    def slice(self, start: int, stop: int) -> Tensor:
        first = start // 8
        packed = self.parts["bits"].slice(first, -(-stop // 8)).numpy()
        bits = numpy.unpackbits(packed, bitorder="little")[start - 8 * first : stop - 8 * first]
        return torch.from_numpy(bits).float().mul_(2).sub_(1).mul_(self._scales(start, stop))


class TopK(Encoded):
    """Some elements, with their places within blocks of 65,536; all others are zero."""

    def slice(self, start: int, stop: int) -> Tensor:
        out = torch.zeros(stop - start)
        first, last = start // BLOCK, -(-stop // BLOCK)
        if start == stop:
            return out
        starts = self.parts["start"].slice(first, last + 1)
        counts, kept = starts.diff(), self.parts["index"].shape[0]
        if bool((counts < 0).any()) or not 0 <= int(starts[0]) <= int(starts[-1]) <= kept:
            raise self._damaged("top_k.start does not ascend from 0 to the number of elements")
        low, high = int(starts[0]), int(starts[-1])
        index = self.parts["index"].slice(low, high).to(torch.int64)
        index += torch.arange(first, last).repeat_interleave(counts) * BLOCK
        if high > low and int(index.max()) >= self.shape.numel():
            raise self._damaged(f"top_k.index leads to element {int(index.max())} of {self.shape.numel()}")
        inside = (index >= start) & (index < stop)
        values = self.parts["values"].slice(low, high).float() * self.parts["scale"].slice(0, 1)
        out[index[inside] - start] = values[inside]
        return out

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"{self.label} is damaged: {why}. Write it again from its source.")


class LowRank(Encoded):
    """A product of two narrow matrices, computed in blocks of rows that are always the same."""

    @property
    def held_bytes(self) -> int:
        right = self.parts["right"].shape.numel() + self.shape[1:].numel()
        return right * (torch.float16.itemsize + torch.float32.itemsize)

    def slice(self, start: int, stop: int) -> Tensor:
        rows, columns = matrix_shape(self.shape)
        rank = self.parts["scale"].shape[0]
        scale, right = self.parts["scale"].read(), self.parts["right"].read().float()  # [rank], [rank, columns]
        height = max(1, BLOCK // max(1, columns))
        out = torch.empty(stop - start)
        for first in range(start // columns // height * height if columns else 0, -(-stop // max(1, columns)), height):
            last = min(first + height, rows)
            left = self.parts["left"].slice(first * rank, last * rank).float().view(-1, rank) * scale
            low, high = max(start, first * columns), min(stop, last * columns)
            block = (left @ right).reshape(-1)
            out[low - start : high - start] = block[low - first * columns : high - first * columns]
        return out


KINDS: dict[str, type[Encoded]] = {"int8": Int8, "sign": Sign, "top_k": TopK, "low_rank": LowRank}
_PLAIN_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def part_name(name: str, encoding: str, part: str) -> str:
    """Return the name of a part's tensor in the file."""
    return f"{name}#{encoding}.{part}"


def decoded(path: Path, stored: Mapping[str, Entry], text: str) -> dict[str, Entry]:
    """Make the encoded tensors of a file readable, reading none yet.

    Args:
        path: The file, for errors.
        stored: Every tensor in it.
        text: The header's ``tva.encoded``.

    Raises:
        ValueError: A part is lacking, has another form or is not accounted for, or an encoding is unknown.
    """
    fields = parse_json(text, f"{path}: tva.encoded", {str: list})
    try:
        listed = {name: (str(field[0]), torch.Size(field[1])) for name, field in fields.items()}
    except Exception as error:  # a stranger's text may provoke any
        raise ValueError(
            f"{path} is damaged: its tva.encoded cannot be read ({type(error).__name__}). Write it again."
        ) from error
    unknown = {encoding for encoding, _ in listed.values()} - {*KINDS, *PLAIN}
    if unknown:
        known = ", ".join([*PLAIN, *KINDS])
        raise ValueError(f"{path} has tensors encoded as {some(sorted(unknown))}; this version of tva knows {known}. "
                         f"Update tva.")  # fmt: skip
    entries: dict[str, Entry] = {}
    left, problems = dict(stored), []
    for name, (encoding, shape) in listed.items():
        if encoding in PLAIN:
            found = left.pop(name, None)
            if found is None:
                problems.append(f"{name!r} is not there")
            elif found.shape != shape or found.spec.dtype_name != _PLAIN_DTYPES.get(encoding, found.spec.dtype_name):
                problems.append(f"{name!r} is {found.dtype} {list(found.shape)}, not {encoding} {list(shape)}")
            else:
                entries[name] = found
            continue
        names = {part: part_name(name, encoding, part) for part in part_specs(encoding, shape)}
        parts = {part: left.pop(full) for part, full in names.items() if full in left}
        problems += [f"{full!r} is not there" for part, full in names.items() if part not in parts]
        if parts.keys() == names.keys():
            wanted = part_specs(encoding, shape, parts["values" if encoding == "top_k" else "scale"].shape.numel())
            problems += [
                f"{names[part]!r} is {entry.dtype} {list(entry.shape)}, not {wanted[part].dtype} "
                f"{list(wanted[part].shape)}"
                for part, entry in parts.items()
                if (entry.dtype, entry.shape) != wanted[part]
            ]
            entries[name] = KINDS[encoding](f"{name!r} in {path}", shape, parts)
    problems += [f"{name!r} is listed nowhere" for name in left]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{path} is a compressed task vector that is damaged or incomplete: {'; '.join(problems[:3])}{more}. "
            f"Compress it again from its source."
        )
    return entries
