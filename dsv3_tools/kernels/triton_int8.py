"""INT8 kernels for CUDA, bit for bit equal to `reference_integer.py`; `triton_integer.py` launches them.

What is written by arithmetic takes two passes over a tile: one for the largest magnitude, one for the codes,
which reads the tile again (from the L1 cache, as it is small) rather than keep its values in registers.

FP8 blocks that become INT8 blocks need next to no arithmetic: a block has one scale, so its FP8 codes alone,
256 of them, decide what they become and at what error. A program works that out once for each code and then
looks its elements up in shared memory: see `fp8_to_int8_block_kernel`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from dsv3_tools.kernels.triton_bits import (
    UNSPECIALIZED,
    bits_after_rounding,
    block_by_block,
    decode,
    describe,
    divide,
    finite,
    is_easy,
    largest_bits,
    load,
    load_parts,
    load_values,
    pick,
    store,
)

__all__ = [
    "dequantize_int8_kernel",
    "fp8_to_int8_block_kernel",
    "quantize_int8_block_kernel",
    "quantize_int8_channel_kernel",
]

_TO_INTEGER = tl.constexpr(1.5 * 2**23)
"""Added to a float32 under 2**22 it leaves the nearest integer (of two, the even one) in the low bits."""


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dequantize_int8_kernel(
    table: tl.int64,
    counts: tl.int64,
    num_items: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    target: tl.int64,
    source: tl.int64,
    scale: tl.int64,
    OUT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    COLUMNS_PER_SCALE: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Takes `[TILE_ROWS, TILE_BLOCKS x BLOCK_COLUMNS]` codes of one item; COLUMNS_PER_SCALE 0: all.

    Rows of a tile share their scales, or each has its own. Only a scale can make a weight that is not finite.
    """
    item, tile, rows, columns = describe(table, num_items, rows, columns, GROUPED)
    target = pick(table, num_items, item, 0, target, GROUPED)
    source = pick(table, num_items, item, 1, source, GROUPED)
    scale = pick(table, num_items, item, 2, scale, GROUPED)
    columns = columns // ALIGN * ALIGN  # no change; tells the compiler (a hint would not outlive inlining)
    OUT_BYTES: tl.constexpr = OUT.primitive_bitwidth // 8

    TILE_COLUMNS: tl.constexpr = TILE_BLOCKS * BLOCK_COLUMNS
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    first_row = tile // tiles_across * TILE_ROWS
    first_column = (
        tile % tiles_across * TILE_COLUMNS + tl.arange(0, TILE_BLOCKS)[None, :, None] * BLOCK_COLUMNS
    )
    column = first_column + tl.arange(0, BLOCK_COLUMNS)[None, None, :]
    row = tl.arange(0, TILE_ROWS)[:, None, None]
    mask = (first_row + row < rows) & (column < columns)
    start = first_row.to(tl.int64) * columns
    offset = row * columns + column
    codes = tl.multiple_of(source.to(tl.pointer_type(tl.int8)) + start, ALIGN)
    outs = tl.multiple_of(target.to(tl.pointer_type(OUT)) + start, min(ALIGN * OUT_BYTES, 16))
    code = tl.load(codes + offset, mask=mask, other=0, cache_modifier=".cg")

    scales = scale.to(tl.pointer_type(tl.float32))
    if ROWS_PER_SCALE < TILE_ROWS:
        scale_row = (first_row + row) // ROWS_PER_SCALE
        scale_mask = (first_row + row < rows) & (first_column < columns)
    else:
        scale_row = first_row // ROWS_PER_SCALE
        scale_mask = first_column < columns
    if COLUMNS_PER_SCALE == 0:
        block_scale = tl.load(scales + scale_row + first_column * 0, mask=scale_mask, other=0.0)
    else:
        scale_start = scale_row.to(tl.int64) * tl.cdiv(columns, COLUMNS_PER_SCALE)
        scale_offset = scale_start + first_column // COLUMNS_PER_SCALE
        block_scale = tl.load(scales + scale_offset, mask=scale_mask, other=0.0)
    tl.store(outs + offset, (code.to(tl.float32) * block_scale).to(OUT), mask=mask)

    # 128 x what is below is finite in both dtypes; NaN and infinity are more, too.
    magnitude = block_scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if tl.max(tl.ravel(magnitude), 0) >= 0x7B800000:  # 2**120
        tl.debug_barrier()  # orders the stores below after the one above, whichever thread made that
        bits = bits_after_rounding(
            tl.load(codes + offset, mask=mask, other=0).to(tl.float32) * block_scale, OUT
        )
        if OUT.is_bf16():
            raw_outs = outs.to(tl.pointer_type(tl.int16), bitcast=True)
            tl.store(raw_outs + offset, (bits >> 16).to(tl.int16), mask=mask)
        else:
            tl.store(outs.to(tl.pointer_type(tl.int32), bitcast=True) + offset, bits, mask=mask)
        count = tl.sum(tl.ravel((mask & ((bits & 0x7FFFFFFF) >= 0x7F800000)).to(tl.int32)), 0)
        if count > 0:
            tl.atomic_add(counts.to(tl.pointer_type(tl.int32)) + item, count)


