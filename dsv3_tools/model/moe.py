"""The router, and routed experts one at a time.

Source: `MoEGate` and `DeepseekV3MoE` of the release ("noaux_tc"); DeepSeek-V3 report, 2.1.2.

Shape suffixes: T tokens, D hidden, E routed experts, G groups, K experts of a token.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from dsv3_tools.model.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Assignment", "Routes", "add_expert", "assign", "route"]


class Routes(NamedTuple):
    """Which experts every token goes to: `indices` int64 `[T, K]`, and `weights` float32 `[T, K]`.

    The weights are those that the experts' outputs are multiplied by: normalised and scaled.
    """

    indices: Tensor
    weights: Tensor


class Assignment(NamedTuple):
    """Routes by expert: places of `Routes` (token x K + k), in the experts' order, and where each begins."""

    order: Tensor
    starts: list[int]
    experts_per_token: int

    def places(self, expert: int) -> Tensor:
        """Returns the places of one expert; `places // K` are its tokens, each there once."""
        return self.order[self.starts[expert] : self.starts[expert + 1]]


def route(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, settings: Settings) -> Routes:
    """Returns the router's choice, computed in float32 throughout.

    The bias (None for "greedy") counts for the choice of groups, by the sum of the best two experts of each,
    and of experts in them; not for the weights.
    """
    import torch

    from dsv3_tools.model.numerics import linear

    dims = settings.dims
    scores_TE = linear(x_TD.to(weight_ED.dtype), weight_ED).sigmoid()
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if dims.n_group > 1:
        choice_TGE = choice_TE.view(len(x_TD), dims.n_group, -1)
        best_TG = choice_TGE.topk(min(2, choice_TGE.shape[2]), dim=2).values.sum(dim=2)
        dropped_TG = best_TG.new_ones(best_TG.shape, dtype=torch.bool).scatter(
            1, best_TG.topk(dims.topk_group, dim=1).indices, False
        )
        choice_TE = choice_TGE.masked_fill(dropped_TG.unsqueeze(2), float("-inf")).flatten(1)
    indices_TK = choice_TE.topk(dims.num_experts_per_tok, dim=1).indices
    weights_TK = scores_TE.gather(1, indices_TK)
    if settings.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(dim=1, keepdim=True) + 1e-20)
    return Routes(indices_TK, weights_TK * settings.routed_scaling_factor)


def assign(routes: Routes, num_experts: int) -> Assignment:
    """Returns the routes by expert; waits for the device once."""
    import torch

    flat = routes.indices.flatten()
    counts = torch.bincount(flat, minlength=num_experts)
    starts = [0, *counts.cumsum(0).tolist()]
    return Assignment(flat.argsort(stable=True), starts, routes.indices.shape[1])


def add_expert(
    out_TD: Tensor, x_TD: Tensor, weights: Mapping[str, Tensor], routes: Routes, places: Tensor
) -> None:
    """Adds one expert's weighted outputs for the tokens at `places` to `out_TD`, in float32."""
    from dsv3_tools.model.mlp import gated_mlp

    tokens = places // routes.indices.shape[1]
    scale = routes.weights.flatten()[places].to(out_TD.dtype).unsqueeze(1)
    out_TD.index_add_(0, tokens, gated_mlp(x_TD[tokens], weights).mul_(scale))
