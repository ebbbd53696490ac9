"""What happens to NaN and infinities: an error that names the element, or a count in the manifest."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from dsv3_tools.checkpoint.dtypes import FLOAT_DTYPES
from dsv3_tools.conversion.pieces import Piece
from dsv3_tools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["NonfinitePolicy"]


class NonfinitePolicy:
    """Decides over elements that are not finite, for one shard.

    Args:
        keep: go on and count them by tensor, instead of refusing the first one.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self.counts: Counter[str] = Counter()

    def judge(
        self,
        piece: Piece,
        count: int,
        read: Mapping[str, NDArray[np.uint8]],
        written: Mapping[str, NDArray[np.uint8]],
    ) -> None:
        """Takes note of `count` such elements in a piece whose bytes are `read` and `written`.

        Raises:
            CheckpointError: naming the tensor and the index of the first one.
        """
        if count == 0:
            return
        name = piece.step.inputs["weight"].name
        if self._keep:
            self.counts[name] += count
            return
        from dsv3_tools.kernels.nonfinite import first_nonfinite

        if piece.writes["weight"].spec.dtype in FLOAT_DTYPES:
            found = first_nonfinite(written["weight"], piece.writes["weight"].spec.dtype)
        else:
            found = first_nonfinite(read["weight"], piece.reads["weight"].spec.dtype)
        index = np.unravel_index(piece.first_element + (found or 0), piece.step.shape)
        raise CheckpointError(
            f"{name}: the element at [{', '.join(str(int(i)) for i in index)}] is NaN or infinite, expected "
            "finite weights (a damaged checkpoint?); --nonfinite keep goes on and counts them"
        )
