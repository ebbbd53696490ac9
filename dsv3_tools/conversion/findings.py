"""What a worker notices in the data of a shard: elements that are not finite, blocks that did not change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dsv3_tools.checkpoint.dtypes import FLOAT_DTYPES
from dsv3_tools.conversion.buffers import as_array
from dsv3_tools.conversion.pieces import Piece
from dsv3_tools.errors import CheckpointError
from dsv3_tools.formats.fp8_block import LIKE_PART, SCALE_PART

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Findings"]


class Findings:
    """The findings of one shard.

    Args:
        keep_nonfinite: go on over NaN and infinity and count them, instead of refusing the first.

    Attributes:
        nonfinite: how many elements of each source tensor are NaN or infinite.
        blocks: blocks of weights that were compared with an earlier quantization.
        blocks_kept: those of them that have the earlier scale; a changed block may come to the same one.
    """

    def __init__(self, *, keep_nonfinite: bool) -> None:
        self._keep_nonfinite = keep_nonfinite
        self.nonfinite: Counter[str] = Counter()
        self.blocks = 0
        self.blocks_kept = 0

    def note(
        self, piece: Piece, nonfinite: int | None, items: Mapping[str, Tensor], outs: Mapping[str, Tensor]
    ) -> None:
        """Takes note of a piece that was read as `items` and will be written as `outs`, both in host memory.

        `nonfinite` is the kernel's count; None for a copy, which nobody has looked at yet.

        Raises:
            CheckpointError: an element that is not finite, by tensor and index.
        """
        if nonfinite is None:
            from dsv3_tools.kernels.nonfinite import count_nonfinite

            nonfinite = count_nonfinite(as_array(outs["weight"]), piece.writes["weight"].spec.dtype)
        if nonfinite:
            self._judge(piece, nonfinite, items, outs)
        if LIKE_PART in items:
            self.blocks += items[LIKE_PART].numel()
            self.blocks_kept += int((items[LIKE_PART] == outs[SCALE_PART]).sum())

    def _judge(
        self, piece: Piece, count: int, items: Mapping[str, Tensor], outs: Mapping[str, Tensor]
    ) -> None:
        name = piece.step.inputs["weight"].name
        if self._keep_nonfinite:
            self.nonfinite[name] += count
            return
        import numpy as np

        from dsv3_tools.kernels.nonfinite import first_nonfinite

        # The side of the conversion that is not quantized shows which element it is.
        dense = piece.writes["weight"].spec.dtype in FLOAT_DTYPES
        where, place = (outs, piece.writes["weight"]) if dense else (items, piece.reads["weight"])
        found = first_nonfinite(as_array(where["weight"]), place.spec.dtype)
        index = np.unravel_index(piece.first_element + (found or 0), piece.step.shape)
        raise CheckpointError(
            f"{name}: the element at [{', '.join(str(int(i)) for i in index)}] is NaN or infinite, expected "
            "finite weights (a damaged checkpoint?); --nonfinite keep goes on and counts them"
        )
