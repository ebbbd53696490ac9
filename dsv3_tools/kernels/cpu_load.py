"""Rows of weights as finite float32, whatever they are stored as: what the integer kernels start from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from dsv3_tools.kernels.cpu_bits import (
    BITS,
    INFINITY,
    MAGNITUDE,
    SAFE_SCALE,
    as_float32,
    as_uint32,
    check_tensors,
    count_blocks,
    decode_e4m3,
    has_nan_code,
    widen,
)
from dsv3_tools.kernels.jit import compiled

__all__ = ["check_source", "load_row", "source_arrays", "spread_scales"]

float32, uint8, uint32 = np.float32, np.uint8, np.uint32


def check_source(
    where: str, weight: Tensor, fp8_scale: Tensor | None, fp8_block_size: tuple[int, int]
) -> None:
    """Checks a weight `[rows, columns]`, which is FP8 exactly if there are FP8 scales.

    Raises:
        FormatError: the kernels would read outside of a tensor.
    """
    blocks = count_blocks(where, weight.shape, (1, 1) if fp8_scale is None else fp8_block_size)
    if fp8_scale is None:
        check_tensors(where, ("weights", weight, weight.shape, (*BITS, torch.float16)))
    else:
        check_tensors(
            where,
            ("weights", weight, weight.shape, (torch.float8_e4m3fn,)),
            ("fp8_scales", fp8_scale, blocks, (torch.float32,)),
        )


def source_arrays(
    weight: Tensor, fp8_scale: Tensor | None, fp8_block_size: tuple[int, int]
) -> tuple[Any, Any, int, int]:
    """Returns a weight's bits, and FP8 scales with their block's size: 1.0 for all if it is not FP8."""
    if fp8_scale is not None:
        return weight.view(torch.uint8).numpy(), fp8_scale.numpy(), *fp8_block_size
    # float16 is not a format that DeepSeek-V3 checkpoints come in: exact, but through a copy.
    values = weight.to(torch.float32) if weight.dtype == torch.float16 else weight
    rows, columns = weight.shape
    return values.view(BITS[values.dtype]).numpy(), np.ones((1, 1), float32), max(rows, 1), max(columns, 1)


@compiled
def spread_scales(scales: Any, block_columns: int, left: int, spread: Any) -> Any:
    """Repeats a block row's scales over `spread`, which starts at column `left`.

    Returns:
        Whether no FP8 number times one of them overflows.
    """
    safe = True
    start = 0
    while start < spread.size:
        k = (left + start) // block_columns
        stop = min((k + 1) * block_columns - left, spread.size)
        spread[start:stop] = scales[k]
        safe &= abs(scales[k]) < SAFE_SCALE  # False for NaN
        start = stop
    return safe


def load_row(weights: Any, scale: Any, safe: Any, values: Any) -> Any:
    """Writes a row as float32 to `values`, 0.0 for what is not finite; returns how many were not.

    Args:
        weights: FP8 codes as uint8, BF16 as uint16 or float32 as uint32.
        scale: what FP8 codes are multiplied by; else unused.
        safe: see `spread_scales`.
        values: float32.
    """
    raise NotImplementedError("compiled code only")


@overload(load_row, jit_options={"nogil": True, "error_model": "numpy"})
def _load_row_overload(weights, scale, safe, values):  # type: ignore[no-untyped-def]  # noqa: ARG001
    if weights.dtype == types.uint8:

        def load_fp8(weights, scale, safe, values):  # type: ignore[no-untyped-def]
            if safe and not has_nan_code(weights):
                _load_fp8(weights, scale, values)
                return uint32(0)
            return _load_fp8_counted(weights, scale, values)

        return load_fp8
    return lambda weights, scale, safe, values: _load_float(weights, values)  # noqa: ARG005


@compiled
def _load_fp8(codes: Any, scale: Any, values: Any) -> None:
    for j in range(codes.size):
        values[j] = decode_e4m3(codes[j]) * scale[j]


@compiled
def _load_fp8_counted(codes: Any, scale: Any, values: Any) -> Any:
    count = uint32(0)
    for j in range(codes.size):
        bits = as_uint32(decode_e4m3(codes[j]) * scale[j])
        nan = (codes[j] & uint8(0x7F)) == uint8(0x7F)
        bad = nan or uint32(bits & MAGNITUDE) >= INFINITY
        values[j] = as_float32(uint32(0) if bad else bits)
        count = uint32(count + uint32(bad))
    return count


@compiled
def _load_float(weights: Any, values: Any) -> Any:
    count = uint32(0)
    for j in range(weights.size):
        bits = widen(weights[j])
        bad = uint32(bits & MAGNITUDE) >= INFINITY
        values[j] = as_float32(uint32(0) if bad else bits)
        count = uint32(count + uint32(bad))
    return count
