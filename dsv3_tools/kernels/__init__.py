"""The arithmetic of the formats, once per device, chosen by where the tensors are.

Every operation works on a *group* of weights at once, into memory that the caller owns: a CPU call
usually holds one stripe of one weight, a CUDA call the weights of many megabytes, in one launch. The
result is the same bytes on every device; `reference.py` is the definition.

Both operations return an int32 tensor `[number of items]`, on the items' device, with the number of
elements that are not finite (in the weight written, or in the weight read): the caller decides what
that means. On CUDA nothing waits: the counts may be read after the current stream has been
synchronized.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "dequantize_fp8_block_into",
    "dequantize_int4_group_into",
    "dequantize_int8_block_into",
    "dequantize_int8_channel_into",
    "quantize_fp8_block_into",
    "quantize_int4_group_into",
    "quantize_int8_block_into",
    "quantize_int8_channel_into",
]


def dequantize_fp8_block_into(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    *,
    block_size: tuple[int, int] = (128, 128),
) -> Tensor:
    """Writes the weights that FP8 block codes stand for into `outs`.

    Args:
        codes: per item `[rows, columns]` float8_e4m3fn, contiguous.
        scales: per item `[ceil(rows / 128), ceil(columns / 128)]` float32, contiguous.
        outs: per item `[rows, columns]`, contiguous; all bfloat16 or all float32.
        block_size: rows and columns that share a scale.

    Returns:
        int32 `[items]`: how many elements written are NaN or infinite.
    """
    return _fp8_block(codes[0]).dequantize_fp8_block_into(codes, scales, outs, block_size=block_size)  # type: ignore[no-any-return]


def quantize_fp8_block_into(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    block_size: tuple[int, int] = (128, 128),
    scale_fmt: str = "f32",
    likes: Sequence[Tensor] | None = None,
) -> Tensor:
    """Writes FP8 block codes and their scales for `weights` into `codes` and `scales`.

    Args:
        weights: per item `[rows, columns]`, contiguous; all bfloat16, all float16 or all float32.
        codes: per item `[rows, columns]` float8_e4m3fn, contiguous; written.
        scales: per item `[ceil(rows / 128), ceil(columns / 128)]` float32, contiguous; written.
        block_size: rows and columns that share a scale.
        scale_fmt: "f32" or "ue8m0".
        likes: per item the scales of an earlier quantization, which unchanged blocks keep (see
            `reference.quantize_fp8_block`).

    Returns:
        int32 `[items]`: how many elements read are NaN or infinite.
    """
    return _fp8_block(weights[0]).quantize_fp8_block_into(  # type: ignore[no-any-return]
        weights, codes, scales, block_size=block_size, scale_fmt=scale_fmt, likes=likes
    )


def dequantize_int8_block_into(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    *,
    block_size: tuple[int, int] = (128, 128),
) -> Tensor:
    """Writes the weights of int8 codes with a scale for each block into `outs`.

    Args:
        codes: per item `[rows, columns]` int8, contiguous.
        scales: per item `[ceil(rows / 128), ceil(columns / 128)]` float32, contiguous.
        outs: per item `[rows, columns]`, contiguous; all bfloat16 or all float32.
        block_size: rows and columns that share a scale.

    Returns:
        int32 `[items]`: how many elements written are NaN or infinite.
    """
    return _int8(codes[0]).dequantize_int8_block_into(codes, scales, outs, block_size=block_size)  # type: ignore[no-any-return]


def dequantize_int8_channel_into(
    codes: Sequence[Tensor], scales: Sequence[Tensor], outs: Sequence[Tensor]
) -> Tensor:
    """Writes the weights of int8 codes with a scale for each row, float32 `[rows, 1]`, into `outs`.

    The rest as `dequantize_int8_block_into`.
    """
    return _int8(codes[0]).dequantize_int8_channel_into(codes, scales, outs)  # type: ignore[no-any-return]


def quantize_int8_block_into(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    block_size: tuple[int, int] = (128, 128),
    fp8_scales: Sequence[Tensor] | None = None,
    fp8_block_size: tuple[int, int] = (128, 128),
) -> Tensor:
    """Writes int8 codes with a scale for each block.

    Args:
        weights: per item `[rows, columns]`, contiguous; all bfloat16, all float16, all float32, or, with
            `fp8_scales`, all float8_e4m3fn codes, whose float32 products with their scales are quantized.
        codes: per item `[rows, columns]` int8, contiguous; written.
        scales: per item `[ceil(rows / 128), ceil(columns / 128)]` float32, contiguous; written.
        block_size: rows and columns that share a scale.
        fp8_scales: per item the float32 scales of FP8 blocks of `fp8_block_size`. Where that is
            `block_size`, a block may take 4 x its FP8 scale: see `reference_integer.quantize_int8_block`.
        fp8_block_size: rows and columns that share an FP8 scale.

    Returns:
        int32 `[items]`: how many elements read are NaN or infinite.
    """
    return _int8(weights[0]).quantize_int8_block_into(  # type: ignore[no-any-return]
        weights,
        codes,
        scales,
        block_size=block_size,
        fp8_scales=fp8_scales,
        fp8_block_size=fp8_block_size,
    )


def quantize_int8_channel_into(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    fp8_scales: Sequence[Tensor] | None = None,
    fp8_block_size: tuple[int, int] = (128, 128),
) -> Tensor:
    """Writes int8 codes with a scale for each row, float32 `[rows, 1]`.

    The rest as `quantize_int8_block_into`, without the choice of 4 x the FP8 scale.
    """
    return _int8(weights[0]).quantize_int8_channel_into(  # type: ignore[no-any-return]
        weights, codes, scales, fp8_scales=fp8_scales, fp8_block_size=fp8_block_size
    )


def dequantize_int4_group_into(
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor] | None,
    outs: Sequence[Tensor],
) -> Tensor:
    """Writes the weights of packed INT4 codes into `outs`.

    Args:
        packed: per item `[rows, columns / 8]` int32, contiguous; see `reference_integer.pack_int4`.
        scales: per item `[rows, groups]`, contiguous; all bfloat16, all float16 or all float32. A group is
            columns / groups neighbours of a row, a multiple of 8, the same for all items.
        zeros: per item `[rows, groups]` uint8, contiguous; None is 8 everywhere.
        outs: per item `[rows, columns]`, contiguous; all bfloat16 or all float32.

    Returns:
        int32 `[items]`: how many elements written are NaN or infinite.
    """
    return _int4(packed[0]).dequantize_int4_group_into(packed, scales, zeros, outs)  # type: ignore[no-any-return]


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
    """Writes packed INT4 codes with a scale, and a zero point or none, for each group.

    Args:
        weights: as for `quantize_int8_block_into`.
        packed: per item `[rows, columns / 8]` int32, contiguous; written.
        scales: per item `[rows, groups]` bfloat16, contiguous; written. A group is columns / groups
            neighbours of a row, a multiple of 8 up to 256, the same for all items.
        zeros: per item `[rows, groups]` uint8, contiguous; written. None quantizes symmetrically.
        search: "mse" or "absmax", see `reference_integer.quantize_int4_group`.
        fp8_scales: as for `quantize_int8_block_into`.
        fp8_block_size: rows and columns that share an FP8 scale.

    Returns:
        int32 `[items]`: how many elements read are NaN or infinite.
    """
    return _int4(weights[0]).quantize_int4_group_into(  # type: ignore[no-any-return]
        weights,
        packed,
        scales,
        zeros,
        search=search,
        fp8_scales=fp8_scales,
        fp8_block_size=fp8_block_size,
    )


def _fp8_block(tensor: Tensor) -> ModuleType:
    """Returns the module with the FP8 block kernels for the tensor's device."""
    if tensor.device.type == "cuda":
        from dsv3_tools.kernels import triton_fp8_block

        return triton_fp8_block
    from dsv3_tools.kernels import cpu_fp8_block

    return cpu_fp8_block


def _int8(tensor: Tensor) -> ModuleType:
    """Returns the module with the INT8 kernels for the tensor's device."""
    if tensor.device.type == "cuda":
        from dsv3_tools.kernels import triton_integer

        return triton_integer
    from dsv3_tools.kernels import cpu_int8

    return cpu_int8


def _int4(tensor: Tensor) -> ModuleType:
    """Returns the module with the INT4 kernels for the tensor's device."""
    if tensor.device.type == "cuda":
        from dsv3_tools.kernels import triton_integer

        return triton_integer
    from dsv3_tools.kernels import cpu_int4

    return cpu_int4
