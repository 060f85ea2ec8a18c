"""Strict arithmetic on state dicts: the one place where keys, shapes and dtypes are checked and tensors are added.

A state dict is any mapping of names to tensors, in memory or lazily read from a file. Sums are taken in float32
(float64 where an input is float64) and rounded once to the output's dtype. Product and sum are rounded one after the
other, never fused, so that a result depends on no chunk size and no instruction set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tva._torch import Tensor, torch
from tva.errors import MismatchError, some

StateDict = Mapping[str, Tensor]
BATCH_NORM_STATISTICS = ("running_mean", "running_var")


def check_same(left: StateDict, right: StateDict, left_name: str, right_name: str) -> None:
    """Check that two state dicts have the same keys and shapes.

    Args:
        left: Any state dict.
        right: Any state dict.
        left_name: What to call ``left`` in the error, such as ``"the base"``.
        right_name: What to call ``right``.

    Raises:
        MismatchError: All differences in one message, at most three of a kind by name.
    """
    missing = [name for name in left if name not in right]
    extra = [name for name in right if name not in left]
    shapes = [
        f"{name!r} is {list(left[name].shape)} in {left_name} but {list(right[name].shape)} in {right_name}"
        for name in left
        if name in right and left[name].shape != right[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"{right_name} lacks {some(missing)}")
    if extra:
        problems.append(f"{right_name} has {some(extra)}, which {left_name} lacks")
    if shapes:
        problems.append("; ".join(shapes[:3]) + (f" and {len(shapes) - 3} more shapes" if len(shapes) > 3 else ""))
    if problems:
        raise MismatchError(
            f"{left_name} and {right_name} must have the same keys and shapes, but "
            + "; ".join(problems)
            + ". Take both from the same architecture, or leave names out by exclude."
        )


def is_edited(like: Any) -> bool:
    """Whether arithmetic applies to a tensor, or one of this `Spec`: never to integers or booleans."""
    return like.is_floating_point() or like.is_complex()


def real_parts(tensor: Tensor) -> Tensor:
    """View complex numbers as their real and imaginary parts, shape (…, 2); real tensors are returned as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def from_real_parts(parts: Tensor, like: Tensor) -> Tensor:
    """View parts as complex numbers again, where ``like`` is complex: the inverse of `real_parts`."""
    return torch.view_as_complex(parts.reshape(*like.shape, 2)) if like.is_complex() else parts


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which sums of these are taken: float64 if one of them is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def subtract(finetuned: Tensor, base: Tensor, out: Tensor | None = None) -> Tensor:
    """Take the delta of one tensor.

    Args:
        finetuned: Any floating dtype and shape; or complex, of which real and imaginary parts are subtracted.
        base: The same shape.
        out: Where to write; of that shape and of the result's dtype.

    Returns:
        ``finetuned - base`` in float32, or float64 if either is float64; ``out``, or a new tensor. What is equal on
        both sides has the delta 0, also NaN and infinity, such as the -inf of attention masks.
    """
    if base.is_complex():
        parts = subtract(real_parts(finetuned), real_parts(base), None if out is None else real_parts(out))
        return from_real_parts(parts, base)
    dtype = sum_dtype(finetuned, base)
    old = base.to(dtype)
    if finetuned.dtype == dtype:
        delta = torch.sub(finetuned, old, out=out)
    else:
        delta = (finetuned.to(dtype) if out is None else out.copy_(finetuned)).sub_(old)
    if delta.is_cpu and all_finite(delta):  # on a device, asking would wait for it
        return delta
    new = finetuned.to(dtype)
    return delta.masked_fill_(delta.isnan() & ((new == old) | (new.isnan() & old.isnan())), 0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 has neither sum nor isfinite


def all_finite(tensor: Tensor) -> bool:
    """Whether every element is finite; one sum says so unless it overflows."""
    tensor = _wide(tensor)
    return math.isfinite(float(tensor.sum())) or bool(tensor.isfinite().all())


def equal(left: Tensor, right: Tensor) -> bool:
    """Whether two floating tensors of one shape are equal, where NaN equals NaN."""
    left, right = real_parts(left), real_parts(right)
    if torch.equal(left, right):
        return True
    return bool(left.isnan().any()) and not bool(torch.count_nonzero(subtract(left, right)))


def add_scaled(
    base: Tensor,
    delta: Tensor,
    scaling_coef: float,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Tensor:
    r"""Compute :math:`\theta = \theta_0 + \lambda \delta` for one tensor, rounded once.

    Args:
        base: Tensor of the base model, any floating dtype; or complex, as ``delta`` then is. Left unchanged.
        delta: Delta of the same shape; left unchanged unless ``overwrite``.
        scaling_coef: :math:`\lambda`, unitless. 0 copies ``base`` bit for bit.
        out: Where to write, with the shape of ``base``; may not share memory with ``base`` or ``delta``.
        dtype: Of a new result; by default that of ``base``.
        overwrite: The memory of ``delta`` may be used.

    Returns:
        ``out``, or a new tensor on the device of ``base``. What is not finite in ``base`` stays as it is.

    Example:
        >>> add_scaled(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]), -1.0)
        tensor([0.5000, 2.0000])
    """
    if scaling_coef == 0:
        return base.to(dtype or base.dtype, copy=True) if out is None else out.copy_(base)
    if base.is_complex():
        parts = (real_parts(base), real_parts(delta))
        moved = add_scaled(*parts, scaling_coef, None if out is None else real_parts(out), overwrite=overwrite)
        return from_real_parts(moved, base) if out is None else out
    wide = sum_dtype(base, delta)
    if out is not None and out.dtype == wide:
        return _keep(base, torch.mul(delta.to(wide), scaling_coef, out=out).add_(base.to(wide)))
    scaled = delta.to(wide)
    if scaling_coef != 1 or not overwrite:
        scaled = torch.mul(scaled, scaling_coef, out=scaled if overwrite else None)
    moved = scaled.add_(base.to(wide))
    return _keep(base, moved.to(dtype or base.dtype) if out is None else out.copy_(moved))


def _keep(base: Tensor, moved: Tensor) -> Tensor:
    """Keep what is not finite in the base bit for bit; by arithmetic, the bits of NaN depend on where it stands."""
    if moved.is_cpu and not all_finite(moved) and bool((still := ~_wide(base).isfinite()).any()):
        bits = torch.uint8 if moved.dtype.itemsize == 1 else moved.dtype  # torch 2.6 chooses no float8
        moved.copy_(torch.where(still, base.to(moved.dtype).view(bits), moved.view(bits)).view(moved.dtype))
    return moved
