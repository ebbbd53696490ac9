"""FP8 block kernels for CUDA: one launch for a whole group of weights, whatever their shapes.

A group's items are cut into tiles of `Tiling` (see `triton_group.py`). Within an item consecutive programs
take consecutive columns, so that the programs in flight read and write one contiguous stretch. A
program issues all its loads at once and waits for its other threads as late as it can.

Bit for bit equal to `reference.py`; `triton_bits.py` says how.
"""

# Triton compiles its functions from source and knows no annotations; its kernels take pointers by position.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_tools.kernels.triton_bits import (
    UNSPECIALIZED,
    bits_after_rounding,
    block_by_block,
    decode,
    describe,
    divide,
    is_easy,
    largest_bits,
    pick,
    widen,
)
from dsv3_tools.kernels.triton_group import (
    Group,
    Operand,
    Tiling,
    check_block_size,
    has_fp8_conversions,
    triton_dtype,
)

__all__ = [
    "DEQUANTIZE_TILING",
    "QUANTIZE_TILING",
    "Tiling",
    "dequantize_fp8_block_into",
    "quantize_fp8_block_into",
]


# Swept by benchmarks/gpu_kernels.py --sweep.
DEQUANTIZE_TILING = Tiling(rows=4, columns=1024, vector=8, num_warps=4)
SMALL_DEQUANTIZE_TILING = Tiling(rows=64, columns=128, vector=16, num_warps=2)
QUANTIZE_TILING = Tiling(rows=128, columns=128, vector=16, num_warps=8, max_registers=80)
QUANTIZE_LIKES_TILING = Tiling(rows=64, columns=128, vector=16, num_warps=8)
QUANTIZE_TILING_WITHOUT_CONVERSIONS = Tiling(rows=32, columns=128, vector=8, num_warps=8)

SMALL_ELEMENTS = 1 << 25
"""Up to here a group is a few waves of programs at most, and large tiles are faster than many."""

MAX_BLOCK_ELEMENTS = 1 << 16
"""A program of the quantization holds a whole block in registers."""


