"""What the formats of integer codes share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import FormatError
from dsv3_tools.formats.base import Format

if TYPE_CHECKING:
    from torch import Tensor

    Parts = Mapping[str, Tensor]

__all__ = ["FloatSource", "IntegerFormat", "check_matrix", "found_scale_dtype"]

SCALE_DTYPES = frozenset({"F32", "BF16", "F16"})
"""Element types of the scales in compressed-tensors, GPTQ and AWQ checkpoints."""


@dataclass(frozen=True)
class FloatSource:
    """What integer formats are encoded from: weights, or FP8 codes with their scales.

    FP8 codes are decoded to float32 inside the kernel that quantizes them.
    """

    weights: Sequence[Tensor]
    fp8_scales: Sequence[Tensor] | None = None
    fp8_block_size: tuple[int, int] = (128, 128)

    def keywords(self) -> dict[str, Any]:
        """Returns the keywords that the kernels take."""
        return {"fp8_scales": self.fp8_scales, "fp8_block_size": self.fp8_block_size}


class IntegerFormat(Format):
    """A format of integer codes: it encodes straight from FP8, too."""

    def encode_into(self, weights: Sequence[Tensor], outs: Sequence[Parts]) -> Tensor:
        """Quantizes weights."""
        return self.encode_from(FloatSource(weights), outs)

    @abstractmethod
    def encode_from(self, source: FloatSource, outs: Sequence[Parts]) -> Tensor:
        """Quantizes `source` into the parts `outs`; returns int32 counts of non-finite elements read."""


def check_matrix(name: str, shape: tuple[int, ...]) -> None:
    """Refuses what is no matrix.

    Raises:
        FormatError: with the shape.
    """
    if len(shape) != 2 or 0 in shape:
        raise FormatError(
            f"{name}: got a weight of shape {list(shape)}, expected two dimensions, none of them 0"
        )


def found_scale_dtype(part: str, specs: Mapping[str, TensorSpec], otherwise: str) -> str:
    """Returns the dtype that a checkpoint's scales have, if it is one of `SCALE_DTYPES`."""
    found = specs.get(part)
    return found.dtype if found is not None and found.dtype in SCALE_DTYPES else otherwise
