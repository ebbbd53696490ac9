"""The gated MLP: dense layers, shared experts and every routed expert.

Source: `DeepseekV3MLP` of the release.

Shape suffixes: T tokens, D hidden, I intermediate.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MLP_PARTS", "Tap", "activation", "gated_mlp"]

Tap = Callable[[str, "Tensor"], None]
"""Called with the name of a linear, such as "down_proj", and its input `[tokens, inputs]`."""

MLP_PARTS = ("gate_proj", "up_proj", "down_proj")


def gated_mlp(x_TD: Tensor, weights: Mapping[str, Tensor], tap: Tap | None = None) -> Tensor:
    """Returns down(silu(gate(x)) * up(x)) in float32 `[T, D]`; the activation is rounded once.

    Rows of gate and up and the same columns of down give a part of the sum. `tap` sees the input of gate and
    up, and that of down.
    """
    from dsv3_tools.model.numerics import linear_wide

    active_TI = activation(x_TD, weights)
    if tap is not None:
        tap("gate_proj", x_TD)
        tap("down_proj", active_TI)
    return linear_wide(active_TI, weights["down_proj"])


def activation(x_TD: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Returns silu(gate(x)) * up(x), the input of down, rounded once to the type of `x_TD`."""
    from torch.nn.functional import silu

    from dsv3_tools.model.numerics import linear, wide

    gate_TI = silu(linear(x_TD, weights["gate_proj"]).to(wide(x_TD.dtype)))
    return gate_TI.mul_(linear(x_TD, weights["up_proj"])).to(x_TD.dtype)
