"""What a worker notices in the data of a shard: elements that are not finite, blocks that did not change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

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

            ((part, write),) = piece.writes.items()
            nonfinite = count_nonfinite(as_array(outs[part]), write.spec.dtype)
        if nonfinite:
            self._judge(piece, nonfinite, items, outs)
        if LIKE_PART in items:
            self.blocks += items[LIKE_PART].numel()
            self.blocks_kept += int((items[LIKE_PART] == outs[SCALE_PART]).sum())

    def _judge(
        self, piece: Piece, count: int, items: Mapping[str, Tensor], outs: Mapping[str, Tensor]
    ) -> None:
        name, shape = _place(piece)
        share = piece.step.share
        if self._keep_nonfinite:
            if share is None or not share.is_repetition:
                self.nonfinite[name] += count
            return
        import numpy as np

        index = np.unravel_index(piece.first_element + _first_nonfinite(piece, items, outs), shape)
        place = [int(i) for i in index] if share is None else share.place(index, shape)
        raise CheckpointError(
            f"{name}: the element at [{', '.join(str(i) for i in place)}] is NaN or infinite, expected "
            "finite weights (a damaged checkpoint?); --nonfinite keep goes on and counts them"
        )


def _place(piece: Piece) -> tuple[str, tuple[int, ...]]:
    """Returns the source tensor that a piece is about, and the shape in which its elements count."""
    if piece.is_coded:
        return piece.step.weight.name, piece.step.shape
    ((part, read),) = piece.reads.items()
    return read.ref.name, piece.step.output_specs(piece.step.shape)[part].shape


def _first_nonfinite(piece: Piece, items: Mapping[str, Tensor], outs: Mapping[str, Tensor]) -> int:
    """Returns the first element of a piece that is not finite, or 0 where codes don't show it."""
    from dsv3_tools.kernels.nonfinite import first_nonfinite

    for tensors, places, fmt in (
        (outs, piece.writes, piece.step.target),
        (items, piece.reads, piece.step.source),
    ):
        part = fmt.weight_part if fmt is not None and piece.is_coded else next(iter(places))
        found = first_nonfinite(as_array(tensors[part]), places[part].spec.dtype)
        if found is not None:
            return found
    return 0