def dequantize_fp8_block_into(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    *,
    block_size: tuple[int, int] = (128, 128),
    tiling: Tiling | None = None,
) -> Tensor:
    """Writes the weights that FP8 block codes stand for; see `kernels.dequantize_fp8_block_into`.

    Launched on the current stream, without waiting for it.

    Raises:
        FormatError: a `block_size` that is not two powers of two.
    """
    check_block_size(block_size)
    if tiling is None:
        is_small = len(codes) < 4 and sum(c.numel() for c in codes) <= SMALL_ELEMENTS and block_size[0] >= 128
        tiling = SMALL_DEQUANTIZE_TILING if is_small else DEQUANTIZE_TILING
    tile_rows = min(tiling.rows, block_size[0])
    operands = (
        Operand("read", codes, (1, 1), torch.float8_e4m3fn),
        Operand("scale", scales, block_size, torch.float32),
        Operand("written", outs),
    )
    group = Group(operands, (tile_rows, tiling.columns), tiling.vector)
    constants = (
        triton_dtype(outs[0].dtype),
        tile_rows,
        max(tiling.columns // block_size[1], 1),
        min(block_size[1], tiling.columns),
        *block_size,
        tiling is SMALL_DEQUANTIZE_TILING,
        has_fp8_conversions(codes),
    )
    return group.launch(_dequantize_kernel, constants, tiling)


def quantize_fp8_block_into(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    block_size: tuple[int, int] = (128, 128),
    scale_fmt: str = "f32",
    likes: Sequence[Tensor] | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """Writes FP8 block codes and their scales; see `kernels.quantize_fp8_block_into`.

    Launched on the current stream, without waiting for it.

    Raises:
        FormatError: a `block_size` that is not two powers of two, or too large for one program.
    """
    check_block_size(block_size, max_elements=MAX_BLOCK_ELEMENTS)
    if scale_fmt not in ("f32", "ue8m0"):
        raise ValueError(f"scale_fmt: got {scale_fmt!r}, expected 'f32' or 'ue8m0'")
    has_conversions = has_fp8_conversions(weights)
    if tiling is None:
        tiling = QUANTIZE_TILING if likes is None else QUANTIZE_LIKES_TILING
        if not has_conversions:
            tiling = QUANTIZE_TILING_WITHOUT_CONVERSIONS
    tile_blocks = max(tiling.columns // block_size[1], 1)
    while tile_blocks > 1 and tile_blocks * block_size[0] * block_size[1] > MAX_BLOCK_ELEMENTS:
        tile_blocks //= 2
    tile = (block_size[0], tile_blocks * block_size[1])
    operands = (
        Operand("read", weights),
        Operand("scale", scales, block_size, torch.float32),
        Operand("written", codes, (1, 1), torch.float8_e4m3fn),
        Operand("like", likes, block_size, torch.float32),
    )
    group = Group(operands, tile, tiling.vector)
    constants = (
        triton_dtype(weights[0].dtype),
        block_size[0],
        tile_blocks,
        block_size[1],
        min(tiling.rows, block_size[0]),
        scale_fmt == "ue8m0",
        likes is not None,
        has_conversions,
    )
    return group.launch(_quantize_kernel, constants, tiling)


# Below here runs on the device. Bit patterns of float32: 0x7F800000 infinity, 0x7FC00000 the one NaN.


@triton.jit
def _dequantize_unsound(
    codes, raw_outs, block_scale, first_row, column, rows, columns, OUT: tl.constexpr, NUM_ROWS: tl.constexpr
):
    """Writes NUM_ROWS rows of a tile that holds, or may hold, NaN or infinity; returns their number.

    Row by row and from memory again: this way the common way needs no registers for it.
    """
    count = 0
    for i in range(NUM_ROWS):
        row = first_row + i
        offset = row.to(tl.int64) * columns + column
        mask = (row < rows) & (column < columns)
        product = decode(tl.load(codes + offset, mask=mask, other=0), False) * block_scale
        bits = bits_after_rounding(product, OUT)
        if OUT.is_bf16():
            tl.store(raw_outs + offset, (bits >> 16).to(tl.int16), mask=mask)
        else:
            tl.store(raw_outs + offset, bits, mask=mask)
        not_finite = mask & ((bits & 0x7FFFFFFF) >= 0x7F800000)
        count += tl.sum(tl.sum(tl.sum(not_finite.to(tl.int32), 2), 1), 0)
    return count


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _dequantize_kernel(
    table: tl.int64,
    counts: tl.int64,
    num_items: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    source: tl.int64,
    scale: tl.int64,
    target: tl.int64,
    OUT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    COLUMNS_PER_SCALE: tl.constexpr,
    EVICT_FIRST: tl.constexpr,
    HAS_CONVERSIONS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Takes `[TILE_ROWS, TILE_BLOCKS x BLOCK_COLUMNS]` codes of one item, within one row of blocks.

    The tile is 3-D, `[TILE_ROWS, TILE_BLOCKS, BLOCK_COLUMNS]`, so that each scale is loaded once per thread
    that needs it instead of once per element. Nothing stands between the loads and the store that makes
    threads wait for each other; the check comes after.
    """
    item, tile, rows, columns = describe(table, num_items, rows, columns, GROUPED)
    source = pick(table, num_items, item, 0, source, GROUPED)
    scale = pick(table, num_items, item, 1, scale, GROUPED)
    target = pick(table, num_items, item, 2, target, GROUPED)
    codes = tl.multiple_of(source.to(tl.pointer_type(tl.uint8)), ALIGN)
    OUT_BYTES: tl.constexpr = OUT.primitive_bitwidth // 8
    outs = tl.multiple_of(target.to(tl.pointer_type(OUT)), min(ALIGN * OUT_BYTES, 16))
    raw_outs = outs.to(tl.pointer_type(tl.int16 if OUT.is_bf16() else tl.int32), bitcast=True)
    scales = scale.to(tl.pointer_type(tl.float32))
    columns = columns // ALIGN * ALIGN  # no change; tells the compiler (a hint would not outlive inlining)

    TILE_COLUMNS: tl.constexpr = TILE_BLOCKS * BLOCK_COLUMNS
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    first_row = tile // tiles_across * TILE_ROWS
    first_columns = tile % tiles_across * TILE_COLUMNS + tl.arange(0, TILE_BLOCKS) * BLOCK_COLUMNS
    column = first_columns[None, :, None] + tl.arange(0, BLOCK_COLUMNS)[None, None, :]
    row = tl.arange(0, TILE_ROWS)[:, None, None]
    start = first_row.to(tl.int64) * columns
    offset = row * columns + column
    mask = (first_row + row < rows) & (column < columns)
    if EVICT_FIRST:
        code = tl.load(codes + start + offset, mask=mask, other=0, eviction_policy="evict_first")
    else:
        code = tl.load(codes + start + offset, mask=mask, other=0, cache_modifier=".cg")
    scale_row = (first_row // ROWS_PER_SCALE).to(tl.int64) * tl.cdiv(columns, COLUMNS_PER_SCALE)
    block_scale = tl.load(
        scales + scale_row + first_columns // COLUMNS_PER_SCALE, mask=first_columns < columns, other=0.0
    )[None, :, None]

    product = decode(code, HAS_CONVERSIONS) * block_scale
    tl.store(outs + start + offset, product.to(OUT), mask=mask)

    # A masked element is 0 x its scale: with a scale that is not finite it only takes the branch in vain.
    largest = tl.max(
        largest_bits(tl.reshape(product, (TILE_ROWS * TILE_BLOCKS, BLOCK_COLUMNS)), HAS_CONVERSIONS), 0
    )
    if largest >= (0x7F7F8000 if OUT.is_bf16() else 0x7F800000):  # what rounds to infinity, infinity, NaN
        tl.debug_barrier()  # orders the stores below after the one above, whichever thread made that
        count = _dequantize_unsound(
            codes, raw_outs, block_scale, first_row, column, rows, columns, OUT, TILE_ROWS
        )
        if count > 0:
            tl.atomic_add(counts.to(tl.pointer_type(tl.int32)) + item, count)


@triton.jit
def _or(x, y):
    return x | y


@triton.jit
def _divide(value, scale, WEIGHT: tl.constexpr, EXACT_RECIPROCAL: tl.constexpr):
    """Returns value / scale, easy (see `divide`): what encodes like the correctly rounded quotient.

    EXACT_RECIPROCAL: the scale is a power of two. A float32 weight needs two remainders, a weight of 16 bits
    one. Only the float32 next to a middle m of two FP8 numbers matter: let A < 2**11, S in [2**23, 2**24)
    and M in [16, 32) be the integers in value, scale and m. For a quotient as near to m +- half a unit as
    one remainder leaves open, |A 2**k - S M| (k >= 16) must be an integer D < 16 with S = 2**20 D + t,
    |t| <= 16 (2**21, D < 8 below m = 16). So 2**16 divides tM +- D, which is under 2**10 and thus zero;
    but 0 < D < |t|M unless t is 0, and D is not 0 as S is at least 2**23.
    """
    if EXACT_RECIPROCAL:
        quotient = divide(value, scale, 0)
    else:
        quotient = divide(value, scale, 2 if WEIGHT.is_fp32() else 1)
    return quotient


@triton.jit
def _encode(bits, scale, WEIGHT: tl.constexpr, EXACT_RECIPROCAL: tl.constexpr, HAS_CONVERSIONS: tl.constexpr):
    """Returns the FP8 codes, as uint8, of finite weights (float32 `bits`) / easy scales."""
    if HAS_CONVERSIONS:
        value = bits.to(tl.float32, bitcast=True)
        quotient = _divide(value, scale, WEIGHT, EXACT_RECIPROCAL)
        code = quotient.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        code = _encode_bits(bits, scale, False).to(tl.uint8)
    return code


@triton.jit
def _encode_bits(bits, scale, ANY_SCALE: tl.constexpr):
    """Returns the FP8 code, as int32, of a weight (float32 `bits`) / scale; not for NaN and infinity.

    Adding 2**20 x the quotient's power of two (at least 2**-6, where FP8's subnormal numbers begin)
    pushes all but three mantissa bits out, with the rounding of float32 addition: to nearest even.
    """
    value = bits.to(tl.float32, bitcast=True)
    if ANY_SCALE:  # moving both by a power of two moves no quotient, and leaves out only what encodes to 0
        factor = tl.where(scale < 2.0**-60, 2.0**96, tl.where(scale > 2.0**60, 2.0**-96, 1.0))
        value = value * factor
        scale = scale * factor
    quotient = tl.minimum(
        tl.abs(_divide(value, scale, tl.float32, False)), 448.0
    )  # also turns NaN, an overflow, to 448
    power_bits = tl.maximum(quotient.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    power = power_bits.to(tl.float32, bitcast=True)
    # Both products are exact: these are an addition and a subtraction.
    many = tl.full(power.shape, 2.0**20, tl.float32)
    rounded = tl.fma(power, -many, tl.fma(power, many, quotient))
    code = (rounded * 2.0**-120).to(tl.int32, bitcast=True) >> 20
    return code | ((bits >> 24) & 0x80)


@triton.jit
def _scale_of_largest(largest, UE8M0: tl.constexpr):
    """Returns the float32 scale of blocks from their largest finite magnitude; see `fp8_block_scale`."""
    quotient = tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32))
    scale = quotient
    if UE8M0:
        bits = tl.maximum(quotient, 2.0**-126).to(tl.int32, bitcast=True)
        scale = ((bits + 0x007FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(quotient == 0.0, 1.0, scale)


# The passes over a tile below read the weights again, from the L1 cache, NUM_ROWS rows at a time: with
# a block's 16,384 weights in registers there is room for few programs on a multiprocessor. By conversions it
# is worth it (three at 80 registers, H200: 0.945 of copy against 0.87); with integers or `likes` it is not.


@triton.jit
def _largest_finite(
    weights, column, rows, columns, WEIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr, TILE_BLOCKS: tl.constexpr
):
    """Returns the bits of each block's largest finite magnitude, and the number of weights not finite."""
    largest = tl.zeros((TILE_BLOCKS,), tl.int32)
    count = 0
    for row in range(BLOCK_ROWS):
        raw = tl.load(weights + row * columns + column, mask=(row < rows) & (column < columns), other=0)
        magnitude = widen(raw, WEIGHT) & 0x7FFFFFFF
        finite = magnitude < 0x7F800000
        largest = tl.maximum(largest, tl.max(tl.max(tl.where(finite, magnitude, 0), 2), 0))
        count += tl.sum(tl.sum(tl.sum((finite == 0).to(tl.int32), 2), 1), 0)
    return largest, count


@triton.jit
def _unchanged(
    weights,
    block_like,
    column,
    rows,
    columns,
    WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
):
    """Returns, per block, 1 if every weight is exactly bfloat16(code x like) for the code that like gives."""
    unchanged = tl.full((TILE_BLOCKS,), 1, tl.int32)
    like = block_like[None, :, None]
    for first_row in range(0, BLOCK_ROWS, NUM_ROWS):
        row = first_row + tl.arange(0, NUM_ROWS)[:, None, None]
        mask = (row < rows) & (column < columns)
        bits = widen(tl.load(weights + row * columns + column, mask=mask, other=0), WEIGHT)
        code = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, _encode_bits(bits, like, True), 0x7F)
        back = decode(code.to(tl.uint8), False) * like
        same = (bits_after_rounding(back, tl.bfloat16) == bits) | (mask == 0)
        unchanged = tl.minimum(unchanged, tl.min(tl.min(same.to(tl.int32), 2), 0))
    return unchanged


@triton.jit
def _unchanged_sound(
    weights,
    block_like,
    column,
    rows,
    columns,
    WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
):
    """As `_unchanged`, by conversions: where all weights are finite and all likes easy."""
    any_difference = tl.full((TILE_BLOCKS,), 0, tl.int32)
    like = block_like[None, :, None]
    for first_row in range(0, BLOCK_ROWS, NUM_ROWS):
        row = first_row + tl.arange(0, NUM_ROWS)[:, None, None]
        raw = tl.load(weights + row * columns + column, mask=(row < rows) & (column < columns), other=0)
        code = _encode(widen(raw, WEIGHT), like, WEIGHT, False, True)
        # A weight far beyond `like` may come back as NaN: a difference too.
        back = (code.to(tl.float8e4nv, bitcast=True).to(tl.float32) * like).to(tl.bfloat16)
        if WEIGHT.is_bf16():
            difference = back.to(tl.int16, bitcast=True) ^ raw
        else:
            difference = back.to(tl.float32).to(tl.int32, bitcast=True) ^ widen(raw, WEIGHT)
        any_difference |= tl.reduce(block_by_block(difference), 1, _or).to(tl.int32)
    return (any_difference == 0).to(tl.int32)


@triton.jit
def _write_codes(
    weights,
    codes,
    block_scale,
    column,
    rows,
    columns,
    WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    SOUND: tl.constexpr,
    EXACT_RECIPROCAL: tl.constexpr,
    HAS_CONVERSIONS: tl.constexpr,
):
    """Writes the tile's codes; SOUND: all weights are finite and all scales easy."""
    scale = block_scale[None, :, None]
    for first_row in range(0, BLOCK_ROWS, NUM_ROWS):
        row = first_row + tl.arange(0, NUM_ROWS)[:, None, None]
        offset = row * columns + column
        mask = (row < rows) & (column < columns)
        bits = widen(tl.load(weights + offset, mask=mask, other=0), WEIGHT)
        if SOUND:
            code = _encode(bits, scale, WEIGHT, EXACT_RECIPROCAL, HAS_CONVERSIONS)
        else:
            code = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, _encode_bits(bits, scale, True), 0x7F)
            code = code.to(tl.uint8)
        tl.store(codes + offset, code, mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _quantize_kernel(  # noqa: PLR0915 - one pass over a tile
    table: tl.int64,
    counts: tl.int64,
    num_items: tl.int32,
    rows: tl.int32,
    columns: tl.int32,
    source: tl.int64,
    scale: tl.int64,
    target: tl.int64,
    like: tl.int64,
    WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    UE8M0: tl.constexpr,
    HAS_LIKE: tl.constexpr,
    HAS_CONVERSIONS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Takes `TILE_BLOCKS` blocks side by side of one item, as `[BLOCK_ROWS, TILE_BLOCKS, BLOCK_COLUMNS]`."""
    item, tile, rows, columns = describe(table, num_items, rows, columns, GROUPED)
    source = pick(table, num_items, item, 0, source, GROUPED)
    scale = pick(table, num_items, item, 1, scale, GROUPED)
    target = pick(table, num_items, item, 2, target, GROUPED)
    WEIGHT_BYTES: tl.constexpr = WEIGHT.primitive_bitwidth // 8
    RAW: tl.constexpr = tl.int32 if WEIGHT.is_fp32() else tl.int16
    columns = columns // ALIGN * ALIGN  # no change; tells the compiler (a hint would not outlive inlining)

    TILE_COLUMNS: tl.constexpr = TILE_BLOCKS * BLOCK_COLUMNS
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    block_row = tile // tiles_across
    first_columns = tile % tiles_across * TILE_COLUMNS + tl.arange(0, TILE_BLOCKS) * BLOCK_COLUMNS
    column = first_columns[None, :, None] + tl.arange(0, BLOCK_COLUMNS)[None, None, :]

    # From here on rows count from the tile's first.
    start = (block_row * BLOCK_ROWS).to(tl.int64) * columns
    weights = source.to(tl.pointer_type(RAW)) + start
    weights = tl.multiple_of(weights, min(ALIGN * WEIGHT_BYTES, 16))
    codes = tl.multiple_of(target.to(tl.pointer_type(tl.uint8)) + start, ALIGN)
    rows -= block_row * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)[:, None, None]
    offset = row * columns + column
    mask = (row < rows) & (column < columns)
    bits = widen(tl.load(weights + offset, mask=mask, other=0), WEIGHT)

    scale_offset = block_row.to(tl.int64) * tl.cdiv(columns, BLOCK_COLUMNS) + first_columns // BLOCK_COLUMNS
    scale_mask = first_columns < columns
    scales = scale.to(tl.pointer_type(tl.float32))
    counts = counts.to(tl.pointer_type(tl.int32))
    EXACT_RECIPROCAL: tl.constexpr = UE8M0 and not HAS_LIKE
    largest = largest_bits(block_by_block(bits.to(tl.float32, bitcast=True)), HAS_CONVERSIONS)
    all_finite = tl.max(largest, 0) < 0x7F800000
    if all_finite == 0:
        largest, count = _largest_finite(weights, column, rows, columns, WEIGHT, BLOCK_ROWS, TILE_BLOCKS)
        tl.atomic_add(counts + item, count)
    block_scale = _scale_of_largest(largest.to(tl.float32, bitcast=True), UE8M0)

    if HAS_LIKE:
        like = pick(table, num_items, item, 3, like, GROUPED)
        likes = like.to(tl.pointer_type(tl.float32))
        block_like = tl.load(likes + scale_offset, mask=scale_mask, other=1.0)
        unchanged = tl.full((TILE_BLOCKS,), 0, tl.int32)
        if HAS_CONVERSIONS and all_finite & (tl.min(is_easy(block_like).to(tl.int32), 0) == 1):
            unchanged = _unchanged_sound(
                weights, block_like, column, rows, columns, WEIGHT, BLOCK_ROWS, TILE_BLOCKS, min(NUM_ROWS, 32)
            )
        else:
            unchanged = _unchanged(
                weights, block_like, column, rows, columns, WEIGHT, BLOCK_ROWS, TILE_BLOCKS, min(NUM_ROWS, 16)
            )
        block_scale = tl.where(unchanged == 1, block_like, block_scale)
    tl.store(scales + scale_offset, block_scale, mask=scale_mask)

    if all_finite & (tl.min(is_easy(block_scale).to(tl.int32), 0) == 1):
        if NUM_ROWS < BLOCK_ROWS:
            _write_codes(
                weights,
                codes,
                block_scale,
                column,
                rows,
                columns,
                WEIGHT,
                BLOCK_ROWS,
                NUM_ROWS,
                True,
                EXACT_RECIPROCAL,
                HAS_CONVERSIONS,
            )
        else:
            code = _encode(bits, block_scale[None, :, None], WEIGHT, EXACT_RECIPROCAL, HAS_CONVERSIONS)
            tl.store(codes + offset, code, mask=mask, eviction_policy="evict_first")
    else:
        _write_codes(
            weights, codes, block_scale, column, rows, columns, WEIGHT, BLOCK_ROWS, 1, False, False, False
        )
