"""Calibrated quantization's arithmetic, chosen by where the tensors are: Triton on a GPU, else plain torch.

Arguments and results are those of `reference_gptq.py`, for one weight, with each column's scale found by the
number of its group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3_tools.kernels import reference_gptq
from dsv3_tools.kernels.reference_gptq import Grid

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["nearest_codes", "quantize_columns", "search_scales"]


def search_scales(weight: Tensor, importance: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Returns scales and zero points of `weight` `[rows, columns]`, `[rows, groups]`."""
    if weight.is_cuda:
        from dsv3_tools.kernels import triton_gptq

        return triton_gptq.search_scales(weight, importance, grid)
    return reference_gptq.search_scales(weight, importance, grid)


def quantize_columns(
    target: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    groups: Tensor,
    factor: Tensor,
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """Returns uint8 codes and float32 errors of a block of columns.

    Args:
        target: float32 `[rows, block]`, at most 128 columns of a wider matrix.
        weight: likewise.
        scale: `[rows, groups]`, of the whole weight.
        zero: as `scale`; None is the grid's middle.
        groups: int32 `[block]`, the group of each column.
        factor: `[block, block]`.
        grid: of the codes.
    """
    if target.is_cuda:
        from dsv3_tools.kernels import triton_gptq

        return triton_gptq.quantize_columns(target, weight, scale, zero, groups, factor, grid)
    import torch

    scales = scale.index_select(1, groups)
    zeros = torch.full_like(scales, grid.middle) if zero is None else zero.index_select(1, groups)
    return reference_gptq.quantize_columns(target, weight, scales, zeros, factor, grid.levels)


def nearest_codes(weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """Returns the nearest code of every weight, uint8 `[rows, columns]`."""
    import torch

    zeros = torch.full_like(scale, grid.middle) if zero is None else zero
    groups = weight.reshape(len(weight), -1, grid.group_size)
    codes, _ = reference_gptq.round_to_grid(groups, scale.unsqueeze(2), zeros.unsqueeze(2), grid.levels)
    return codes.to(torch.uint8).flatten(1)
