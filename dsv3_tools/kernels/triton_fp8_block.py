"""FP8 block kernels for CUDA: one launch for a whole group of weights, whatever their shapes.

A group's items are cut into tiles of `Tiling`, numbered one after the other; a program finds its item by a
binary search in a small table (pointers, rows, columns, first tile) that travels with the call, and a
group of one needs no table at all. Within an item consecutive programs take consecutive columns, so that
the programs in flight read and write one contiguous stretch. A program issues all its loads at once and
waits for its other threads as late as it can.

Bit for bit equal to `reference.py` from compute capability 8.0 on:

- From 8.9 on, FP8 is decoded and encoded by the device's conversions (exact; to nearest even, saturating).
  Before, and in Triton's interpreter, by integer arithmetic and by float32 operations that are exact.
  PTX's float32 arithmetic keeps subnormal numbers unless `.ftz` is asked for, and `enable_fp_fusion=False`
  keeps products and sums apart.
- Triton's `/` is not correctly rounded. `tl.div_rn` is, and divides once for each block; the division of
  every weight is Markstein's (see `_divide`) and takes a third of the instructions.
- What is rare (NaN, infinity) is found by one maximum over a tile and put right in a branch that costs
  nothing where the weights are sound.
"""

# Triton compiles its functions from source and knows no annotations; its kernels take pointers by position.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

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
            it encodes them from registers where that is all rows of a block, or else this many rows at
            a time, read again from the L1 cache.
        columns: columns of a tile, a power of two: the contiguous run.
        vector: FP8 codes that a thread loads or stores at once, 8 or 16.
        num_warps: warps of a program.
        max_registers: of a thread, a multiple of 8, where the compiler would take too many (of groups whose
            accesses are `vector` wide); 0 for its choice.
    """

    rows: int
    columns: int
    vector: int
    num_warps: int
    max_registers: int = 0


# Swept by benchmarks/gpu_kernels.py --sweep.
DEQUANTIZE_TILING = Tiling(rows=4, columns=1024, vector=8, num_warps=4)
SMALL_DEQUANTIZE_TILING = Tiling(rows=64, columns=128, vector=16, num_warps=2)
QUANTIZE_TILING = Tiling(rows=128, columns=128, vector=16, num_warps=8, max_registers=80)
QUANTIZE_LIKES_TILING = Tiling(rows=64, columns=128, vector=16, num_warps=8)
QUANTIZE_TILING_WITHOUT_CONVERSIONS = Tiling(rows=32, columns=128, vector=8, num_warps=8)

SMALL_ELEMENTS = 1 << 25
"""Up to here a group is a few waves of programs at most, and large tiles are faster than many."""

FP8_CONVERSIONS_SINCE = (8, 9)
"""The first compute capability that converts to and from FP8 in hardware."""

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
    _check_block_size(block_size)
    if tiling is None:
        is_small = len(codes) < 4 and sum(c.numel() for c in codes) <= SMALL_ELEMENTS and block_size[0] >= 128
        tiling = SMALL_DEQUANTIZE_TILING if is_small else DEQUANTIZE_TILING
    tile_rows = min(tiling.rows, block_size[0])
    group = _Group(codes, scales, outs, None, block_size, (tile_rows, tiling.columns), tiling.vector)
    constants = (
        _triton_dtype(outs[0].dtype),
        tile_rows,
        max(tiling.columns // block_size[1], 1),
        min(block_size[1], tiling.columns),
        *block_size,
        tiling is SMALL_DEQUANTIZE_TILING,
        _has_fp8_conversions(group.device_index),
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
    _check_block_size(block_size)
    if math.prod(block_size) > MAX_BLOCK_ELEMENTS:
        raise FormatError(
            f"block_size: got {block_size}, expected at most {MAX_BLOCK_ELEMENTS} elements (a block must fit "
            "into the registers of one CUDA program); quantize on the CPU"
        )
    if scale_fmt not in ("f32", "ue8m0"):
        raise ValueError(f"scale_fmt: got {scale_fmt!r}, expected 'f32' or 'ue8m0'")
    has_conversions = _has_fp8_conversions(weights[0].get_device()) if len(weights) else False
    if tiling is None:
        tiling = QUANTIZE_TILING if likes is None else QUANTIZE_LIKES_TILING
        if not has_conversions:
            tiling = QUANTIZE_TILING_WITHOUT_CONVERSIONS
    tile_blocks = max(tiling.columns // block_size[1], 1)
    while tile_blocks > 1 and tile_blocks * math.prod(block_size) > MAX_BLOCK_ELEMENTS:
        tile_blocks //= 2
    tile = (block_size[0], tile_blocks * block_size[1])
    group = _Group(weights, scales, codes, likes, block_size, tile, tiling.vector)
    constants = (
        _triton_dtype(weights[0].dtype),
        block_size[0],
        tile_blocks,
        block_size[1],
        min(tiling.rows, block_size[0]),
        scale_fmt == "ue8m0",
        likes is not None,
        has_conversions,
    )
    return group.launch(_quantize_kernel, constants, tiling)


class _Group:
    """The items of one call as the kernels see them: pointers, sizes and tiles.

    `sources` are read and `targets` written, of one shape per item; one of the two are FP8 codes. Everything
    here is paid per call and per item while the device waits, hence one loop, plain integers, and no torch
    operation that can be spared.

    Raises:
        ValueError: for what would make a kernel read or write outside of its tensors.
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
        lengths = {len(sources), len(scales), len(targets), len(sources if likes is None else likes)}
        if lengths != {len(sources)} or not sources:
            raise ValueError(f"a group's lists have {sorted(lengths)} items, expected one number, at least 1")
        source_dtype, target_dtype, device = sources[0].dtype, targets[0].dtype, sources[0].get_device()
        float32 = torch.float32
        by_shape: dict[torch.Size, tuple[int, int, tuple[int, int], int]] = {}
        items: list[tuple[int, ...]] = []  # the table: pointers, rows, columns, first tile
        num_tiles = any_column = any_source = any_target = 0
        like_pointer = 0
        for i, (source, scale, target) in enumerate(zip(sources, scales, targets, strict=True)):
            shape = source.shape
            known = by_shape.get(shape)
            if known is None:
                known = by_shape[shape] = _sizes(i, shape, block_size, tile)
            rows, columns, blocks, tiles = known
            if not (
                source.dtype is source_dtype
                and target.dtype is target_dtype
                and scale.dtype is float32
                and target.shape == shape
                and scale.shape == blocks
                and source.is_contiguous()
                and target.is_contiguous()
                and scale.is_contiguous()
                and source.get_device() == target.get_device() == scale.get_device() == device
            ):
                raise _misfit(i, source, scale, target, sources[0], targets[0], blocks)
            if likes is not None:
                like = likes[i]
                if not (
                    like.dtype is float32
                    and like.shape == blocks
                    and like.is_contiguous()
                    and like.get_device() == device
                ):
                    raise _misfit(i, source, like, target, sources[0], targets[0], blocks)
                like_pointer = like.data_ptr()
            source_pointer, target_pointer = source.data_ptr(), target.data_ptr()
            items.append(
                (source_pointer, scale.data_ptr(), target_pointer, like_pointer, rows, columns, num_tiles)
            )
            num_tiles += tiles
            any_column |= columns
            any_source |= source_pointer
            any_target |= target_pointer
        if num_tiles >= 1 << 31:
            raise ValueError(f"a group of {num_tiles} tiles, expected under 2**31; pass fewer weights")
        # Elements that every row and pointer is a multiple of; pointers need no more than 16 bytes.
        self.align = 1
        for align in (8, vector):
            source_nbytes = min(align * source_dtype.itemsize, 16)
            target_nbytes = min(align * target_dtype.itemsize, 16)
            if not (any_column % align or any_source % source_nbytes or any_target % target_nbytes):
                self.align = align
        self.device = sources[0].device
        self.device_index = device
        self._num_tiles = num_tiles
        self._items = items

    def launch(self, kernel: Any, constants: tuple[Any, ...], tiling: Tiling) -> Tensor:
        """Launches `kernel` on the current stream of the items' device; returns the counts."""
        if self.device_index < 0:  # Triton's interpreter
            return self._launch(kernel, constants, tiling, 0)
        if self.device_index == torch.cuda.current_device():
            return self._launch(kernel, constants, tiling, self._stream())
        with torch.cuda.device(self.device_index):
            return self._launch(kernel, constants, tiling, self._stream())

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self.device_index).cuda_stream)

    def _launch(self, kernel: Any, constants: tuple[Any, ...], tiling: Tiling, stream: int) -> Tensor:
        items = self._items
        if len(items) == 1:
            table = 0
            counts = _zeroed_count(self.device, stream)
        else:
            words, counts = _to_device(items, self.device)
            table = words.data_ptr()  # reused no sooner than this stream gets past the launch
        if not self._num_tiles:
            return counts
        arguments = (
            table,
            counts.data_ptr(),
            len(items),
            *items[0][:_FIRST_TILE],
            *constants,
            len(items) > 1,
            self.align,
        )
        key = (kernel, self.device_index, tiling, *arguments[-len(constants) - 2 :])
        compiled = _compiled.get(key)
        if compiled is not None:
            compiled[self._num_tiles, 1, 1](*arguments, stream=stream)
        else:
            options: dict[str, Any] = {"num_warps": tiling.num_warps, "enable_fp_fusion": False}
            if tiling.max_registers and self.align == tiling.vector:  # narrow accesses need more
                options["maxnreg"] = tiling.max_registers
            compiled = kernel[self._num_tiles,](*arguments, **options)
            if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
                _compiled[key] = compiled
        return counts


