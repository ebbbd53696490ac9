"""What the CUDA kernels of all formats share on the device: finding the item, decoding, dividing, NaN.

Bit for bit what `reference.py` does, from compute capability 8.0 on:

- From 8.9 on, FP8 is decoded and encoded by the device's conversions (exact; to nearest even, saturating).
  Before, and in Triton's interpreter, by integer arithmetic and by float32 operations that are exact.
  PTX's float32 arithmetic keeps subnormal numbers unless `.ftz` is asked for, and `enable_fp_fusion=False`
  keeps products and sums apart.
- Triton's `/` is not correctly rounded. `tl.div_rn` is, and divides once for each scale; the division of
  every weight is Markstein's (see `divide`) and takes a third of the instructions.
- What is rare (NaN, infinity) is found by one maximum over a tile and put right in a branch that costs
  nothing where the weights are sound.

Bit patterns of float32: 0x7F800000 infinity, 0x7FC00000 the one NaN.
"""

# Triton compiles its functions from source and knows no annotations; its kernels take pointers by position.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "UNSPECIALIZED",
    "bits_after_rounding",
    "block_by_block",
    "decode",
    "describe",
    "divide",
    "finite",
    "is_easy",
    "largest_bits",
    "load",
    "load_parts",
    "load_values",
    "maximum_or_nan",
    "pick",
    "store",
    "widen",
]

UNSPECIALIZED = [
    *("table", "counts", "num_items", "rows", "columns"),
    *("source", "source_scale", "target", "scale", "like", "zero"),
]
"""One compilation for all pointers and shapes: what the kernels may assume of them is `ALIGN`."""


@triton.jit
def _find_item(first_tiles, num_items, tile):
    """Returns the last item, of a power of two of them, whose first tile is not after `tile`.

    So never an empty item, nor one that only pads the table.
    """
    item = 0
    step = num_items // 2
    while step > 0:
        item = tl.where(tl.load(first_tiles + item + step) <= tile, item + step, item)
        step = step // 2
    return item


@triton.jit
def describe(table, num_items, rows, columns, GROUPED: tl.constexpr):
    """Returns (item, tile within the item, rows, columns) of this program."""
    tile = tl.program_id(0)
    item = 0
    if GROUPED:
        table = table.to(tl.pointer_type(tl.int64))
        item = _find_item(table, num_items, tile)
        tile -= tl.load(table + item).to(tl.int32)
        rows = tl.load(table + num_items + item).to(tl.int32)
        columns = tl.load(table + 2 * num_items + item).to(tl.int32)
    return item, tile, rows, columns


@triton.jit
def pick(table, num_items, item, OPERAND: tl.constexpr, pointer, GROUPED: tl.constexpr):
    """Returns the item's pointer of the group's operand number OPERAND; `pointer` where the item is alone."""
    if GROUPED:
        pointer = tl.load(table.to(tl.pointer_type(tl.int64)) + (3 + OPERAND) * num_items + item)
    return pointer.to(tl.int64)  # which it is, but for a null pointer in the interpreter


@triton.jit
def decode(code, HAS_CONVERSIONS: tl.constexpr):
    """Returns FP8 codes, uint8, as float32."""
    if HAS_CONVERSIONS:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        code = code.to(tl.int32)
        value = tl.where((code & 0x7F) == 0x7F, float("nan"), _value_of_code(code) * 2.0**120)
    return value


