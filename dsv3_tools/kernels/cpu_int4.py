"""INT4 group arithmetic on the CPU: the bytes of `reference_integer.py`.

How: see `cpu_fp8_block.py`. A row is read once into a float32 buffer. The search then goes over each group
once, with the 16 scales in the lanes of a vector; what it needs for that is computed for all groups of the
row first, in long loops. Measured on one Zen 5 core from FP8, groups of 128: 2.3 G weights/s without the
search and 0.8 with it.

Quotients are rounded by adding and subtracting 1.5 x 2**23, which is exact to nearest even below 2**22.
All of them are: a scale is at least 0.64 of what maps the group onto 15 steps, or 1.0 for a group of less
than 2**-121. Between addition and subtraction a sum is clamped: there codes are neighbouring floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from dsv3_tools.errors import FormatError
from dsv3_tools.kernels.cpu_bits import (
    BITS,
    INFINITY,
    MAGNITUDE,
    NAN,
    SAFE_SCALE,
    as_float32,
    as_uint32,
    check_tensors,
    count_blocks,
    narrow,
    round_to_bfloat16,
    widen,
)
from dsv3_tools.kernels.cpu_load import check_source, load_row, source_arrays, spread_scales
from dsv3_tools.kernels.jit import cached, compiled, inlined
from dsv3_tools.kernels.reference_integer import SCALE_FACTORS

__all__ = ["dequantize_int4_group_into", "quantize_int4_group_into"]

float32, int32, uint8, uint32, uint64 = np.float32, np.int32, np.uint8, np.uint32, np.uint64

_MIN_SCALE = float32(2.0**-126)
_ROUNDER = float32(1.5 * 2.0**23)
_BITS_128 = uint32(0x4300_0000)
_MAX_GROUP_SIZE = 256  # the sum of more squared errors may not fit into 32 bits

_LANES = 16

# An argument of the kernels, not a constant in them: numba's cache would not notice another value. Should
# there be fewer than 16, the first fills up: the first of equals wins.
_FACTORS = {
    "absmax": np.array(SCALE_FACTORS[:1], float32),
    "mse": np.array((*SCALE_FACTORS, *[SCALE_FACTORS[0]] * (_LANES - len(SCALE_FACTORS))), float32),
}


def dequantize_int4_group_into(
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor] | None,
    outs: Sequence[Tensor],
) -> Tensor:
    """Writes the weights of packed INT4 codes into `outs`: see `kernels.dequantize_int4_group_into`."""
    items = list(zip(packed, scales, _each(zeros, packed), outs, strict=True))
    for i, (words, scale, zero, out) in enumerate(items):
        where = f"dequantize_int4_group_into, item {i}"
        check_tensors(where, ("weights", out, out.shape, tuple(BITS)))
        _check(where, out, words, scale, zero, (*BITS, torch.float16))
    counts = torch.empty(len(items), dtype=torch.int32)
    for i, (words, scale, zero, out) in enumerate(items):
        counts[i] = _dequantize(
            words.view(torch.uint32).numpy(),
            scale.to(torch.float32).numpy(),
            _zero_array(zero),
            zero is not None,
            out.view(BITS[out.dtype]).numpy(),
        )
    return counts


def quantize_int4_group_into(
    weights: Sequence[Tensor],
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor] | None,
    *,
    search: str = "mse",
    fp8_scales: Sequence[Tensor] | None = None,
    fp8_block_size: tuple[int, int] = (128, 128),
) -> Tensor:
    """Writes packed INT4 codes, scales and zeros of `weights`: see `kernels.quantize_int4_group_into`."""
    if search not in _FACTORS:
        raise ValueError(f"search: got {search!r}, expected 'absmax' or 'mse'")
    sources = _each(fp8_scales, weights)
    items = list(zip(weights, packed, scales, _each(zeros, weights), sources, strict=True))
    for i, (weight, words, scale, zero, source) in enumerate(items):
        where = f"quantize_int4_group_into, item {i}"
        check_source(where, weight, source, fp8_block_size)
        _check(where, weight, words, scale, zero, (torch.bfloat16,))
        if weight.shape[1] // scale.shape[1] > _MAX_GROUP_SIZE:
            raise FormatError(
                f"{where}: groups of {weight.shape[1] // scale.shape[1]}, expected at most {_MAX_GROUP_SIZE}"
            )
    counts = torch.empty(len(items), dtype=torch.int32)
    for i, (weight, words, scale, zero, source) in enumerate(items):
        counts[i] = _quantize(
            *source_arrays(weight, source, fp8_block_size),
            words.view(torch.uint32).numpy(),
            scale.view(torch.uint16).numpy(),
            _zero_array(zero),
            zero is not None,
            _FACTORS[search],
        )
    return counts


def _each(optional: Sequence[Tensor] | None, items: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return [None] * len(items) if optional is None else optional


def _zero_array(zero: Tensor | None) -> Any:
    return np.empty((0, 0), uint8) if zero is None else zero.numpy()


def _check(
    where: str,
    weight: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    scale_dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raises FormatError where the kernels would read or write outside of packed codes, scales or zeros."""
    rows, columns = count_blocks(where, weight.shape, (1, 1))
    groups = scale.shape[1] if scale.dim() == 2 else 0
    if groups == 0 or columns % (8 * groups) != 0 or columns == 0:
        raise FormatError(
            f"{where}: {columns} columns with scales of {tuple(scale.shape)}, expected [rows, groups] "
            "and groups of a multiple of 8"
        )
    check_tensors(
        where,
        ("packed", packed, (rows, columns // 8), (torch.int32,)),
        ("scales", scale, (rows, groups), scale_dtypes),
    )
    if zero is not None:
        check_tensors(where, ("zeros", zero, (rows, groups), (torch.uint8,)))


# ------------------------------------------------------------------------------------------------ packing


@compiled
def _unpack_row(words: Any, eights: Any) -> None:
    """Spreads each word's eight codes over the bytes of a uint64, the first to the lowest."""
    for j in range(words.size):
        x = uint64(words[j])
        x = (x | (x << uint64(16))) & uint64(0x0000_FFFF_0000_FFFF)
        x = (x | (x << uint64(8))) & uint64(0x00FF_00FF_00FF_00FF)
        eights[j] = (x | (x << uint64(4))) & uint64(0x0F0F_0F0F_0F0F_0F0F)


@compiled
def _pack_row(eights: Any, words: Any) -> None:
    """The reverse of `_unpack_row`."""
    for j in range(words.size):
        x = eights[j]
        x = (x | (x >> uint64(4))) & uint64(0x00FF_00FF_00FF_00FF)
        x = (x | (x >> uint64(8))) & uint64(0x0000_FFFF_0000_FFFF)
        words[j] = uint32(x | (x >> uint64(16)))


# --------------------------------------------------------------------------------------------- dequantize


@compiled
def _dequantize_row(codes: Any, zero: Any, scale: Any, out: Any) -> None:
    for j in range(codes.size):
        out[j] = narrow(as_uint32((float32(codes[j]) - zero[j]) * scale[j]), out)


@compiled
def _dequantize_row_counted(codes: Any, zero: Any, scale: Any, out: Any) -> Any:
    """Like `_dequantize_row`, for any scale; returns how many elements are not finite."""
    count = uint32(0)
    for j in range(codes.size):
        bits = as_uint32((float32(codes[j]) - zero[j]) * scale[j])
        spelled = narrow(NAN if uint32(bits & MAGNITUDE) > INFINITY else bits, out)
        out[j] = spelled
        count = uint32(count + uint32(uint32(widen(spelled) & MAGNITUDE) >= INFINITY))
    return count


@compiled
def _spread(numbers: Any, groups: Any) -> None:
    for g in range(groups.shape[0]):
        for j in range(groups.shape[1]):
            groups[g, j] = float32(numbers[g])


@cached
def _dequantize(packed: Any, scales: Any, zeros: Any, has_zeros: bool, out: Any) -> Any:
    rows, groups = scales.shape
    columns = out.shape[1]
    eights = np.empty(packed.shape[1], uint64)
    codes = eights.view(uint8)
    scale, zero = np.empty(columns, float32), np.full(columns, float32(8))
    group_scale, group_zero = scale.reshape(groups, -1), zero.reshape(groups, -1)
    count = 0
    for r in range(rows):
        _unpack_row(packed[r], eights)
        _spread(scales[r], group_scale)
        if has_zeros:
            _spread(zeros[r], group_zero)
        safe = True
        for g in range(groups):
            safe &= abs(scales[r, g]) < SAFE_SCALE  # False for NaN
        if safe:
            _dequantize_row(codes, zero, scale, out[r])
        else:
            count += _dequantize_row_counted(codes, zero, scale, out[r])
    return count


# ----------------------------------------------------------------------------------------------- quantize


@inlined
def _usable(scale: Any) -> Any:
    """Returns the scale in BF16, as float32, or 1.0 where that is too small."""
    rounded = as_float32(uint32(round_to_bfloat16(as_uint32(scale)) & uint32(0xFFFF_0000)))
    return float32(1) if rounded < _MIN_SCALE else rounded


@compiled
def _largest(values: Any) -> Any:
    largest = uint32(0)
    for j in range(values.size):
        largest = max(largest, uint32(as_uint32(values[j]) & MAGNITUDE))
    return as_float32(largest)


@compiled
def _bounds(values: Any) -> Any:
    """Returns low and high, low <= 0 <= high: negative floats are the largest of all bits as uint32."""
    low, high = uint32(0x8000_0000), int32(0)
    for j in range(values.size):
        bits = as_uint32(values[j])
        low, high = max(low, bits), max(high, int32(bits))
    return as_float32(low), as_float32(uint32(high))


def _add_errors(_context: Any, values: Any, inverse: Any, least: Any, most: Any, totals: Any) -> Any:
    """Adds, for each of 16 scales, the bits of 128 + squared error of all `values` to `totals`.

    Every lane of a vector is one scale. A loop that LLVM would make into vectors has values in the lanes
    and adds them up across lanes at its end, 16 times for every group: a fifth slower for groups of
    128 and half as fast for groups of 32.

    Args:
        values: float32 `[n]`.
        inverse: float32 `[16]`, 1 / scale.
        least: uint32 `[16]`, the bits of the least `_ROUNDER` + code; positive floats are ordered like bits.
        most: the same of the largest.
        totals: uint32 `[16]`.
    """
    signature = types.void(values, inverse, least, most, totals)
    floats, words = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(ir.IntType(32), _LANES)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [
            context.make_array(kind)(context, builder, argument)
            for kind, argument in zip(signature.args, arguments, strict=True)
        ]
        pointers = [builder.bitcast(array.data, words.as_pointer()) for array in arrays[1:]]
        loaded = [builder.load(pointer, align=4) for pointer in pointers]
        scale, total = builder.bitcast(loaded[0], floats), cgutils.alloca_once_value(builder, loaded[3])
        rounder, spacing = (ir.Constant(floats, [number] * _LANES) for number in (float(_ROUNDER), 128.0))
        size = builder.extract_value(arrays[0].shape, 0)
        with cgutils.for_range(builder, size) as loop:
            value = builder.load(builder.gep(arrays[0].data, [loop.index]))
            lane = builder.insert_element(ir.Constant(floats, None), value, ir.IntType(32)(0))
            spread = builder.shuffle_vector(lane, lane, ir.Constant(words, None))
            quotient = builder.fmul(spread, scale)
            code = builder.bitcast(builder.fadd(quotient, rounder), words)
            code = builder.select(builder.icmp_unsigned(">", code, loaded[1]), code, loaded[1])
            code = builder.select(builder.icmp_unsigned("<", code, loaded[2]), code, loaded[2])
            error = builder.fsub(quotient, builder.fsub(builder.bitcast(code, floats), rounder))
            square = builder.fadd(builder.fmul(error, error), spacing)
            builder.store(builder.add(builder.load(total), builder.bitcast(square, words)), total)
        builder.store(builder.load(total), pointers[3], align=4)
        return context.get_dummy_value()

    return signature, generate


_add_errors_of_16: Any = intrinsic(_add_errors)


@compiled
def _quantize_group(values: Any, scale: Any, zero: Any, codes: Any) -> None:
    offset = uint32(zero)
    least, most = _ROUNDER - zero, _ROUNDER + (float32(15) - zero)
    for j in range(values.size):
        rounded = min(max(values[j] / scale + _ROUNDER, least), most)
        codes[j] = uint8(uint32(as_uint32(rounded) + offset))


# ------------------------------------------------------- quantize: all groups of one row, `[groups, tried]`


@compiled
def _plain_scales(values: Any, has_zeros: bool, plain: Any, low: Any) -> None:
    """Writes each group's plain scale and, if there are zeros, its `low`, once for each scale tried."""
    for g in range(plain.shape[0]):
        if has_zeros:
            bound, high = _bounds(values[g])
            plain[g] = high / float32(15) - bound / float32(15)
            low[g] = bound
        else:
            plain[g] = _largest(values[g]) / float32(7.5)


@compiled
def _candidates(plain: Any, low: Any, factors: Any, has_zeros: bool, scales: Any, zeros: Any) -> None:
    """Writes the scale and the zero that each factor gives; all arrays are flat and of one size."""
    for i in range(scales.size):
        scales[i] = _usable(plain[i] * factors[i])
    for i in range(scales.size):
        zero = (-(low[i] * factors[i]) / scales[i] + _ROUNDER) - _ROUNDER
        zeros[i] = min(max(zero, float32(0)), float32(15)) if has_zeros else float32(8)


@compiled
def _prepare(scales: Any, zeros: Any, inverse: Any, least: Any, most: Any, totals: Any) -> None:
    """Writes the arguments of `_add_errors_of_16`; all arrays are flat and of one size."""
    for i in range(scales.size):
        inverse[i] = float32(1) / scales[i]
        totals[i] = uint32(0)
    for i in range(scales.size):
        least[i] = as_uint32(_ROUNDER - zeros[i])
        most[i] = as_uint32(_ROUNDER + (float32(15) - zeros[i]))


@compiled
def _choose(scales: Any, totals: Any, group_size: int, best: Any) -> None:
    """Writes the index of each group's scale of the least squared error, the first of equals."""
    offset = uint32(uint32(group_size) * _BITS_128)
    for g in range(best.size):
        lowest = uint64(0xFFFF_FFFF_FFFF_FFFF)
        for i in range(scales.shape[1]):
            ratio = scales[g, i] / scales[g, 0]
            cost = float32(int32(uint32(totals[g, i] - offset))) * ratio * ratio
            # No cost is negative, so their bits are in their order: one minimum finds cost and index.
            lowest = min(lowest, (uint64(as_uint32(cost)) << uint64(32)) | uint64(i))
        best[g] = lowest & uint64(0xFFFF_FFFF)


@cached
def _quantize(
    weights: Any,
    fp8_scales: Any,
    fp8_rows: int,
    fp8_columns: int,
    packed: Any,
    scales: Any,
    zeros: Any,
    has_zeros: bool,
    factors: Any,
) -> Any:
    rows, columns = weights.shape
    groups, num_tried = scales.shape[1], factors.size
    size = columns // groups
    spread, row = np.empty(columns, float32), np.empty(columns, float32)
    values = row.reshape(groups, size)
    eights = np.empty(columns // 8, uint64)
    codes = eights.view(uint8).reshape(groups, size)
    # Flat, for long loops, and `[groups, tried]`.
    flat, flat_bits = np.zeros((6, groups * num_tried), float32), np.empty((3, groups * num_tried), uint32)
    shaped, bits = flat.reshape(6, groups, num_tried), flat_bits.reshape(3, groups, num_tried)
    best = np.zeros(groups, uint64)
    shaped[0] = factors
    count, safe = 0, False
    for r in range(rows):
        if r % fp8_rows == 0:
            safe = spread_scales(fp8_scales[r // fp8_rows], fp8_columns, 0, spread)
        count += load_row(weights[r], spread, safe, row)
        _plain_scales(values, has_zeros, shaped[1], shaped[2])
        _candidates(flat[1], flat[2], flat[0], has_zeros, flat[3], flat[4])
        if num_tried == _LANES:
            _prepare(flat[3], flat[4], flat[5], flat_bits[0], flat_bits[1], flat_bits[2])
            for g in range(groups):
                _add_errors_of_16(values[g], shaped[5, g], bits[0, g], bits[1, g], bits[2, g])
            _choose(shaped[3], bits[2], size, best)
        for g in range(groups):
            scale, zero = shaped[3, g, best[g]], shaped[4, g, best[g]]
            _quantize_group(values[g], scale, zero, codes[g])
            scales[r, g] = as_uint32(scale) >> uint32(16)
            if has_zeros:
                zeros[r, g] = uint8(zero)
        _pack_row(eights, packed[r])
    return count
