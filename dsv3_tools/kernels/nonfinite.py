"""Finds NaN and infinities in the bytes of a tensor, outside the GIL and faster than they come from memory.

For every floating-point dtype the magnitude bits (all but the sign) of a number that is not finite are at
least those of infinity (of NaN in F8_E4M3, which has no infinity). So one vectorized maximum per chunk
decides that a chunk is clean, which nearly every chunk is; only others are looked at by element.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv3_tools.kernels.jit import cached, compiled

__all__ = ["SMALLEST_NONFINITE", "count_nonfinite", "first_nonfinite", "largest_magnitude"]

SMALLEST_NONFINITE: dict[str, Any] = {
    "BF16": np.uint16(0x7F80),
    "F16": np.uint16(0x7C00),
    "F32": np.uint32(0x7F80_0000),
    "F64": np.uint64(0x7FF0_0000_0000_0000),
    "F8_E4M3": np.uint8(0x7F),
    "F8_E5M2": np.uint8(0x7C),
}
"""Per safetensors dtype the smallest magnitude bits that are not finite, as wide as an element."""

_CHUNK = 4096  # elements: long enough to hide a loop's start, short enough to look at twice in L1 cache


def count_nonfinite(data: np.ndarray[Any, np.dtype[np.uint8]], dtype: str) -> int:
    """Returns how many elements are NaN or infinite; 0 for a dtype that has neither.

    Args:
        data: the tensor's little-endian bytes, contiguous, uint8, a whole number of elements.
        dtype: safetensors' name of the dtype, such as "BF16".
    """
    threshold = SMALLEST_NONFINITE.get(dtype)
    return 0 if threshold is None else int(_count(_elements(data, threshold), threshold))


def first_nonfinite(data: np.ndarray[Any, np.dtype[np.uint8]], dtype: str) -> int | None:
    """Returns the index of the first element that is NaN or infinite, or None; arguments as above."""
    threshold = SMALLEST_NONFINITE.get(dtype)
    index = -1 if threshold is None else int(_first(_elements(data, threshold), threshold))
    return None if index < 0 else index


def _elements(data: np.ndarray[Any, np.dtype[np.uint8]], threshold: Any) -> np.ndarray[Any, Any]:
    return data.reshape(-1).view(threshold.dtype)


@compiled
def largest_magnitude(bits: Any, infinity: Any) -> Any:
    """Returns the largest of `bits` without their signs, shifted left by one; as wide as `infinity`."""
    # Shifting the sign out, rather than masking it, needs no constant for each width; the order is
    # the same. `type(infinity)(...)` undoes numba's widening to 64 bits, which would cost the vectors.
    largest = type(infinity)(0)
    for j in range(bits.size):
        largest = max(largest, type(infinity)(bits[j] << 1))
    return largest


@cached
def _count(bits: Any, infinity: Any) -> Any:
    shifted = type(infinity)(infinity << 1)
    count = 0
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        if largest_magnitude(chunk, infinity) >= shifted:
            for j in range(chunk.size):
                count += type(infinity)(chunk[j] << 1) >= shifted
    return count


@cached
def _first(bits: Any, infinity: Any) -> Any:
    shifted = type(infinity)(infinity << 1)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        if largest_magnitude(chunk, infinity) >= shifted:
            for j in range(chunk.size):
                if type(infinity)(chunk[j] << 1) >= shifted:
                    return start + j
    return -1
