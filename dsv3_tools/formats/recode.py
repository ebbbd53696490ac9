"""From one format to another without a weight in between where the kernels allow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dsv3_tools.formats.base import Format
from dsv3_tools.formats.dense import Dense
from dsv3_tools.formats.fp8_block import LIKE_PART, FP8Block
from dsv3_tools.formats.int4 import INT4
from dsv3_tools.formats.integer import FloatSource, IntegerFormat

if TYPE_CHECKING:
    from torch import Tensor

    Parts = Mapping[str, Tensor]

__all__ = ["moves_codes", "recode_into"]


def recode_into(source: Format, target: Format, items: Sequence[Parts], outs: Sequence[Parts]) -> Tensor:
    """Rewrites weights stored as `items` in `source` format into the parts `outs` of `target` format.

    Between two quantized formats the weight passes through float32, never through BF16, which would
    add an error of its own. Between two INT4 layouts of the same groups codes are moved as they are.

    Parts whose content follows from the shape (`Format.fixed`) are neither read nor written.

    Returns:
        int32 `[items]`: how many elements of each weight are NaN or infinite.
    """
    if isinstance(target, Dense):
        return source.decode_into(items, [out[target.weight_part] for out in outs])
    if LIKE_PART in items[0]:
        outs = [{**out, LIKE_PART: item[LIKE_PART]} for item, out in zip(items, outs, strict=True)]
    if isinstance(source, Dense):
        return target.encode_into([item[source.weight_part] for item in items], outs)
    if isinstance(source, FP8Block) and isinstance(target, IntegerFormat):
        codes = [item[source.weight_part] for item in items]
        return target.encode_from(FloatSource(codes, source.scales(items), source.block_size), outs)
    if isinstance(source, INT4) and isinstance(target, INT4) and moves_codes(source, target):
        return _move_codes(source, target, items, outs)
    return _through_float32(source, target, items, outs)


def moves_codes(source: Format, target: Format) -> bool:
    """Whether codes go from one format into the other as they are."""
    return isinstance(source, INT4) and isinstance(target, INT4) and source.same_grid(target)


def _move_codes(source: INT4, target: INT4, items: Sequence[Parts], outs: Sequence[Parts]) -> Tensor:
    import torch

    counts = []
    for item, out in zip(items, outs, strict=True):
        codes = source.load(item)
        if codes.zeros is None and not target.symmetric:
            codes = codes._replace(zeros=torch.full_like(codes.scales, 8, dtype=torch.uint8))
        target.store(codes, out)
        per_scale = 8 * codes.packed.shape[1] // codes.scales.shape[1]
        counts.append((~torch.isfinite(codes.scales)).sum(dtype=torch.int32) * per_scale)
    return torch.stack(counts)


def _through_float32(source: Format, target: Format, items: Sequence[Parts], outs: Sequence[Parts]) -> Tensor:
    import torch

    weights = []
    for item in items:
        codes = item[source.weight_part]
        shape = source.shape_of(tuple(codes.shape))
        weights.append(torch.empty(shape, dtype=torch.float32, device=codes.device))
    counts = source.decode_into(items, weights)
    target.encode_into(weights, outs)
    return counts
