"""FP8 block arithmetic on the CPU: the bytes of `reference.py`, at close to the speed of memory.

Each call is single-threaded and runs outside the GIL: the caller runs several threads over shards.

How: every inner loop walks one row of the weight, elementwise and free of branches, so that LLVM turns
it into vector code, whatever the block size. To make that possible each block's scale is first
*spread* over the columns of a buffer (28 KB for 7168 columns, it stays in L1 cache), and the largest
magnitude of a block is a maximum per column first, which is reduced to blocks once per block row.

What is rare (NaN codes, scales so large that a product may overflow) is looked for with one cheap
maximum per row, and only such a row takes the loop that can spell NaN and count. Measured on one Zen 5
core, one block row at a time: 9 GB/s of FP8 with that check, 5.5 GB/s if every row took the careful loop.

Left out: a table of 256 BF16 values per block. A gather per element does not vectorize: 0.5 GB/s. Also
left out: reading code bits as a subnormal float32 (code x 2**-120), one instruction shorter but half as
fast, since subnormal operands are slow in hardware.
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
    REBIAS,
    SAFE_SCALE,
    as_bytes,
    as_float32,
    as_uint32,
    check_tensors,
    count_blocks,
    decode_e4m3,
    has_nan_code,
    narrow,
    round_to_bfloat16,
    widen,
    without_sign,
)
from dsv3_tools.kernels.jit import cached, compiled, inlined

__all__ = ["dequantize_fp8_block_into", "quantize_fp8_block_into"]

float32, uint8, uint16, uint32 = np.float32, np.uint8, np.uint16, np.uint32

_TOP = uint32(0xFFF0_0000)  # sign, exponent and three mantissa bits of a float32: what FP8 can hold
_BITS_448 = uint32(0x43E0_0000)
_BITS_SMALLEST_NORMAL = uint32(0x3C80_0000)  # 2**-6
_SPACING_512TH = float32(2.0**14)  # around 2**14 neighbours are 2**-9 apart, like e4m3's subnormals
_BITS_SPACING_512TH = uint32(0x4680_0000)
_TILE_COLUMNS = 1024  # 128 rows of it in BF16 are 256 KB: the second pass finds them in L2 cache


def dequantize_fp8_block_into(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    *,
    block_size: tuple[int, int] = (128, 128),
) -> Tensor:
    """Writes the weights of FP8 block codes into `outs`: see `kernels.dequantize_fp8_block_into`."""
    counts = torch.empty(len(codes), dtype=torch.int32)
    for i, (code, scale, out) in enumerate(zip(codes, scales, outs, strict=True)):
        where = f"dequantize_fp8_block_into, item {i}"
        _check(where, code, scale, out, block_size=block_size, dtypes=tuple(BITS))
        counts[i] = _dequantize(as_bytes(code), scale.numpy(), out.view(BITS[out.dtype]).numpy(), *block_size)
    return counts


def quantize_fp8_block_into(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    block_size: tuple[int, int] = (128, 128),
    scale_fmt: str = "f32",
    likes: Sequence[Tensor] | None = None,
) -> Tensor:
    """Writes FP8 block codes and scales of `weights`: see `kernels.quantize_fp8_block_into`.

    A `like` that is not finite and positive, which the definition leaves open, counts as a change.
    """
    if scale_fmt not in ("f32", "ue8m0"):
        raise ValueError(f"scale_fmt: got {scale_fmt!r}, expected 'f32' or 'ue8m0'")
    counts = torch.empty(len(weights), dtype=torch.int32)
    for i, (weight, code, scale) in enumerate(zip(weights, codes, scales, strict=True)):
        like = scale if likes is None else likes[i]
        where = f"quantize_fp8_block_into, item {i}"
        _check(where, code, scale, weight, block_size=block_size, dtypes=(*BITS, torch.float16))
        check_tensors(where, ("likes", like, scale.shape, (torch.float32,)))
        # float16 is not a format that DeepSeek-V3 checkpoints come in: exact, but through a copy.
        values = weight.to(torch.float32) if weight.dtype == torch.float16 else weight
        counts[i] = _quantize(
            values.view(BITS[values.dtype]).numpy(),
            as_bytes(code),
            scale.numpy(),
            like.numpy(),
            likes is not None,
            scale_fmt == "ue8m0",
            *block_size,
        )
    return counts


def _check(
    where: str,
    code: Tensor,
    scale: Tensor,
    weight: Tensor,
    *,
    block_size: tuple[int, int],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raises FormatError where the kernels would read or write outside of a tensor."""
    blocks = count_blocks(where, code.shape, block_size)
    check_tensors(
        where,
        ("codes", code, code.shape, (torch.float8_e4m3fn,)),
        ("scales", scale, blocks, (torch.float32,)),
        ("weights", weight, code.shape, dtypes),
    )


