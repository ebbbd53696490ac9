"""Errors of quantized weights, from the codes as they are stored: decoded in registers, measured, forgotten.

How: by vectors of `cpu_lanes`, in bands of rows that stay in L2 cache, block after block of 128 columns. Sums
are float32 in 32 lanes within a block, and float64 beyond it. `compare.py` defines what is measured, and
measures whatever does not fit here.

To tell errors beyond the outermost code, which count for less, from others is a third of the work. INT8 has
hardly any: there they are told apart only in those blocks of a band that would otherwise have the most steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from dsv3_tools.kernels.cpu_bits import as_float32, decode_e4m3, has_nan_code
from dsv3_tools.kernels.cpu_files import IN_MEMORY, rows_at
from dsv3_tools.kernels.cpu_lanes import (
    MAX_E4M3_SCALE,
    PAIR,
    add_product,
    any_above,
    count_same,
    e4m3_per_step,
    e4m3_unit,
    held,
    hold,
    larger,
    largest_bits,
    largest_lane,
    load_pair,
    magnitude,
    no_bits,
    power_below,
    raise_bits,
    smaller,
    splat,
    sum_lanes,
    where_below,
)
from dsv3_tools.kernels.jit import cached, compiled, inlined

__all__ = ["BLOCK", "Coded", "measure_codes"]

float32, uint8, uint32 = np.float32, np.uint8, np.uint32

BLOCK = 128
"""Rows and columns of the blocks that errors are summed over."""

_ANY_ROWS = 1 << 62
_MIN_SCALE = float32(2.0**-126)  # its inverse is finite
_TWO_POW_23 = 2.0**23  # see `cpu_lanes.load_pair`
_HELD = 96  # numbers of a block in `_Sums.held`
_RANGES = {np.dtype(np.int8): (128.0, 255.0), np.dtype(np.int32): (8.0, 15.0)}
"""By type of integer codes, how far the smallest is below 0, and the largest above the smallest."""

Array = np.ndarray[Any, Any]


class Coded(NamedTuple):
    """Some rows of a weight, as they are stored.

    Attributes:
        values: `[rows, columns]`: uint8 e4m3 codes, int8 codes, bits of BF16 (uint16) or of float32 (uint32);
            or `[rows, columns / 8]`: int32, eight INT4 codes each, the first lowest. From a file, room for
            as many rows as are read at once.
        scales: float32 `[scale rows, scale columns]`, the first row's first; one 1.0 for what is not coded.
        zeros: uint8 of the same shape, the zero points of INT4 codes; None is 8 everywhere.
        block_size: rows and columns that share a scale.
        place: descriptor and offset of the first row's values, or `cpu_files.IN_MEMORY`.
    """

    values: Array
    scales: Array
    zeros: Array | None
    block_size: tuple[int, int]
    place: tuple[int, int] = IN_MEMORY

    @classmethod
    def floats(cls, bits: Array, place: tuple[int, int] = IN_MEMORY) -> Coded:
        """Returns what is not coded."""
        return cls(bits, np.ones((1, 1), float32), None, (_ANY_ROWS, bits.shape[1]), place)


class _Source(NamedTuple):
    """Where rows come from, in compiled code: `block_size` and `place` as in `Coded`."""

    values: Any
    scales: Any
    block_size: Any
    place: Any


class _Rows(NamedTuple):
    """A band of rows, flat, and in which row of `scales` each is, and in which column each segment."""

    values: Any
    scales: Any
    scale_rows: Any
    scale_columns: Any


class _Codes(NamedTuple):
    """What codes are: the zero points, or one for all if there are none, and largest less smallest code.

    `slack` and `share` are those of `compare.compare_blocks`: slack, 1 / clamp.
    """

    zeros: Any
    zero: Any
    span: Any
    slack: Any
    share: Any


class _Sums(NamedTuple):
    """What is measured in a row of blocks.

    `held` are float32 lanes, `[blocks, 6 x 16]`: two sums of squares of the original, two of the errors, the
    largest error, the most steps. `same` counts equal elements, `bits` are the original's largest. `doubtful`
    is set for blocks that may have too many steps.
    """

    held: Any
    same: Any
    bits: Any
    doubtful: Any


def measure_codes(
    original: Coded,
    other: Coded,
    out: Sequence[Array],
    *,
    rows: int,
    top: int,
    slack: float = 0.0,
    clamp: float = 1.0,
) -> float | None:
    """Adds the errors of some rows to those of the blocks that they lie in: see `compare.compare_blocks`.

    Args:
        original: floats or e4m3 codes.
        other: e4m3, INT8 or INT4 codes.
        out: the fields of a `compare.BlockErrors`. A block's steps may be too many, but not more than the
            most of all blocks, which are right.
        rows: how many there are.
        top: the first one's number in the weight.
        slack: as there.
        clamp: as there.

    Returns:
        The largest error in steps of the weight so far. None, and nothing is added, for what `compare_blocks`
        has to measure: numbers that are not finite, scales that are not positive, columns or groups in
        multiples of something else than 32, an original in integer codes, rows that cannot be read.
    """
    finer, kind, columns = original.values.dtype, other.values.dtype, original.values.shape[1]
    widths = [min(side.block_size[1], columns) for side in (original, other)]
    segment = gcd(BLOCK, columns, *widths)
    if finer not in (uint8, np.uint16, uint32) or segment % PAIR:
        return None
    if finer == uint8 and (slack or (widths[0] < columns and widths[0] % BLOCK)):
        return None
    zeros = np.empty((0, 0), uint8) if other.zeros is None else other.zeros
    at_once = [len(side.values) for side in (original, other) if side.place != IN_MEMORY]
    farthest = _measure(
        _Source(original.values, original.scales, original.block_size, original.place),
        _Source(other.values, other.scales, other.block_size, other.place),
        _Codes(zeros, *map(float32, (*_RANGES.get(kind, (0, 0)), slack, 1 / clamp))),
        (rows, columns, top, segment, min(at_once, default=BLOCK)),
        kind == np.int32,
        *out,
    )
    return None if farthest < 0 else float(farthest)


# ---------------------------------------------------------------------- what depends on the elements' type


def _peak_of(values: Any, bits: Any, scale: Any) -> Any:
    """Returns the largest magnitude of elements with these largest `bits`; infinity if one is not finite."""
    raise NotImplementedError("compiled code only")


@overload(_peak_of, inline="always")
def _peak_of_overload(values, bits, scale):  # type: ignore[no-untyped-def]  # noqa: ARG001
    if values.dtype == types.uint8:
        return lambda values, bits, scale: (  # noqa: ARG005
            float32(np.inf) if bits == uint32(0x7F) else decode_e4m3(uint8(bits)) * abs(scale)
        )
    if values.dtype == types.uint16:
        return lambda values, bits, scale: as_float32(uint32(bits << uint32(16)))  # noqa: ARG005
    return lambda values, bits, scale: as_float32(bits)  # noqa: ARG005


def _weights_of(values: Any, loaded: Any, scale: Any) -> Any:
    """Returns the weights of a pair of vectors."""
    raise NotImplementedError("compiled code only")


@overload(_weights_of, inline="always")
def _weights_of_overload(values, loaded, scale):  # type: ignore[no-untyped-def]  # noqa: ARG001
    if values.dtype == types.uint8:
        return lambda values, loaded, scale: _times(loaded, scale)  # noqa: ARG005
    return lambda values, loaded, scale: loaded  # noqa: ARG005


def _rounding_of(values: Any, weight: Any, slack: Any) -> Any:
    """Returns by how much each weight may itself have been rounded: a share of its power of two."""
    raise NotImplementedError("compiled code only")


@overload(_rounding_of, inline="always")
def _rounding_of_overload(values, weight, slack):  # type: ignore[no-untyped-def]  # noqa: ARG001
    if values.dtype == types.uint8:
        return lambda values, weight, slack: splat(float32(0))  # noqa: ARG005
    return lambda values, weight, slack: power_below(weight) * slack  # noqa: ARG005


def _in_steps(values: Any, size: Any, code: Any) -> Any:
    """Returns sizes of errors as steps times the scale."""
    raise NotImplementedError("compiled code only")


@overload(_in_steps, inline="always")
def _in_steps_overload(values, size, code):  # type: ignore[no-untyped-def]  # noqa: ARG001
    if values.dtype == types.uint8:
        return lambda values, size, code: size * e4m3_per_step(code)  # noqa: ARG005
    return lambda values, size, code: size  # noqa: ARG005


def _largest_of(original: Any, other: Any, near: Any, far: Any) -> Any:
    """Returns `near`, or `far` where that must be the same: one maximum less in the loop."""
    raise NotImplementedError("compiled code only")


@overload(_largest_of, inline="always")
def _largest_of_overload(original, other, near, far):  # type: ignore[no-untyped-def]  # noqa: ARG001
    if original.dtype == types.uint8 and other.dtype != types.uint8:
        return lambda original, other, near, far: far  # noqa: ARG005
    return lambda original, other, near, far: near  # noqa: ARG005


def _all_finite(values: Any) -> Any:
    """Whether no code is NaN."""
    raise NotImplementedError("compiled code only")


@overload(_all_finite, inline="always")
def _all_finite_overload(values):  # type: ignore[no-untyped-def]
    if values.dtype == types.uint8:
        return lambda values: not has_nan_code(values)
    return lambda values: True  # noqa: ARG005


# ----------------------------------------------------------------------------------------- pairs of vectors


@inlined
def _times(pair: Any, factor: Any) -> Any:
    return pair[0] * factor, pair[1] * factor


@inlined
def _minus(pair: Any, other: Any) -> Any:
    return pair[0] - other[0], pair[1] - other[1]


@inlined
def _add_squares(totals: Any, pair: Any) -> Any:
    return add_product(totals[0], pair[0], pair[0]), add_product(totals[1], pair[1], pair[1])


@inlined
def _raise_to_magnitude(most: Any, pair: Any) -> Any:
    return larger(most, larger(magnitude(pair[0]), magnitude(pair[1])))


# ------------------------------------------------------------------------------------------------- one band


@compiled
def _measure_band(
    original: Any, other: Any, codes: Any, sizes: Any, part: Any, most: Any, clamps: bool, sums: Any
) -> None:
    """Adds what is measured in some rows of some blocks.

    Args:
        original: `_Rows`.
        other: `_Rows`.
        codes: `_Codes`, the other's.
        sizes: columns of the weight, and of a segment, which share all scales.
        part: the first column, and the last one's successor.
        most: steps so far.
        clamps: tell errors beyond the outermost codes from others.
        sums: `_Sums`.
    """
    columns, segment = sizes
    nothing, bound = splat(float32(0)), splat(float32(most))
    slack, share = splat(codes.slack), splat(codes.share)
    for start in range(part[0], part[1], BLOCK):
        block = start // BLOCK
        here = sums.held[block]
        signal, error = (held(here, 0), held(here, 16)), (held(here, 32), held(here, 48))
        largest, steps = held(here, 64), nothing
        bits, equal = no_bits(original.values), 0
        first, last = start // segment, min(start + BLOCK, part[1]) // segment
        for i in range(original.scale_rows.size):
            for n in range(first, last):
                unit = original.scales[original.scale_rows[i], original.scale_columns[n]]
                row, column = other.scale_rows[i], other.scale_columns[n]
                step = other.scales[row, column]
                zero = float32(codes.zeros[row, column]) if codes.zeros.size else codes.zero
                origin, scale = splat(float32(zero + _TWO_POW_23)), splat(unit / e4m3_unit(original.values))
                low, high = splat(float32(0.5) - zero), splat(codes.span - float32(0.5) - zero)
                width = splat(step / e4m3_unit(other.values))
                near = far = above = below = nothing
                begin = i * columns + n * segment
                for j in range(begin, begin + segment, PAIR):
                    bits = raise_bits(bits, original.values, j)
                    loaded = load_pair(original.values, j, other.values, origin)
                    code = load_pair(other.values, j, original.values, origin)
                    weight, coded = _weights_of(original.values, loaded, scale), _times(code, width)
                    off = _minus(weight, coded)
                    signal, error = _add_squares(signal, weight), _add_squares(error, off)
                    equal += count_same(weight[0], coded[0]) + count_same(weight[1], coded[1])
                    near = _raise_to_magnitude(near, off)
                    for half in range(2):
                        free = _rounding_of(original.values, weight[half], slack)
                        far = larger(far, _in_steps(other.values, magnitude(off[half]) - free, code[half]))
                        if clamps:
                            above = larger(above, where_below(off[half] - free, code[half], high))
                            below = smaller(below, where_below(off[half] - (nothing - free), low, code[half]))
                largest = larger(largest, _largest_of(original.values, other.values, near, far))
                if clamps:
                    far = larger(larger(far * share, above), nothing - below)
                steps = larger(steps, far * splat(float32(1) / step))
        hold(here, 0, signal[0])
        hold(here, 16, signal[1])
        hold(here, 32, error[0])
        hold(here, 48, error[1])
        hold(here, 64, largest)
        sums.same[block] += equal
        sums.bits[block] = max(sums.bits[block], largest_bits(bits))
        sums.doubtful[block] = not clamps and codes.span > 0 and any_above(steps, bound)
        if not sums.doubtful[block]:
            hold(here, 80, larger(held(here, 80), steps))


# -------------------------------------------------------------------------------------------------- all rows


@compiled
def _are_usable(original: Any, other: Any) -> Any:
    """Whether no product overflows, and every step has an inverse."""
    usable = True
    for row in original.scales:
        for scale in row:
            usable &= abs(scale) < MAX_E4M3_SCALE  # False for NaN
    for row in other.scales:
        for scale in row:
            usable &= (scale >= _MIN_SCALE) & (scale < MAX_E4M3_SCALE)
    return usable


@compiled
def _places(count: int, unit: int, offset: int, size: int) -> Any:
    """Returns in which block of `size` each of `count` units is, counted from the first one's."""
    places = np.empty(count, np.int64)
    for n in range(count):
        places[n] = (offset + n * unit) // size - offset // size
    return places


