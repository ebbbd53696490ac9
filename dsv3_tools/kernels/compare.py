"""For each block of a weight the sums and maxima of its errors, on the CPU, from decoded weights.

`cpu_errors.py` measures the same of codes as they are stored, where they allow it, several times as fast.

How: like the other CPU kernels, every inner loop walks one row without branches, so that it becomes vector
code; sums are kept by column (in float32, over 128 rows at most) and added up in float64 once per block.
A tile of 1024 columns with its sums and scales stays in L1 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dsv3_tools.kernels.cpu_bits import as_float32, as_uint32, widen
from dsv3_tools.kernels.cpu_errors import BLOCK
from dsv3_tools.kernels.jit import cached, compiled

__all__ = ["BLOCK", "BlockErrors", "Steps", "compare_blocks"]

float32, uint32 = np.float32, np.uint32

_TILE = 1024  # columns, a multiple of BLOCK
_EXPONENT = uint32(0x7F80_0000)
_SMALLEST_NORMAL = uint32(0x3C80_0000)  # 2**-6 of e4m3, below which its steps stay 2**-9
_TWO_POW_254 = uint32(0x7F00_0000)
_MANTISSA_BITS_E4M3 = uint32(3 << 23)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Steps:
    """How far apart the values are that the codes of some rows can stand for.

    Attributes:
        inverse: float32 `[scale rows, scale columns]`, 1 / scale.
        low: of the same shape, the smallest code less its zero point; codes reach to `low + span`.
        span: largest less smallest code; None for e4m3, whose steps grow with the code.
        block_size: rows and columns that share a scale.
    """

    inverse: Array
    low: Array
    span: float | None
    block_size: tuple[int, int]


class BlockErrors(NamedTuple):
    """Per block of `BLOCK` x `BLOCK` elements, each float64 `[block rows, block columns]`.

    `same` counts elements with equal bits, `signal` and `error` are sums of squares, `steps` is the largest
    error in steps (0 where no steps are given), `largest` the largest error and `peak` the largest magnitude.
    """

    same: Array
    signal: Array
    error: Array
    steps: Array
    largest: Array
    peak: Array

    @classmethod
    def zeros(cls, rows: int, columns: int) -> BlockErrors:
        """Returns those of a weight `[rows, columns]` before anything was compared."""
        grid = (-(-rows // BLOCK), -(-columns // BLOCK))
        return cls(*np.zeros((6, *grid)))


def compare_blocks(
    original: Array,
    other: Array,
    out: BlockErrors,
    *,
    top: int,
    steps: Steps | None = None,
    slack: float = 0.0,
    clamp: float = 1.0,
) -> None:
    """Adds the errors of some rows to those of the blocks that they lie in.

    Args:
        original: `[rows, columns]`, bits of BF16 (uint16) or of float32 (uint32), all finite.
        other: `[rows, columns]`, bits of float32 (uint32), all finite: what `steps` are about.
        out: the errors of the whole weight.
        top: the rows' first row in the weight.
        steps: those of the rows, beginning with the scales of row `top`.
        slack: share of the power of two below an element by which it may itself be rounded.
        clamp: steps are divided by this where the outermost code stands for something farther out.
    """
    if steps is None:
        nothing = np.zeros((1, 1), np.float32)
        steps = Steps(nothing, nothing, 0.0, (max(1, out.same.shape[0] * BLOCK), max(1, original.shape[1])))
    _compare(
        original,
        other,
        steps.inverse,
        steps.low,
        float32(steps.span or 0.0),
        steps.span is None,
        *steps.block_size,
        top,
        float32(slack),
        float32(1.0 / clamp),
        *out,
    )


@compiled
def _spread(numbers: Any, width: int, left: int, spread: Any) -> None:
    """Repeats each of a row's numbers over the `width` columns that share it, from column `left` on."""
    start = 0
    while start < spread.size:
        k = (left + start) // width
        stop = min((k + 1) * width - left, spread.size)
        spread[start:stop] = numbers[k]
        start = stop


# LLVM makes vector code of a loop only if few pairs of its arrays could overlap: hence three loops, not one.


@compiled
def _sum_squares(original: Any, other: Any, signal: Any, error: Any) -> None:
    for j in range(original.size):
        value = as_float32(widen(original[j]))
        difference = value - as_float32(other[j])
        signal[j] += value * value
        error[j] += difference * difference


@compiled
def _raise_maxima(original: Any, other: Any, largest: Any, peak: Any) -> None:
    for j in range(original.size):
        value = as_float32(widen(original[j]))
        size, magnitude = abs(value - as_float32(other[j])), abs(value)
        largest[j] = size if size > largest[j] else largest[j]
        peak[j] = magnitude if magnitude > peak[j] else peak[j]