# --------------------------------------------------------------------------------------------- one number


@inlined
def _encode(quotient: Any) -> Any:
    """Returns the e4m3 code nearest to a float32 clamped to +-448, and the float32 bits it decodes to."""
    bits = as_uint32(quotient)
    magnitude = min(uint32(bits & MAGNITUDE), _BITS_448)
    odd = uint32(uint32(magnitude >> uint32(20)) & uint32(1))
    rounded = uint32(uint32(magnitude + uint32(0x7_FFFF)) + odd)
    # The addition rounds to a multiple of 2**-9, to nearest even: all that e4m3 has below 2**-6.
    shifted = as_float32(magnitude) + _SPACING_512TH
    small = magnitude < _BITS_SMALLEST_NORMAL
    subnormal_code = uint32(as_uint32(shifted) - _BITS_SPACING_512TH)
    normal_code = uint32(uint32(rounded >> uint32(20)) - uint32(REBIAS << uint32(3)))
    code = subnormal_code if small else normal_code
    subnormal_value = as_uint32(shifted - _SPACING_512TH)
    value = subnormal_value if small else uint32(rounded & _TOP)
    sign = uint32(bits & uint32(0x8000_0000))
    return uint8(code | uint32(sign >> uint32(24))), uint32(value | sign)


# ------------------------------------------------------------------------------------------------ one row


@compiled
def _dequantize_row(codes: Any, scale: Any, out: Any) -> None:
    for j in range(codes.size):
        out[j] = narrow(as_uint32(decode_e4m3(codes[j]) * scale[j]), out)


@compiled
def _dequantize_row_counted(codes: Any, scale: Any, out: Any) -> Any:
    """Like `_dequantize_row`, for any code and scale; returns how many elements are not finite."""
    count = uint32(0)
    for j in range(codes.size):
        bits = as_uint32(decode_e4m3(codes[j]) * scale[j])
        nan = (codes[j] & uint8(0x7F)) == uint8(0x7F) or uint32(bits & MAGNITUDE) > INFINITY
        spelled = narrow(NAN if nan else bits, out)
        out[j] = spelled
        count = uint32(count + uint32(uint32(widen(spelled) & MAGNITUDE) >= INFINITY))
    return count


@compiled
def _raise_to_magnitude(largest: Any, weights: Any) -> None:
    for j in range(weights.size):
        largest[j] = max(largest[j], without_sign(weights[j]))


@compiled
def _raise_to_finite_magnitude(largest: Any, weights: Any) -> Any:
    """Like `_raise_to_magnitude`, without the elements that are not finite; returns their number."""
    count = 0
    for j in range(weights.size):
        magnitude = without_sign(weights[j])
        if uint32(widen(magnitude)) >= INFINITY:
            count += 1
        elif magnitude > largest[j]:
            largest[j] = magnitude
    return count


@compiled
def _quantize_row(weights: Any, scale: Any, codes: Any) -> None:
    for j in range(weights.size):
        bits = widen(weights[j])
        code, _ = _encode(as_float32(bits) / scale[j])
        codes[j] = uint8(0x7F) if uint32(bits & MAGNITUDE) >= INFINITY else code


@compiled
def _quantize_row_compared(weights: Any, scale: Any, codes: Any, changed: Any) -> None:
    """Like `_quantize_row`; sets bits of `changed` where the code does not decode back to the weight."""
    for j in range(weights.size):
        bits = widen(weights[j])
        code, value = _encode(as_float32(bits) / scale[j])
        back = uint32(round_to_bfloat16(as_uint32(as_float32(value) * scale[j])) & uint32(0xFFFF_0000))
        infinite = uint32(bits & MAGNITUDE) >= INFINITY
        codes[j] = uint8(0x7F) if infinite else code
        changed[j] = uint32(changed[j] | uint32((NAN if infinite else back) ^ bits))


# ----------------------------------------------------------------------------------------- rows of blocks


