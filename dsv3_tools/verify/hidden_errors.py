"""Errors of hidden states: of whole batches, of each token, and which experts they come from.

Shape suffixes: B sequences, L tokens of a sequence, T = B x L, D hidden, E routed experts, K experts of a
token.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3_tools.model.moe import Routes
from dsv3_tools.verify.logits_results import ExpertError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["expert_errors", "ratio", "relative_error", "shared_routes", "squares"]

_TOKENS_AT_ONCE = 8192
_NUM_EXPERTS_NAMED = 8
_LEAST_TOKENS = 8
"""An expert with fewer tokens is not judged: its part cannot be told from that of others."""

_DEVIATIONS = 4.0
"""Standard errors by which a part must stand out."""

_SURE = 3.0
"""Standard errors that an estimate may be off by before a limit counts as exceeded."""

_RIDGE = 1e-6
"""Share of the mean diagonal added to the normal equations: experts that always go together share a part."""


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
    error_T: Tensor, signal_T: Tensor, routes: Routes, num_experts: int
) -> tuple[ExpertError, ...]:
    """Returns the experts that errors come from, the largest first.

    Outputs are sums over a token's experts; only the sums' squares are known here. A token's squared error is
    taken as the sum of parts of its experts, each times the square of its route's weight, and of a part that
    all tokens have (shared experts, or a norm before them); least squares over all tokens give the parts. The
    same for the outputs themselves gives what the errors are relative to. What does not stand out from its
    own standard error is not named.

    Args:
        error_T: squares of each token's error, the inputs and routes being equal.
        signal_T: squares of each token's output.
        routes: of the tokens.
        num_experts: E.
    """
    import torch

    indices_TK, weights_TK = routes.indices.cpu(), routes.weights.double().cpu()
    shares_TE = torch.zeros((len(error_T), num_experts + 1), dtype=torch.float64)
    shares_TE.scatter_(1, indices_TK, weights_TK.square())
    counts_E = torch.bincount(indices_TK.flatten(), minlength=num_experts)
    shares_TE[:, num_experts] = float(weights_TK.square().sum(1).mean())
    if not torch.isfinite(error_T).all():
        return ()
    parts, deviations = _least_squares(shares_TE, torch.stack((error_T, signal_T), dim=1))
    (error_E, signal_E), (error_sd_E, signal_sd_E) = parts[:num_experts].T, deviations[:num_experts].T
    stands_out_E = (counts_E >= _LEAST_TOKENS) & (error_E > _DEVIATIONS * error_sd_E)
    least_E = (_DEVIATIONS * signal_sd_E).clamp_min(torch.finfo(torch.float64).tiny)
    relative_E = (error_E.clamp_min(0) / signal_E.maximum(least_E)).sqrt()
    sure_E = (error_E - _SURE * error_sd_E).clamp_min(0) / (signal_E.clamp_min(0) + _SURE * signal_sd_E)
    found = [
        ExpertError(number, float(relative_E[number]), int(counts_E[number]), float(sure_E[number].sqrt()))
        for number in relative_E.argsort(descending=True, stable=True).tolist()
        if stands_out_E[number]
    ]
    return tuple(found[:_NUM_EXPERTS_NAMED])


def _least_squares(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x with the least |rows x - values| for each column of values, and x's standard errors."""
    import torch

    normal = rows.T @ rows
    ridge = _RIDGE * normal.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    inverse = torch.linalg.inv(normal + ridge * torch.eye(len(normal)).to(normal))
    solution = inverse @ (rows.T @ values)
    freedom = max(1, len(rows) - len(normal))
    variance = (values - rows @ solution).square().sum(0) / freedom
    return solution, (inverse.diagonal().unsqueeze(1) * variance).sqrt()
