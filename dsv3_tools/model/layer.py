"""One layer: attention and MLP or experts on hidden states, its weights read as they are needed.

Shape suffixes: B sequences, L tokens of a sequence, T = B x L, D hidden, K experts of a token.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsv3_tools.model.attention import attend
from dsv3_tools.model.mlp import Tap, gated_mlp
from dsv3_tools.model.moe import Routes, Scores, Sketch, add_expert, assign, route, score
from dsv3_tools.model.parallel import RankGroup
from dsv3_tools.model.rope import Ropes
from dsv3_tools.model.settings import Settings
from dsv3_tools.model.units import layer_orders
from dsv3_tools.model.weights import Supply, Unit

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["TOKENS_AT_ONCE", "Layer", "add_residual", "add_residuals", "like", "sequence_chunks"]

TOKENS_AT_ONCE = 8192
"""Tokens whose intermediate values are in memory together, or one sequence if that is longer."""


@dataclass
class _State:
    """Hidden states on their way through an MLP, on the device: normalised, and what is to be added."""

    x: Tensor
    sum: Tensor
    routes: Routes | None = None
    sketch: Sketch | None = None


@dataclass
class _Weights:
    """A unit's weights in the type of whatever hidden states they meet; those that are wide stay so."""

    unit: Unit
    own: dict[str, Tensor]
    others: dict[torch.dtype, dict[str, Tensor]] = field(default_factory=dict)

    def of(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the weights for hidden states of this type."""
        if dtype not in self.others:
            self.others[dtype] = {
                name: weight if weight.dtype == dtype or self.unit[name].is_wide else weight.to(dtype)
                for name, weight in self.own.items()
            }
        return self.others[dtype]


class Layer:
    """One layer of a model, MTP layers included.

    Its weights are read when they are used, and not kept. A second pass reads them again, without reading
    ahead: give all hidden states that a layer is to work on to one `forward_all`. Hidden states of another
    type than the model's meet weights rounded or widened to theirs. `tap` sees the inputs of attention's
    linears.

    Attributes:
        number: counted from 0 through the MTP layers.
        is_moe: whether it has a router and routed experts.
    """

    def __init__(
        self,
        number: int,
        settings: Settings,
        weights: Supply,
        *,
        ranks: RankGroup,
        device: torch.device,
        ropes: Ropes,
        tap: Tap | None = None,
    ) -> None:
        self.number = number
        self.is_moe = settings.dims.is_moe_layer(number)
        self._settings = settings
        self._weights = weights
        self._ranks = ranks
        self._device = device
        self._ropes = ropes
        self._tap = tap
        self._units = {order.key: order.unit for order in layer_orders(settings, number, ranks)}
        self._router: dict[str, Tensor] | None = None

    def forward(self, hidden_BLD: Tensor, *, routes: Routes | None = None) -> tuple[Tensor, Routes | None]:
        """Returns the hidden states after the layer, and the routes that its tokens took.

        The result is where the hidden states were: on the device, or in (pinned) host memory.

        Args:
            hidden_BLD: hidden states, in the type that is computed in.
            routes: takes these in place of the router's own, to replay another model's routing.

        Returns:
            New hidden states, and `routes` or the router's own; None for a dense layer.
        """
        (hidden,), (taken,) = self.forward_all([hidden_BLD], [routes])
        return hidden, taken

    def forward_all(
        self, hiddens: Sequence[Tensor], routes: Sequence[Routes | None] | None = None
    ) -> tuple[list[Tensor], list[Routes | None]]:
        """Does `forward` for several batches of sequences, each weight being read and decoded once."""
        middle = add_residuals(hiddens, self.attention_all(hiddens))
        added, taken = self.mlp_all(middle, routes)
        return add_residuals(middle, added), taken

    def attention(self, hidden_BLD: Tensor) -> Tensor:
        """Returns the hidden states after attention, the residual added."""
        return add_residual(hidden_BLD, *self.attention_all([hidden_BLD]))

    def attention_all(self, hiddens: Sequence[Tensor]) -> list[Tensor]:
        """Returns what attention adds to each of several batches: float32 on the device, not rounded."""
        weights = self._take_all("attention")
        return [self._attend(hidden, weights.of(hidden.dtype)) for hidden in hiddens]

    def mlp(self, hidden_BLD: Tensor, *, routes: Routes | None = None) -> tuple[Tensor, Routes | None]:
        """Returns the hidden states after the MLP or the experts, and the routes, as `forward` does."""
        added, (taken,) = self.mlp_all([hidden_BLD], [routes])
        return add_residual(hidden_BLD, *added), taken

    def mlp_all(
        self,
        hiddens: Sequence[Tensor],
        routes: Sequence[Routes | None] | None = None,
        *,
        sketches: Mapping[int, Sketch] | None = None,
    ) -> tuple[list[Tensor], list[Routes | None]]:
        """Returns what MLP or experts add to each of several batches, as `attention_all`, and the routes.

        All of them are on the device until the last expert is done. `sketches` are filled for the batches of
        these numbers.
        """
        given = routes or [None] * len(hiddens)
        states = [self._start(hidden, taken) for hidden, taken in zip(hiddens, given, strict=True)]
        for number, sketch in (sketches or {}).items():
            states[number].sketch = sketch
        if (self.number, "mlp") in self._units:
            weights = self._take_all("mlp")
            for state in states:
                for rows in _chunks(len(state.x)) if weights.own else ():
                    state.sum[rows] += gated_mlp(state.x[rows], weights.of(state.x.dtype))
        if self.is_moe:
            self._add_experts(states)
        results = [
            self._ranks.sum_(s.sum).view(hidden.shape) for hidden, s in zip(hiddens, states, strict=True)
        ]
        return results, [state.routes for state in states]

    def route(self, hidden_BLD: Tensor) -> Routes:
        """Returns the choice of this layer's router for hidden states after `attention`."""
        return self._route(self.normed(hidden_BLD))

    def scores(self, hidden_BLD: Tensor) -> Scores:
        """Returns the scores by which the router chooses, for hidden states after `attention`."""
        return self._score(self.normed(hidden_BLD))

    def _take(self, part: Hashable) -> dict[str, Tensor]:
        key = (self.number, part)
        return self._weights.take(key, self._units[key])

    def _take_all(self, part: Hashable) -> _Weights:
        return _Weights(self._units[self.number, part], self._take(part))

    def _get_router(self) -> dict[str, Tensor]:
        """Returns norm and router, which are small and stay."""
        if self._router is None:
            self._router = self._take("router")
        return self._router

    def _attend(self, hidden_BLD: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Returns what attention adds, summed over the ranks' heads."""
        import torch

        from dsv3_tools.model.numerics import rms_norm

        norm, eps = weights["norm"], self._settings.rms_norm_eps
        added_BLD = torch.zeros(hidden_BLD.shape, dtype=norm.dtype, device=self._device)
        rope = self._ropes.get(hidden_BLD.shape[1], hidden_BLD.dtype)
        for rows in sequence_chunks(hidden_BLD) if "o_proj" in weights else ():  # more ranks than heads
            x_BLD = rms_norm(hidden_BLD[rows].to(self._device), norm, eps)
            added_BLD[rows] = attend(x_BLD, weights, self._settings, rope, self._tap)
        return self._ranks.sum_(added_BLD)

    def _start(self, hidden_BLD: Tensor, routes: Routes | None) -> _State:
        import torch

        x_TD = self.normed(hidden_BLD)
        state = _State(x_TD, torch.zeros_like(x_TD, dtype=self._get_router()["norm"].dtype))
        if self.is_moe and routes is None:
            state.routes = self._route(x_TD)
        elif self.is_moe and routes is not None:
            state.routes = Routes(*(values.to(self._device) for values in routes))
        return state

    def normed(self, hidden_BLD: Tensor) -> Tensor:
        """Returns the input of router and experts `[tokens, D]`, for hidden states after `attention`."""
        import torch

        from dsv3_tools.model.numerics import rms_norm

        weight, eps = self._get_router()["norm"], self._settings.rms_norm_eps
        hidden_TD = hidden_BLD.flatten(0, -2)
        parts = [rms_norm(hidden_TD[rows].to(self._device), weight, eps) for rows in _chunks(len(hidden_TD))]
        return torch.cat(parts)

    def _route(self, x_TD: Tensor) -> Routes:
        return route(self._score(x_TD), self._settings)

    def _score(self, x_TD: Tensor) -> Scores:
        import torch

        router = self._get_router()
        parts = [score(x_TD[rows], router["gate"], router.get("bias")) for rows in _chunks(len(x_TD))]
        return Scores(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _add_experts(self, states: Sequence[_State]) -> None:
        """Adds the outputs of this rank's experts, one expert after the other."""
        num_experts = self._settings.dims.n_routed_experts
        pairs = [(s, assign(s.routes, num_experts)) for s in states if s.routes is not None]
        for expert in self._ranks.share(num_experts):
            used = [(state, a, a.of(expert)) for state, a in pairs]
            if not any(of.start < of.stop for _, _, of in used):
                continue
            weights = self._take_all(expert)
            for state, assignment, of in used:
                own = weights.of(state.x.dtype)
                for part in _chunks(of.stop, of.start):
                    add_expert(state.sum, state.x, own, assignment, part, state.sketch)


def add_residuals(hiddens: Sequence[Tensor], added: Sequence[Tensor]) -> list[Tensor]:
    """Does `add_residual` for each pair."""
    return [add_residual(one, other) for one, other in zip(hiddens, added, strict=True)]


def add_residual(hidden_BLD: Tensor, added_BLD: Tensor) -> Tensor:
    """Returns the sum, rounded once, where the hidden states are: on the device or in host memory."""
    out_BLD = like(hidden_BLD)
    out_TD, hidden_TD, added_TD = (values.flatten(0, -2) for values in (out_BLD, hidden_BLD, added_BLD))
    for rows in _chunks(len(added_TD)):
        out_TD[rows] = (added_TD[rows] + hidden_TD[rows].to(added_TD.device)).to(hidden_BLD.dtype)
    return out_BLD


def like(values: Tensor) -> Tensor:
    """Returns new memory of the same shape and type in the same place, pinned if that is."""
    import torch

    return torch.empty_like(values, pin_memory=values.device.type == "cpu" and values.is_pinned())


def sequence_chunks(hidden_BLD: Tensor) -> list[slice]:
    """Returns slices of sequences with at most `TOKENS_AT_ONCE` tokens each, or one sequence."""
    count = max(1, TOKENS_AT_ONCE // max(1, hidden_BLD.shape[1]))
    return [slice(start, start + count) for start in range(0, len(hidden_BLD), count)]


def _chunks(stop: int, begin: int = 0) -> list[slice]:
    return [slice(at, min(at + TOKENS_AT_ONCE, stop)) for at in range(begin, stop, TOKENS_AT_ONCE)]
