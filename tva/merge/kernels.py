"""Elementwise arithmetic on chunks of tensors, fused: a recipe's steps are done block by block in the innermost cache.

torch does one operation at a time, each a walk over memory; here a short program of steps runs over blocks of 2,048
elements, compiled by numba once for each machine. Every step is the float32 operation that torch does, each rounded by
itself, so that the bits are the same (tested); where a step or a dtype is not known here, torch does the work.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic

from tva.checkpoints.atomic import cache_folder
from tva.merge.program import ADD, DIV, DROP, LOAD, MUL, NEG, SUB, TIES, TRIM, ZERO, Step, encode

BLOCK = 2048  # elements: a few rows of float32 stay in the first-level cache
LANES = 64  # values that are compared at once
LOADED_BYTES = 28 * 2**20  # of memory that `load` takes
BFLOAT16, FLOAT16, FLOAT32 = range(3)


@contextmanager
def _cached() -> Iterator[bool]:
    """Let numba cache compiled code beside this file, else in tva's cache folder; return whether it can.

    numba looks for a place when a function is decorated, and raises where it finds none.
    """
    before, places = config.CACHE_DIR, [Path(__file__).parent / "__pycache__"]
    with suppress(RuntimeError):  # of a user without a home
        places.append(cache_folder() / "kernels")
    if before:
        places = [Path(before)]
    place = next(filter(_can_write, places), None)
    if place is None:
        where = " nor ".join(map(str, places))
        print(
            f"tva: what is compiled cannot be kept, not in {where}: every run compiles it again. Set "
            f"TVA_CACHE to a folder that can be written.",
            file=sys.stderr,
        )
    elif place != Path(__file__).parent / "__pycache__":
        config.CACHE_DIR = str(place)
    try:
        yield place is not None
    finally:
        config.CACHE_DIR = before


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


_caching = _cached()
_OPTIONS: dict[str, Any] = {"nogil": True, "cache": _caching.__enter__(), "error_model": "numpy"}


@intrinsic
def _as_float(context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _as_bits(context, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@njit(**_OPTIONS)
def _widen(kind, halves, floats, out):
    if kind == FLOAT32:
        for i in range(len(out)):
            out[i] = floats[i]
    elif kind == BFLOAT16:
        for i in range(len(out)):
            out[i] = _as_float(numpy.uint32(numpy.uint32(halves[i]) << numpy.uint32(16)))
    else:
        for i in range(len(out)):
            half = numpy.uint32(halves[i])
            sign = numpy.uint32((half & numpy.uint32(0x8000)) << numpy.uint32(16))
            rest = numpy.uint32((half & numpy.uint32(0x7FFF)) << numpy.uint32(13))
            value = _as_bits(numpy.float32(_as_float(rest) * numpy.float32(2.0**112)))
            if rest >= numpy.uint32(0x0F800000):  # infinity and NaN
                value = numpy.uint32(rest | numpy.uint32(0x7F800000))
            out[i] = _as_float(numpy.uint32(value | sign))


@njit(**_OPTIONS)
def _load(kind, halves, floats, relative, base, out, check):
    """Turn stored values to deltas, without the base where they are ``relative`` to it; if checked, are all finite?

    Unchecked, what is infinite or NaN on both sides is NaN; checked it is 0, as in `tva.arithmetic.subtract`.
    """
    if relative and kind == BFLOAT16:  # in one loop, as most are stored
        for i in range(len(out)):
            out[i] = _as_float(numpy.uint32(numpy.uint32(halves[i]) << numpy.uint32(16))) - base[i]
    else:
        _widen(kind, halves, floats, out)
        if relative:
            for i in range(len(out)):
                out[i] = out[i] - base[i]
    if not check:
        return True
    largest = numpy.uint32(0)
    for i in range(len(out)):
        largest = max(largest, _as_bits(out[i]) & numpy.uint32(0x7FFFFFFF))
    finite = largest < numpy.uint32(0x7F800000)
    if finite or not relative:
        return finite
    finite = True
    _widen(kind, halves, floats, out)
    for i in range(len(out)):
        delta = out[i] - base[i]
        equal = (out[i] == base[i]) | ((out[i] != out[i]) & (base[i] != base[i]))
        out[i] = numpy.float32(0) if (delta != delta) & equal else delta
        finite &= numpy.isfinite(out[i])
    return finite


@njit(**_OPTIONS)
def _round(kind, values, halves, floats):
    """Round float32 values to the nearest stored ones, ties to even, in place as well."""
    if kind == FLOAT32:
        for i in range(len(values)):
            floats[i] = values[i]
    elif kind == BFLOAT16:
        for i in range(len(values)):
            bits = _as_bits(values[i])
            odd = numpy.uint32((bits >> numpy.uint32(16)) & numpy.uint32(1))
            rounded = numpy.uint32(numpy.uint32(bits + numpy.uint32(0x7FFF) + odd) >> numpy.uint32(16))
            if values[i] != values[i]:
                rounded = numpy.uint32(0x7FC0)
            halves[i] = numpy.uint16(rounded)
            values[i] = _as_float(numpy.uint32(rounded << numpy.uint32(16)))
    else:
        for i in range(len(values)):
            bits = _as_bits(values[i])
            size = numpy.uint32(bits & numpy.uint32(0x7FFFFFFF))
            odd = numpy.uint32((size >> numpy.uint32(13)) & numpy.uint32(1))
            rounded = numpy.uint32((size - numpy.uint32(0x38000000) + numpy.uint32(0xFFF) + odd) >> numpy.uint32(13))
            if size < numpy.uint32(0x38800000):  # subnormal: the unit in the last place of 0.5 is theirs
                small = _as_bits(numpy.float32(_as_float(size) + numpy.float32(0.5)))
                rounded = numpy.uint32(small - numpy.uint32(0x3F000000))
            if size >= numpy.uint32(0x47800000):
                rounded = numpy.uint32(0x7C00)
            if size > numpy.uint32(0x7F800000):
                rounded = numpy.uint32(0x7E00)
            halves[i] = numpy.uint16(rounded | numpy.uint32((bits >> numpy.uint32(16)) & numpy.uint32(0x8000)))
        _widen(kind, halves, floats, values)


@njit(**_OPTIONS)
def _mix(x):
    """Mix 32 bits, each into all others: the ``lowbias32`` permutation of Chris Wellons."""
    x = numpy.uint32(x ^ (x >> numpy.uint32(16)))
    x = numpy.uint32(x * numpy.uint32(0x7FEB352D))
    x = numpy.uint32(x ^ (x >> numpy.uint32(15)))
    x = numpy.uint32(x * numpy.uint32(0x846CA68B))
    return numpy.uint32(x ^ (x >> numpy.uint32(16)))


@njit(**_OPTIONS)
def _ties(stack, top, count, numbers, at, size):
    """Trim, elect and merge the topmost ``count`` values, in the order of `tva.merge.methods.ties`."""
    first, zero, one = top - count, numpy.float32(0), numpy.float32(1)
    elected, agreeing, merged = stack[-1, :size], stack[-2, :size], stack[first, :size]
    mean, weighted, least, positive = numbers[at], numbers[at + 1], numbers[at + 2], numbers[at + 3]
    for t in range(count):
        values, limit = stack[first + t, :size], numbers[at + 4 + t]
        factor = numbers[at + 4 + count + t] if weighted != 0 else one
        for i in range(size):
            value = values[i]
            value = zero if abs(value) <= limit else value
            values[i] = value
            elected[i] = value * factor if t == 0 else elected[i] + value * factor
    for i in range(size):
        total = elected[i]
        elected[i] = (one if total > 0 else positive) - (one + positive if total < 0 else zero)
        agreeing[i] = zero
    for t in range(count):
        values, weight = stack[first + t, :size], numbers[at + 4 + count + t]
        for i in range(size):
            part = values[i] * elected[i]
            agreeing[i] += weight if part > 0 else zero
            part = (zero if part < 0 else part) * weight
            merged[i] = part if t == 0 else merged[i] + part
    for i in range(size):
        value = merged[i] * elected[i]
        merged[i] = value / max(agreeing[i], least) if mean != 0 else value


@njit(**_OPTIONS)
def _block(steps, numbers, stack, halves, floats, kinds, relative, base, low, size, start, check):
    """Run the program over one block; its value is the stack's first row. Whether all deltas are finite, if checked."""
    top, finite = 0, True
    for j in range(len(steps)):
        kind, count, at = steps[j, 0], steps[j, 1], steps[j, 2]
        if kind == LOAD:
            row, wide = halves[count, low : low + size], floats[count, low : low + size]
            finite &= _load(kinds[count], row, wide, relative[count], base, stack[top, :size], check)
            top += 1
        elif kind == ZERO:
            for i in range(size):
                stack[top, i] = numpy.float32(0)
            top += 1
        elif kind == ADD:
            left, right = stack[top - 2, :size], stack[top - 1, :size]
            for i in range(size):
                left[i] = left[i] + right[i]
            top -= 1
        elif kind == SUB:
            left, right = stack[top - 2, :size], stack[top - 1, :size]
            for i in range(size):
                left[i] = left[i] - right[i]
            top -= 1
        elif kind == TIES:
            _ties(stack, top, count, numbers, at, size)
            top -= count - 1
        else:
            values, number = stack[top - 1, :size], numbers[at]
            if kind == MUL:
                for i in range(size):
                    values[i] = values[i] * number
            elif kind == DIV:
                for i in range(size):
                    values[i] = values[i] / number
            elif kind == NEG:
                for i in range(size):
                    values[i] = -values[i]
            elif kind == TRIM:
                for i in range(size):
                    values[i] = numpy.float32(0) if abs(values[i]) <= number else values[i]
            elif kind == DROP:
                upper, lower = numpy.uint32(steps[j, 3]), numpy.uint32(steps[j, 4])
                first, limit = numpy.uint32(start + low), numpy.int32(count)
                for i in range(size):
                    bits = _mix(numpy.uint32((first + numpy.uint32(i)) ^ upper))
                    bits = _mix(numpy.uint32(bits ^ lower))
                    keep = numpy.float32(1) if numpy.int32(bits) >= limit else numpy.float32(0)
                    values[i] = (values[i] / number) * keep
    return finite


