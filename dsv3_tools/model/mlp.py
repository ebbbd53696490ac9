"""The gated MLP: dense layers, shared experts and every routed expert.

Source: `DeepseekV3MLP` of the release.

Shape suffixes: T tokens, D hidden, I intermediate.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MLP_PARTS", "gated_mlp"]

MLP_PARTS = ("gate_proj", "up_proj", "down_proj")


def gated_mlp(x_TD: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Returns down(silu(gate(x)) * up(x)) in float32 `[T, D]`; the activation is rounded once.

    Rows of gate and up and the same columns of down give a part of the sum.
    """
    from torch.nn.functional import silu

    from dsv3_tools.model.numerics import linear, linear_wide, wide

    dtype = wide(x_TD.dtype)
    gate_TI = silu(linear(x_TD, weights["gate_proj"]).to(dtype))
    active_TI = gate_TI.mul_(linear(x_TD, weights["up_proj"])).to(x_TD.dtype)
    return linear_wide(active_TI, weights["down_proj"])
