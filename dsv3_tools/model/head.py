"""Final norm and output matrix: hidden states to logits, some tokens at a time.

Shape suffixes: B sequences, L tokens of a sequence, T = B x L, D hidden, V vocabulary.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Head"]


class Head:
    """A norm and the matrix that gives logits.

    Args:
        norm_D: wide.
        weight_VD: in the model's type; hidden states of another type meet it rounded or widened to theirs.
        eps: of the norm.
    """

    def __init__(self, norm_D: Tensor, weight_VD: Tensor, eps: float) -> None:
        self._norm = norm_D
        self._weights: dict[torch.dtype, Tensor] = {weight_VD.dtype: weight_VD}
        self._weight = weight_VD
        self._eps = eps

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Returns the logits of hidden states after the last layer: wide `[T, V]` on the device."""
        from dsv3_tools.model.numerics import linear_wide, rms_norm

        if hidden_TD.dtype not in self._weights:
            self._weights[hidden_TD.dtype] = self._weight.to(hidden_TD.dtype)
        x_TD = rms_norm(hidden_TD.to(self._weight.device), self._norm, self._eps)
        return linear_wide(x_TD, self._weights[hidden_TD.dtype])

    def chunks(self, hidden_BLD: Tensor, size: int) -> Iterator[Tensor]:
        """Yields the logits of `size` tokens at a time, in order."""
        hidden_TD = hidden_BLD.flatten(0, -2)
        for start in range(0, len(hidden_TD), size):
            yield self.logits(hidden_TD[start : start + size])
