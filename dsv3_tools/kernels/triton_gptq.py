"""The column loop of GPTQ and the search for scales, on a GPU; `reference_gptq.py` is the definition.

A program of the column loop has 16 rows of a block of 128 columns in registers and goes through the columns
one by one: it cannot be any other way, each depends on those before. What is to be read of a column (its
error) is summed out of the tile, zeros elsewhere. What all later blocks get of the errors is one matrix
product, which is torch's.

DeepSeek-V3's gate and up projections together, 4096 x 7168, are 56 such blocks of 256 programs.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_tools.kernels.reference_gptq import Grid
from dsv3_tools.kernels.reference_integer import MIN_SCALE, SCALE_FACTORS

__all__ = ["quantize_columns", "search_scales"]

_ROWS = 16
_SEARCH_ROWS = 8
_SEARCH_COLUMNS = 128
_TO_INTEGER = tl.constexpr(1.5 * 2**23)
"""Added to a float32 under 2**22 it leaves the nearest integer (of two, the even one) in the low bits."""


@triton.jit
def _round_to_grid(values, scale, zero, LEVELS: tl.constexpr):
    """Returns what the nearest codes stand for, and the codes, as float32."""
    quotient = tl.minimum(tl.maximum(tl.div_rn(values, scale), -1024.0), 1024.0)
    nearest = (quotient + _TO_INTEGER) - _TO_INTEGER
    codes = tl.minimum(tl.maximum(nearest + zero, 0.0), LEVELS)
    return (codes - zero) * scale, codes


@triton.jit
def _columns_kernel(
    target,
    weight,
    scale,
    zero,
    groups,
    factor,
    codes,
    errors,
    num_rows,
    stride,
    num_groups,
    factor_stride,
    middle,
    LEVELS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Takes ROWS rows of a block; a column's scales are found by its group."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    known = row < num_rows
    mask = known[:, None] & (column < BLOCK)[None, :]
    place = row[:, None].to(tl.int64) * stride + column[None, :]
    value = tl.load(target + place, mask=mask, other=0.0)
    group_place = row.to(tl.int64) * num_groups
    zeros = tl.zeros((ROWS,), tl.float32) + middle
    for step in range(BLOCK):
        group = tl.load(groups + step)
        scales = tl.load(scale + group_place + group, mask=known, other=1.0)
        if HAS_ZERO:
            zeros = tl.load(zero + group_place + group, mask=known, other=0.0)
        original = tl.load(weight + row.to(tl.int64) * stride + step, mask=known, other=0.0)
        after = (column > step) & (column < BLOCK)
        weights = tl.load(factor + step * factor_stride + column, mask=after, other=0.0)
        here = tl.sum(tl.where((column == step)[None, :], value, 0.0), 1)
        rounded, _ = _round_to_grid(here, scales, zeros, LEVELS)
        value = value + (original - rounded)[:, None] * weights[None, :]
    original = tl.load(weight + place, mask=mask, other=0.0)
    group = tl.load(groups + column, mask=column < BLOCK, other=0)
    scale_place = group_place[:, None] + group[None, :]
    scales = tl.load(scale + scale_place, mask=mask, other=1.0)
    zeros = tl.zeros((ROWS, COLUMNS), tl.float32) + middle
    if HAS_ZERO:
        zeros = tl.load(zero + scale_place, mask=mask, other=0.0)
    rounded, code = _round_to_grid(value, scales, zeros, LEVELS)
    out = row[:, None].to(tl.int64) * BLOCK + column[None, :]
    tl.store(codes + out, code.to(tl.uint8), mask=mask)
    tl.store(errors + out, original - rounded, mask=mask)


def quantize_columns(
    target: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    groups: Tensor,
    factor: Tensor,
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """Does `reference_gptq.quantize_columns` for one weight, each column's scale found by its group.

    Args:
        target: float32 `[rows, block]`, at most 128 columns of a wider matrix.
        weight: likewise, with the same strides.
        scale: float32 `[rows, groups]`, contiguous, of all groups of the weight.
        zero: as `scale`; None is the grid's middle.
        groups: int32 `[block]`, the group of each column.
        factor: float32 `[block, block]` of a wider matrix.
        grid: of the codes.

    Returns:
        uint8 codes and float32 errors, each `[rows, block]`.
    """
    rows, block = target.shape
    if target.stride() != weight.stride() or target.stride(1) != 1 or factor.stride(1) != 1 or block > 128:
        raise ValueError(f"a block of {block} columns with strides {target.stride()}, {weight.stride()}")
    codes = torch.empty((rows, block), dtype=torch.uint8, device=target.device)
    errors = torch.empty((rows, block), dtype=torch.float32, device=target.device)
    with torch.cuda.device(target.device if target.is_cuda else -1):
        _columns_kernel[(triton.cdiv(rows, _ROWS),)](
            target,
            weight,
            scale,
            scale if zero is None else zero,
            groups,
            factor,
            codes,
            errors,
            rows,
            target.stride(0),
            scale.shape[1],
            factor.stride(0),
            grid.middle,
            LEVELS=float(grid.levels),
            HAS_ZERO=zero is not None,
            ROWS=_ROWS,
            BLOCK=block,
            COLUMNS=max(16, triton.next_power_of_2(block)),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return codes, errors


@triton.jit
def _bounds(values, low, high, mask):
    low = tl.minimum(low, tl.min(tl.where(mask, values, 0.0), 1))
    high = tl.maximum(high, tl.max(tl.where(mask, values, 0.0), 1))
    return low, high


@triton.jit
def _search_kernel(
    weight,
    importance,
    factors,
    scale_out,
    zero_out,
    num_rows,
    columns,
    num_groups,
    reach,
    middle,
    least_scale,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BF16_SCALE: tl.constexpr,
    FACTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Takes one group of ROWS rows, COLUMNS columns at a time."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    inside = tl.arange(0, COLUMNS)[None, :]
    start = row[:, None].to(tl.int64) * columns + group * GROUP
    known = row[:, None] < num_rows
    low = tl.zeros((ROWS,), tl.float32)
    high = tl.zeros((ROWS,), tl.float32)
    for first in range(0, GROUP, COLUMNS):
        mask = known & (first + inside < GROUP)
        values = tl.load(weight + start + first + inside, mask=mask, other=0.0)
        low, high = _bounds(values, low, high, mask)
    if SYMMETRIC:
        plain = tl.div_rn(tl.maximum(high, -low), tl.zeros((ROWS,), tl.float32) + reach)
    else:
        steps = tl.full((ROWS,), LEVELS, tl.float32)
        plain = tl.div_rn(high, steps) - tl.div_rn(low, steps)
    best_scale = tl.full((ROWS,), 1.0, tl.float32)
    best_zero = tl.zeros((ROWS,), tl.float32) + middle
    least = tl.full((ROWS,), float("inf"), tl.float32)
    for number in range(FACTORS):
        factor = tl.load(factors + number)
        scale = plain * factor
        if BF16_SCALE:
            scale = scale.to(tl.bfloat16).to(tl.float32)
        scale = tl.where(scale < least_scale, 1.0, scale)
        zero = tl.zeros((ROWS,), tl.float32) + middle
        if not SYMMETRIC:
            quotient = tl.div_rn(-(low * factor), scale)
            zero = tl.minimum(tl.maximum((quotient + _TO_INTEGER) - _TO_INTEGER, 0.0), LEVELS)
        cost = tl.zeros((ROWS,), tl.float32)
        for first in range(0, GROUP, COLUMNS):
            mask = known & (first + inside < GROUP)
            values = tl.load(weight + start + first + inside, mask=mask, other=0.0)
            counts = tl.load(
                importance + group * GROUP + first + inside, mask=first + inside < GROUP, other=0.0
            )
            rounded, _ = _round_to_grid(values, scale[:, None], zero[:, None], LEVELS)
            error = values - rounded
            cost += tl.sum(error * error * counts, 1)
        better = (cost < least) | (number == 0)
        least = tl.where(better, cost, least)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    place = row.to(tl.int64) * num_groups + group
    tl.store(scale_out + place, best_scale, mask=row < num_rows)
    if not SYMMETRIC:
        tl.store(zero_out + place, best_zero, mask=row < num_rows)


@functools.lru_cache(maxsize=64)
def _on_device(factors: tuple[float, ...], device: torch.device) -> Tensor:
    """Returns the factors in the device's memory; putting them there waits for it."""
    return torch.tensor(factors, dtype=torch.float32, device=device)