@cached
def _dequantize(codes: Any, scales: Any, out: Any, block_rows: int, block_columns: int) -> Any:
    rows, columns = codes.shape
    spread = np.empty(columns, float32)
    count = 0
    for i in range(scales.shape[0]):
        safe = True
        for k in range(scales.shape[1]):
            spread[k * block_columns : (k + 1) * block_columns] = scales[i, k]
            safe &= abs(scales[i, k]) < SAFE_SCALE  # False for NaN
        for r in range(i * block_rows, min((i + 1) * block_rows, rows)):
            if safe and not has_nan_code(codes[r]):
                _dequantize_row(codes[r], spread, out[r])
            else:
                count += _dequantize_row_counted(codes[r], spread, out[r])
    return count


@cached
def _quantize(
    weights: Any,
    codes: Any,
    scales: Any,
    likes: Any,
    has_likes: bool,
    ue8m0: bool,
    block_rows: int,
    block_columns: int,
) -> Any:
    rows, columns = weights.shape
    width = min(max(1, _TILE_COLUMNS // block_columns) * block_columns, columns)
    spread, largest = np.empty(width, float32), np.empty(width, weights.dtype)
    changed = np.empty(width, uint32)
    count = 0
    for i in range(scales.shape[0]):
        top, bottom = i * block_rows, min((i + 1) * block_rows, rows)
        for left in range(0, columns, width):
            right = min(left + width, columns)
            k0 = left // block_columns
            k1 = -(-right // block_columns)
            if has_likes:
                _try_likes(
                    weights, codes, likes[i, k0:k1], spread, changed, top, bottom, left, right, block_columns
                )
            count += _largest_magnitudes(weights, largest, top, bottom, left, right)
            fresh = False
            for k in range(k0, k1):
                a, b = (k - k0) * block_columns, min((k - k0 + 1) * block_columns, right - left)
                if has_likes and changed[a:b].max() == uint32(0):
                    scales[i, k] = likes[i, k]
                else:
                    scales[i, k] = _block_scale(as_float32(widen(largest[a:b].max())), ue8m0)
                    fresh = True
                spread[a:b] = scales[i, k]
            if fresh:
                for r in range(top, bottom):
                    _quantize_row(weights[r, left:right], spread, codes[r, left:right])
    return count


@compiled
def _largest_magnitudes(weights: Any, largest: Any, top: int, bottom: int, left: int, right: int) -> Any:
    """Fills `largest` with each column's largest finite magnitude; returns how many are not finite."""
    largest[:] = 0
    for r in range(top, bottom):
        _raise_to_magnitude(largest, weights[r, left:right])
    if uint32(widen(largest.max())) < INFINITY:
        return 0
    count = 0
    largest[:] = 0
    for r in range(top, bottom):
        count += _raise_to_finite_magnitude(largest, weights[r, left:right])
    return count


@compiled
def _try_likes(
    weights: Any,
    codes: Any,
    likes: Any,
    spread: Any,
    changed: Any,
    top: int,
    bottom: int,
    left: int,
    right: int,
    block_columns: int,
) -> None:
    """Writes the codes that `likes` give; `changed` is 0 in the columns of a block they are right for.

    Where every block has changed already in its first row, as after a training step, the rest of the
    rows would tell nothing new.
    """
    for k in range(likes.size):
        a, b = k * block_columns, min((k + 1) * block_columns, right - left)
        usable = likes[k] > float32(0) and likes[k] < float32(np.inf)
        spread[a:b] = likes[k] if usable else float32(1)
        changed[a:b] = uint32(0) if usable else uint32(1)
    for r in range(top, bottom):
        _quantize_row_compared(weights[r, left:right], spread, codes[r, left:right], changed)
        if r == top:
            same = False
            for k in range(likes.size):
                same |= changed[
                    k * block_columns : min((k + 1) * block_columns, right - left)
                ].max() == uint32(0)
            if not same:
                return


@compiled
def _block_scale(largest: Any, ue8m0: bool) -> Any:
    quotient = largest / float32(448)
    if quotient == float32(0):
        return float32(1)
    if not ue8m0:
        return quotient
    # Rounds up to a power of two; a subnormal quotient becomes 2**-126, the definition's minimum.
    return as_float32(uint32(uint32(as_uint32(quotient) + uint32(0x007F_FFFF)) & INFINITY))
