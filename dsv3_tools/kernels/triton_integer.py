"""INT8 and INT4 on CUDA: one launch for a whole group of weights, bit for bit as `reference_integer.py`.

The host's side; the kernels are in `triton_int8.py` and `triton_int4.py`. What comes from FP8 is decoded in
registers: no weight goes through memory on its way from one format to the other.

Every function launches on the current stream, without waiting for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from dsv3_tools.errors import FormatError
from dsv3_tools.kernels import triton_int4, triton_int8
from dsv3_tools.kernels.triton_group import (
    Group,
    Operand,
    Tiling,
    check_block_size,
    has_fp8_conversions,
    triton_dtype,
)

__all__ = [
    "dequantize_int4_group_into",
    "dequantize_int8_block_into",
    "dequantize_int8_channel_into",
    "quantize_int4_group_into",
    "quantize_int8_block_into",
    "quantize_int8_channel_into",
]

# Swept by benchmarks/gpu_kernels.py --sweep --only integer. `rows` and `columns` are of a tile, but for the
# quantizations. To channels: the rows that a program takes one after the other, and what it holds at once of
# a row. To blocks and to groups: the rows that it holds at once.
DEQUANTIZE_INT8_TILING = Tiling(rows=4, columns=1024, vector=8, num_warps=4)
DEQUANTIZE_INT4_TILING = Tiling(rows=8, columns=1024, vector=8, num_warps=4)
DEQUANTIZE_INT4_ZEROS_TILING = Tiling(rows=4, columns=1024, vector=8, num_warps=4)
INT8_CHANNEL_TILING = Tiling(rows=4, columns=1024, vector=16, num_warps=2)
FP8_TO_INT8_CHANNEL_TILING = Tiling(rows=4, columns=1024, vector=16, num_warps=1)
INT8_BLOCK_TILING = Tiling(rows=32, columns=128, vector=16, num_warps=4, max_registers=80)
FP8_TO_INT8_BLOCK_TILING = Tiling(rows=32, columns=128, vector=16, num_warps=2, max_registers=96)
INT4_TILING = Tiling(rows=8, columns=256, vector=16, num_warps=1, max_registers=128)
FP8_TO_INT4_TILING = Tiling(rows=4, columns=512, vector=16, num_warps=1, max_registers=128)
INT4_SEARCH_TILING = Tiling(rows=32, columns=128, vector=16, num_warps=4, max_registers=128)

MAX_BLOCK_ELEMENTS = 1 << 16
"""A program of the quantization takes a whole block."""

INT4_STEPS = 8
"""How often a program of the INT4 quantization takes a tile, one below the other."""

INT4_SPAN = 64
"""Of a group of INT4, the elements that lie side by side in threads that do: a quarter of a warp at most."""


def dequantize_int8_block_into(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    *,
    block_size: tuple[int, int] = (128, 128),
    tiling: Tiling = DEQUANTIZE_INT8_TILING,
) -> Tensor:
    """Writes the weights of int8 codes with a scale for each block; see `kernels`.

    Raises:
        FormatError: a `block_size` that is not two powers of two.
    """
    check_block_size(block_size)
    return _dequantize_int8(codes, scales, outs, block_size, tiling)


def dequantize_int8_channel_into(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    *,
    tiling: Tiling = DEQUANTIZE_INT8_TILING,
) -> Tensor:
    """Writes the weights of int8 codes with a scale for each row; see `kernels`."""
    return _dequantize_int8(codes, scales, outs, (1, 0), tiling)


def _dequantize_int8(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    block_size: tuple[int, int],
    tiling: Tiling,
) -> Tensor:
    """`block_size` (1, 0) is a row each."""
    high, wide = block_size
    run = min(wide or tiling.columns, tiling.columns)
    tile_rows = tiling.rows if high == 1 else min(tiling.rows, high)
    operands = (
        Operand("written", outs),
        Operand("read", codes, dtype=torch.int8),
        Operand("scale", scales, block_size, torch.float32),
    )
    group = Group(operands, (tile_rows, tiling.columns), tiling.vector)
    constants = (triton_dtype(outs[0].dtype), tile_rows, tiling.columns // run, run, high, wide)
    return group.launch(triton_int8.dequantize_int8_kernel, constants, tiling)


def quantize_int8_block_into(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    block_size: tuple[int, int] = (128, 128),
    fp8_scales: Sequence[Tensor] | None = None,
    fp8_block_size: tuple[int, int] = (128, 128),
    tiling: Tiling | None = None,
) -> Tensor:
    """Writes int8 codes with a scale for each block; see `kernels`.

    Raises:
        FormatError: a `block_size` that is not two powers of two, or too large for one program.
    """
    check_block_size(block_size, max_elements=MAX_BLOCK_ELEMENTS)
    high, wide = block_size
    same_blocks = fp8_scales is not None and tuple(fp8_block_size) == tuple(block_size)
    if tiling is None:
        tiling = FP8_TO_INT8_BLOCK_TILING if same_blocks else INT8_BLOCK_TILING
    source = _Source.of(weights, fp8_scales, fp8_block_size)
    tile_blocks = 1 if same_blocks else max(tiling.columns // wide, 1)
    while tile_blocks > 1 and tile_blocks * high * wide > MAX_BLOCK_ELEMENTS:
        tile_blocks //= 2
    operands = (
        *source.operands,
        Operand("written", codes, dtype=torch.int8),
        Operand("scale", scales, block_size, torch.float32),
    )
    group = Group(operands, (high, tile_blocks * wide), tiling.vector)
    num_rows = min(tiling.rows, high)
    constants: tuple[Any, ...] = (high, wide, num_rows, source.has_conversions)
    if same_blocks:
        if not hasattr(tl, "gather"):
            raise FormatError("FP8 blocks to INT8 blocks on CUDA need triton >= 3.3; convert on the CPU")
        return group.launch(triton_int8.fp8_to_int8_block_kernel, constants, tiling)
    constants = (*source.constants, high, tile_blocks, *constants[1:])
    return group.launch(triton_int8.quantize_int8_block_kernel, constants, tiling)


def quantize_int8_channel_into(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    fp8_scales: Sequence[Tensor] | None = None,
    fp8_block_size: tuple[int, int] = (128, 128),
    tiling: Tiling | None = None,
) -> Tensor:
    """Writes int8 codes with a scale for each row; see `kernels`."""
    source = _Source.of(weights, fp8_scales, fp8_block_size)
    operands = (
        *source.operands,
        Operand("written", codes, dtype=torch.int8),
        Operand("scale", scales, (1, 0), torch.float32),
    )
    if tiling is None:
        tiling = INT8_CHANNEL_TILING if fp8_scales is None else FP8_TO_INT8_CHANNEL_TILING
    group = Group(operands, (tiling.rows, 0), tiling.vector)
    run = min(128, tiling.columns)
    constants = (*source.constants, tiling.rows, tiling.columns // run, run, source.has_conversions)
    return group.launch(triton_int8.quantize_int8_channel_kernel, constants, tiling)


def dequantize_int4_group_into(
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor] | None,
    outs: Sequence[Tensor],
    *,
    tiling: Tiling | None = None,
) -> Tensor:
    """Writes the weights of packed INT4 codes; see `kernels`.

    Raises:
        FormatError: groups that are not a multiple of 8.
    """
    group_size = _group_size(outs, scales)
    if tiling is None:
        tiling = DEQUANTIZE_INT4_TILING if zeros is None else DEQUANTIZE_INT4_ZEROS_TILING
    operands = (
        Operand("written", outs),
        Operand("packed", packed, (1, 8), torch.int32),
        Operand("scale", scales, (1, group_size)),
        Operand("zero", zeros, (1, group_size), torch.uint8),
    )
    group = Group(operands, (tiling.rows, tiling.columns), tiling.vector)
    constants = (
        triton_dtype(outs[0].dtype),
        triton_dtype(scales[0].dtype),
        zeros is not None,
        group_size,
        tiling.rows,
        tiling.columns // 8,
    )
    return group.launch(triton_int4.dequantize_int4_kernel, constants, tiling)


def quantize_int4_group_into(
    weights: Sequence[Tensor],
    packed: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor] | None,
    *,
    search: str = "mse",
    fp8_scales: Sequence[Tensor] | None = None,
    fp8_block_size: tuple[int, int] = (128, 128),
    tiling: Tiling | None = None,
) -> Tensor:
    """Writes packed INT4 codes with a scale, and a zero point or none, for each group; see `kernels`.

    Raises:
        FormatError: groups that are not of 8, 16, 32, 64, 128 or 256.
    """
    if search not in ("absmax", "mse"):
        raise ValueError(f"search: got {search!r}, expected 'absmax' or 'mse'")
    group_size = _group_size(weights, scales)
    if group_size & (group_size - 1) or group_size > 256:
        raise FormatError(
            f"group_size: got {group_size}, expected a power of two up to 256 (the tiles of the CUDA kernels "
            "are); quantize on the CPU"
        )
    if tiling is None:
        tiling = INT4_TILING if fp8_scales is None else FP8_TO_INT4_TILING
        if search == "mse":
            tiling = INT4_SEARCH_TILING
    source = _Source.of(weights, fp8_scales, fp8_block_size)
    operands = (
        *source.operands,
        Operand("packed", packed, (1, 8), torch.int32),
        Operand("scale", scales, (1, group_size), torch.bfloat16),
        Operand("zero", zeros, (1, group_size), torch.uint8),
    )
    tile_groups = max(tiling.columns // group_size, 1)
    tile_rows = INT4_STEPS * tiling.rows
    group = Group(operands, (tile_rows, tile_groups * group_size), tiling.vector)
    constants = (
        *source.constants,
        zeros is None,
        search == "mse",
        group_size,
        tile_rows,
        tiling.rows,
        tile_groups,
        min(INT4_SPAN, group_size),
        source.has_conversions,
    )
    return group.launch(triton_int4.quantize_int4_kernel, constants, tiling)


@dataclasses.dataclass(frozen=True)
class _Source:
    """What is quantized: weights, or FP8 codes and their scales.

    Args:
        operands: for `Group`, the weights first and FP8's scales second.
        constants: for the kernels, the dtype and the rows and columns of an FP8 block.
        has_conversions: see `triton_bits.decode`.
    """

    operands: tuple[Operand, Operand]
    constants: tuple[tl.dtype, int, int]
    has_conversions: bool

    @classmethod
    def of(
        cls, weights: Sequence[Tensor], fp8_scales: Sequence[Tensor] | None, fp8_block_size: tuple[int, int]
    ) -> _Source:
        if fp8_scales is not None:
            read = Operand("read", weights, dtype=torch.float8_e4m3fn)
            constants = (tl.float8e4nv, *fp8_block_size)
        else:
            read = Operand("read", weights)
            constants = (triton_dtype(weights[0].dtype) if weights else tl.float32, 1, 1)
        scale = Operand("fp8 scale", fp8_scales, fp8_block_size, torch.float32)
        return cls((read, scale), constants, has_fp8_conversions(weights))


def _group_size(weights: Sequence[Tensor], scales: Sequence[Tensor]) -> int:
    """Returns how many neighbours in a row share a scale, by the first item that has any."""
    for weight, scale in zip(weights, scales, strict=False):
        if weight.ndim == scale.ndim == 2 and weight.shape[1] and scale.shape[1]:
            size, rest = divmod(weight.shape[1], scale.shape[1])
            if rest or size % 8:
                raise FormatError(
                    f"group_size: got {scale.shape[1]} scales for {weight.shape[1]} columns, expected groups "
                    "of a multiple of 8"
                )
            return size
    return 8
