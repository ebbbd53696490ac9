"""FP8 block kernels for CUDA: one launch for a whole group of weights, whatever their shapes.

A group's items are cut into tiles of `Tiling`, numbered one after the other; a program finds its item by a
binary search in a small table (pointers, rows, columns, first tile) that travels with the call, and a
group of one needs no table at all. Within an item consecutive programs take consecutive columns, so that
the programs in flight read and write one contiguous stretch.

Bit for bit equal to `reference.py` from compute capability 8.0 on:

- FP8 is decoded and encoded by integer arithmetic and by float32 operations that are exact, because
  Triton's own FP8 types need 8.9. PTX's float32 arithmetic keeps subnormal numbers unless `.ftz` is asked
  for, and `enable_fp_fusion=False` keeps products and sums apart.
- Triton's `/` is not correctly rounded. `tl.div_rn` is, and divides once for each block; the division of
  every weight is Markstein's (see `_divide`), correctly rounded too and a third of the instructions.
- What is rare (NaN, infinity) is found by one maximum over a tile and put right in a branch that costs
  nothing where the weights are sound.
"""

# Triton compiles its functions from source and knows no annotations; its kernels take pointers by position.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# ruff: noqa: PLR0917

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_tools.errors import FormatError

__all__ = [
    "DEQUANTIZE_TILING",
    "QUANTIZE_TILING",
    "Tiling",
    "dequantize_fp8_block_into",
    "quantize_fp8_block_into",
]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a weight is cut into programs.

    Args:
        rows: rows of a tile, never more than a block's. A program of the quantization takes whole blocks;
            it encodes them this many rows at a time, read again from the L1 cache; where that is all rows of
            a block, from registers.
        columns: columns of a tile, a power of two: the contiguous run.
        steps: tiles, one below the other, that one program of the dequantization takes in turn.
        vector: FP8 codes that a thread loads or stores at once, 8 or 16.
        num_warps: warps of a program.
    """

    rows: int
    columns: int
    steps: int
    vector: int
    num_warps: int


# Swept by benchmarks/gpu_kernels.py --sweep.
DEQUANTIZE_TILING = Tiling(rows=8, columns=1024, steps=1, vector=8, num_warps=4)
QUANTIZE_TILING = Tiling(rows=32, columns=128, steps=1, vector=8, num_warps=8)

MAX_BLOCK_ELEMENTS = 1 << 16
"""A program of the quantization holds a whole block in registers."""

# Sections of the table of a group, each int64 `[items]`.
_SOURCE, _SCALE, _TARGET, _LIKE, _ROWS, _COLUMNS, _FIRST_TILE = range(7)
_NUM_SECTIONS = 7


def dequantize_fp8_block_into(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    *,
    block_size: tuple[int, int] = (128, 128),
    tiling: Tiling = DEQUANTIZE_TILING,
) -> Tensor:
    """Writes the weights that FP8 block codes stand for; see `kernels.dequantize_fp8_block_into`.

    Launched on the current stream, without waiting for it.

    Raises:
        FormatError: a `block_size` that is not two powers of two.
    """
    _check_block_size(block_size)
    tile_rows = min(tiling.rows, block_size[0])
    steps = min(tiling.steps, block_size[0] // tile_rows)
    group = _Group(codes, scales, outs, None, block_size, (tile_rows * steps, tiling.columns), tiling.vector)
    with group.on_device():
        if group.num_tiles:
            _dequantize_kernel[(group.num_tiles,)](
                *group.arguments(),
                OUT=_triton_dtype(outs[0].dtype),
                TILE_ROWS=tile_rows,
                TILE_BLOCKS=max(tiling.columns // block_size[1], 1),
                BLOCK_COLUMNS=min(block_size[1], tiling.columns),
                ROWS_PER_SCALE=block_size[0],
                COLUMNS_PER_SCALE=block_size[1],
                STEPS=steps,
                GROUPED=group.is_grouped,
                ALIGN=group.align,
                num_warps=tiling.num_warps,
                enable_fp_fusion=False,
            )
    return group.counts


def quantize_fp8_block_into(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    block_size: tuple[int, int] = (128, 128),
    scale_fmt: str = "f32",
    likes: Sequence[Tensor] | None = None,
    tiling: Tiling = QUANTIZE_TILING,
) -> Tensor:
    """Writes FP8 block codes and their scales; see `kernels.quantize_fp8_block_into`.

    Launched on the current stream, without waiting for it.

    Raises:
        FormatError: a `block_size` that is not two powers of two, or too large for one program.
    """
    _check_block_size(block_size)
    if math.prod(block_size) > MAX_BLOCK_ELEMENTS:
        raise FormatError(
            f"block_size: got {block_size}, expected at most {MAX_BLOCK_ELEMENTS} elements (a block must fit "
            "into the registers of one CUDA program); quantize on the CPU"
        )
    if scale_fmt not in ("f32", "ue8m0"):
        raise ValueError(f"scale_fmt: got {scale_fmt!r}, expected 'f32' or 'ue8m0'")
    tile_blocks = max(tiling.columns // block_size[1], 1)
    while tile_blocks > 1 and tile_blocks * math.prod(block_size) > MAX_BLOCK_ELEMENTS:
        tile_blocks //= 2
    tile = (block_size[0], tile_blocks * block_size[1])
    group = _Group(weights, scales, codes, likes, block_size, tile, tiling.vector)
    with group.on_device():
        if group.num_tiles:
            _quantize_kernel[(group.num_tiles,)](
                *group.arguments(),
                WEIGHT=_triton_dtype(weights[0].dtype),
                BLOCK_ROWS=block_size[0],
                TILE_BLOCKS=tile_blocks,
                BLOCK_COLUMNS=block_size[1],
                NUM_ROWS=min(tiling.rows, block_size[0]),
                UE8M0=scale_fmt == "ue8m0",
                HAS_LIKE=likes is not None,
                GROUPED=group.is_grouped,
                ALIGN=group.align,
                num_warps=tiling.num_warps,
                enable_fp_fusion=False,
            )
    return group.counts


class _Group:
    """The items of one call as the kernels see them: pointers, sizes, tiles, and zeroed counts.

    `sources` are read and `targets` written, of one shape per item; one of the two are FP8 codes.
    """

    def __init__(
        self,
        sources: Sequence[Tensor],
        scales: Sequence[Tensor],
        targets: Sequence[Tensor],
        likes: Sequence[Tensor] | None,
        block_size: tuple[int, int],
        tile: tuple[int, int],
        vector: int,
    ) -> None:
        _check_items(sources, scales, targets, likes, block_size)
        num_items = len(sources)
        self.device = sources[0].device
        self.is_grouped = num_items > 1
        table = np.zeros((_NUM_SECTIONS, num_items), np.int64)
        table[_SOURCE] = [t.data_ptr() for t in sources]
        table[_SCALE] = [t.data_ptr() for t in scales]
        table[_TARGET] = [t.data_ptr() for t in targets]
        if likes is not None:
            table[_LIKE] = [t.data_ptr() for t in likes]
        table[_ROWS] = [t.shape[0] for t in sources]
        table[_COLUMNS] = [t.shape[1] for t in sources]
        tiles = -(-table[_ROWS] // tile[0]) * -(-table[_COLUMNS] // tile[1])
        table[_FIRST_TILE] = np.cumsum(tiles) - tiles
        self.num_tiles = int(tiles.sum())
        if self.num_tiles >= 1 << 31:
            raise ValueError(f"a group of {self.num_tiles} tiles, expected under 2**31; pass fewer weights")
        self.align = _common_alignment(table, sources[0].element_size(), targets[0].element_size(), vector)
        self._num_items = num_items
        self._single = tuple(int(x) for x in table[:_FIRST_TILE, 0])
        if self.is_grouped:
            self._table, self.counts = _to_device(table, self.device)
        else:
            self.counts = _zeroed_count(self.device)
            self._table = self.counts  # a pointer for the launch; nothing is read from it

    def arguments(self) -> tuple[Tensor | int, ...]:
        """Returns the positional arguments that both kernels take."""
        return (self._table, self.counts, self._num_items, *self._single)

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """Returns a context in which a launch goes to the items' device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