@njit(**_OPTIONS)
def evaluate(steps, numbers, depth, halves, floats, kinds, relative, start, out):
    """Compute a program.

    Args:
        steps: From `tva.merge.program.encode`, as are ``numbers`` and ``depth``.
        numbers: Float32.
        depth: Of the stack.
        halves: Stored values, uint16; row 0 is the base's, row i that of vector i; at least as long as ``out``.
        floats: The same memory as float32.
        kinds: Dtype of each row.
        relative: Whether the base is to be subtracted from each row.
        start: Index in its tensor of the first element.
        out: Float32, shape (elements,).

    Returns:
        Whether all deltas are finite.
    """
    finite = True
    base = numpy.empty(BLOCK, numpy.float32)
    stack = numpy.empty((depth + 2, BLOCK), numpy.float32)  # two rows more for TIES
    alone = len(steps) == 1 and steps[0, 0] == LOAD  # a delta, which goes where it belongs at once
    for low in range(0, len(out), BLOCK):
        size = min(BLOCK, len(out) - low)
        _widen(kinds[0], halves[0, low : low + size], floats[0, low : low + size], base[:size])
        if alone:
            row, end = steps[0, 1], low + size
            stored = halves[row, low:end], floats[row, low:end]
            finite &= _load(kinds[row], stored[0], stored[1], relative[row], base[:size], out[low:end], True)
            continue
        finite &= _block(steps, numbers, stack, halves, floats, kinds, relative, base, low, size, start, True)
        for i in range(size):
            out[low + i] = stack[0, i]
    return finite


