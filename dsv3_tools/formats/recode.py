"""From one format to another without a weight in between where the kernels allow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dsv3_tools.formats.base import Format
from dsv3_tools.formats.dense import Dense
from dsv3_tools.formats.fp8_block import LIKE_PART

if TYPE_CHECKING:
    from torch import Tensor

    Parts = Mapping[str, Tensor]

__all__ = ["recode_into"]


def recode_into(source: Format, target: Format, items: Sequence[Parts], outs: Sequence[Parts]) -> Tensor:
    """Rewrites weights stored as `items` in `source` format into the parts `outs` of `target` format.

    Between two quantized formats the weight passes through float32, never through BF16, which would
    add an error of its own.

    Returns:
        int32 `[items]`: how many elements of each weight are NaN or infinite.
    """
    if isinstance(target, Dense):
        return source.decode_into(items, [out["weight"] for out in outs])
    if LIKE_PART in items[0]:
        outs = [{**out, LIKE_PART: item[LIKE_PART]} for item, out in zip(items, outs, strict=True)]
    if isinstance(source, Dense):
        return target.encode_into([item["weight"] for item in items], outs)
    import torch

    weights = [torch.empty_like(item["weight"], dtype=torch.float32) for item in items]
    counts = source.decode_into(items, weights)
    target.encode_into(weights, outs)
    return counts