def _to_device(table: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the table on `device` and a zeroed int32 count per item, in one allocation and one copy.

    Nothing waits. The pinned source may be dropped at once: torch's host allocator does not reuse it before
    the copy is done. The device memory comes from the current stream's pool, so its reuse comes after
    the launch that reads it.
    """
    num_items = table.shape[1]
    num_words = table.size + (num_items + 1) // 2
    host = torch.zeros(num_words, dtype=torch.int64, pin_memory=device.type == "cuda")
    host.numpy()[: table.size] = table.reshape(-1)
    words = host.to(device, non_blocking=True)
    return words, words[table.size :].view(torch.int32)[:num_items]


_zeros = threading.local()


def _zeroed_count(device: torch.device) -> Tensor:
    """Returns one int32 zero of its own.

    A launch that zeroes four bytes takes a tenth of the time of dequantizing one expert weight. So zeros
    are made 1024 at a time, per thread and stream, and each is given out once.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32)
    stream = torch.cuda.current_stream(device)
    if torch.cuda.is_current_stream_capturing():  # a replay must zero it again
        return torch.zeros(1, dtype=torch.int32, device=device)
    pools: dict[tuple[torch.device, int], Tensor] = _zeros.__dict__.setdefault("pools", {})
    pool = pools.get((device, stream.cuda_stream))
    if pool is None or not len(pool):
        pool = torch.zeros(1024, dtype=torch.int32, device=device)
    pools[device, stream.cuda_stream] = pool[1:]
    return pool[:1]