def search_scales(
    weight: Tensor, importance: Tensor | None, grid: Grid, *, factors: tuple[float, ...] = SCALE_FACTORS
) -> tuple[Tensor, Tensor | None]:
    """Does `reference_gptq.search_scales` for one weight `[rows, columns]`, in one launch."""
    rows, columns = weight.shape
    num_groups = columns // grid.group_size
    scale = torch.empty((rows, num_groups), dtype=torch.float32, device=weight.device)
    zero = None if grid.symmetric else torch.empty_like(scale)
    counts = torch.ones(columns, device=weight.device) if importance is None else importance
    tried = factors if importance is not None else factors[:1]
    with torch.cuda.device(weight.device if weight.is_cuda else -1):
        _search_kernel[(triton.cdiv(rows, _SEARCH_ROWS), num_groups)](
            weight.contiguous(),
            counts.contiguous(),
            _on_device(tried, weight.device),
            scale,
            scale if zero is None else zero,
            rows,
            columns,
            num_groups,
            grid.reach,
            grid.middle,
            MIN_SCALE,
            LEVELS=float(grid.levels),
            GROUP=grid.group_size,
            SYMMETRIC=grid.symmetric,
            BF16_SCALE=grid.scale_dtype == torch.bfloat16,
            FACTORS=len(tried),
            ROWS=_SEARCH_ROWS,
            COLUMNS=min(_SEARCH_COLUMNS, triton.next_power_of_2(grid.group_size)),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return scale, zero