@njit(**_OPTIONS)
def agree(halves, floats, kinds, row, length):
    """Whether the first ``length`` values of a row equal those of the base; NaN equals NaN."""
    left, right = numpy.empty(BLOCK, numpy.float32), numpy.empty(BLOCK, numpy.float32)
    for low in range(0, length, BLOCK):
        size = min(BLOCK, length - low)
        _widen(kinds[0], halves[0, low : low + size], floats[0, low : low + size], left[:size])
        _widen(kinds[row], halves[row, low : low + size], floats[row, low : low + size], right[:size])
        same = True
        for i in range(size):
            same &= (left[i] == right[i]) | ((left[i] != left[i]) & (right[i] != right[i]))
        if not same:
            return False
    return True


@njit(fastmath={"reassoc"}, **_OPTIONS)
def _account(delta, base, written):
    """Count moved and changed elements, and sum squares; only these sums may be taken in any order.

    The counts are of at most a block, so that float32 has them exactly.
    """
    zero, one = numpy.float32(0), numpy.float32(1)
    moving, changed, change_square, base_square = zero, zero, zero, zero
    for i in range(len(delta)):
        change = written[i] - base[i]
        moving += one if delta[i] != zero else zero
        changed += one if change != zero else zero
        change_square += change * change
        base_square += base[i] * base[i]
    return int(moving), int(changed), numpy.float64(change_square), numpy.float64(base_square)


