"""Are these the weights of those FP8 codes? Decoded in registers and compared at once, never written.

How: see `cpu_fp8_block.py`. Of a row that holds no NaN, in which no product can overflow, nothing but equality
is asked. e4m3 codes are taken for float32 bits: see `cpu_lanes.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv3_tools.kernels.cpu_bits import (
    INFINITY,
    MAGNITUDE,
    NAN,
    as_float32,
    as_uint32,
    decode_e4m3,
    has_nan_code,
    narrow,
    widen,
)
from dsv3_tools.kernels.cpu_lanes import E4M3_UNIT, MAX_E4M3_SCALE
from dsv3_tools.kernels.jit import cached, compiled

__all__ = ["count_if_same"]

float32, int8, int32, uint8, uint16, uint32 = np.float32, np.int8, np.int32, np.uint8, np.uint16, np.uint32

Array = np.ndarray[Any, Any]


def count_if_same(codes: Array, scales: Array, block_size: tuple[int, int], words: Array) -> int | None:
    """Returns how many weights are not finite; None if the codes' weights are others than the words'.

    Args:
        codes: uint8 `[rows, columns]`, e4m3.
        scales: float32, of their blocks.
        block_size: rows and columns that share a scale.
        words: `[rows, columns]`, bits of BF16 (uint16) or of float32 (uint32).
    """
    count = int(_count_if_same(codes, scales, *block_size, words))
    return None if count < 0 else count


@compiled
def _differs(codes: Any, scale: Any, words: Any) -> Any:
    """Whether a row differs anywhere; `scale` is in the unit of the codes' bits."""
    found = uint32(0)
    for j in range(codes.size):
        bits = uint32(uint32(int32(int8(codes[j])) << int32(20)) & uint32(0x87F0_0000))
        weight = narrow(as_uint32(as_float32(bits) * scale[j]), words)
        found = uint32(found | uint32(weight ^ words[j]))
    return found != uint32(0)


@compiled
def _count_row_if_same(codes: Any, scale: Any, words: Any) -> Any:
    """Like `_differs`, for any code and scale; returns how many weights are not finite, or -1."""
    count, same = 0, True
    for j in range(codes.size):
        bits = as_uint32(decode_e4m3(codes[j]) * scale[j])
        nan = (codes[j] & uint8(0x7F)) == uint8(0x7F) or uint32(bits & MAGNITUDE) > INFINITY
        weight = narrow(NAN if nan else bits, words)
        same &= weight == words[j]
        count += uint32(widen(weight) & MAGNITUDE) >= INFINITY
    return count if same else -1


@cached
def _count_if_same(codes: Any, scales: Any, block_rows: int, block_columns: int, words: Any) -> Any:
    rows, columns = codes.shape
    spread, in_unit = np.empty(columns, float32), np.empty(columns, float32)
    count = 0
    for i in range(scales.shape[0]):
        safe = True
        for k in range(scales.shape[1]):
            spread[k * block_columns : (k + 1) * block_columns] = scales[i, k]
            safe &= abs(scales[i, k]) < MAX_E4M3_SCALE  # False for NaN
        for j in range(columns):
            in_unit[j] = spread[j] / E4M3_UNIT
        for r in range(i * block_rows, min((i + 1) * block_rows, rows)):
            if safe and not has_nan_code(codes[r]):
                if _differs(codes[r], in_unit, words[r]):
                    return -1
                continue
            found = _count_row_if_same(codes[r], spread, words[r])
            if found < 0:
                return -1
            count += found
    return count