@triton.jit
def _scale_of_largest(bits):
    """Returns the scales of what has these largest finite magnitudes, given as the bits of a float32."""
    largest = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    return tl.where(scale < 2.0**-126, 1.0, scale)


@triton.jit
def _codes(value, scale, SOUND: tl.constexpr):
    """Returns round(value / scale) as int8; SOUND: all values are finite and all scales easy.

    Nothing is clamped: a scale is at least largest / 127, rounded.

    One remainder is enough. Only the float32 next to the halves of odd integers matter. There are 2,865
    quotients of 24-bit integers that lie so near to the middle between one of these and its neighbour that a
    remainder might not do; all come out right. See tests/kernels/test_triton_integer.py.
    """
    if SOUND:
        quotient = divide(value, scale, 1)
    else:
        quotient = tl.div_rn(tl.where(finite(value), value, 0.0), tl.broadcast_to(scale, value.shape))
    return (quotient + _TO_INTEGER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _quantize_row(
    source,
    source_scale,
    target,
    scales,
    count,
    row,
    rows,
    columns,
    WEIGHT: tl.constexpr,
    FP8_ROWS: tl.constexpr,
    FP8_COLUMNS: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    RUN: tl.constexpr,
    HAS_CONVERSIONS: tl.constexpr,
    ALIGN: tl.constexpr,
    FULL: tl.constexpr,
):
    """Quantizes one row, `NUM_RUNS x RUN` columns at a time; FULL: they divide `columns`."""
    runs = tl.arange(0, NUM_RUNS)[:, None] * RUN
    lane = tl.arange(0, RUN)[None, :]
    CHUNK: tl.constexpr = NUM_RUNS * RUN
    # Of elements that share an FP8 scale, and a thread, the largest code has the largest magnitude.
    SIDE_BY_SIDE: tl.constexpr = min(ALIGN, RUN) if WEIGHT.is_fp8e4nv() and FP8_COLUMNS % RUN == 0 else 1
    most = tl.zeros((NUM_RUNS, RUN // SIDE_BY_SIDE), tl.int32)
    chunk = 0
    while chunk < columns:
        value, fp8_scale, _ = load_parts(
            source, source_scale, row, 0, chunk + runs, chunk + runs + lane, rows, columns,
            WEIGHT, FP8_ROWS, FP8_COLUMNS, 1, RUN, HAS_CONVERSIONS, ALIGN, FULL,
        )  # fmt: skip
        size = largest_bits(
            tl.reshape(value, (NUM_RUNS * RUN // SIDE_BY_SIDE, SIDE_BY_SIDE)), HAS_CONVERSIONS
        )
        size = tl.reshape(size, (NUM_RUNS, RUN // SIDE_BY_SIDE))
        if WEIGHT.is_fp8e4nv():
            size = (size.to(tl.float32, bitcast=True) * fp8_scale).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        most = tl.maximum(most, size)  # NaN is the largest of all
        chunk += CHUNK
    largest = tl.max(tl.ravel(most), 0)
    all_finite = largest < 0x7F800000
    if all_finite == 0:
        largest = 0
        not_finite = 0
        chunk = 0
        while chunk < columns:
            value, mask = load_values(
                source, source_scale, row, 0, chunk + runs, chunk + runs + lane, rows, columns,
                WEIGHT, FP8_ROWS, FP8_COLUMNS, 1, RUN, HAS_CONVERSIONS, ALIGN, False,
            )  # fmt: skip
            magnitude = tl.where(finite(value), value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
            largest = tl.maximum(largest, tl.max(tl.ravel(magnitude), 0))
            not_finite += tl.sum(tl.ravel((mask & (finite(value) == 0)).to(tl.int32)), 0)
            chunk += CHUNK
        if not_finite > 0:
            tl.atomic_add(count, not_finite)
    row_scale = _scale_of_largest(tl.full((1, 1), 0, tl.int32) + largest)
    tl.store(scales + row + tl.arange(0, 1)[:, None], row_scale)

    codes = tl.multiple_of(target.to(tl.pointer_type(tl.int8)) + row.to(tl.int64) * columns, ALIGN)
    sound = all_finite & (tl.min(tl.ravel(is_easy(row_scale).to(tl.int32)), 0) == 1)
    chunk = 0
    if sound:
        while chunk < columns:
            value, mask = load_values(
                source, source_scale, row, 0, chunk + runs, chunk + runs + lane, rows, columns,
                WEIGHT, FP8_ROWS, FP8_COLUMNS, 1, RUN, HAS_CONVERSIONS, ALIGN, FULL,
            )  # fmt: skip
            store(codes + (chunk + runs + lane), _codes(value, row_scale, True), mask, FULL)
            chunk += CHUNK
    else:
        while chunk < columns:
            value, mask = load_values(
                source, source_scale, row, 0, chunk + runs, chunk + runs + lane, rows, columns,
                WEIGHT, FP8_ROWS, FP8_COLUMNS, 1, RUN, HAS_CONVERSIONS, ALIGN, False,
            )  # fmt: skip
            store(codes + (chunk + runs + lane), _codes(value, row_scale, False), mask, False)
            chunk += CHUNK


@triton.jit(do_not_specialize=UNSPECIALIZED)
def quantize_int8_channel_kernel(
    table: tl.int64,
    counts: tl.int64,
    num_items: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    source: tl.int64,
    source_scale: tl.int64,
    target: tl.int64,
    scale: tl.int64,
    WEIGHT: tl.constexpr,
    FP8_ROWS: tl.constexpr,
    FP8_COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    RUN: tl.constexpr,
    HAS_CONVERSIONS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Takes `TILE_ROWS` whole rows of one item, one after the other."""
    item, tile, rows, columns = describe(table, num_items, rows, columns, GROUPED)
    source = pick(table, num_items, item, 0, source, GROUPED)
    source_scale = pick(table, num_items, item, 1, source_scale, GROUPED)
    target = pick(table, num_items, item, 2, target, GROUPED)
    scales = pick(table, num_items, item, 3, scale, GROUPED).to(tl.pointer_type(tl.float32))
    count = counts.to(tl.pointer_type(tl.int32)) + item
    columns = columns // ALIGN * ALIGN  # no change; tells the compiler (a hint would not outlive inlining)
    row = tile * TILE_ROWS
    last = tl.minimum(row + TILE_ROWS, rows)
    if columns % (NUM_RUNS * RUN) == 0:
        while row < last:
            _quantize_row(
                source, source_scale, target, scales, count, row, rows, columns,
                WEIGHT, FP8_ROWS, FP8_COLUMNS, NUM_RUNS, RUN, HAS_CONVERSIONS, ALIGN, True,
            )  # fmt: skip
            row += 1
    else:
        while row < last:
            _quantize_row(
                source, source_scale, target, scales, count, row, rows, columns,
                WEIGHT, FP8_ROWS, FP8_COLUMNS, NUM_RUNS, RUN, HAS_CONVERSIONS, ALIGN, False,
            )  # fmt: skip
            row += 1


@triton.jit(do_not_specialize=UNSPECIALIZED)
def quantize_int8_block_kernel(
    table: tl.int64,
    counts: tl.int64,
    num_items: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    source: tl.int64,
    source_scale: tl.int64,
    target: tl.int64,
    scale: tl.int64,
    WEIGHT: tl.constexpr,
    FP8_ROWS: tl.constexpr,
    FP8_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    HAS_CONVERSIONS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Takes `TILE_BLOCKS` blocks side by side of one item, in the second pass `NUM_ROWS` rows at a time."""
    item, tile, rows, columns = describe(table, num_items, rows, columns, GROUPED)
    source = pick(table, num_items, item, 0, source, GROUPED)
    source_scale = pick(table, num_items, item, 1, source_scale, GROUPED)
    target = pick(table, num_items, item, 2, target, GROUPED)
    scale = pick(table, num_items, item, 3, scale, GROUPED)
    columns = columns // ALIGN * ALIGN  # no change; tells the compiler (a hint would not outlive inlining)
    TILE_COLUMNS: tl.constexpr = TILE_BLOCKS * BLOCK_COLUMNS
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    block_row = tile // tiles_across
    first_row = block_row * BLOCK_ROWS
    first_columns = tile % tiles_across * TILE_COLUMNS + tl.arange(0, TILE_BLOCKS) * BLOCK_COLUMNS
    first_column = first_columns[None, :, None]
    column = first_column + tl.arange(0, BLOCK_COLUMNS)[None, None, :]

    all_values, _ = load_values(
        source, source_scale, first_row, tl.arange(0, BLOCK_ROWS)[:, None, None], first_column, column,
        rows, columns,
        WEIGHT, FP8_ROWS, FP8_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS, HAS_CONVERSIONS, ALIGN, False,
    )  # fmt: skip
    row = tl.arange(0, NUM_ROWS)[:, None, None]
    largest = largest_bits(block_by_block(all_values), HAS_CONVERSIONS)
    all_finite = tl.max(largest, 0) < 0x7F800000
    if all_finite == 0:
        largest = tl.zeros((TILE_BLOCKS,), tl.int32)
        count = 0
        for i in range(0, BLOCK_ROWS, NUM_ROWS):
            value, mask = load_values(
                source, source_scale, first_row + i, row, first_column, column, rows, columns,
                WEIGHT, FP8_ROWS, FP8_COLUMNS, NUM_ROWS, BLOCK_COLUMNS, HAS_CONVERSIONS, ALIGN, False,
            )  # fmt: skip
            magnitude = tl.where(finite(value), value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
            largest = tl.maximum(largest, tl.max(block_by_block(magnitude), 1))
            count += tl.sum(tl.ravel((mask & (finite(value) == 0)).to(tl.int32)), 0)
        if count > 0:
            tl.atomic_add(counts.to(tl.pointer_type(tl.int32)) + item, count)
    block_scale = _scale_of_largest(largest)
    scale_offset = block_row.to(tl.int64) * tl.cdiv(columns, BLOCK_COLUMNS) + first_columns // BLOCK_COLUMNS
    tl.store(scale.to(tl.pointer_type(tl.float32)) + scale_offset, block_scale, mask=first_columns < columns)

    codes = tl.multiple_of(target.to(tl.pointer_type(tl.int8)) + first_row.to(tl.int64) * columns, ALIGN)
    sound = all_finite & (tl.min(is_easy(block_scale).to(tl.int32), 0) == 1)
    for i in range(0, BLOCK_ROWS, NUM_ROWS):
        value, mask = load_values(
            source, source_scale, first_row + i, row, first_column, column, rows, columns,
            WEIGHT, FP8_ROWS, FP8_COLUMNS, NUM_ROWS, BLOCK_COLUMNS, HAS_CONVERSIONS, ALIGN, False,
        )  # fmt: skip
        if sound:
            code = _codes(value, block_scale[None, :, None], True)
        else:
            code = _codes(value, block_scale[None, :, None], False)
        tl.store(codes + ((i + row) * columns + column), code, mask=mask, eviction_policy="evict_first")


@triton.jit
def _errors(value, scale):
    """Returns the squared errors of finite values at a scale, int32, as `reference_integer` defines them."""
    quotient = value * tl.div_rn(tl.full(value.shape, 1.0, tl.float32), scale)
    rounded = (quotient + _TO_INTEGER) - _TO_INTEGER
    error = quotient - tl.minimum(tl.maximum(rounded, -128.0), 127.0)
    return (error * error + 128.0).to(tl.int32, bitcast=True) - 0x43000000


@triton.jit
def _error_of_all(
    errors,
    codes,
    row,
    column,
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Returns the sum of `errors`, by magnitude of the FP8 code, over a block's elements."""
    SIZE: tl.constexpr = NUM_ROWS * column.shape[1]
    PAIR: tl.constexpr = min(2, SIZE)  # an instruction adds three numbers
    totals = tl.zeros((SIZE // PAIR,), tl.int32)
    for i in range(0, BLOCK_ROWS, NUM_ROWS):
        code = load(codes + ((i + row) * columns + column), (i + row < rows) & (column < columns), FULL)
        error = tl.gather(errors, tl.ravel(code.to(tl.int32) & 0x7F), 0).to(tl.int32)
        totals += tl.sum(tl.reshape(error, (SIZE // PAIR, PAIR)), 1)
    return tl.sum(totals, 0)


@triton.jit
def _largest_code(
    codes, first_column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr
):
    """Returns the largest magnitude of a full block's FP8 codes, read four at a time."""
    row_words = columns // ALIGN * (ALIGN // 4)
    words = tl.multiple_of(codes + first_column, ALIGN).to(tl.pointer_type(tl.int32), bitcast=True)
    offset = tl.arange(0, ROWS)[:, None] * row_words + tl.arange(0, COLUMNS // 4)[None, :]
    word = tl.load(words + offset) & 0x7F7F7F7F
    # As a number, a word is as large as its highest byte makes it.
    largest = tl.maximum(tl.maximum(word, word << 8), tl.maximum(word << 16, word << 24))
    return tl.max(tl.ravel(largest), 0) >> 24


@triton.jit
def _block_of_fp8(  # noqa: PLR0915 - one pass over a block
    codes,
    fp8_scale,
    outs,
    scale,
    count,
    first_column,
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    HAS_CONVERSIONS: tl.constexpr,
    ALIGN: tl.constexpr,
    FULL: tl.constexpr,
):
    """See `fp8_to_int8_block_kernel`; rows count from the block's first."""
    column = first_column + tl.arange(0, BLOCK_COLUMNS)[None, :]
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    if FULL and ALIGN >= 8 and BLOCK_COLUMNS >= ALIGN:
        largest = _largest_code(codes, first_column, columns, BLOCK_ROWS, BLOCK_COLUMNS, ALIGN)
    else:
        code = load(codes + (row * columns + column), (row < rows) & (column < columns), FULL)
        largest = tl.max(tl.ravel(code.to(tl.int32) & 0x7F), 0)
    magnitude = tl.arange(0, 128)
    value = decode(magnitude.to(tl.uint8), HAS_CONVERSIONS) * fp8_scale
    last_finite = tl.max(tl.where(finite(value), magnitude, -1), 0)  # larger codes' values are not, either
    row = tl.arange(0, NUM_ROWS)[:, None]
    if largest > last_finite:
        largest = 0
        not_finite = 0
        for i in range(0, BLOCK_ROWS, NUM_ROWS):
            mask = (i + row < rows) & (column < columns)
            size = tl.load(codes + ((i + row) * columns + column), mask=mask, other=0).to(tl.int32) & 0x7F
            largest = tl.maximum(largest, tl.max(tl.ravel(tl.where(size <= last_finite, size, 0)), 0))
            not_finite += tl.sum(tl.ravel((mask & (size > last_finite)).to(tl.int32)), 0)
        tl.atomic_add(count, not_finite)

    value = tl.where(finite(value), value, 0.0)
    size = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    plain = _scale_of_largest(tl.zeros((128,), tl.int32) + tl.max(tl.where(magnitude == largest, size, 0), 0))
    aligned = tl.full((128,), 4.0, tl.float32) * fp8_scale
    possible = finite(aligned) & (aligned >= 2.0**-126)
    aligned = tl.where(possible, aligned, 1.0)
    ratio = tl.div_rn(aligned, plain)
    plain_error = _errors(value, plain)
    aligned_error = _errors(value, aligned)
    square = ratio * ratio
    # Errors of what occurs are 2**14 at most, so that their units fit into a byte.
    units = plain_error.to(tl.float32) - aligned_error.to(tl.float32) * square
    units = units * tl.div_rn(tl.full((128,), 1.0, tl.float32), 130.0 * tl.maximum(square, 1.0))
    units = tl.minimum(tl.maximum(units, -127.0), 127.0)
    units = (units + _TO_INTEGER).to(tl.int32, bitcast=True).to(tl.int8)
    total = _error_of_all(units, codes, row, column, rows, columns, BLOCK_ROWS, NUM_ROWS, FULL)
    BOUND: tl.constexpr = BLOCK_ROWS * BLOCK_COLUMNS * 9 // 16 + 1
    usual = (ratio >= 2.0**-10) & (ratio <= 2.0**10)
    better = tl.zeros((128,), tl.int32) + (total > 0).to(tl.int32)
    if (tl.min((usual | (possible == 0)).to(tl.int32), 0) == 0) | ((total >= -BOUND) & (total <= BOUND)):
        aligned_total = _error_of_all(
            aligned_error, codes, row, column, rows, columns, BLOCK_ROWS, NUM_ROWS, False
        )
        plain_total = _error_of_all(
            plain_error, codes, row, column, rows, columns, BLOCK_ROWS, NUM_ROWS, False
        )
        cost = aligned_total.to(tl.float32) * ratio * ratio
        better = (cost <= plain_total.to(tl.float32)).to(tl.int32)
    chosen = tl.max(tl.where(possible & (better == 1), aligned, plain), 0)
    tl.store(scale, chosen)

    value = decode(tl.arange(0, 256).to(tl.uint8), HAS_CONVERSIONS) * fp8_scale
    new_codes = _codes(value, tl.zeros((256,), tl.float32) + chosen, False)
    for i in range(0, BLOCK_ROWS, NUM_ROWS):
        offset = (i + row) * columns + column
        mask = (i + row < rows) & (column < columns)
        index = tl.ravel(load(codes + offset, mask, FULL).to(tl.int32))
        new_code = tl.reshape(tl.gather(new_codes, index, 0), (NUM_ROWS, BLOCK_COLUMNS))
        store(outs + offset, new_code, mask, FULL)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def fp8_to_int8_block_kernel(
    table: tl.int64,
    counts: tl.int64,
    num_items: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    source: tl.int64,
    source_scale: tl.int64,
    target: tl.int64,
    scale: tl.int64,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    HAS_CONVERSIONS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Takes one block of one item, which is a block of both formats.

    Tables of 128 are by the magnitude of the FP8 code. What decides between the two scales is the sign of
    the sum over the elements of (error at the plain scale - ratio**2 x error at 4 x the FP8 scale). A byte
    for each code, rounded, which shared memory serves to a whole warp at once (wider numbers take turns),
    tells the sum to within half a unit for each element: nearly always enough. Only where it is not are
    the errors themselves, in 32 bits, added up and compared as the definition does.
    """
    item, tile, rows, columns = describe(table, num_items, rows, columns, GROUPED)
    source = pick(table, num_items, item, 0, source, GROUPED)
    source_scale = pick(table, num_items, item, 1, source_scale, GROUPED)
    target = pick(table, num_items, item, 2, target, GROUPED)
    scale = pick(table, num_items, item, 3, scale, GROUPED)
    columns = columns // ALIGN * ALIGN  # no change; tells the compiler (a hint would not outlive inlining)
    blocks_across = tl.cdiv(columns, BLOCK_COLUMNS)
    first_row = tile // blocks_across * BLOCK_ROWS
    first_column = tile % blocks_across * BLOCK_COLUMNS
    start = first_row.to(tl.int64) * columns
    codes = tl.multiple_of(source.to(tl.pointer_type(tl.uint8)) + start, ALIGN)
    outs = tl.multiple_of(target.to(tl.pointer_type(tl.int8)) + start, ALIGN)
    fp8_scale = tl.load(source_scale.to(tl.pointer_type(tl.float32)) + tile)
    scale = scale.to(tl.pointer_type(tl.float32)) + tile
    count = counts.to(tl.pointer_type(tl.int32)) + item
    rows -= first_row
    if (rows >= BLOCK_ROWS) & (first_column + BLOCK_COLUMNS <= columns):
        _block_of_fp8(
            codes, fp8_scale, outs, scale, count, first_column, rows, columns,
            BLOCK_ROWS, BLOCK_COLUMNS, NUM_ROWS, HAS_CONVERSIONS, ALIGN, True,
        )  # fmt: skip
    else:
        _block_of_fp8(
            codes, fp8_scale, outs, scale, count, first_column, rows, columns,
            BLOCK_ROWS, BLOCK_COLUMNS, NUM_ROWS, HAS_CONVERSIONS, ALIGN, False,
        )  # fmt: skip
