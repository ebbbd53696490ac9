"""The definition of the integer formats' arithmetic, in plain torch; see `reference.py` for the rules.

`cpu_int8.py` and `cpu_int4.py` (numba) and their Triton counterparts give the same bytes as these
functions. All arithmetic is IEEE float32, one rounding per operation, nothing fused, no subnormal flushed.

Three layouts share one idea, weight = (code - zero) x scale, and differ in what shares a scale: INT8 block
a rectangle, INT8 channel a row, INT4 group `group_size` neighbours in a row. A weight that is not finite does
not count for its scale and gets the code that decodes to zero: integers have no NaN.

Where a scale is chosen by its error, the error is a sum of integers, the same in whatever order it is
added up: with x = weight x (1 / scale) and e = x - code, every element adds round(e^2 x 65536), which is
the low half of the bits of e^2 + 128. Sums for two scales are compared in units of the first one's square.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3_tools.kernels.int4_layouts import pack_words, unpack_words
from dsv3_tools.kernels.reference import spread_blocks, with_one_nan

__all__ = [
    "SCALE_FACTORS",
    "dequantize_int4_group",
    "dequantize_int8_block",
    "dequantize_int8_channel",
    "pack_int4",
    "quantize_int4_group",
    "quantize_int8_block",
    "quantize_int8_channel",
    "unpack_int4",
]

SCALE_FACTORS = (1.0, *(1.0 + 0.03 * i for i in (3, 2, 1)), *(1.0 - 0.03 * i for i in range(1, 13)))
"""What the search multiplies a group's plain scale by, in the order tried, each rounded to float32.

On normal weights in groups of 128 these 16 come within 0.01 dB of the best scale there is.
"""

MIN_SCALE = 2.0**-126
"""A scale below the smallest normal float32 becomes 1.0, and what it scales zeros."""

INT8_MAX = 127.0


def quantize_int8_block(
    weight: Tensor, *, block_size: tuple[int, int] = (128, 128), fp8_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns int8 codes `[rows, columns]` and float32 scales `[block rows, block columns]`.

    code = round(weight / scale), to nearest even. The scale is the block's largest finite magnitude
    / 127, or 1.0 where that is below `MIN_SCALE`.

    Args:
        weight: `[rows, columns]` bfloat16, float16 or float32.
        block_size: rows and columns that share a scale.
        fp8_scale: scales of the FP8 blocks, of the same `block_size`, that `weight` was decoded from in
            float32. With 4 x that scale every FP8 code of magnitude 32 and more is exactly an integer, so a
            block takes it where its squared error is no larger (and 4 x scale is finite and normal).
    """
    values = weight.to(torch.float32)
    finite = torch.isfinite(values)
    magnitude = torch.where(finite, values.abs(), 0.0)
    scale = _usable(_reduce_blocks(magnitude, block_size).amax(-1) / INT8_MAX)
    if fp8_scale is not None:
        aligned = fp8_scale * 4.0
        possible = torch.isfinite(aligned) & (aligned >= MIN_SCALE)
        aligned = torch.where(possible, aligned, 1.0)
        ratio = aligned / scale
        cost = _block_error(values, finite, aligned, block_size).to(torch.float32) * ratio * ratio
        better = cost <= _block_error(values, finite, scale, block_size).to(torch.float32)
        scale = torch.where(possible & better, aligned, scale)
    return _codes(values, finite, spread_blocks(scale, values.shape, block_size), -128, 127), scale


def quantize_int8_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 codes `[rows, columns]` and float32 scales `[rows, 1]`: a block is a row."""
    return quantize_int8_block(weight, block_size=(1, weight.shape[1]))


def dequantize_int8_block(
    codes: Tensor,
    scale: Tensor,
    *,
    block_size: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Returns the weight: float32 product of code and scale, rounded once to `dtype`."""
    return with_one_nan(codes.to(torch.float32) * spread_blocks(scale, codes.shape, block_size), dtype)


