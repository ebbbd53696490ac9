"""Errors of hidden states: of whole batches, of each token, and which experts they come from.

Shape suffixes: B sequences, L tokens of a sequence, T = B x L, D hidden, E routed experts, K experts of a
token, R = T x K routes in the experts' order.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3_tools.model.moe import Routes, Sketch
from dsv3_tools.model.parallel import RankGroup
from dsv3_tools.verify.logits_results import ExpertError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["expert_errors", "ratio", "relative_error", "shared_routes", "squares"]

_TOKENS_AT_ONCE = 8192
_NUM_EXPERTS_NAMED = 8


def squares(values_BLD: Tensor, reference_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each token's sum of squares of the difference, and of the reference: float64 on the CPU."""
    import torch

    parts = []
    values_TD, reference_TD = values_BLD.flatten(0, -2), reference_BLD.flatten(0, -2)
    for start in range(0, len(values_TD), _TOKENS_AT_ONCE):
        rows = slice(start, start + _TOKENS_AT_ONCE)
        one, other = values_TD[rows].float(), reference_TD[rows].float()
        pair = (one - other, other)
        parts.append(torch.stack([part.square().sum(-1, dtype=torch.float64) for part in pair]))
    error_T, signal_T = torch.cat(parts, dim=1).cpu()
    return error_T, signal_T


def ratio(error_T: Tensor, signal_T: Tensor) -> float:
    """Returns the root of the sum of squared errors over that of the signal; 0 / 0 is 0."""
    error, signal = float(error_T.sum()), float(signal_T.sum())
    if error == 0:
        return 0.0
    return float((error / signal) ** 0.5) if signal else float("inf")


def relative_error(values_BLD: Tensor, reference_BLD: Tensor) -> float:
    """Returns the error relative to the reference, root mean squares over everything."""
    return ratio(*squares(values_BLD, reference_BLD))


def shared_routes(found: Routes, routes: Routes) -> tuple[float, float]:
    """Returns the share of experts in both, and the share of tokens with all of their experts in both."""
    shared_TK = (found.indices.unsqueeze(2) == routes.indices.unsqueeze(1)).any(2)
    return float(shared_TK.double().mean()), float(shared_TK.all(1).double().mean())


def expert_errors(
    ours: Sketch, theirs: Sketch, routes: Routes, num_experts: int, ranks: RankGroup
) -> tuple[ExpertError, ...]:
    """Returns the routed experts with the largest errors, the largest first; those without any are left out.

    Args:
        ours: what the reference's experts give.
        theirs: what the candidate's give for the same inputs and routes.
        routes: of the tokens.
        num_experts: E.
        ranks: that share the experts.
    """
    import torch

    experts_R = routes.indices.flatten().sort(stable=True).values
    squares_R2 = torch.stack(
        [values.double().square().sum(1) for values in (theirs.rows - ours.rows, ours.rows)], dim=1
    )
    sums_E2 = squares_R2.new_zeros((num_experts, 2)).index_add_(0, experts_R, squares_R2)
    error_E, signal_E = ranks.sum_(sums_E2).cpu().unbind(1)
    counts_E = torch.bincount(experts_R, minlength=num_experts)
    relative_E = (error_E / signal_E).sqrt().masked_fill(error_E == 0, 0.0).nan_to_num(float("inf"))
    found = [
        ExpertError(number, float(relative_E[number]), int(counts_E[number]))
        for number in relative_E.argsort(descending=True, stable=True).tolist()
        if relative_E[number] > 0
    ]
    return tuple(found[:_NUM_EXPERTS_NAMED])
