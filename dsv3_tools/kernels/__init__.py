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

__all__ = ["dequantize_fp8_block_into", "quantize_fp8_block_into"]


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


def _fp8_block(tensor: Tensor) -> ModuleType:
    """Returns the module with the FP8 block kernels for the tensor's device."""
    if tensor.device.type == "cuda":
        from dsv3_tools.kernels import triton_fp8_block

        return triton_fp8_block
    from dsv3_tools.kernels import cpu_fp8_block

    return cpu_fp8_block
