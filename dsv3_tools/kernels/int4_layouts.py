"""Bits of INT4 layouts moved about with torch's own operations: the same on every device, nothing rounded.

A word is an int32 with eight codes; `order[i]` says which of eight neighbours its i-th lowest four bits hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3_tools.kernels.reference import with_one_nan

__all__ = ["AWQ_ORDER", "IN_ORDER", "dequantize_by_column", "pack_words", "unpack_words"]

IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""What AutoAWQ's GEMM kernel expects."""

_ROWS_AT_ONCE = 1024  # of float32 columns: 75 MB for the widest weight of DeepSeek-V3


def pack_words(codes: Tensor, order: Sequence[int] = IN_ORDER) -> Tensor:
    """Returns int32 `[m, n]` of uint8 codes 0 ... 15 `[m, 8 x n]`."""
    neighbours = codes.reshape(codes.shape[0], -1, 8)
    words = torch.zeros(neighbours.shape[:2], dtype=torch.int32, device=codes.device)
    for place, neighbour in enumerate(order):
        words |= neighbours[:, :, neighbour].to(torch.int32) << (4 * place)
    return words


def unpack_words(words: Tensor, order: Sequence[int] = IN_ORDER) -> Tensor:
    """Returns uint8 codes 0 ... 15 `[m, 8 x n]` of int32 `[m, n]`."""
    codes = torch.empty((*words.shape, 8), dtype=torch.uint8, device=words.device)
    for place, neighbour in enumerate(order):
        codes[:, :, neighbour] = (words >> (4 * place)) & 15
    return codes.flatten(1)


def dequantize_by_column(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, group_of: Tensor, out: Tensor
) -> Tensor:
    """Writes the weight of codes whose groups are not neighbours (GPTQ's `desc_act`) into `out`.

    Args:
        packed: int32 `[rows, columns / 8]`.
        scales: `[rows, groups]`.
        zeros: uint8 `[rows, groups]`, or None for 8 everywhere.
        group_of: int32 `[columns]`, every column's group.
        out: `[rows, columns]` bfloat16 or float32.

    Returns:
        int32 scalar: how many elements written are NaN or infinite.
    """
    columns = group_of.long()
    count = torch.zeros((), dtype=torch.int32, device=out.device)
    for top in range(0, out.shape[0], _ROWS_AT_ONCE):
        rows = slice(top, top + _ROWS_AT_ONCE)
        codes = unpack_words(packed[rows]).to(torch.float32)
        codes -= 8.0 if zeros is None else zeros[rows][:, columns].to(torch.float32)
        out[rows] = with_one_nan(codes * scales[rows].to(torch.float32)[:, columns], out.dtype)
        count += (~torch.isfinite(out[rows])).sum(dtype=torch.int32)
    return count
