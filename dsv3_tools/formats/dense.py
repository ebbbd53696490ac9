"""Unquantized weights: BF16 as released checkpoints store them, F16 and F32 as trainers write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv3_tools.checkpoint.dtypes import FLOAT_DTYPES
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import FormatError
from dsv3_tools.formats.base import Format

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(Format):
    """One tensor, the weight itself.

    Decoding copies, rounding once where the target is narrower. A NaN that is converted is spelt 0x7FC0,
    or 0x7FC00000 in float32.
    """

    dtype: str = "BF16"

    def __post_init__(self) -> None:
        if self.dtype not in FLOAT_DTYPES:
            raise FormatError(f"dense: got dtype {self.dtype}, expected one of {sorted(FLOAT_DTYPES)}")

    @property
    def name(self) -> str:  # type: ignore[override]
        """The dtype in lower case: "bf16"."""
        return self.dtype.lower()

    @property
    def code_dtype(self) -> str:
        """The dtype of the weight itself."""
        return self.dtype

    @property
    def row_alignment(self) -> int:
        """Any row may be split off."""
        return 1

    def shape_of(self, code_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `code_shape`."""
        return code_shape

    def parts(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Returns the one part "weight"."""
        return {"weight": TensorSpec(self.dtype, shape)}

    def decode_into(self, items: Sequence[Mapping[str, Tensor]], outs: Sequence[Tensor]) -> Tensor:
        """Copies each weight into `outs`; counts elements that are not finite."""
        return _copy([item["weight"] for item in items], outs)

    def encode_into(self, weights: Sequence[Tensor], outs: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Copies each weight into its part; counts elements that are not finite."""
        return _copy(weights, [out["weight"] for out in outs])


def _copy(weights: Sequence[Tensor], outs: Sequence[Tensor]) -> Tensor:
    import torch

    counts = []
    for weight, out in zip(weights, outs, strict=True):
        out.copy_(weight)
        if out.dtype != weight.dtype:
            out.masked_fill_(torch.isnan(out), torch.nan)  # conversions spell NaN differently by device
        counts.append((~torch.isfinite(out)).sum(dtype=torch.int32))
    return torch.stack(counts)
