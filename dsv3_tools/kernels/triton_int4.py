"""INT4 kernels for CUDA, bit for bit equal to `reference_integer.py`; `triton_integer.py` launches them.

A program holds its weights in registers, whole groups of them, and writes packed words: eight codes are
added up in one int32, each shifted to its place, and what the arithmetic left above their low four bits
is subtracted from the sum, once.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from dsv3_tools.kernels.triton_bits import (
    UNSPECIALIZED,
    bits_after_rounding,
    describe,
    divide,
    finite,
    is_easy,
    load_parts,
    maximum_or_nan,
    pick,
    store,
    widen,
)

__all__ = ["dequantize_int4_kernel", "quantize_int4_kernel"]

_TO_INTEGER = tl.constexpr(1.5 * 2**23)
"""Added to a float32 under 2**22 it leaves the nearest integer (of two, the even one) in the low bits."""


@triton.jit
def _decode_words(words, scales, zeros, scale_offset, mask, SCALE: tl.constexpr, HAS_ZERO: tl.constexpr):
    """Returns the float32 weights of packed words, eight more in a last axis, and the words' scales."""
    word = tl.load(words, mask=mask, other=0)
    RAW: tl.constexpr = tl.int32 if SCALE.is_fp32() else tl.int16
    raw_scale = tl.load(scales.to(tl.pointer_type(RAW)) + scale_offset, mask=mask, other=0)
    scale = widen(raw_scale, SCALE).to(tl.float32, bitcast=True)
    code = ((word[:, :, None] >> tl.arange(0, 8)[None, None, :] * 4) & 15).to(tl.float32)
    if HAS_ZERO:
        zero = tl.load(zeros.to(tl.pointer_type(tl.uint8)) + scale_offset, mask=mask, other=0).to(tl.float32)
        code = code - zero[:, :, None]
    else:
        code = code - 8.0
    return code * scale[:, :, None], scale


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dequantize_int4_kernel(
    table: tl.int64,
    counts: tl.int64,
    num_items: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    target: tl.int64,
    source: tl.int64,
    scale: tl.int64,
    zero: tl.int64,
    OUT: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Takes TILE_ROWS x TILE_WORDS words of one item. Only a scale can make a weight that is not finite.

    As `[TILE_WORDS, TILE_ROWS]`, and `[TILE_WORDS, TILE_ROWS, 8]` weights: the first axis is spread over
    threads first, so that these are side by side in memory, and a thread's word is its weights'.
    """
    item, tile, rows, columns = describe(table, num_items, rows, columns, GROUPED)
    target = pick(table, num_items, item, 0, target, GROUPED)
    source = pick(table, num_items, item, 1, source, GROUPED)
    scale = pick(table, num_items, item, 2, scale, GROUPED)
    columns = columns // ALIGN * ALIGN  # no change; tells the compiler (a hint would not outlive inlining)
    OUT_BYTES: tl.constexpr = OUT.primitive_bitwidth // 8
    row_words = columns // 8
    tiles_across = tl.cdiv(row_words, TILE_WORDS)
    first_row = tile // tiles_across * TILE_ROWS
    word_column = tile % tiles_across * TILE_WORDS + tl.arange(0, TILE_WORDS)[:, None]
    row = tl.arange(0, TILE_ROWS)[None, :]
    mask = (first_row + row < rows) & (word_column < row_words)
    words = source.to(tl.pointer_type(tl.int32)) + first_row.to(tl.int64) * row_words
    offset = row * row_words + word_column
    scale_offset = (first_row + row).to(tl.int64) * (columns // GROUP) + word_column * 8 // GROUP
    if HAS_ZERO:
        zero = pick(table, num_items, item, 3, zero, GROUPED)
    value, group_scale = _decode_words(words + offset, scale, zero, scale_offset, mask, SCALE, HAS_ZERO)
    outs = tl.multiple_of(target.to(tl.pointer_type(OUT)), min(ALIGN * OUT_BYTES, 16))
    outs += first_row.to(tl.int64) * columns
    out_offset = (row * columns + word_column * 8)[:, :, None] + tl.arange(0, 8)[None, None, :]
    tl.store(outs + out_offset, value.to(OUT), mask=mask[:, :, None])

    # 256 x what is below is finite in both dtypes; NaN and infinity are more, too.
    magnitude = group_scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if tl.max(tl.max(magnitude, 1), 0) >= 0x7B000000:  # 2**119
        tl.debug_barrier()  # orders the stores below after the one above, whichever thread made that
        # From memory again: Triton would keep what both ways share in two layouts.
        value, _ = _decode_words(words + offset, scale, zero, scale_offset, mask, SCALE, HAS_ZERO)
        bits = bits_after_rounding(value, OUT)
        if OUT.is_bf16():
            raw_outs = outs.to(tl.pointer_type(tl.int16), bitcast=True)
            tl.store(raw_outs + out_offset, (bits >> 16).to(tl.int16), mask=mask[:, :, None])
        else:
            tl.store(
                outs.to(tl.pointer_type(tl.int32), bitcast=True) + out_offset, bits, mask=mask[:, :, None]
            )
        not_finite = mask[:, :, None] & ((bits & 0x7FFFFFFF) >= 0x7F800000)
        count = tl.sum(tl.sum(tl.sum(not_finite.to(tl.int32), 2), 1), 0)
        if count > 0:
            tl.atomic_add(counts.to(tl.pointer_type(tl.int32)) + item, count)


@triton.jit
def _plain_scale(low, high, EASY: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Returns the plain scales, before their rounding, of groups that these numbers bound.

    EASY: they are right where they come out easy. Markstein's division is, with one remainder: an integer
    over 15 is 1 / 15 at least away from the middle between two others.
    """
    if SYMMETRIC:
        divisor = tl.full(high.shape, 7.5, tl.float32)
        plain = divide(high, divisor, 1) if EASY else tl.div_rn(high, divisor)
    else:
        divisor = tl.full(high.shape, 15.0, tl.float32)
        plain = tl.div_rn(high, divisor) - tl.div_rn(low, divisor)
    return plain


@triton.jit
def _scale_and_zero(plain, low, factor, SYMMETRIC: tl.constexpr):
    """Returns the groups' scales (bfloat16 numbers) and zero points for a factor, all as float32."""
    scale = bits_after_rounding(plain * factor, tl.bfloat16).to(tl.float32, bitcast=True)
    scale = tl.where(scale < 2.0**-126, 1.0, scale)
    if SYMMETRIC:
        zero = tl.full(scale.shape, 8.0, tl.float32)
    else:
        quotient = tl.div_rn(low * factor * -1.0, scale)  # from 0 to 15 and a little
        zero = tl.minimum((quotient + _TO_INTEGER) - _TO_INTEGER, 15.0)
    return scale, zero


@triton.jit
def _reciprocal(scale):
    """Returns 1 / scale, correctly rounded, of easy bfloat16 scales.

    One step from an approximation, by its exact error: a power of two over an integer under 2**8 is 2**-8 at
    least away from the middle between two float32.
    """
    near = 1.0 / scale
    return tl.fma(tl.fma(near * -1.0, scale, tl.full(scale.shape, 1.0, tl.float32)), near, near)


@triton.jit
def _clamped(rounded, zero, CLAMP_LEAST: tl.constexpr):
    """Returns _TO_INTEGER + (code - zero), for such a sum with the code clamped to what four bits hold."""
    rounded = tl.minimum(rounded, (zero * -1.0 + (_TO_INTEGER + 15.0))[:, :, None, None])
    if CLAMP_LEAST:
        rounded = tl.maximum(rounded, (zero * -1.0 + _TO_INTEGER)[:, :, None, None])
    return rounded


@triton.jit
def _of_groups(values):
    """Returns `[rows, groups, parts, span]` summed up to `[rows, groups]`."""
    return tl.sum(tl.sum(values, 3), 2)


@triton.jit
def _error(value, scale, zero, EASY: tl.constexpr, CLAMP_LEAST: tl.constexpr):
    """Returns the groups' squared errors, int32, as `reference_integer` defines them."""
    reciprocal = _reciprocal(scale) if EASY else tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    quotient = value * reciprocal[:, :, None, None]
    error = quotient - (_clamped(quotient + _TO_INTEGER, zero, CLAMP_LEAST) - _TO_INTEGER)
    # The sum of what is subtracted from each, as the int32 that it overflows to.
    OFFSET: tl.constexpr = (value.shape[2] * value.shape[3] * 0x43000000 + (1 << 31)) % (1 << 32) - (1 << 31)
    return _of_groups((error * error + 128.0).to(tl.int32, bitcast=True)) - OFFSET


@triton.jit
def _factor(i):
    """Returns number i of `reference_integer.SCALE_FACTORS`."""
    percent = tl.where(i == 0, 100, tl.where(i < 4, 112 - 3 * i, 109 - 3 * i))
    return tl.div_rn(percent.to(tl.float32), 100.0)


@triton.jit
def _try(
    value,
    plain,
    low,
    factor,
    first,
    least,
    scale,
    zero,
    EASY: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    CLAMP_LEAST: tl.constexpr,
):
    """Returns the least cost, its scale and its zero point, with another factor tried."""
    tried, tried_zero = _scale_and_zero(plain, low, factor, SYMMETRIC)
    # Of two bfloat16 numbers: a remainder is enough, as it is for a plain scale.
    ratio = divide(tried, first, 1) if EASY else tl.div_rn(tried, first)
    cost = _error(value, tried, tried_zero, EASY, CLAMP_LEAST).to(tl.float32) * ratio * ratio
    better = cost < least
    return tl.where(better, cost, least), tl.where(better, tried, scale), tl.where(better, tried_zero, zero)


@triton.jit
def _search(value, plain, low, EASY: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Returns the groups' scales and zero points with the smallest squared error, the first of equals.

    EASY: all scales are within `is_easy`, but for the factors.
    """
    first, zero = _scale_and_zero(plain, low, 1.0, SYMMETRIC)
    least = _error(value, first, zero, EASY, not SYMMETRIC).to(tl.float32)
    scale = first
    # The quotients of a symmetric group are 7.5 / factor x (1 + 2**-8) at most, 8.28 up to number 6.
    MIDDLE: tl.constexpr = 7 if SYMMETRIC and EASY else 1
    for i in range(1, MIDDLE):
        least, scale, zero = _try(
            value, plain, low, _factor(i), first, least, scale, zero, EASY, SYMMETRIC, False
        )
    for i in range(MIDDLE, 16):
        least, scale, zero = _try(
            value, plain, low, _factor(i), first, least, scale, zero, EASY, SYMMETRIC, True
        )
    return scale, zero


@triton.jit
def _near_half(ratio):
    """Returns where code x ratio, of an FP8 code, can be within 5 units of a half of an odd integer under 32.

    FP8's significands are 8 ... 15; such a half has five bits, so that 19 of its 24 as a float32 are zero.
    """
    product = ratio[:, :, None, None] * (tl.arange(0, 8) + 8).to(tl.float32)[None, None, None, :]
    return tl.min(tl.min((product.to(tl.int32, bitcast=True) + 6) & 0x7FFFF, 3), 2) <= 12


@triton.jit
def _pack(rounded, zero):
    """Returns the words, `[rows, groups, parts, span / 8]`, of what `_clamped` returned."""
    base = (zero * -1.0 + _TO_INTEGER).to(tl.int32, bitcast=True)[:, :, None, None]
    eight = tl.reshape(
        rounded.to(tl.int32, bitcast=True),
        (rounded.shape[0], rounded.shape[1], rounded.shape[2], rounded.shape[3] // 8, 8),
    )
    return tl.sum(eight << (tl.arange(0, 8) * 4)[None, None, None, None, :], 4) - base * 0x11111111


@triton.jit
def _minimum_or_nan(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quantize_tile(  # noqa: PLR0912, PLR0915 - one pass over a tile; most branches are the compiler's
    source,
    source_scale,
    words,
    scales,
    zeros,
    count,
    first_row,
    first_group,
    rows,
    columns,
    WEIGHT: tl.constexpr,
    FP8_ROWS: tl.constexpr,
    FP8_COLUMNS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SEARCH: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_CONVERSIONS: tl.constexpr,
    ALIGN: tl.constexpr,
    FULL: tl.constexpr,
):
    """Quantizes NUM_ROWS x TILE_GROUPS groups; see `quantize_int4_kernel`."""
    row = tl.arange(0, NUM_ROWS)[:, None, None, None]
    group = first_group + tl.arange(0, TILE_GROUPS)[None, :, None, None]
    part = group * GROUP + tl.arange(0, GROUP // SPAN)[None, None, :, None] * SPAN
    ONE_SCALE: tl.constexpr = FP8_COLUMNS % GROUP == 0
    value, fp8_scale, mask = load_parts(
        source, source_scale, first_row, row,
        group * GROUP if ONE_SCALE else part, part + tl.arange(0, SPAN)[None, None, None, :], rows, columns,
        WEIGHT, FP8_ROWS, FP8_COLUMNS, NUM_ROWS, GROUP if ONE_SCALE else SPAN, HAS_CONVERSIONS, ALIGN, FULL,
    )  # fmt: skip
    BY_CODE: tl.constexpr = WEIGHT.is_fp8e4nv() and ONE_SCALE and not SEARCH
    if WEIGHT.is_fp8e4nv() and not BY_CODE:
        value = value * fp8_scale
    if SYMMETRIC:
        high = tl.reduce(tl.reduce(tl.abs(value), 3, maximum_or_nan), 2, maximum_or_nan)
        low = high
    else:
        high = tl.maximum(tl.reduce(tl.reduce(value, 3, maximum_or_nan), 2, maximum_or_nan), 0.0,
                          propagate_nan=tl.PropagateNan.ALL)  # fmt: skip
        low = tl.minimum(tl.reduce(tl.reduce(value, 3, _minimum_or_nan), 2, _minimum_or_nan), 0.0,
                         propagate_nan=tl.PropagateNan.ALL)  # fmt: skip
    if BY_CODE:
        own_scale = tl.sum(tl.sum(fp8_scale, 3), 2)  # the last two axes are 1
        high = high * own_scale
        low = low * own_scale
    plain = _plain_scale(low, high, True, SYMMETRIC)
    scale, zero = _scale_and_zero(plain, low, 1.0, SYMMETRIC)
    sound = finite(high) & finite(low) & is_easy(scale)
    if BY_CODE:
        ratio = own_scale * _reciprocal(scale)
        sound = sound & is_easy(own_scale) & (_near_half(ratio) == 0)
    if tl.min(tl.min(sound.to(tl.int32), 1), 0) == 1:
        if SEARCH:
            scale, zero = _search(value, plain, low, True, SYMMETRIC)
        if BY_CODE:
            many = tl.full(value.shape, _TO_INTEGER, tl.float32)
            rounded = tl.fma(value, tl.broadcast_to(ratio[:, :, None, None], value.shape), many)
        else:  # a remainder is enough, as it is for INT8
            rounded = divide(value, scale[:, :, None, None], 1) + _TO_INTEGER
        # The quotients of a plain scale are 7.5 x (1 + 2**-8) at most: only the greatest code needs clamping.
        word = _pack(_clamped(rounded, zero, SEARCH or not SYMMETRIC), zero)
    else:
        if BY_CODE:
            value = value * fp8_scale
        not_finite = _of_groups((mask & (finite(value) == 0)).to(tl.int32))
        not_finite = tl.sum(tl.sum(not_finite, 1), 0)
        if not_finite > 0:
            tl.atomic_add(count, not_finite)
        value = tl.where(finite(value), value, 0.0)
        if SYMMETRIC:
            high = tl.max(tl.max(tl.abs(value), 3), 2)
            low = high
        else:
            high = tl.maximum(tl.max(tl.max(value, 3), 2), 0.0)
            low = tl.minimum(tl.min(tl.min(value, 3), 2), 0.0)
        plain = _plain_scale(low, high, False, SYMMETRIC)
        scale, zero = _scale_and_zero(plain, low, 1.0, SYMMETRIC)
        if SEARCH:
            scale, zero = _search(value, plain, low, False, SYMMETRIC)
        rounded = tl.div_rn(value, tl.broadcast_to(scale[:, :, None, None], value.shape)) + _TO_INTEGER
        word = _pack(_clamped(rounded, zero, True), zero)

    row_words = columns // max(ALIGN, 8) * (max(ALIGN, 8) // 8)
    words = tl.multiple_of(words + first_row.to(tl.int64) * row_words, max(ALIGN // 2, 4))
    word_column = part // 8 + tl.arange(0, SPAN // 8)[None, None, None, :]
    store(words + (row * row_words + word_column), word, (first_row + row < rows) & (part < columns), FULL)
    own = row * (columns // GROUP) + group
    own_start = first_row.to(tl.int64) * (columns // GROUP)
    own_mask = (first_row + row < rows) & (group * GROUP < columns)
    raw_scale = (scale.to(tl.int32, bitcast=True) >> 16).to(tl.int16)[:, :, None, None]
    store(scales + own_start + own, raw_scale, own_mask, FULL)
    if not SYMMETRIC:
        store(zeros + own_start + own, zero.to(tl.uint8)[:, :, None, None], own_mask, FULL)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def quantize_int4_kernel(
    table: tl.int64,
    counts: tl.int64,
    num_items: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    source: tl.int64,
    source_scale: tl.int64,
    target: tl.int64,
    scale: tl.int64,
    zero: tl.int64,
    WEIGHT: tl.constexpr,
    FP8_ROWS: tl.constexpr,
    FP8_COLUMNS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SEARCH: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_CONVERSIONS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Takes `TILE_GROUPS` groups side by side in each of `TILE_ROWS` rows of one item, `NUM_ROWS` at a time.

    As `[NUM_ROWS, TILE_GROUPS, GROUP / SPAN, SPAN]`: of what lies apart in memory, Triton spreads the first
    axis over threads first, and the last one last. So a group is in few threads, and little is done twice.

    What has one FP8 scale for a whole group need not be multiplied by it, neither for the plain scale nor for
    the codes, whose quotient is FP8 code x (FP8 scale / scale). That is at most 4 units of its last place
    from the definition's quotient, and matters only next to a half of an odd integer. Few groups can have a
    code there (`_near_half`); a tile that may goes the long way, as one does that has NaN or infinity.
    """
    item, tile, rows, columns = describe(table, num_items, rows, columns, GROUPED)
    source = pick(table, num_items, item, 0, source, GROUPED)
    source_scale = pick(table, num_items, item, 1, source_scale, GROUPED)
    words = pick(table, num_items, item, 2, target, GROUPED).to(tl.pointer_type(tl.int32))
    scales = pick(table, num_items, item, 3, scale, GROUPED).to(tl.pointer_type(tl.int16))
    zeros = pick(table, num_items, item, 4, zero, GROUPED).to(tl.pointer_type(tl.uint8))
    count = counts.to(tl.pointer_type(tl.int32)) + item
    columns = columns // ALIGN * ALIGN  # no change; tells the compiler (a hint would not outlive inlining)
    tiles_across = tl.cdiv(columns // GROUP, TILE_GROUPS)
    first_group = tile % tiles_across * TILE_GROUPS
    first_row = tile // tiles_across * TILE_ROWS
    last = tl.minimum(first_row + TILE_ROWS, rows)
    if ((first_row + TILE_ROWS) <= rows) & ((first_group + TILE_GROUPS) * GROUP <= columns):
        while first_row < last:
            _quantize_tile(
                source, source_scale, words, scales, zeros, count, first_row, first_group, rows, columns,
                WEIGHT, FP8_ROWS, FP8_COLUMNS, SYMMETRIC, SEARCH, GROUP, NUM_ROWS, TILE_GROUPS, SPAN,
                HAS_CONVERSIONS, ALIGN, True,
            )  # fmt: skip
            first_row += NUM_ROWS
    else:
        while first_row < last:
            _quantize_tile(
                source, source_scale, words, scales, zeros, count, first_row, first_group, rows, columns,
                WEIGHT, FP8_ROWS, FP8_COLUMNS, SYMMETRIC, SEARCH, GROUP, NUM_ROWS, TILE_GROUPS, SPAN,
                HAS_CONVERSIONS, ALIGN, False,
            )  # fmt: skip
            first_row += NUM_ROWS