def dequantize_int8_channel(codes: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Returns the weight of codes `[rows, columns]` and scales `[rows, 1]`."""
    return dequantize_int8_block(codes, scale, block_size=(1, codes.shape[1]), dtype=dtype)


def quantize_int4_group(
    weight: Tensor, *, group_size: int = 128, symmetric: bool = True, search: str = "mse"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns packed codes, bfloat16 scales and, unless `symmetric`, zero points.

    The plain scale of a group is its largest finite magnitude / 7.5, or, if not `symmetric`,
    high / 15 - low / 15, where high >= 0 >= low bound its finite weights. A scale is rounded to bfloat16
    *before* a code is chosen, and is 1.0 where that is below `MIN_SCALE`.

    "absmax" takes the plain scale. "mse" tries the plain scale x each of `SCALE_FACTORS` (a float32
    product) and takes the one with the smallest squared error, the first of equals.

    Symmetric: code = clamp(round(weight / scale), -8, 7), stored as code + 8. Otherwise
    zero = clamp(round(-(low x factor) / scale), 0, 15), stored code =
    clamp(round(weight / scale) + zero, 0, 15). In the search weight / scale is weight x (1 / scale).

    Args:
        weight: `[rows, columns]` bfloat16, float16 or float32; `group_size` divides columns.
        group_size: neighbours in a row that share a scale, a multiple of 8.
        symmetric: no zero points.
        search: "absmax" or "mse".

    Returns:
        int32 `[rows, columns / 8]`, see `pack_int4`; bfloat16 `[rows, columns / group_size]`; uint8
        `[rows, columns / group_size]` from 0 to 15, or None.
    """
    if search not in ("absmax", "mse"):
        raise ValueError(f"search: got {search!r}, expected 'absmax' or 'mse'")
    rows, columns = weight.shape
    groups = weight.to(torch.float32).reshape(rows, columns // group_size, group_size)
    finite = torch.isfinite(groups)
    values = torch.where(finite, groups, 0.0)
    low = values.amin(2).clamp(max=0.0)
    plain = values.abs().amax(2) / 7.5 if symmetric else values.amax(2).clamp(min=0.0) / 15.0 - low / 15.0
    best = None
    for factor in SCALE_FACTORS if search == "mse" else SCALE_FACTORS[:1]:
        exact_factor = torch.tensor(factor, dtype=torch.float32)
        scale = _usable((plain * exact_factor).to(torch.bfloat16).to(torch.float32))
        zero = None if symmetric else torch.round(-(low * exact_factor) / scale).clamp(0.0, 15.0)
        if search == "absmax":
            best = (scale, zero)
            break
        error = _group_error(values, scale, zero)
        if best is None:
            first, least, best = scale, error.to(torch.float32), (scale, zero)
            continue
        ratio = scale / first
        cost = error.to(torch.float32) * ratio * ratio
        better = cost < least
        least = torch.where(better, cost, least)
        best = (
            torch.where(better, scale, best[0]),
            None if zero is None or best[1] is None else torch.where(better, zero, best[1]),
        )
    assert best is not None
    scale, zero = best
    offset = 8.0 if zero is None else zero[:, :, None]
    codes = _rounded(values / scale[:, :, None], offset).to(torch.uint8).reshape(rows, columns)
    return (
        pack_int4(codes),
        scale.to(torch.bfloat16),
        None if zero is None else zero.to(torch.uint8),
    )


def dequantize_int4_group(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Returns the weight: float32 product of (code - zero) and scale, rounded once to `dtype`.

    Args:
        packed: int32 `[rows, columns / 8]`.
        scale: `[rows, groups]` bfloat16, float16 or float32.
        zero: uint8 `[rows, groups]`; None is 8 everywhere.
        dtype: bfloat16 or float32.
    """
    codes = unpack_int4(packed).to(torch.float32)
    group_size = codes.shape[1] // scale.shape[1]
    zeros = torch.full_like(scale, 8.0, dtype=torch.float32) if zero is None else zero.to(torch.float32)
    differences = codes - zeros.repeat_interleave(group_size, 1)
    return with_one_nan(differences * scale.to(torch.float32).repeat_interleave(group_size, 1), dtype)


def pack_int4(codes: Tensor) -> Tensor:
    """Packs uint8 codes 0 ... 15 `[rows, columns]` into int32 `[rows, columns / 8]`.

    Eight neighbours in a row make a word, the first in its lowest four bits: compressed-tensors'
    `pack-quantized`.
    """
    return pack_words(codes)


def unpack_int4(packed: Tensor) -> Tensor:
    """Returns uint8 codes `[rows, 8 x words]` of int32 `[rows, words]`: the reverse of `pack_int4`."""
    return unpack_words(packed)


def _usable(scale: Tensor) -> Tensor:
    return torch.where(scale < MIN_SCALE, 1.0, scale)


def _codes(values: Tensor, finite: Tensor, scale: Tensor, least: float, most: float) -> Tensor:
    rounded = torch.round(values / scale).clamp(least, most)
    return torch.where(finite, rounded, 0.0).to(torch.int8)


def _rounded(quotient: Tensor, offset: Tensor | float) -> Tensor:
    """Returns stored INT4 codes 0 ... 15 as float32."""
    return (torch.round(quotient) + offset).clamp(0.0, 15.0)


def _group_error(values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Returns each group's squared error in units of scale^2 / 65536, int32 `[rows, groups]`."""
    quotient = values * (1.0 / scale)[:, :, None]
    offset: Tensor | float = 8.0 if zero is None else zero[:, :, None]
    return _squares(quotient - (_rounded(quotient, offset) - offset)).sum(2, dtype=torch.int32)


def _block_error(values: Tensor, finite: Tensor, scale: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Returns each block's squared error in units of scale^2 / 65536, int32 `[block rows, block columns]`."""
    quotient = torch.where(finite, values, 0.0) * spread_blocks(1.0 / scale, values.shape, block_size)
    squares = _squares(quotient - torch.round(quotient).clamp(-128.0, 127.0))
    return _reduce_blocks(squares, block_size).sum(-1, dtype=torch.int32)


def _squares(error: Tensor) -> Tensor:
    """Returns round(error^2 x 65536) as int32, for errors below 11, which all that can be chosen have."""
    return (error * error + 128.0).view(torch.int32) - 0x4300_0000


def _reduce_blocks(values: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Returns the elements of every block side by side, `[block rows, block columns, elements]`, 0-padded."""
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values, (0, -columns % block_size[1], 0, -rows % block_size[0]))
    block_rows, block_columns = (n // size for n, size in zip(padded.shape, block_size, strict=True))
    blocks = padded.reshape(block_rows, block_size[0], block_columns, block_size[1])
    return blocks.permute(0, 2, 1, 3).reshape(block_rows, block_columns, -1)