@compiled
def _count_same(original: Any, other: Any, same: Any) -> None:
    for j in range(original.size):
        same[j] = uint32(same[j] + uint32(widen(original[j]) == other[j]))


@compiled
def _steps_of_integers(
    original: Any, other: Any, inverse: Any, low: Any, span: Any, slack: Any, clamp: Any, steps: Any
) -> None:
    half = float32(0.5)
    for j in range(original.size):
        bits = widen(original[j])
        value, coded, power = as_float32(bits), as_float32(other[j]), as_float32(uint32(bits & _EXPONENT))
        code = coded * inverse[j]
        away = (value - coded) * inverse[j]  # signed like the codes, whatever the sign of the scale
        above = (code > low[j] + span - half) & (away > float32(0.0))
        below = (code < low[j] + half) & (away < float32(0.0))
        excess = abs(away) - slack * abs(power * inverse[j])
        excess = excess * clamp if above | below else excess
        steps[j] = excess if excess > steps[j] else steps[j]


@compiled
def _steps_of_e4m3(original: Any, other: Any, inverse: Any, slack: Any, steps: Any) -> None:
    for j in range(original.size):
        bits = widen(original[j])
        value, coded, power = as_float32(bits), as_float32(other[j]), as_float32(uint32(bits & _EXPONENT))
        # Just above the code, so that a product rounded down is not taken for the next smaller exponent.
        code = abs(coded) * inverse[j] * float32(1.00001)
        exponent = uint32(as_uint32(code) & _EXPONENT)
        exponent = exponent if exponent > _SMALLEST_NORMAL else _SMALLEST_NORMAL
        per_step = as_float32(uint32(_TWO_POW_254 - uint32(exponent - _MANTISSA_BITS_E4M3)))
        excess = (abs(value - coded) - slack * power) * inverse[j] * per_step
        steps[j] = excess if excess > steps[j] else steps[j]


@compiled
def _add_blocks(tile: Any, counts: Any, place: int, row: int, same: Any, signal: Any, error: Any,
                steps: Any, largest: Any, peak: Any) -> None:  # fmt: skip
    for start in range(0, counts.size, BLOCK):
        column = place + start // BLOCK
        for j in range(start, min(counts.size, start + BLOCK)):
            same[row, column] += counts[j]
            signal[row, column] += tile[0, j]
            error[row, column] += tile[1, j]
            steps[row, column] = max(steps[row, column], tile[2, j])
            largest[row, column] = max(largest[row, column], tile[3, j])
            peak[row, column] = max(peak[row, column], tile[4, j])


@cached
def _compare(
    original: Any,
    other: Any,
    inverse: Any,
    low: Any,
    span: Any,
    is_e4m3: bool,
    block_rows: int,
    block_columns: int,
    top: int,
    slack: Any,
    clamp: Any,
    same: Any,
    signal: Any,
    error: Any,
    steps: Any,
    largest: Any,
    peak: Any,
) -> None:
    rows, columns = original.shape
    tile, counts = np.empty((5, _TILE), float32), np.empty(_TILE, uint32)
    scale, least = np.empty(_TILE, float32), np.empty(_TILE, float32)
    has_steps = is_e4m3 or span > float32(0.0)
    first_scale = top // block_rows
    for left in range(0, columns, _TILE):
        width = min(_TILE, columns - left)
        begin = 0
        spread = -1
        while begin < rows:
            block = (top + begin) // BLOCK
            end = min(rows, (block + 1) * BLOCK - top)
            tile[:, :width] = float32(0.0)
            counts[:width] = uint32(0)
            for i in range(begin, end):
                row, coded = original[i, left : left + width], other[i, left : left + width]
                _sum_squares(row, coded, tile[0, :width], tile[1, :width])
                _raise_maxima(row, coded, tile[3, :width], tile[4, :width])
                _count_same(row, coded, counts[:width])
                if not has_steps:
                    continue
                k = (top + i) // block_rows - first_scale
                if k != spread:
                    _spread(inverse[k], block_columns, left, scale[:width])
                    _spread(low[k], block_columns, left, least[:width])
                    spread = k
                if is_e4m3:
                    _steps_of_e4m3(row, coded, scale[:width], slack, tile[2, :width])
                else:
                    _steps_of_integers(
                        row, coded, scale[:width], least[:width], span, slack, clamp, tile[2, :width]
                    )
            _add_blocks(tile, counts[:width], left // BLOCK, block, same, signal, error, steps, largest, peak)
            begin = end