@njit(**_OPTIONS)
def _keep(wide, base, written, stored, out):
    """Keep non-finite elements of the base, and count them as zero; return whether everything else written is finite.

    Args:
        wide: Whether stored values are float32.
        base: Float32.
        written: Float32.
        stored: The base as it is stored, as uint16; empty where the output has another dtype.
        out: The output, as uint16.
    """
    finite = True
    for i in range(len(base)):
        if numpy.isfinite(base[i]):
            finite &= numpy.isfinite(written[i])
            continue
        base[i] = written[i] = numpy.float32(0)
        if len(stored):
            for j in range(2 * i, 2 * i + 2) if wide else range(i, i + 1):
                out[j] = stored[j]
    return finite


@njit(**_OPTIONS)
def edit(
    steps, numbers, depth, halves, floats, kinds, relative, start, scaling_coef, kind, length, out_halves, out_floats
):
    """Compute ``base + scaling_coef * program``, rounded once; arguments are those of `evaluate`, and these.

    Args:
        scaling_coef: Float32.
        kind: Dtype of the output.
        length: Elements.
        out_halves: Where to write, shape (elements,) uint16.
        out_floats: The same memory as float32.

    Returns:
        Whether all deltas are finite, and all that is written where the base is; elements whose delta is not
        zero; elements that change; sums of squares of the change and of the base.
    """
    finite, hides = True, False  # sums show NaN and infinity in what they give; other steps may lose them
    for j in range(len(steps)):
        hides |= steps[j, 0] in (TRIM, DROP, TIES)
    base, written = numpy.empty(BLOCK, numpy.float32), numpy.empty(BLOCK, numpy.float32)
    stack = numpy.empty((depth + 2, BLOCK), numpy.float32)
    moving, changed, change_square, base_square = 0, 0, 0.0, 0.0
    for low in range(0, length, BLOCK):
        size = min(BLOCK, length - low)
        _widen(kinds[0], halves[0, low : low + size], floats[0, low : low + size], base[:size])
        for check in (hides, True):
            finite &= _block(steps, numbers, stack, halves, floats, kinds, relative, base, low, size, start, check)
            for i in range(size):
                written[i] = stack[0, i] * scaling_coef + base[i]
            _round(kind, written[:size], out_halves[low : low + size], out_floats[low : low + size])
            more = _account(stack[0, :size], base[:size], written[:size])
            if check or numpy.isfinite(more[2]):
                break
        if not numpy.isfinite(more[2]):
            step = 2 if kind == FLOAT32 else 1
            stored = halves[0, step * low : step * (low + size) if kind == kinds[0] else step * low]
            finite &= _keep(kind == FLOAT32, base[:size], written[:size], stored, out_halves[step * low :])
            more = _account(stack[0, :size], base[:size], written[:size])
        moving += more[0]
        changed += more[1]
        change_square += more[2]
        base_square += more[3]
    return finite, moving, changed, change_square, base_square


@njit(**_OPTIONS)
def random_bits(start, upper, lower, out):
    """Fill ``out``, int32, with random bits of elements ``start`` and following, below 2³², by a key of two halves."""
    for i in range(len(out)):
        bits = _mix(numpy.uint32(numpy.uint32(start + i) ^ numpy.uint32(upper)))
        out[i] = numpy.int32(_mix(numpy.uint32(bits ^ numpy.uint32(lower))))


@njit(**_OPTIONS)
def _key(value, signed):
    """Return bits that order as unsigned integers as the values, or else their magnitudes, do."""
    if signed:
        bits = _as_bits(value + numpy.float32(0))  # which makes -0.0 the 0.0 that it equals
        return bits ^ (numpy.uint32(0xFFFFFFFF) if bits >> numpy.uint32(31) else numpy.uint32(0x80000000))
    return _as_bits(value) & numpy.uint32(0x7FFFFFFF)


@njit(**_OPTIONS)
def count_upper(values, signed, counts):
    """Count float32 values by the upper 16 bits of their keys."""
    for i in range(len(values)):
        counts[_key(values[i], signed) >> numpy.uint32(16)] += 1


