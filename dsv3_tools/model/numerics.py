"""The roundings of the forward pass: what is computed wider than the hidden states.

With hidden states in BF16, norms, softmax, rope, router and the activation of MLPs are computed in float32
and rounded once; matrix products sum in float32; and what a block adds to the hidden states stays in float32
(over heads, experts and ranks) until the sum is rounded. DeepSeek's and transformers' code does the same but
for the last two, where it rounds once or twice more. With hidden states in float32 nothing is rounded but by
the operations themselves; float64 is there to measure just that.

Shape suffixes: T tokens, I inputs, O outputs, D hidden.
"""
# ruff: noqa: N803 (shape suffixes are capitals)

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["COMPUTE_DTYPES", "compute_dtype", "linear", "linear_wide", "rms_norm", "wide"]

COMPUTE_DTYPES = ("F32", "BF16", "F64")
"""Element types that hidden states may have."""


def compute_dtype(name: str) -> torch.dtype:
    """Returns torch's dtype for one of `COMPUTE_DTYPES`."""
    import torch

    return {"F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64}[name]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the type that sums are kept in: float32, or float64 where that is computed in."""
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Returns `[T, O]` in the type of `x_TI`: summed in float32, rounded once."""
    from torch.nn.functional import linear as product

    return product(x_TI, weight_OI)


def linear_wide(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Returns `[T, O]` in float32, not rounded to BF16: products of BF16 numbers are exact in float32."""
    import torch

    if x_TI.dtype != torch.bfloat16:
        return linear(x_TI, weight_OI)
    if x_TI.is_cuda:
        try:
            return torch.mm(x_TI, weight_OI.t(), out_dtype=torch.float32)  # type: ignore[call-overload,no-any-return,unused-ignore]
        except TypeError:  # torch before 2.8
            return linear(x_TI, weight_OI).float()
    return linear(x_TI.float(), weight_OI.float())


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Returns the norm in the type of `x_TD`, having rounded once; `weight_D` is wide."""
    values = x_TD.to(weight_D.dtype)
    scale = (values.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (values * scale * weight_D).to(x_TD.dtype)
