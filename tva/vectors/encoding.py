"""The encodings in which deltas are stored in fewer bytes: what a user writes, the sizes, the header.

==========================  ======================================================  ====================
name                        what is kept of a tensor                                part of float32
==========================  ======================================================  ====================
``exact``                   everything                                              100%
``bf16``, ``fp16``          every element, rounded                                  50%
``int8``                    every element on 255 levels of its row's largest        25%
``sign``                    signs, and each row's mean magnitude                    3.1%
``top_k(density=0.1)``      the largest elements and their places                   ``density``
``low_rank(rank=16)``       the leading singular triplets, in float16               rank · (1/rows + 1/columns) / 2
==========================  ======================================================  ====================

A row is what belongs to one index of the first dimension; a tensor of one dimension is one row.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tva._torch import torch
from tva.checkpoints import Spec
from tva.checkpoints.compressed import KINDS, PLAIN, matrix_shape, part_name, part_specs
from tva.errors import some
from tva.merge.order_statistics import check_density, num_kept

PARAMETERS = {"top_k": ("density", 0.1), "low_rank": ("rank", 16)}


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
                takes = f"takes only {key}, as in {cls(name, size)}" if key else "takes no parameter"
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
        """Return the names, dtypes and shapes of the tensors that take a tensor's place in the file."""
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
        """Return the bytes of a tensor that is stored so."""
        return sum(part.num_bytes for part in self.specs("", spec).values())

    def suited(self, spec: Spec) -> Encoding:
        """Return this encoding, or bf16 for what it is not meant for.

        That is: tensors with fewer than two dimensions (biases, norms), which are few and matter much, and those that
        would take as many bytes as in bf16, or more.
        """
        bf16 = Encoding("bf16")
        small = len(spec.shape) < 2 or self.num_bytes(spec) >= bf16.num_bytes(spec)
        return bf16 if self.name not in PLAIN and small else self


def relative_error(squared_error: float, squared_norm: float) -> float:
    """Return the relative error; 0 for a zero tensor that is read back as such."""
    return math.sqrt(squared_error / squared_norm) if squared_norm else math.inf if squared_error else 0.0


def check_names(names: Sequence[str]) -> None:
    """Check that no tensor has the name of another one's part.

    Raises:
        ValueError: One does.
    """
    if len(set(names)) < len(names):
        twice = some(sorted({name for name in names if names.count(name) > 1}))
        raise ValueError(f"Two tensors would be stored as {twice}. Rename the one that is called like a part.")


def encoded_header(
    text: str, coded: Mapping[str, tuple[Encoding, torch.Size, float]], error: float, norm: float
) -> dict[str, str]:
    """Return what the header of a compressed vector says beyond that of others, of one length whatever the errors.

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
