"""One weight and what its inputs have been, to codes: weighted scales, and GPTQ's making up for errors.

Shape suffixes: N rows (outputs), K columns (inputs), G groups.
"""
# ruff: noqa: N803, N806, N815 (shape suffixes are capitals)

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dsv3_tools.kernels.reference_gptq import Grid

__all__ = ["ATTEMPTS", "BLOCK", "PANEL", "Coded", "Factor", "compensate", "factorize", "quantize_matrix"]

BLOCK = 128
"""Columns of a block: errors are made up for at once within it, in later blocks by one matrix product."""

PANEL = 1024
"""Columns whose errors are made up for together in all columns beyond: large products are fast ones."""

ATTEMPTS = 4
"""How often the factor is tried, with twice the damping each time."""


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of the Hessian, in the order in which columns are quantized.

    Attributes:
        order: int64 `[K]`, the column that comes first, second, ...
        factor_KK: R / diag(R) by columns, for the damped H = R R' with R upper triangular.
        variance_K: diag(R) squared: what is left of each input when those after it are known.
        damping: what was added to the diagonal, as a part of its mean.
    """

    order: Tensor
    factor_KK: Tensor
    variance_K: Tensor
    damping: float

    @property
    def importance(self) -> Tensor:
        """What a column's error costs when all later ones make up for it, in the weight's own order."""
        import torch

        return torch.empty_like(self.variance_K).index_copy_(0, self.order, self.variance_K)


@dataclass(frozen=True)
class Coded:
    """A quantized weight.

    Attributes:
        codes_NK: uint8 0 ... levels, in the weight's own order of columns.
        scale_NG: float32, numbers of the grid's scale dtype.
        zero_NG: float32, or None if the grid is symmetric.
        predicted_gain: the output error of rounding alone over what theory promises, on the device; 1 without
            a factor.
        damping: of the factor; None if there was none.
    """

    codes_NK: Tensor
    scale_NG: Tensor
    zero_NG: Tensor | None
    predicted_gain: Tensor
    damping: float | None = None

    def decode(self, grid: Grid) -> Tensor:
        """Returns the weight that the codes stand for, float32 `[N, K]`."""
        zero_NG = self.zero_NG
        groups = self.codes_NK.float().reshape(len(self.codes_NK), -1, grid.group_size)
        offset = grid.middle if zero_NG is None else zero_NG.unsqueeze(2)
        return ((groups - offset) * self.scale_NG.unsqueeze(2)).flatten(1)


def factorize(hessian_KK: Tensor, damping: float, *, in_order: bool = True) -> Factor | None:
    """Returns the factor for GPTQ; None if the Hessian has none, damped or not.

    Columns whose inputs are largest come first, so that all the others can make up for them. The factor comes
    from one Cholesky decomposition of the reversed matrix: K^3 / 3 multiplications, where inverting and
    decomposing again takes four times as many.

    Args:
        hessian_KK: float32, symmetric.
        damping: what is added to the diagonal, as a part of its mean; doubled up to three times.
        in_order: by the size of inputs; False keeps the columns' own order.
    """
    import torch

    diagonal_K = hessian_KK.diagonal()
    mean = diagonal_K.mean()
    count = len(diagonal_K)
    backwards = torch.arange(count - 1, -1, -1, device=hessian_KK.device)
    order = diagonal_K.argsort(descending=True, stable=True) if in_order else backwards.flip(0)
    reverse = order.flip(0)
    reversed_KK = hessian_KK.index_select(0, reverse).index_select(1, reverse)
    for attempt in range(ATTEMPTS):
        added = damping * 2**attempt
        reversed_KK.diagonal().add_((added if attempt == 0 else added / 2) * mean)
        lower_KK, failed = torch.linalg.cholesky_ex(reversed_KK)
        spread_K = lower_KK.diagonal()
        if bool((failed == 0) & torch.isfinite(spread_K).all() & (mean > 0.0)):
            upper_KK = lower_KK.flip(0, 1).contiguous()  # the library's own order is by columns
            spread_K = spread_K.flip(0)
            return Factor(order, upper_KK.div_(spread_K), spread_K.square(), added)
    return None


def quantize_matrix(weight_NK: Tensor, hessian_KK: Tensor, grid: Grid, factor: Factor | None) -> Coded:
    """Quantizes a weight so that what it makes of its inputs changes least.

    Scales are chosen first, by group and from the original weights, each column's error counting by the size
    of its input; a group keeps its columns, whatever the order in which they are quantized, so that nothing
    but codes and scales need be stored.

    Args:
        weight_NK: float32, finite.
        hessian_KK: whose diagonal says how large inputs are.
        grid: of the codes.
        factor: has errors made up for; None rounds every weight to the nearest code.
    """
    import torch

    from dsv3_tools.kernels import gptq

    importance_K = hessian_KK.diagonal() if factor is None else factor.importance
    scale_NG, zero_NG = gptq.search_scales(weight_NK, importance_K, grid)
    if factor is None:
        codes_NK = gptq.nearest_codes(weight_NK, scale_NG, zero_NG, grid)
        return Coded(codes_NK, scale_NG, zero_NG, torch.ones((), device=weight_NK.device))
    codes_NK = compensate(weight_NK, scale_NG, zero_NG, grid, factor)
    gain = hessian_KK.trace() / factor.variance_K.sum()
    return Coded(codes_NK, scale_NG, zero_NG, gain, factor.damping)


def compensate(
    weight_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, grid: Grid, factor: Factor
) -> Tensor:
    """Returns GPTQ's codes `[N, K]` for scales that have been chosen."""
    import torch

    from dsv3_tools.kernels import gptq

    ordered_NK = weight_NK.index_select(1, factor.order)
    target_NK = ordered_NK.clone()
    groups_K = (factor.order // grid.group_size).to(torch.int32)
    codes_NK = torch.empty_like(weight_NK, dtype=torch.uint8)
    errors_NK = torch.empty_like(weight_NK)
    count = len(factor.order)
    for start in range(0, count, BLOCK):
        here, end = slice(start, start + BLOCK), start + BLOCK
        codes, errors = gptq.quantize_columns(
            target_NK[:, here],
            ordered_NK[:, here],
            scale_NG,
            zero_NG,
            groups_K[here],
            factor.factor_KK[here, here],
            grid,
        )
        codes_NK.index_copy_(1, factor.order[here], codes)
        # To the end of the panel at once; to all that is beyond when the panel is done.
        panel = start // PANEL * PANEL
        near = slice(end, min(panel + PANEL, count))
        if near.start < near.stop:
            errors_NK[:, here] = errors
            target_NK[:, near].addmm_(errors, factor.factor_KK[here, near])
        elif end < count:
            errors_NK[:, here] = errors
            target_NK[:, end:].addmm_(errors_NK[:, panel:end], factor.factor_KK[panel:end, end:])
    return codes_NK
