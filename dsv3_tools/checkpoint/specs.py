"""What a tensor is, without its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from dsv3_tools.checkpoint.dtypes import DTYPES

__all__ = ["TensorSpec"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Element type (safetensors' name, such as "BF16") and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return (self.num_elements * DTYPES[self.dtype].bits + 7) // 8

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"
