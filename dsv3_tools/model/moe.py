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
    import torch
    from torch import Tensor

__all__ = ["Assignment", "Routes", "Scores", "Sketch", "add_expert", "assign", "route", "score"]


class Routes(NamedTuple):
    """Which experts every token goes to: `indices` int64 `[T, K]`, and `weights` float32 `[T, K]`.

    The weights are those that the experts' outputs are multiplied by: normalised and scaled.
    """

    indices: Tensor
    weights: Tensor


class Scores(NamedTuple):
    """A router's scores `[T, E]`, wide: `gate` is the sigmoid, `choice` has the bias added."""

    gate: Tensor
    choice: Tensor


class Sketch:
    """Random projections of what every routed expert gives for each of its tokens, times the route's weight.

    Rows are in the order of `Assignment`, so those of two runs with the same routes belong together, and the
    squares of their differences are those of the outputs, on average. Experts of other ranks stay 0.

    Args:
        hidden_size: D.
        num_rows: T x K.
        device: where the outputs are.
    """

    SIZE = 32

    def __init__(self, hidden_size: int, num_rows: int, device: torch.device) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (hidden_size, self.SIZE), generator=generator) * 2 - 1
        self._projection_DS = (signs / self.SIZE**0.5).to(device, torch.float32)
        self.rows = torch.zeros((num_rows, self.SIZE), device=device)

    def note(self, part: slice, output_TD: Tensor) -> None:
        """Notes the outputs of an expert for the routes of `part`."""
        self.rows[part] = output_TD.float() @ self._projection_DS


class Assignment(NamedTuple):
    """Routes in the experts' order: each one's token and `[.., 1]` weight, and where each expert begins."""

    tokens: Tensor
    weights: Tensor
    starts: list[int]

    def of(self, expert: int) -> slice:
        """Returns the routes of one expert; each token is there once."""
        return slice(self.starts[expert], self.starts[expert + 1])


def score(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Scores:
    """Returns the router's scores, computed in float32 throughout; there is no bias for "greedy"."""
    from dsv3_tools.model.numerics import linear

    gate_TE = linear(x_TD.to(weight_ED.dtype), weight_ED).sigmoid()
    return Scores(gate_TE, gate_TE if bias_E is None else gate_TE + bias_E)


def route(scores: Scores, settings: Settings) -> Routes:
    """Returns the router's choice.

    The bias counts for the choice of groups, by the sum of the best two experts of each, and of experts in
    them; not for the weights.
    """
    import torch

    dims = settings.dims
    scores_TE, choice_TE = scores
    if dims.n_group > 1:
        choice_TGE = choice_TE.view(len(choice_TE), dims.n_group, -1)
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
    order = flat.argsort(stable=True)
    weights = routes.weights.flatten()[order].unsqueeze(1)
    return Assignment(order // routes.indices.shape[1], weights, starts)


def add_expert(
    out_TD: Tensor,
    x_TD: Tensor,
    weights: Mapping[str, Tensor],
    assignment: Assignment,
    part: slice,
    sketch: Sketch | None = None,
) -> None:
    """Adds one expert's weighted outputs for the routes of `part` to `out_TD`, in float32."""
    from dsv3_tools.model.mlp import gated_mlp

    tokens = assignment.tokens[part]
    output = gated_mlp(x_TD.index_select(0, tokens), weights).mul_(assignment.weights[part])
    if sketch is not None:
        sketch.note(part, output)
    out_TD.index_add_(0, tokens, output)