@compiled
def _new_sums(blocks: int) -> Any:
    """Returns those of so many blocks before anything was measured."""
    held_lanes, same = np.zeros((blocks, _HELD), float32), np.zeros(blocks, np.int64)
    return _Sums(held_lanes, same, np.zeros(blocks, uint32), np.zeros(blocks, np.bool_))


@compiled
def _look_again(original: Any, other: Any, codes: Any, sizes: Any, most: Any, sums: Any, spare: Any) -> Any:
    """Adds the steps of blocks that are in doubt; returns the most steps so far."""
    for block in range(sums.doubtful.size):
        again = sums.doubtful[block]  # not a literal True below, for which numba would compile once more
        if again:
            part = block * BLOCK, min(sizes[0], (block + 1) * BLOCK)
            spare.held[block] = float32(0)
            _measure_band(original, other, codes, sizes, part, most, again, spare)
            steps = held(spare.held[block], 80)
            hold(sums.held[block], 80, larger(held(sums.held[block], 80), steps))
            most = max(most, largest_lane(steps))
    return most


@compiled
def _add_block_row(original: Any, segment: int, sums: Any, found: Any) -> Any:
    """Moves what is held to the errors of a row of blocks; returns whether the original is finite there."""
    finite = True
    for block in range(sums.same.size):
        here, column = sums.held[block], original.scale_columns[block * BLOCK // segment]
        scale = original.scales[original.scale_rows[0], column]
        peak = _peak_of(original.values, sums.bits[block], scale)
        finite &= peak < float32(np.inf)
        found[0, block] += sums.same[block]
        found[1, block] += sum_lanes(held(here, 0)) + sum_lanes(held(here, 16))
        found[2, block] += sum_lanes(held(here, 32)) + sum_lanes(held(here, 48))
        found[3, block] = max(found[3, block], largest_lane(held(here, 80)))
        found[4, block] = max(found[4, block], largest_lane(held(here, 64)))
        found[5, block] = max(found[5, block], peak)
    sums.held[:], sums.same[:], sums.bits[:] = float32(0), 0, uint32(0)
    return finite


@compiled
def _next(row: int, size: int) -> Any:
    """Returns the first row of the next block of `size` rows."""
    return (row // size + 1) * size


@compiled
def _add_found(
    found: Any, first_row: int, same: Any, signal: Any, error: Any, steps: Any, largest: Any, peak: Any
) -> None:
    """Adds the errors of some rows of blocks to those of the weight: nothing is added before all is read."""
    for i in range(found.shape[1]):
        for block in range(found.shape[2]):
            here, place = found[:, i, block], (first_row + i, block)
            same[place] += here[0]
            signal[place] += here[1]
            error[place] += here[2]
            steps[place] = max(steps[place], here[3])
            largest[place] = max(largest[place], here[4])
            peak[place] = max(peak[place], here[5])


@cached
def _measure(
    ours: Any,
    theirs: Any,
    codes: Any,
    shape: Any,
    clamps: bool,
    same: Any,
    signal: Any,
    error: Any,
    steps: Any,
    largest: Any,
    peak: Any,
) -> Any:
    """Returns the largest error in steps so far, or -1: see `measure_codes`.

    Args:
        ours: `_Source` of the original.
        theirs: `_Source` of the other.
        codes: `_Codes`, theirs.
        shape: rows, columns, the first row's number, columns of a segment, rows to read at once.
        clamps: tell errors beyond the outermost codes from others at once.
        same: as in `compare.BlockErrors`.
        signal: as there.
        error: as there.
        steps: as there.
        largest: as there.
        peak: as there.
    """
    rows, columns, top, segment, at_once = shape
    if not _are_usable(ours, theirs):
        return -1.0
    blocks, segments, first_block = same.shape[1], columns // segment, top // BLOCK
    our_rows, their_rows = (
        _places(rows, 1, top, ours.block_size[0]),
        _places(rows, 1, top, theirs.block_size[0]),
    )
    our_columns = _places(segments, segment, 0, ours.block_size[1])
    their_columns = _places(segments, segment, 0, theirs.block_size[1])
    found = np.zeros((6, (top + rows - 1) // BLOCK - first_block + 1, blocks))
    sums, spare = _new_sums(blocks), _new_sums(blocks)
    most, begin = float32(steps.max()), 0
    while begin < rows:
        row = top + begin
        end = min(rows, begin + at_once, _next(row, BLOCK) - top, _next(row, ours.block_size[0]) - top)
        our_read, a = rows_at(ours.values, ours.place, begin, end - begin)
        their_read, b = rows_at(theirs.values, theirs.place, begin, end - begin)
        if not (our_read and their_read and _all_finite(b.reshape(-1))):
            return -1.0
        original = _Rows(a.reshape(-1), ours.scales, our_rows[begin:end], our_columns)
        other = _Rows(b.reshape(-1), theirs.scales, their_rows[begin:end], their_columns)
        _measure_band(original, other, codes, (columns, segment), (np.int64(0), columns), most, clamps, sums)
        most = _look_again(original, other, codes, (columns, segment), most, sums, spare)
        begin = end
        if end == rows or (top + end) % BLOCK == 0 or (top + end) % ours.block_size[0] == 0:
            if not _add_block_row(original, segment, sums, found[:, row // BLOCK - first_block]):
                return -1.0
            most = max(most, float32(found[3].max()))
    _add_found(found, first_block, same, signal, error, steps, largest, peak)
    return most