_FIRST_TILE = 6
"""Where an item's tuple has its first tile; before it are the kernels' arguments."""

_compiled: dict[tuple[Any, ...], CompiledKernel] = {}
"""Compiled kernels by (function, device, tiling, constants).

Triton's own look-up specializes every argument of every launch again, which takes longer than the launch.
"""


def _sizes(
    i: int, shape: torch.Size, block_size: tuple[int, int], tile: tuple[int, int]
) -> tuple[int, int, tuple[int, int], int]:
    """Returns rows, columns, the shape of the scales and the number of tiles."""
    if len(shape) != 2:
        raise ValueError(f"item {i}: got shape {tuple(shape)}, expected a matrix")
    rows, columns = shape
    blocks = (-(-rows // block_size[0]), -(-columns // block_size[1]))
    return rows, columns, blocks, -(-rows // tile[0]) * -(-columns // tile[1])


def _misfit(
    i: int,
    source: Tensor,
    scale: Tensor,
    target: Tensor,
    first_source: Tensor,
    first_target: Tensor,
    blocks: tuple[int, ...],
) -> ValueError:
    """Returns the error for an item that `_Group` refuses; `scale` may be its `like`."""
    device = first_source.device
    for what, t, dtype, shape in (
        ("read", source, first_source.dtype, tuple(source.shape)),
        ("written", target, first_target.dtype, tuple(source.shape)),
        ("scale", scale, torch.float32, blocks),
    ):
        if (t.dtype, tuple(t.shape), t.device) != (dtype, shape, device) or not t.is_contiguous():
            layout = "contiguous" if t.is_contiguous() else "not contiguous"
            return ValueError(
                f"item {i}: {what}: got {t.dtype} {tuple(t.shape)} on {t.device}, {layout}, expected "
                f"{dtype} {shape} on {device}, contiguous"
            )
    return ValueError(f"item {i}: expected tensors on {device}")


def _to_device(items: list[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the table, int64 `[7, items]`, and a zeroed int32 count per item, in one copy.

    Nothing waits. The pinned source may be dropped at once: torch's host allocator does not reuse it before
    the copy is done. The device memory comes from the current stream's pool, so its reuse comes after
    the launch that reads it.
    """
    num_items = len(items)
    num_table = num_items * (_FIRST_TILE + 1)
    num_words = num_table + (num_items + 1) // 2
    host = torch.empty(num_words, dtype=torch.int64, pin_memory=device.type == "cuda")
    array = host.numpy()
    table = np.fromiter(itertools.chain.from_iterable(items), np.int64, num_table)
    array[:num_table].reshape(-1, num_items)[:] = table.reshape(num_items, -1).T
    array[num_table:] = 0
    words = host.to(device, non_blocking=True)
    return words, words[num_table:].view(torch.int32)[:num_items]


_zeros = threading.local()


def _zeroed_count(device: torch.device, stream: int) -> Tensor:
    """Returns one int32 zero of its own.

    A launch that zeroes four bytes takes a tenth of the time of dequantizing one expert weight. So zeros
    are made 1024 at a time, per thread and stream, and each is given out once.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():  # a replay must zero it again
        return torch.zeros(1, dtype=torch.int32, device=device)
    pools: dict[tuple[torch.device, int], list[Tensor]] = _zeros.__dict__.setdefault("pools", {})
    pool = pools.get((device, stream))
    if not pool:
        pool = pools[device, stream] = list(torch.zeros(1024, dtype=torch.int32, device=device).split(1))
    return pool.pop()


@functools.cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def _has_fp8_conversions(device_index: int) -> bool:
    return device_index >= 0 and _capability(device_index) >= FP8_CONVERSIONS_SINCE


def _check_block_size(block_size: tuple[int, int]) -> None:
    if any(size < 1 or size & (size - 1) for size in block_size):
        raise FormatError(
            f"block_size: got {tuple(block_size)}, expected powers of two (the tiles of the CUDA kernels are)"
        )


_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    try:
        return _TRITON_DTYPES[dtype]
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
        table = table.to(tl.pointer_type(tl.int64))
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
def _maximum_or_nan(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest_bits(value, HAS_CONVERSIONS: tl.constexpr):
    """Returns, per row, the float32 bits of the largest magnitude; NaN counts as more than infinity."""
    if HAS_CONVERSIONS:  # half the instructions
        largest = tl.reduce(tl.abs(value), 1, _maximum_or_nan).to(tl.int32, bitcast=True)
    else:
        largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    return largest


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
    table: tl.int64,
    counts: tl.int64,
    num_items: tl.int32,
    source: tl.int64,
    scale: tl.int64,
    target: tl.int64,
    like: tl.int64,
    rows: tl.int32,
    columns: tl.int32,
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
    item, tile, source, scale, target, like, rows, columns = _describe(
        table, num_items, source, scale, target, like, rows, columns, GROUPED
    )
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

    if HAS_CONVERSIONS:
        product = code.to(tl.float8e4nv, bitcast=True).to(tl.float32) * block_scale
    else:
        code = code.to(tl.int32)
        product = (_value_of_code(code) * 2.0**120) * block_scale
        product = tl.where((code & 0x7F) == 0x7F, float("nan"), product)
    tl.store(outs + start + offset, product.to(OUT), mask=mask)

    # A masked element is 0 x its scale: with a scale that is not finite it only takes the branch in vain.
    largest = tl.max(
        _largest_bits(tl.reshape(product, (TILE_ROWS * TILE_BLOCKS, BLOCK_COLUMNS)), HAS_CONVERSIONS), 0
    )
    if largest >= (0x7F7F8000 if OUT.is_bf16() else 0x7F800000):  # what rounds to infinity, infinity, NaN
        tl.debug_barrier()  # orders the stores below after the one above, whichever thread made that
        count = _dequantize_unsound(
            codes, raw_outs, block_scale, first_row, column, rows, columns, OUT, TILE_ROWS
        )
        if count > 0:
            tl.atomic_add(counts.to(tl.pointer_type(tl.int32)) + item, count)


@triton.jit
def _divide(value, scale, WEIGHT: tl.constexpr, EXACT_RECIPROCAL: tl.constexpr):
    """Returns value / scale: what encodes like the correctly rounded quotient.

    `scale` must be within `_is_easy`; EXACT_RECIPROCAL: it is a power of two. Overflow, of a weight far
    beyond its scale, comes out as NaN. Markstein: a quotient from the correctly rounded reciprocal is within
    2 units in the last place; one exact remainder rounds it correctly unless the true quotient is within
    2**-22 units of the middle of two float32; a second one always (from quotients of 2**-11 on; what is
    smaller stays under 2**-10).

    A weight of 16 bits needs no second one. Only the float32 next to a middle m of two FP8 numbers matter:
    let A < 2**11, S in [2**23, 2**24) and M in [16, 32) be the integers in value, scale and m. For
    a quotient that near to m +- half a unit, |A 2**k - S M| (k >= 16) must be an integer D < 16 with
    S = 2**20 D + t, |t| <= 16 (2**21, D < 8 below m = 16). So 2**16 divides tM +- D, which is under 2**10 and
    thus zero; but 0 < D < |t|M unless t is 0, and D is not 0 as S is at least 2**23.
    """
    reciprocal = tl.broadcast_to(tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), value.shape)
    quotient = value * reciprocal
    if not EXACT_RECIPROCAL:
        # With these signs a quotient of -0.0 stays: its remainder is +0.0.
        scale = tl.broadcast_to(scale, value.shape)
        reciprocal = reciprocal * -1.0
        quotient = tl.fma(tl.fma(quotient, scale, value * -1.0), reciprocal, quotient)
        if WEIGHT.is_fp32():
            quotient = tl.fma(tl.fma(quotient, scale, value * -1.0), reciprocal, quotient)
    return quotient


@triton.jit
def _or(x, y):
    return x | y


@triton.jit
def _block_by_block(values):
    """Returns `[rows, blocks, columns]` as `[blocks, rows x columns]`."""
    values = tl.permute(values, (1, 0, 2))
    return tl.reshape(values, (values.shape[0], values.shape[1] * values.shape[2]))


@triton.jit
def _is_easy(scale):
    """Returns where `_divide`'s remainders neither overflow nor underflow."""
    return (scale >= 2.0**-60) & (scale <= 2.0**60)


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
        code = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, _encode_bits(bits, like, True), 0x7F)
        back = tl.where((code & 0x7F) == 0x7F, float("nan"), (_value_of_code(code) * 2.0**120) * like)
        same = (_bits_after_rounding(back, tl.bfloat16) == bits) | (mask == 0)
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
        code = _encode(_widen(raw, WEIGHT), like, WEIGHT, False, True)
        # A weight far beyond `like` may come back as NaN: a difference too.
        back = (code.to(tl.float8e4nv, bitcast=True).to(tl.float32) * like).to(tl.bfloat16)
        if WEIGHT.is_bf16():
            difference = back.to(tl.int16, bitcast=True) ^ raw
        else:
            difference = back.to(tl.float32).to(tl.int32, bitcast=True) ^ _widen(raw, WEIGHT)
        any_difference |= tl.reduce(_block_by_block(difference), 1, _or).to(tl.int32)
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
        bits = _widen(tl.load(weights + offset, mask=mask, other=0), WEIGHT)
        if SOUND:
            code = _encode(bits, scale, WEIGHT, EXACT_RECIPROCAL, HAS_CONVERSIONS)
        else:
            code = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, _encode_bits(bits, scale, True), 0x7F)
            code = code.to(tl.uint8)
        tl.store(codes + offset, code, mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _quantize_kernel(
    table: tl.int64,
    counts: tl.int64,
    num_items: tl.int32,
    source: tl.int64,
    scale: tl.int64,
    target: tl.int64,
    like: tl.int64,
    rows: tl.int32,
    columns: tl.int32,
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
    weights = source.to(tl.pointer_type(RAW)) + start
    weights = tl.multiple_of(weights, min(ALIGN * WEIGHT_BYTES, 16))
    codes = tl.multiple_of(target.to(tl.pointer_type(tl.uint8)) + start, ALIGN)
    rows -= block_row * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)[:, None, None]
    offset = row * columns + column
    mask = (row < rows) & (column < columns)
    bits = _widen(tl.load(weights + offset, mask=mask, other=0), WEIGHT)

    scale_offset = block_row.to(tl.int64) * tl.cdiv(columns, BLOCK_COLUMNS) + first_columns // BLOCK_COLUMNS
    scale_mask = first_columns < columns
    scales = scale.to(tl.pointer_type(tl.float32))
    counts = counts.to(tl.pointer_type(tl.int32))
    EXACT_RECIPROCAL: tl.constexpr = UE8M0 and not HAS_LIKE
    largest = _largest_bits(_block_by_block(bits.to(tl.float32, bitcast=True)), HAS_CONVERSIONS)
    all_finite = tl.max(largest, 0) < 0x7F800000
    if all_finite == 0:
        largest, count = _largest_finite(weights, column, rows, columns, WEIGHT, BLOCK_ROWS, TILE_BLOCKS)
        tl.atomic_add(counts + item, count)
    block_scale = _scale_of_largest(largest.to(tl.float32, bitcast=True), UE8M0)

    if HAS_LIKE:
        likes = like.to(tl.pointer_type(tl.float32))
        block_like = tl.load(likes + scale_offset, mask=scale_mask, other=1.0)
        unchanged = tl.full((TILE_BLOCKS,), 0, tl.int32)
        if HAS_CONVERSIONS and all_finite & (tl.min(_is_easy(block_like).to(tl.int32), 0) == 1):
            unchanged = _unchanged_sound(
                weights, block_like, column, rows, columns, WEIGHT, BLOCK_ROWS, TILE_BLOCKS, min(NUM_ROWS, 32)
            )
        else:
            unchanged = _unchanged(
                weights, block_like, column, rows, columns, WEIGHT, BLOCK_ROWS, TILE_BLOCKS, min(NUM_ROWS, 16)
            )
        block_scale = tl.where(unchanged == 1, block_like, block_scale)
    tl.store(scales + scale_offset, block_scale, mask=scale_mask)

    if all_finite & (tl.min(_is_easy(block_scale).to(tl.int32), 0) == 1):
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