@intrinsic
def _compare(context, values, at, signed, start, last):
    """Compare the keys of 64 values with a window, in vector registers, whatever their width.

    The arguments are a contiguous float32 array, an index, and as uint32 all ones or zeros, the first key and the
    number of further ones; the result is two masks: of the keys before the window, and of those within.
    """
    many, word, mask = ir.VectorType(ir.IntType(32), LANES), ir.IntType(32), ir.IntType(LANES)
    result = types.UniTuple(types.uint64, 2)

    def generate(context, builder, signature, arguments):
        def every(value):
            one = builder.insert_element(ir.Constant(many, ir.Undefined), value, ir.Constant(word, 0))
            return builder.shuffle_vector(one, ir.Constant(many, ir.Undefined), ir.Constant(many, [0] * LANES))

        def constant(value):
            return ir.Constant(many, [value] * LANES)

        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(array.data, [arguments[1]])
        floats = ir.VectorType(ir.FloatType(), LANES)
        value = builder.load(builder.bitcast(place, floats.as_pointer()), align=4)
        bits = builder.bitcast(builder.fadd(value, ir.Constant(floats, [0.0] * LANES)), many)
        signed, start, last = (every(argument) for argument in arguments[2:])
        # magnitudes lose their sign; of signed values the negative are turned, and the others get a bit above them
        turn = builder.and_(builder.ashr(bits, constant(31)), builder.or_(signed, constant(0x80000000)))
        key = builder.xor(bits, builder.or_(turn, builder.and_(signed, constant(0x80000000))))
        masks = (builder.icmp_unsigned("<", key, start), builder.icmp_unsigned("<=", builder.sub(key, start), last))
        return context.make_tuple(builder, signature.return_type, [builder.bitcast(m, mask) for m in masks])

    return result(values, types.int64, types.uint32, types.uint32, types.uint32), generate


@intrinsic
def _count_ones(context, bits):
    return types.int64(types.uint64), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


@intrinsic
def _lowest(context, bits):
    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


@njit(**_OPTIONS)
def count_window(values, signed, start, shift, counts):
    """Count float32 values whose keys are below, in each bin of, and above a window.

    Args:
        values: Contiguous, any length.
        signed: Whether keys are of values or of their magnitudes.
        start: The first key.
        shift: A bin holds the keys that are the same but for this many lower bits, counted from ``start``.
        counts: Added to: those before, those in each bin, those behind; shape (bins + 2,).
    """
    bins = len(counts) - 2
    first, turned = numpy.uint32(start), numpy.uint32(0xFFFFFFFF if signed else 0)
    last = numpy.uint32(min((bins << shift) - 1, 0xFFFFFFFF - start))
    before, within, whole = 0, 0, len(values) // LANES * LANES
    for i in range(0, whole, LANES):
        below, inside = _compare(values, i, turned, first, last)
        before += _count_ones(below)
        within += _count_ones(inside)
        while inside:
            place = numpy.uint32(_key(values[i + _lowest(inside)], signed) - first)
            counts[1 + (place >> shift)] += 1
            inside &= inside - numpy.uint64(1)
    for i in range(whole, len(values)):
        key = _key(values[i], signed)
        place = numpy.uint32(key - first)
        if key < first:
            before += 1
        elif place <= last:
            counts[1 + (place >> shift)] += 1
            within += 1
    counts[0] += before
    counts[-1] += len(values) - before - within


@njit(**_OPTIONS)
def locate(counts, rank):
    """Find the bin that holds a rank, and the rank within that bin."""
    position = 0
    while rank >= counts[position]:
        rank -= counts[position]
        position += 1
    return position, rank


_caching.__exit__(None, None, None)  # every function is decorated


@cache
def load() -> None:
    """Load the kernels that edits use, so that the memory that it takes (`LOADED_BYTES`, mostly numba) is known."""
    rows, kinds = numpy.zeros((1, 64), numpy.uint8), numpy.zeros(1, numpy.int64)
    halves, floats, out = rows.view(numpy.uint16), rows.view(numpy.float32), numpy.zeros(1, numpy.float32)
    agree(halves, floats, kinds, 0, 1)
    program = encode((Step(ZERO),))
    inputs = (program.steps, program.numbers, program.depth, halves, floats, kinds, kinds != 0, 0)
    evaluate(*inputs, out)
    edit(*inputs, numpy.float32(1), BFLOAT16, 1, halves[0], floats[0])
    counts = numpy.zeros(2**16, numpy.int64)
    count_upper(out, False, counts)
    count_window(out, False, 0, 0, counts)
    locate(counts, 0)
