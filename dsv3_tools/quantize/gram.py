"""What a linear's inputs have been: the mean of x x', GPTQ's Hessian up to a factor.

Shape suffixes: T tokens, K inputs of the linear.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Gram", "shrink", "square"]

_LEAST = 1e-30
"""In place of a weight of zero."""


class Gram:
    """The sum of x x' over tokens, each counting with a weight of its own.

    Products of BF16 numbers are exact in float32, in which they are added up.

    Args:
        size: K.
        device: where it is.

    Attributes:
        sum_KK: float32, symmetric.
        weight: what all tokens have counted, on the device: nothing waits for it.
        tokens: how many there were.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        import torch

        self.sum_KK = torch.zeros((size, size), dtype=torch.float32, device=device)
        self.weight = torch.zeros((), dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x_TK: Tensor, weights_T1: Tensor | None = None) -> None:
        """Adds tokens; `weights_T1` float32 are what they count, None is 1 each."""
        if not len(x_TK):
            return
        self.tokens += len(x_TK)
        if weights_T1 is None:
            self.weight += len(x_TK)
        else:
            self.weight += weights_T1.sum()
            x_TK = (x_TK.float() * weights_T1.sqrt()).to(x_TK.dtype)
        self.sum_KK += square(x_TK)

    def mean(self) -> Tensor:
        """Returns the mean over tokens `[K, K]`; zeros without any."""
        return self.sum_KK / self.weight.clamp(min=_LEAST)


def shrink(own: Gram, layer: Gram) -> Tensor:
    """Returns an expert's mean, drawn towards that of all the layer's tokens the more, the fewer it has.

    (1 - s) x own + s x layer with s = K / (K + tokens), the layer's brought to the trace of the expert's.
    With fewer tokens than inputs the expert's own has no inverse, and says little of the inputs to come.
    """
    if not own.tokens:
        return layer.mean()
    size = len(own.sum_KK)
    share = size / (size + own.tokens)
    weight = own.weight.clamp(min=_LEAST)
    ratio = own.sum_KK.trace() / layer.sum_KK.trace().clamp(min=_LEAST)
    mean_KK = own.sum_KK * ((1.0 - share) / weight)
    return mean_KK.addcmul_(layer.sum_KK, share * ratio / weight)


def square(x_TK: Tensor) -> Tensor:
    """Returns x' x in float32."""
    import torch

    if x_TK.dtype != torch.bfloat16 or not x_TK.is_cuda:
        x_TK = x_TK.float()
        return x_TK.t() @ x_TK
    try:
        return torch.mm(x_TK.t(), x_TK, out_dtype=torch.float32)  # type: ignore[call-overload,no-any-return,unused-ignore]
    except TypeError:  # torch before 2.8
        return x_TK.float().t() @ x_TK.float()
