"""What of a tensor one of several model-parallel ranks gets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import SupportsInt

__all__ = ["Share"]


@dataclass(frozen=True, slots=True)
class Share:
    """A model-parallel rank's share of a tensor that is copied.

    Attributes:
        rank: which of `world` ranks.
        world: how many ranks there are.
        axis: the tensor is cut into `world` equal parts along axis 0 or 1; None gives it whole to each.
    """

    rank: int
    world: int
    axis: int | None

    @property
    def is_repetition(self) -> bool:
        """Whether an earlier rank has the same."""
        return self.axis is None and self.rank > 0

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the tensor of which a share has `shape`."""
        return tuple(n * self.world if axis == self.axis else n for axis, n in enumerate(shape))

    def place(self, index: Iterable[SupportsInt], shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns where an element of the share, which has `shape`, is in the whole tensor."""
        first = [self.rank * n if axis == self.axis else 0 for axis, n in enumerate(shape)]
        return tuple(begin + int(i) for begin, i in zip(first, index, strict=True))
