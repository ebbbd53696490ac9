"""The definition of calibrated quantization's arithmetic, in plain torch, on any device and in batches.

A grid has codes 0 ... levels; weight = (code - zero) x scale. Two operations: the search for scales whose
error counts by column, and the column loop of GPTQ over one block of columns. `triton_gptq.py` does both on a
GPU; the column loop gives the same bytes there (float32, one rounding per operation, nothing fused), the
search adds up errors in another order, so that of two scales as good as each other it may take the other.

Everything may have batch dimensions in front, written `...`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_tools.kernels.reference_integer import MIN_SCALE, SCALE_FACTORS

__all__ = ["Grid", "quantize_columns", "round_to_grid", "search_scales"]


@dataclass(frozen=True)
class Grid:
    """The numbers that codes can stand for.

    Attributes:
        levels: the largest code: 15 (INT4) or 255 (INT8).
        reach: a symmetric group's plain scale is its largest magnitude over this.
        group_size: neighbours in a row that share a scale.
        symmetric: every zero point is (levels + 1) / 2.
        scale_dtype: scales are rounded to it before a code is chosen.
    """

    levels: int
    reach: float
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype

    @property
    def middle(self) -> float:
        """The zero point of symmetric codes."""
        return (self.levels + 1) / 2


def search_scales(
    weight: Tensor, importance: Tensor | None, grid: Grid, *, factors: tuple[float, ...] = SCALE_FACTORS
) -> tuple[Tensor, Tensor | None]:
    """Returns the scales with the least sum of importance x squared error, and zero points.

    Tries the plain scale of a group x each of `factors`, and takes the first of equals; as
    `reference_integer.quantize_int4_group`, whose error counts every column alike.

    Args:
        weight: float32 `[..., rows, columns]`, finite.
        importance: float32 `[..., columns]`, not negative; None takes the plain scale.
        grid: of the codes.
        factors: what the plain scale is multiplied by; 1.0 first.

    Returns:
        float32 `[..., rows, groups]`, numbers of the grid's scale dtype; float32 zero points of that shape,
        or None if the grid is symmetric.
    """
    groups = weight.reshape(*weight.shape[:-1], -1, grid.group_size)
    low = groups.amin(-1).clamp(max=0.0)
    high = groups.amax(-1).clamp(min=0.0)
    # Divided by a tensor: torch multiplies with the reciprocal of a number on a GPU.
    parts = torch.full_like(high, grid.reach if grid.symmetric else grid.levels)
    plain = torch.maximum(high, -low) / parts if grid.symmetric else high / parts - low / parts
    counts = (
        None if importance is None else importance.reshape(*importance.shape[:-1], 1, -1, grid.group_size)
    )
    best: tuple[Tensor, Tensor] | None = None
    least = torch.full_like(plain, torch.inf)
    for factor in factors if counts is not None else factors[:1]:
        scale = (plain * factor).to(grid.scale_dtype).to(torch.float32)
        scale = torch.where(scale < MIN_SCALE, 1.0, scale)
        zero = _zero(low * factor, scale, grid)
        if counts is None:
            return scale, None if grid.symmetric else zero
        error = groups - round_to_grid(groups, scale.unsqueeze(-1), zero.unsqueeze(-1), grid.levels)[1]
        cost = (error * error * counts).sum(-1)
        better = cost < least if best is not None else torch.ones_like(cost, dtype=torch.bool)
        least = torch.where(better, cost, least)
        old = best or (scale, zero)
        best = torch.where(better, scale, old[0]), torch.where(better, zero, old[1])
    assert best is not None
    return best[0], None if grid.symmetric else best[1]


def _zero(low: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    if grid.symmetric:
        return torch.full_like(scale, grid.middle)
    return torch.round(-low / scale).clamp(0.0, grid.levels)


def round_to_grid(values: Tensor, scale: Tensor, zero: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Returns the nearest codes, as float32, and the numbers that they stand for."""
    codes = (torch.round(values / scale) + zero).clamp(0.0, levels)
    return codes, (codes - zero) * scale


def quantize_columns(
    target: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, factor: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """Quantizes a block of columns one after the other, each error being made up for by the columns after it.

    Column j gets the code nearest to target + sum over i < j of error_i x factor_ij. The errors are of the
    original weights: with H = R R' for an upper triangular R and factor = R / diag(R), column by column, this
    is GPTQ (Frantar et al., arXiv:2210.17323, algorithm 1; that it is the same: Chen et al.,
    arXiv:2507.18553).

    Args:
        target: float32 `[..., rows, block]`, the weights with what earlier blocks have to make up for.
        weight: `[..., rows, block]`, the original ones.
        scale: `[..., rows, block]`, of each column's group.
        zero: as `scale`.
        factor: `[..., block, block]`; what is above the diagonal counts.
        levels: the largest code.

    Returns:
        uint8 codes, and float32 errors: weight less what its code stands for.
    """
    target = target.clone()
    codes, errors = torch.empty_like(target, dtype=torch.uint8), torch.empty_like(target)
    for column in range(target.shape[-1]):
        code, value = round_to_grid(target[..., column], scale[..., column], zero[..., column], levels)
        codes[..., column] = code.to(torch.uint8)
        error = weight[..., column] - value
        errors[..., column] = error
        rest = slice(column + 1, None)
        target[..., rest] += error.unsqueeze(-1) * factor[..., column, rest].unsqueeze(-2)
    return codes, errors
