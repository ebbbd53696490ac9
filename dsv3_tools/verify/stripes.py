"""Parts of a weight to compare at once, and the memory of a worker for them."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm, prod
from typing import TYPE_CHECKING

from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.buffers import view
from dsv3_tools.formats import Format, FP8Block, INT8Block

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DECODED_ELEMENTS", "STORED_ELEMENTS", "Buffers", "matrix_shape", "stripes"]

DECODED_ELEMENTS = 1 << 20
"""Elements in a stripe that is decoded: its codes and weights stay in L3 cache. Smaller ones would stay in L2
cache, but take longer to set up in Python than to compare."""

STORED_ELEMENTS = 1 << 24
"""Elements in a stripe that a kernel reads itself: some milliseconds."""


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns rows and columns; what is no matrix is one column, so that any number of elements is rows."""
    return (shape[0], shape[1]) if len(shape) == 2 else (prod(shape), 1)


def stripes(
    shape: tuple[int, ...],
    formats: tuple[Format, Format],
    elements: int = DECODED_ELEMENTS,
    within: tuple[int, int] | None = None,
) -> Iterator[tuple[int, int]]:
    """Yields first row and height of every stripe of a weight that both formats can decode by itself.

    Args:
        shape: the weight's.
        formats: both sides'.
        elements: how many are wanted in a stripe.
        within: first row and height of a larger stripe, to yield its own; None is the whole weight.
    """
    rows, columns = matrix_shape(shape)
    if rows == 0 or columns == 0:
        return
    whole = [rows if fmt.row_alignment is None else fmt.row_alignment for fmt in formats]
    together = lcm(*whole)
    wanted = max(1, elements // columns)
    if wanted >= together:
        height = wanted // together * together
    else:  # a part of the rows that share scales is enough for them to be decoded
        least = lcm(*(1 if _has_blocks(fmt) else n for fmt, n in zip(formats, whole, strict=True)))
        height = together
        while height % 2 == 0 and height // 2 % least == 0 and height > wanted:
            height //= 2
    first, count = within or (0, rows)
    for top in range(first, first + count, height):
        yield top, min(height, first + count - top)


class Buffers:
    """Memory of one worker, reused for every stripe: first touches cost more than the arithmetic."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, key: str, nbytes: int) -> Tensor:
        """Returns a flat uint8 buffer of at least `nbytes`; what was under this `key` is overwritten."""
        import torch

        if key not in self._memory or self._memory[key].numel() < nbytes:
            self._memory[key] = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory[key]

    def tensor(self, key: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """Returns a tensor in such a buffer."""
        spec = TensorSpec(dtype, shape)
        return view(self.take(key, spec.nbytes), 0, spec)


def _has_blocks(fmt: Format) -> bool:
    """Whether some of the rows that share scales can be decoded without the others."""
    return isinstance(fmt, (FP8Block, INT8Block))
