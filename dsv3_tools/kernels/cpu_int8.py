"""INT8 arithmetic on the CPU: the bytes of `reference_integer.py`. A channel is a block of one row.

How: see `cpu_fp8_block.py`. A tile of blocks is read once into a float32 buffer that stays in L2 cache.

Quotients are rounded by adding and subtracting 1.5 x 2**23, which is exact to nearest even below 2**22.
All of them are: none is over 127.00002, since a scale is the largest magnitude / 127, or 1.0 for magnitudes
below 2**-119, or 4 x the FP8 scale, which makes 112 of the largest code. For the same reason no code needs
clamping, and its byte is the lowest of the sum's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_tools.kernels.cpu_bits import (
    BITS,
    INFINITY,
    MAGNITUDE,
    NAN,
    as_float32,
    as_uint32,
    check_tensors,
    count_blocks,
    narrow,
    widen,
)
from dsv3_tools.kernels.cpu_load import check_source, load_row, source_arrays, spread_scales
from dsv3_tools.kernels.jit import cached, compiled, inlined

__all__ = [
    "dequantize_int8_block_into",
    "dequantize_int8_channel_into",
    "quantize_int8_block_into",
    "quantize_int8_channel_into",
]

float32, int32, uint32, int8 = np.float32, np.int32, np.uint32, np.int8

_TILE_ELEMENTS = 64 * 1024  # 256 KB of float32: the later passes find them in L2 cache
_MIN_SCALE = float32(2.0**-126)
_ROUNDER = float32(1.5 * 2.0**23)
_BITS_128 = uint32(0x4300_0000)


def dequantize_int8_block_into(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    *,
    block_size: tuple[int, int] = (128, 128),
) -> Tensor:
    """Writes the weights of INT8 block codes: see `kernels.dequantize_int8_block_into`."""
    return _dequantize_items("dequantize_int8_block_into", codes, scales, outs, block_size)


def dequantize_int8_channel_into(
    codes: Sequence[Tensor], scales: Sequence[Tensor], outs: Sequence[Tensor]
) -> Tensor:
    """Writes the weights of INT8 channel codes: see `kernels.dequantize_int8_channel_into`."""
    return _dequantize_items("dequantize_int8_channel_into", codes, scales, outs, None)


def quantize_int8_block_into(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    block_size: tuple[int, int] = (128, 128),
    fp8_scales: Sequence[Tensor] | None = None,
    fp8_block_size: tuple[int, int] = (128, 128),
) -> Tensor:
    """Writes INT8 block codes and scales of `weights`: see `kernels.quantize_int8_block_into`."""
    where = "quantize_int8_block_into"
    return _quantize_items(where, weights, codes, scales, block_size, fp8_scales, fp8_block_size)


def quantize_int8_channel_into(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    fp8_scales: Sequence[Tensor] | None = None,
    fp8_block_size: tuple[int, int] = (128, 128),
) -> Tensor:
    """Writes INT8 channel codes and scales of `weights`: see `kernels.quantize_int8_channel_into`."""
    where = "quantize_int8_channel_into"
    return _quantize_items(where, weights, codes, scales, None, fp8_scales, fp8_block_size)


def _dequantize_items(
    name: str,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    block_size: tuple[int, int] | None,
) -> Tensor:
    """Checks all items, then writes them; no `block_size` is a row."""
    items = list(zip(codes, scales, outs, strict=True))
    for i, (code, scale, out) in enumerate(items):
        _check(f"{name}, item {i}", code, scale, block_size)
        check_tensors(f"{name}, item {i}", ("weights", out, code.shape, tuple(BITS)))
    counts = torch.empty(len(items), dtype=torch.int32)
    for i, (code, scale, out) in enumerate(items):
        bits = out.view(BITS[out.dtype]).numpy()
        counts[i] = _dequantize(code.numpy(), scale.numpy(), bits, *(block_size or _row_of(code)))
    return counts


def _quantize_items(
    name: str,
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    block_size: tuple[int, int] | None,
    fp8_scales: Sequence[Tensor] | None,
    fp8_block_size: tuple[int, int],
) -> Tensor:
    """Checks all items, then writes them; no `block_size` is a row."""
    sources: Sequence[Tensor | None] = [None] * len(weights) if fp8_scales is None else fp8_scales
    items = list(zip(weights, codes, scales, sources, strict=True))
    for i, (weight, code, scale, source) in enumerate(items):
        where = f"{name}, item {i}"
        check_source(where, weight, source, fp8_block_size)
        _check(where, code, scale, block_size)
        check_tensors(where, ("codes", code, weight.shape, (torch.int8,)))
    counts = torch.empty(len(items), dtype=torch.int32)
    for i, (weight, code, scale, source) in enumerate(items):
        counts[i] = _quantize(
            *source_arrays(weight, source, fp8_block_size),
            code.numpy(),
            scale.numpy(),
            source is not None and block_size == fp8_block_size,
            *(block_size or _row_of(code)),
        )
    return counts


def _row_of(code: Tensor) -> tuple[int, int]:
    return 1, max(code.shape[1], 1)


def _check(where: str, code: Tensor, scale: Tensor, block_size: tuple[int, int] | None) -> None:
    """Raises FormatError where the kernels would read or write outside of codes or scales."""
    blocks = count_blocks(where, code.shape, block_size or (1, 1))
    check_tensors(
        where,
        ("codes", code, code.shape, (torch.int8,)),
        ("scales", scale, blocks if block_size else (blocks[0], 1), (torch.float32,)),
    )


# ------------------------------------------------------------------------------------------------ one row


@inlined
def _squared_error(quotient: Any) -> Any:
    """Returns the bits of 128 + (what rounding changes)^2: the low half is round(squared error x 65536)."""
    error = quotient - ((quotient + _ROUNDER) - _ROUNDER)
    return as_uint32(error * error + float32(128))


@compiled
def _dequantize_row(codes: Any, scale: Any, out: Any) -> None:
    for j in range(codes.size):
        out[j] = narrow(as_uint32(float32(codes[j]) * scale[j]), out)


@compiled
def _dequantize_row_counted(codes: Any, scale: Any, out: Any) -> Any:
    """Like `_dequantize_row`, for any scale; returns how many elements are not finite."""
    count = uint32(0)
    for j in range(codes.size):
        bits = as_uint32(float32(codes[j]) * scale[j])
        spelled = narrow(NAN if uint32(bits & MAGNITUDE) > INFINITY else bits, out)
        out[j] = spelled
        count = uint32(count + uint32(uint32(widen(spelled) & MAGNITUDE) >= INFINITY))
    return count


@compiled
def _raise_to_magnitude(largest: Any, values: Any) -> None:
    for j in range(largest.size):
        largest[j] = max(largest[j], uint32(as_uint32(values[j]) & MAGNITUDE))


@compiled
def _add_row_errors(values: Any, inverse: Any, errors: Any) -> None:
    for j in range(errors.size):
        errors[j] = uint32(errors[j] + _squared_error(values[j] * inverse[j]))


@compiled
def _wrapping_sum(numbers: Any) -> Any:
    total = uint32(0)
    for j in range(numbers.size):
        total = uint32(total + numbers[j])
    return total


@compiled
def _quantize_row(values: Any, scale: Any, codes: Any) -> None:
    for j in range(codes.size):
        codes[j] = int8(as_uint32(values[j] / scale[j] + _ROUNDER))


# ----------------------------------------------------------------------------------------- rows of blocks


@cached
def _dequantize(codes: Any, scales: Any, out: Any, block_rows: int, block_columns: int) -> Any:
    rows, columns = codes.shape
    spread = np.empty(columns, float32)
    count = 0
    for i in range(scales.shape[0]):
        safe = spread_scales(scales[i], block_columns, 0, spread)
        for r in range(i * block_rows, min((i + 1) * block_rows, rows)):
            if safe:
                _dequantize_row(codes[r], spread, out[r])
            else:
                count += _dequantize_row_counted(codes[r], spread, out[r])
    return count


@cached
def _quantize(
    weights: Any,
    fp8_scales: Any,
    fp8_rows: int,
    fp8_columns: int,
    codes: Any,
    scales: Any,
    aligned: bool,
    block_rows: int,
    block_columns: int,
) -> Any:
    rows, columns = weights.shape
    width = min(max(1, _TILE_ELEMENTS // (block_rows * block_columns)) * block_columns, columns)
    values = np.empty((min(block_rows, rows), width), float32)
    spread, other, largest = np.empty(width, float32), np.empty(width, float32), np.empty(width, uint32)
    count, safe = 0, False
    for i in range(scales.shape[0]):
        top, bottom = i * block_rows, min((i + 1) * block_rows, rows)
        for left in range(0, columns, width):
            n = min(left + width, columns) - left
            largest[:n] = 0
            for r in range(top, bottom):
                if r == top or r % fp8_rows == 0:
                    safe = spread_scales(fp8_scales[r // fp8_rows], fp8_columns, left, spread[:n])
                count += load_row(weights[r, left : left + n], spread, safe, values[r - top])
                _raise_to_magnitude(largest[:n], values[r - top])
            tile_scales = scales[i, left // block_columns : -(-(left + n) // block_columns)]
            for k in range(tile_scales.size):
                scale = as_float32(largest[k * block_columns : min((k + 1) * block_columns, n)].max())
                scale /= float32(127)
                tile_scales[k] = float32(1) if scale < _MIN_SCALE else scale
            if aligned:
                fp8_tile_scales = fp8_scales[i, left // block_columns : -(-(left + n) // block_columns)]
                _try_aligned(values, bottom - top, n, tile_scales, fp8_tile_scales, block_columns, other)
            spread_scales(tile_scales, block_columns, 0, spread[:n])
            for r in range(top, bottom):
                _quantize_row(values[r - top], spread, codes[r, left : left + n])
    return count


@compiled
def _try_aligned(
    values: Any, rows: int, columns: int, scales: Any, fp8_scales: Any, block_columns: int, inverse: Any
) -> None:
    """Replaces scales by 4 x the FP8 scale where the blocks' squared error is no larger with that.

    Where 4 x the FP8 scale is no scale, the one there is competes with itself.
    """
    candidates = fp8_scales * float32(4)
    for k in range(scales.size):
        if not (candidates[k] >= _MIN_SCALE and candidates[k] < float32(np.inf)):
            candidates[k] = scales[k]
    errors, errors_aligned = np.zeros(columns, uint32), np.zeros(columns, uint32)
    _add_errors(values, rows, scales, block_columns, inverse, errors)
    _add_errors(values, rows, candidates, block_columns, inverse, errors_aligned)
    for k in range(scales.size):
        a, b = k * block_columns, min((k + 1) * block_columns, columns)
        offset = uint32(uint32((b - a) * rows) * _BITS_128)
        error = float32(int32(uint32(_wrapping_sum(errors[a:b]) - offset)))
        error_aligned = float32(int32(uint32(_wrapping_sum(errors_aligned[a:b]) - offset)))
        ratio = candidates[k] / scales[k]
        if error_aligned * ratio * ratio <= error:
            scales[k] = candidates[k]


@compiled
def _add_errors(values: Any, rows: int, scales: Any, block_columns: int, inverse: Any, errors: Any) -> None:
    """Adds each column's squared errors to `errors`; `inverse` is room for a row."""
    spread_scales(float32(1) / scales, block_columns, 0, inverse[: errors.size])
    for r in range(rows):
        _add_row_errors(values[r], inverse, errors)