@triton.jit
def _value_of_code(code):
    """Returns FP8 code x 2**-120 as float32; a NaN code comes out as +-480 x 2**-120."""
    return (((code & 0x7F) << 20) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def finite(value):
    """Returns where `value` is neither NaN nor infinite."""
    return (value.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000


@triton.jit
def maximum_or_nan(x, y):
    """Returns the larger of two, or NaN where either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_bits(value, HAS_CONVERSIONS: tl.constexpr):
    """Returns, per row, the float32 bits of the largest magnitude; NaN counts as more than infinity."""
    if HAS_CONVERSIONS:  # half the instructions
        largest = tl.reduce(tl.abs(value), 1, maximum_or_nan).to(tl.int32, bitcast=True)
    else:
        largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    return largest


@triton.jit
def bits_after_rounding(value, DTYPE: tl.constexpr):
    """Returns the float32 bits of `value` after rounding to DTYPE, any NaN spelled 0x7FC00000."""
    bits = value.to(tl.int32, bitcast=True)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if DTYPE.is_bf16():
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(nan, 0x7FC00000, bits)


@triton.jit
def divide(value, scale, NUM_REMAINDERS: tl.constexpr):
    """Returns value / scale, for a scale within `is_easy`, as exactly as NUM_REMAINDERS (0, 1, 2) make it.

    Overflow, of a weight far beyond its scale, comes out as NaN. Markstein: a quotient from the correctly
    rounded reciprocal is within 2 units in the last place (and is exact where that is); one exact remainder
    rounds it correctly unless the true quotient is within 2**-22 units of the middle of two float32; a
    second one always (from quotients of 2**-11 on; what is smaller stays under 2**-10).
    """
    reciprocal = tl.broadcast_to(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), value.shape)
    quotient = value * reciprocal
    # With these signs a quotient of -0.0 stays: its remainder is +0.0.
    scale = tl.broadcast_to(scale, value.shape)
    reciprocal = reciprocal * -1.0
    for _ in tl.static_range(NUM_REMAINDERS):
        quotient = tl.fma(tl.fma(quotient, scale, value * -1.0), reciprocal, quotient)
    return quotient


@triton.jit
def block_by_block(values):
    """Returns `[rows, blocks, columns]` as `[blocks, rows x columns]`."""
    values = tl.permute(values, (1, 0, 2))
    return tl.reshape(values, (values.shape[0], values.shape[1] * values.shape[2]))


@triton.jit
def is_easy(scale):
    """Returns where `divide`'s remainders neither overflow nor underflow."""
    return (scale >= 2.0**-60) & (scale <= 2.0**60)


@triton.jit
def widen(raw, WEIGHT: tl.constexpr):
    """Returns the float32 bits, as int32, of weights loaded as integers of their size."""
    if WEIGHT.is_bf16():
        bits = raw.to(tl.int32) << 16
    elif WEIGHT.is_fp16():
        bits = raw.to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
        # The one NaN that widens to 0x7FC00000; the instruction spells all of them 0x7FFFFFFF.
        bits = tl.where(raw == 0x7E00, 0x7FC00000, bits)
    else:
        bits = raw
    return bits


@triton.jit
def load(pointer, mask, FULL: tl.constexpr):
    """Returns what is there, and 0 where `mask` is not; FULL: it is everywhere, and costs nothing."""
    return tl.load(pointer) if FULL else tl.load(pointer, mask=mask, other=0)


@triton.jit
def store(pointer, value, mask, FULL: tl.constexpr):
    """Writes what no one reads soon; `mask` and FULL as for `load`."""
    if FULL:
        tl.store(pointer, value, eviction_policy="evict_first")
    else:
        tl.store(pointer, value, mask=mask, eviction_policy="evict_first")


@triton.jit
def load_parts(
    source,
    source_scale,
    first_row,
    row,
    first_column,
    column,
    rows,
    columns,
    WEIGHT: tl.constexpr,
    FP8_ROWS: tl.constexpr,
    FP8_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    HAS_CONVERSIONS: tl.constexpr,
    ALIGN: tl.constexpr,
    FULL: tl.constexpr,
):
    """Returns two float32 factors of the weights at `first_row + row`, `column`, and where there are any.

    The first is 0.0 outside of the matrix. The second is 1.0, or the FP8 scale: one for each run if
    FP8_COLUMNS is a multiple of RUN, and else one for each weight.

    Args:
        source: address of the weights, or, if WEIGHT is FP8, of codes that are multiplied by their scales.
        source_scale: address of the FP8 scales, for each FP8_ROWS x FP8_COLUMNS.
        first_row: of the tile; all else is within a tile and counted in 32 bits.
        row: broadcasts against `column`.
        first_column: of the run of RUN that `column` is in; the last axis is 1.
        column: its last axis is a run.
        rows: of the matrix.
        columns: of the matrix, known to be a multiple of ALIGN.
        WEIGHT: dtype.
        FP8_ROWS: see `source_scale`.
        FP8_COLUMNS: see `source_scale`.
        ROWS: power of two; how many there are in `row`; `first_row` is a multiple.
        RUN: power of two; `first_column` is a multiple.
        HAS_CONVERSIONS: see `decode`.
        ALIGN: see `Group`.
        FULL: nothing is outside of the matrix.
    """
    mask = (first_row + row < rows) & (column < columns)
    start = first_row.to(tl.int64) * columns
    offset = row * columns + column
    if WEIGHT.is_fp8e4nv():
        codes = tl.multiple_of(source.to(tl.pointer_type(tl.uint8)) + start, ALIGN)
        value = decode(load(codes + offset, mask, FULL), HAS_CONVERSIONS)
        if FP8_COLUMNS % RUN == 0:
            column = first_column
        scale_mask = column < columns
        if FP8_ROWS % ROWS == 0:  # one row of scales for the whole tile: fewer loads, in any thread's layout
            scale_row = first_row // FP8_ROWS
        else:
            scale_row = (first_row + row) // FP8_ROWS
            scale_mask &= first_row + row < rows
        scale_start = scale_row.to(tl.int64) * tl.cdiv(columns, FP8_COLUMNS)
        scales = source_scale.to(tl.pointer_type(tl.float32))
        scale = load(scales + (scale_start + column // FP8_COLUMNS), scale_mask, FULL)
    else:
        WEIGHT_BYTES: tl.constexpr = WEIGHT.primitive_bitwidth // 8
        RAW: tl.constexpr = tl.int32 if WEIGHT.is_fp32() else tl.int16
        weights = tl.multiple_of(source.to(tl.pointer_type(RAW)) + start, min(ALIGN * WEIGHT_BYTES, 16))
        value = widen(load(weights + offset, mask, FULL), WEIGHT).to(tl.float32, bitcast=True)
        scale = 1.0
    return value, scale, mask


@triton.jit
def load_values(
    source,
    source_scale,
    first_row,
    row,
    first_column,
    column,
    rows,
    columns,
    WEIGHT: tl.constexpr,
    FP8_ROWS: tl.constexpr,
    FP8_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    HAS_CONVERSIONS: tl.constexpr,
    ALIGN: tl.constexpr,
    FULL: tl.constexpr,
):
    """Returns the weights themselves, and where there are any; see `load_parts`.

    Outside of the matrix a value is 0.0, or NaN next to an FP8 scale that is not finite.
    """
    value, scale, mask = load_parts(
        source, source_scale, first_row, row, first_column, column, rows, columns,
        WEIGHT, FP8_ROWS, FP8_COLUMNS, ROWS, RUN, HAS_CONVERSIONS, ALIGN, FULL,
    )  # fmt: skip
    if WEIGHT.is_fp8e4nv():
        value = value * scale
    return value, mask