def _common_alignment(table: np.ndarray, source_size: int, target_size: int, vector: int) -> int:
    """Returns how many elements every row and pointer of the group is a multiple of: `vector`, 8 or 1.

    Pointers need no more than 16 bytes.
    """
    for align in (vector, 8):
        if (
            not (table[_COLUMNS] % align).any()
            and not (table[_SOURCE] % min(align * source_size, 16)).any()
            and not (table[_TARGET] % min(align * target_size, 16)).any()
        ):
            return align
    return 1


def _check_block_size(block_size: tuple[int, int]) -> None:
    if any(size < 1 or size & (size - 1) for size in block_size):
        raise FormatError(
            f"block_size: got {tuple(block_size)}, expected powers of two (the tiles of the CUDA kernels are)"
        )


def _check_items(
    sources: Sequence[Tensor],
    scales: Sequence[Tensor],
    targets: Sequence[Tensor],
    likes: Sequence[Tensor] | None,
    block_size: tuple[int, int],
) -> None:
    """Raises ValueError for what would make a kernel read or write outside of its tensors."""
    lengths = {len(sources), len(scales), len(targets), len(sources if likes is None else likes)}
    if lengths != {len(sources)} or not sources:
        raise ValueError(f"a group's lists have {sorted(lengths)} items, expected one number, at least 1")
    source, target = sources[0], targets[0]
    for kind, tensors, first in (("read", sources, source), ("written", targets, target)):
        for i, t in enumerate(tensors):
            if t.dtype != first.dtype or t.device != source.device or t.ndim != 2 or not t.is_contiguous():
                raise ValueError(
                    f"item {i} {kind}: got {t.dtype} {tuple(t.shape)} on {t.device}, expected a contiguous "
                    f"matrix of {first.dtype} on {source.device}"
                )
    for i, (s, t) in enumerate(zip(sources, targets, strict=True)):
        rows, columns = s.shape
        blocks = (-(-rows // block_size[0]), -(-columns // block_size[1]))
        if t.shape != s.shape:
            raise ValueError(f"item {i}: written {tuple(t.shape)}, expected the shape read, {tuple(s.shape)}")
        for scale in (scales[i],) if likes is None else (scales[i], likes[i]):
            if scale.shape != blocks or scale.dtype != torch.float32 or scale.device != s.device:
                raise ValueError(
                    f"item {i}: scale {scale.dtype} {tuple(scale.shape)} on {scale.device}, expected float32 "
                    f"{blocks} on {s.device}"
                )
            if not scale.is_contiguous():
                raise ValueError(f"item {i}: scale is not contiguous")


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    try:
        return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
    except KeyError:
        raise ValueError(f"dtype: got {dtype}, expected bfloat16, float16 or float32") from None


# Below here runs on the device. Bit patterns of float32: 0x7F800000 infinity, 0x7FC00000 the one NaN.

_UNSPECIALIZED = ["table", "counts", "num_items", "source", "scale", "target", "like", "rows", "columns"]
"""One compilation for all pointers and shapes: what the kernels may assume of them is `ALIGN`."""


@triton.jit
def _find_item(first_tiles, num_items, tile):
    """Returns the last item whose first tile is not after `tile` (so never an empty item)."""
    low = 0
    high = num_items
    while high - low > 1:
        middle = (low + high) // 2
        not_after = tl.load(first_tiles + middle) <= tile
        low = tl.where(not_after, middle, low)
        high = tl.where(not_after, high, middle)
    return low


@triton.jit
def _describe(table, num_items, source, scale, target, like, rows, columns, GROUPED: tl.constexpr):
    """Returns (item, tile within the item, source, scale, target, like, rows, columns) of this program."""
    tile = tl.program_id(0)
    item = 0
    if GROUPED:
        item = _find_item(table + 6 * num_items, num_items, tile)
        entry = table + item
        source = tl.load(entry)
        scale = tl.load(entry + num_items)
        target = tl.load(entry + 2 * num_items)
        like = tl.load(entry + 3 * num_items)
        rows = tl.load(entry + 4 * num_items).to(tl.int32)
        columns = tl.load(entry + 5 * num_items).to(tl.int32)
        tile -= tl.load(entry + 6 * num_items).to(tl.int32)
    return item, tile, source, scale, target, like, rows, columns


@triton.jit
def _value_of_code(code):
    """Returns FP8 code x 2**-120 as float32; a NaN code comes out as +-480 x 2**-120."""
    return (((code & 0x7F) << 20) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _bits_after_rounding(value, DTYPE: tl.constexpr):
    """Returns the float32 bits of `value` after rounding to DTYPE, any NaN spelled 0x7FC00000."""
    bits = value.to(tl.int32, bitcast=True)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if DTYPE.is_bf16():
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(nan, 0x7FC00000, bits)


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
        code = tl.load(codes + offset, mask=mask, other=0).to(tl.int32)
        product = (_value_of_code(code) * 2.0**120) * block_scale
        product = tl.where((code & 0x7F) == 0x7F, float("nan"), product)
        bits = _bits_after_rounding(product, OUT)
        if OUT.is_bf16():
            tl.store(raw_outs + offset, (bits >> 16).to(tl.int16), mask=mask)
        else:
            tl.store(raw_outs + offset, bits, mask=mask)
        not_finite = mask & ((bits & 0x7FFFFFFF) >= 0x7F800000)
        count += tl.sum(tl.sum(tl.sum(not_finite.to(tl.int32), 2), 1), 0)
    return count


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _dequantize_kernel(
    table,
    counts,
    num_items,
    source,
    scale,
    target,
    like,
    rows,
    columns,
    OUT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    COLUMNS_PER_SCALE: tl.constexpr,
    STEPS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Takes `[STEPS x TILE_ROWS, TILE_BLOCKS x BLOCK_COLUMNS]` codes of one item, within one row of blocks.

    The tile is 3-D, `[TILE_ROWS, TILE_BLOCKS, BLOCK_COLUMNS]`, so that each scale is loaded once per thread
    that needs it instead of once per element.
    """
    item, tile, source, scale, target, like, rows, columns = _describe(
        table, num_items, source, scale, target, like, rows, columns, GROUPED
    )
    codes = tl.multiple_of(source.to(tl.int64).to(tl.pointer_type(tl.uint8)), ALIGN)
    OUT_BYTES: tl.constexpr = OUT.primitive_bitwidth // 8
    outs = tl.multiple_of(target.to(tl.int64).to(tl.pointer_type(OUT)), min(ALIGN * OUT_BYTES, 16))
    raw_outs = outs.to(tl.pointer_type(tl.int16 if OUT.is_bf16() else tl.int32), bitcast=True)
    scales = scale.to(tl.int64).to(tl.pointer_type(tl.float32))
    columns = columns // ALIGN * ALIGN  # no change; tells the compiler (a hint would not outlive inlining)

    TILE_COLUMNS: tl.constexpr = TILE_BLOCKS * BLOCK_COLUMNS
    tiles_across = tl.cdiv(columns, TILE_COLUMNS)
    first_row = tile // tiles_across * (TILE_ROWS * STEPS)
    first_column = tile % tiles_across * TILE_COLUMNS

    first_columns = first_column + tl.arange(0, TILE_BLOCKS) * BLOCK_COLUMNS
    scale_row = (first_row // ROWS_PER_SCALE).to(tl.int64) * tl.cdiv(columns, COLUMNS_PER_SCALE)
    block_scale = tl.load(
        scales + scale_row + first_columns // COLUMNS_PER_SCALE, mask=first_columns < columns, other=0.0
    )[None, :, None]
    # Under 2**118 no code's product is infinite; NaN compares false.
    sound_scales = tl.min((tl.abs(block_scale) < 2.0**118).to(tl.int32)) == 1

    column = first_columns[None, :, None] + tl.arange(0, BLOCK_COLUMNS)[None, None, :]
    row_of_tile = tl.arange(0, TILE_ROWS)[:, None, None]
    for step in tl.static_range(STEPS):
        row = first_row + step * TILE_ROWS
        start = row.to(tl.int64) * columns
        offset = row_of_tile * columns + column
        mask = (row + row_of_tile < rows) & (column < columns)
        code = tl.load(codes + start + offset, mask=mask, other=0, cache_modifier=".cg").to(tl.int32)
        value = _value_of_code(code)
        product = (value * 2.0**120) * block_scale
        tl.store(outs + start + offset, product.to(OUT), mask=mask, eviction_policy="evict_first")
        largest = tl.max(tl.reshape(tl.abs(value), (TILE_ROWS * TILE_COLUMNS,), can_reorder=True), 0)
        if (largest.to(tl.int32, bitcast=True) > (0x7E << 20)) | (sound_scales == 0):
            tl.debug_barrier()  # orders the stores below after the one above, whichever thread made that
            count = _dequantize_unsound(
                codes, raw_outs, block_scale, row, column, rows, columns, OUT, TILE_ROWS
            )
            if count > 0:
                tl.atomic_add(counts + item, count)


@triton.jit
def _divide(value, scale):
    """Returns value / scale: correctly rounded from 2**-11 on, something under 2**-10 where it is smaller.

    `scale` must be within `_is_easy`. Markstein: a quotient from the correctly rounded reciprocal is within
    2 units in the last place; one exact remainder brings it within 1, a second one rounds it
    correctly. Overflow, of a weight far beyond its scale, comes out as NaN.
    """
    reciprocal = tl.broadcast_to(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), value.shape)
    scale = tl.broadcast_to(-scale, value.shape)
    quotient = value * reciprocal
    quotient = tl.fma(tl.fma(quotient, scale, value), reciprocal, quotient)
    return tl.fma(tl.fma(quotient, scale, value), reciprocal, quotient)


@triton.jit
def _is_easy(scale):
    """Returns where `_divide`'s remainders neither overflow nor underflow."""
    return (scale >= 2.0**-60) & (scale <= 2.0**60)


@triton.jit
def _encode(bits, scale, ANY_SCALE: tl.constexpr):
    """Returns the FP8 code, as int32, of a weight (float32 `bits`) / scale; not for NaN and infinity.

    Adding 2**20 x the quotient's power of two (at least 2**-6, where FP8's subnormal numbers begin)
    pushes all but three mantissa bits out, with the rounding of float32 addition: to nearest even.
    """
    value = bits.to(tl.float32, bitcast=True)
    if ANY_SCALE:  # moving both by a power of two moves no quotient, and leaves out only what encodes to 0
        factor = tl.where(scale < 2.0**-60, 2.0**96, tl.where(scale > 2.0**60, 2.0**-96, 1.0))
        value = value * factor
        scale = scale * factor
    quotient = tl.minimum(tl.abs(_divide(value, scale)), 448.0)  # also turns NaN, an overflow, to 448
    power_bits = tl.maximum(quotient.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    power = power_bits.to(tl.float32, bitcast=True)
    # Both products are exact: these are an addition and a subtraction.
    many = tl.full(power.shape, 2.0**20, tl.float32)
    rounded = tl.fma(power, -many, tl.fma(power, many, quotient))
    code = (rounded * 2.0**-120).to(tl.int32, bitcast=True) >> 20
    return code | ((bits >> 24) & 0x80)


@triton.jit
def _widen(raw, WEIGHT: tl.constexpr):
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
def _scale_of_largest(largest, UE8M0: tl.constexpr):
    """Returns the float32 scale of blocks from their largest finite magnitude; see `fp8_block_scale`."""
    quotient = tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32))
    scale = quotient
    if UE8M0:
        bits = tl.maximum(quotient, 2.0**-126).to(tl.int32, bitcast=True)
        scale = ((bits + 0x007FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(quotient == 0.0, 1.0, scale)


# The passes over a tile below read the weights again, from the L1 cache, NUM_ROWS rows at a time: holding
# a block's 16,384 weights in registers leaves room for one program on a multiprocessor.


@triton.jit
def _largest_finite(
    weights, column, rows, columns, WEIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr, TILE_BLOCKS: tl.constexpr
):
    """Returns the bits of each block's largest finite magnitude, and the number of weights not finite."""
    largest = tl.zeros((TILE_BLOCKS,), tl.int32)
    count = 0
    for row in range(BLOCK_ROWS):
        raw = tl.load(weights + row * columns + column, mask=(row < rows) & (column < columns), other=0)
        magnitude = _widen(raw, WEIGHT) & 0x7FFFFFFF
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
        bits = _widen(tl.load(weights + row * columns + column, mask=mask, other=0), WEIGHT)
        code = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, _encode(bits, like, True), 0x7F)
        back = tl.where((code & 0x7F) == 0x7F, float("nan"), (_value_of_code(code) * 2.0**120) * like)
        same = (_bits_after_rounding(back, tl.bfloat16) == bits) | (mask == 0)
        unchanged = tl.minimum(unchanged, tl.min(tl.min(same.to(tl.int32), 2), 0))
    return unchanged


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
):
    """Writes the tile's codes; SOUND: all weights are finite and all scales easy."""
    scale = block_scale[None, :, None]
    for first_row in range(0, BLOCK_ROWS, NUM_ROWS):
        row = first_row + tl.arange(0, NUM_ROWS)[:, None, None]
        offset = row * columns + column
        mask = (row < rows) & (column < columns)
        bits = _widen(tl.load(weights + offset, mask=mask, other=0), WEIGHT)
        if SOUND:
            code = _encode(bits, scale, False)
        else:
            code = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, _encode(bits, scale, True), 0x7F)
        tl.store(codes + offset, code.to(tl.uint8), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _quantize_kernel(
    table,
    counts,
    num_items,
    source,
    scale,
    target,
    like,
    rows,
    columns,
    WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    UE8M0: tl.constexpr,
    HAS_LIKE: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Takes `TILE_BLOCKS` blocks side by side of one item, as `[BLOCK_ROWS, TILE_BLOCKS, BLOCK_COLUMNS]`."""
    item, tile, source, scale, target, like, rows, columns = _describe(
        table, num_items, source, scale, target, like, rows, columns, GROUPED
    )
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
    weights = source.to(tl.int64).to(tl.pointer_type(RAW)) + start
    weights = tl.multiple_of(weights, min(ALIGN * WEIGHT_BYTES, 16))
    codes = tl.multiple_of(target.to(tl.int64).to(tl.pointer_type(tl.uint8)) + start, ALIGN)
    rows -= block_row * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)[:, None, None]
    offset = row * columns + column
    mask = (row < rows) & (column < columns)
    bits = _widen(tl.load(weights + offset, mask=mask, other=0), WEIGHT)

    largest = tl.max(tl.max(bits & 0x7FFFFFFF, 2), 0)
    all_finite = tl.max(largest, 0) < 0x7F800000
    if all_finite == 0:
        largest, count = _largest_finite(weights, column, rows, columns, WEIGHT, BLOCK_ROWS, TILE_BLOCKS)
        tl.atomic_add(counts + item, count)
    block_scale = _scale_of_largest(largest.to(tl.float32, bitcast=True), UE8M0)

    scale_offset = block_row.to(tl.int64) * tl.cdiv(columns, BLOCK_COLUMNS) + first_columns // BLOCK_COLUMNS
    scale_mask = first_columns < columns
    if HAS_LIKE:
        likes = like.to(tl.int64).to(tl.pointer_type(tl.float32))
        block_like = tl.load(likes + scale_offset, mask=scale_mask, other=1.0)
        unchanged = _unchanged(
            weights, block_like, column, rows, columns, WEIGHT, BLOCK_ROWS, TILE_BLOCKS, min(NUM_ROWS, 16)
        )
        block_scale = tl.where(unchanged == 1, block_like, block_scale)
    scales = scale.to(tl.int64).to(tl.pointer_type(tl.float32))
    tl.store(scales + scale_offset, block_scale, mask=scale_mask)

    if all_finite & (tl.min(_is_easy(block_scale).to(tl.int32), 0) == 1):
        if NUM_ROWS < BLOCK_ROWS:
            _write_codes(
                weights, codes, block_scale, column, rows, columns, WEIGHT, BLOCK_ROWS, NUM_ROWS, True
            )
        else:
            code = _encode(bits, block_scale[None, :, None], False)
            tl.store(codes + offset, code.to(tl.uint8), mask=mask, eviction_policy="evict_first")
    else:
        _write_codes(weights, codes, block_scale, column, rows, columns, WEIGHT, BLOCK_ROWS, 1, False)
