"""Do two files hold the same bytes, or one the BF16 weights of the other's FP8 codes?

How: rows are read into L2 cache, decoded in registers, compared, and never written. The kernels go on as
long as all is equal and finite; what stops them the caller has to find out. For each scale the weights of all
codes are calculated first, then looked up, 64 at once, if the processor can. Others multiply and round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3_tools.kernels.cpu_bits import as_uint32, decode_e4m3, round_to_bfloat16
from dsv3_tools.kernels.cpu_errors import Coded
from dsv3_tools.kernels.cpu_files import fill, rows_at
from dsv3_tools.kernels.cpu_lanes import E4M3_UNIT, MAX_E4M3_SCALE, differences_of_64
from dsv3_tools.kernels.jit import cached, compiled
from dsv3_tools.kernels.nonfinite import SMALLEST_NONFINITE, largest_magnitude

__all__ = ["are_equal_weights", "equal_nbytes", "first_difference"]

float32, uint8, uint32, uint64 = np.float32, np.uint8, np.uint32, np.uint64

_CHUNK = 512  # words: as long as the loop takes to start, short enough to stop early

Array = np.ndarray[Any, Any]


def first_difference(a: Array, b: Array) -> int:
    """Returns the index of the first byte in which two uint8 arrays of one length differ, or -1."""
    whole = a.size // 8 * 8
    index = int(_first_difference(a[:whole].view(uint64), b[:whole].view(uint64)))
    start = whole if index < 0 else 8 * index
    differing = np.flatnonzero(a[start : start + 8] != b[start : start + 8])
    return start + int(differing[0]) if differing.size else -1


def equal_nbytes(places: Sequence[tuple[int, int]], rooms: Sequence[Array], nbytes: int, dtype: str) -> int:
    """Returns how many of the bytes from two places on are equal, and all of them finite elements, at least.

    Args:
        places: descriptors and offsets.
        rooms: two arrays of uint64 of one size, for what is read at once.
        nbytes: how many to compare.
        dtype: safetensors' name of the elements' type.
    """
    infinity = SMALLEST_NONFINITE.get(dtype, uint8(0))
    return int(
        _equal_nbytes(tuple(places), rooms[0], rooms[1], rooms[1].view(infinity.dtype), nbytes, infinity)
    )


def are_equal_weights(fp8: Coded, bfloat16: Coded, rows: int) -> bool:
    """Returns whether rows of BF16 weights are those of FP8 codes.

    False may also mean that one of them is not finite, that a scale is negative or large, that there are not
    64 neighbours for each scale, or that rows cannot be read.
    """
    columns = fp8.values.shape[1]
    if columns % 64 or (fp8.block_size[1] < columns and fp8.block_size[1] % 64):
        return False
    return bool(
        _are_equal_weights(
            fp8.values, fp8.place, fp8.scales, fp8.block_size, bfloat16.values, bfloat16.place, rows
        )
    )


@compiled
def _differ(a: Any, b: Any) -> Any:
    found = uint64(0)
    for j in range(a.size):
        found |= a[j] ^ b[j]
    return found != uint64(0)


@cached
def _first_difference(a: Any, b: Any) -> Any:
    for start in range(0, a.size, _CHUNK):
        if _differ(a[start : start + _CHUNK], b[start : start + _CHUNK]):
            for j in range(start, min(a.size, start + _CHUNK)):
                if a[j] != b[j]:
                    return j
    return -1


@cached
def _equal_nbytes(places: Any, ours: Any, theirs: Any, elements: Any, nbytes: int, infinity: Any) -> Any:
    """See `equal_nbytes`; `elements` are `theirs`, and an `infinity` of 0 is for those that are finite."""
    limit = type(infinity)(infinity << 1)
    for start in range(0, nbytes, 8 * ours.size):
        count = min(nbytes - start, 8 * ours.size)
        words = -(-count // 8)
        ours[words - 1] = theirs[words - 1] = uint64(0)  # what is beyond the last byte
        if not (fill(places[0], start, ours, count) and fill(places[1], start, theirs, count)):
            return start
        if _differ(ours[:words], theirs[:words]):
            return start
        if infinity > 0 and largest_magnitude(elements[: count // elements.itemsize], infinity) >= limit:
            return start
    return nbytes


@compiled
def _write_tables(scales: Any, tables: Any) -> None:
    """Writes the BF16 magnitudes of all codes, low bytes first, for each scale of a row of blocks."""
    for k in range(scales.size):
        for code in range(128):
            bits = as_uint32(decode_e4m3(uint8(code)) * abs(scales[k]))
            bits = uint32(round_to_bfloat16(bits) >> uint32(16))
            tables[k, code], tables[k, 128 + code] = uint8(bits), uint8(bits >> uint32(8))


@compiled
def _rows_differ(codes: Any, words: Any, columns: int, scales: Any, block_columns: int, tables: Any) -> Any:
    """Whether weights differ from flat rows of `words` anywhere, or are NaN; columns are multiples of 64."""
    found = uint64(0)
    for start in range(0, codes.size, columns):
        for k in range(scales.size):
            scale, table = scales[k] / E4M3_UNIT, tables[k]
            for j in range(k * block_columns, min((k + 1) * block_columns, columns), 64):
                found |= differences_of_64(codes, words, start + j, table, scale)
    return found != uint64(0)


@cached
def _are_equal_weights(
    codes: Any, codes_place: Any, scales: Any, block_size: Any, words: Any, words_place: Any, rows: int
) -> Any:
    columns = codes.shape[1]
    tables = np.empty((scales.shape[1], 256), uint8)
    begin = 0
    while begin < rows:
        block = begin // block_size[0]
        for scale in scales[block]:
            if as_uint32(scale) >= as_uint32(MAX_E4M3_SCALE):  # or negative, or NaN
                return False
        _write_tables(scales[block], tables)
        stop = min(rows, (block + 1) * block_size[0])
        while begin < stop:
            count = min(stop - begin, codes.shape[0])
            read, ours = rows_at(codes, codes_place, begin, count)
            also_read, theirs = rows_at(words, words_place, begin, count)
            if not (read and also_read):
                return False
            if _rows_differ(
                ours.reshape(-1), theirs.reshape(-1), columns, scales[block], block_size[1], tables
            ):
                return False
            begin += count
    return True
