"""The definition of every operation, in plain torch: slow, short, and what all kernels must equal.

`cpu_fp8_block.py` (numba) and `triton_fp8_block.py` give the same bytes as these functions for every input,
NaN, infinities, subnormal numbers and partial blocks included. All arithmetic is IEEE float32 with
one rounding per operation and no flushing of subnormal numbers.

FP8 is `float8_e4m3fn`: 1 sign, 4 exponent (bias 7), 3 mantissa bits; largest value 448; no infinity;
codes 0x7F and 0xFF are NaN. A block is `block_size` = (rows, columns) of the weight; the last block of
either axis may be partial (576 rows are 5 block rows). The layout is DeepSeek-V3's
(`README_WEIGHTS.md` of the released model): weight = code x scale.

NaN has one spelling on the way out: 0x7FC0 in BF16, 0x7FC00000 in float32, 0x7F in FP8.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "FP8_MAX",
    "MIN_UE8M0_SCALE",
    "dequantize_fp8_block",
    "fp8_block_scale",
    "quantize_fp8_block",
    "round_up_to_power_of_two",
    "spread_blocks",
    "with_one_nan",
]

FP8_MAX = 448.0
MIN_UE8M0_SCALE = 2.0**-126
"""Smallest scale written for `ue8m0`: the smallest normal float32."""


def dequantize_fp8_block(
    codes: Tensor,
    scale: Tensor,
    *,
    block_size: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Returns the weight that FP8 block codes stand for.

    weight = round_to_dtype(float32(code) * scale), the product rounded once to float32 and then once,
    to nearest even, to `dtype`.

    Args:
        codes: `[rows, columns]` float8_e4m3fn.
        scale: `[ceil(rows / block rows), ceil(columns / block columns)]` float32, the multiplier.
        block_size: rows and columns that share a scale.
        dtype: bfloat16 or float32.
    """
    product = codes.to(torch.float32) * spread_blocks(scale, codes.shape, block_size)
    return with_one_nan(product, dtype)


def quantize_fp8_block(
    weight: Tensor,
    *,
    block_size: tuple[int, int] = (128, 128),
    scale_fmt: str = "f32",
    like: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns FP8 codes `[rows, columns]` and their float32 scales `[block rows, block columns]`.

    code = round_to_fp8(clamp(float32(weight) / scale, -448, 448)), the quotient rounded once to
    float32 and then once, to nearest even, to FP8. The sign of zero is kept. A weight that is not
    finite gets the NaN code 0x7F and does not count for its block's scale.

    Args:
        weight: `[rows, columns]` bfloat16, float16 or float32.
        block_size: rows and columns that share a scale.
        scale_fmt: "f32" or "ue8m0" (a power of two), see `fp8_block_scale`.
        like: scales of an earlier quantization, of the result's scale shape, each finite and
            positive. A block whose every weight is exactly bfloat16(code x like), for the codes that
            `like` gives, was not changed since: it keeps `like` and so gets its old codes back. Any
            other block gets a scale of its own.
    """
    values = weight.to(torch.float32)
    scale = fp8_block_scale(values, block_size=block_size, scale_fmt=scale_fmt)
    if like is not None:
        codes = _encode(values, like, block_size)
        back = dequantize_fp8_block(codes, like, block_size=block_size).to(torch.float32)
        same = back.view(torch.int32) == values.view(torch.int32)
        unchanged = _block_reduce(same.to(torch.float32), block_size, fill=1.0, largest=False) == 1.0
        scale = torch.where(unchanged, like, scale)
    return _encode(values, scale, block_size), scale


def fp8_block_scale(weight: Tensor, *, block_size: tuple[int, int], scale_fmt: str) -> Tensor:
    """Returns the float32 scale of every block of a float32 `weight`.

    "f32": the block's largest finite magnitude / 448. "ue8m0": the same, raised to at least 2**-126
    and rounded up to a power of two *before* anything is divided by it. Where largest / 448 is zero (a
    block of zeros, or of float32 numbers under 2**-141) the scale is 1.0 and the block decodes to zeros.
    """
    finite = torch.where(torch.isfinite(weight), weight.abs(), torch.zeros_like(weight))
    quotient = _block_reduce(finite, block_size, fill=0.0, largest=True) / FP8_MAX
    scale = quotient
    if scale_fmt == "ue8m0":
        scale = round_up_to_power_of_two(quotient.clamp(min=MIN_UE8M0_SCALE))
    elif scale_fmt != "f32":
        raise ValueError(f"scale_fmt: got {scale_fmt!r}, expected 'f32' or 'ue8m0'")
    return torch.where(quotient == 0.0, torch.ones_like(scale), scale)


def round_up_to_power_of_two(x: Tensor) -> Tensor:
    """Returns the smallest power of two that is >= each normal, positive float32 of `x`."""
    bits = x.view(torch.int32)
    return ((bits + 0x007F_FFFF) & 0x7F80_0000).view(torch.float32)


def _encode(values: Tensor, scale: Tensor, block_size: tuple[int, int]) -> Tensor:
    quotient = values / spread_blocks(scale, values.shape, block_size)
    codes = quotient.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    nan_code = torch.full_like(codes, 0x7F)
    return torch.where(torch.isfinite(values), codes, nan_code).view(torch.float8_e4m3fn)


def with_one_nan(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float32 `values` to `dtype`, NaN spelt the one way; torch's vectorized cast writes 0xFFFF."""
    rounded = values.to(dtype)
    bits, nan = {
        torch.bfloat16: (torch.int16, 0x7FC0),
        torch.float32: (torch.int32, 0x7FC0_0000),
    }[dtype]
    spelled = torch.full_like(rounded, 0).view(bits) + nan
    return torch.where(torch.isnan(values), spelled, rounded.view(bits)).view(dtype)


def spread_blocks(scale: Tensor, shape: torch.Size, block_size: tuple[int, int]) -> Tensor:
    """Repeats each block's scale over the block: `[block rows, block columns]` -> `shape`."""
    rows, columns = shape
    return scale.repeat_interleave(block_size[0], 0)[:rows].repeat_interleave(block_size[1], 1)[:, :columns]


def _block_reduce(values: Tensor, block_size: tuple[int, int], *, fill: float, largest: bool) -> Tensor:
    """Reduces every block of `[rows, columns]` to one number; `fill` pads partial blocks."""
    rows, columns = values.shape
    pad = (0, -columns % block_size[1], 0, -rows % block_size[0])
    padded = torch.nn.functional.pad(values, pad, value=fill)
    block_rows, block_columns = (n // size for n, size in zip(padded.shape, block_size, strict=True))
    blocks = padded.reshape(block_rows, block_size[0], block_columns, block_size[1])
    return blocks.amax((1, 3)) if largest else blocks.amin((1, 3))
