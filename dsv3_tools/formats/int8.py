"""INT8: one float32 scale for each block of the weight, or for each row.

Sources: SGLang's `blockwise_int8` (`srt/layers/quantization/blockwise_int8.py`) for blocks;
compressed-tensors' `int-quantized` with strategy "channel" for rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import FormatError
from dsv3_tools.formats.fp8_block import SCALE_PART, block_grid, read_block_size
from dsv3_tools.formats.integer import FloatSource, IntegerFormat, check_matrix, found_scale_dtype

if TYPE_CHECKING:
    from torch import Tensor

    Parts = Mapping[str, Tensor]

__all__ = ["INT8Block", "INT8Channel"]


@dataclass(frozen=True)
class INT8Block(IntegerFormat):
    """Codes `weight` (I8) and scales `weight_scale_inv` (F32), weight = code x scale."""

    name = "int8_block"
    block_size: tuple[int, int] = (128, 128)

    @property
    def code_dtype(self) -> str:
        """Codes are int8."""
        return "I8"

    @property
    def scale_part(self) -> str:
        """The scales' part, named as in FP8 checkpoints."""
        return SCALE_PART

    @property
    def row_alignment(self) -> int:
        """Rows of a block share scales."""
        return self.block_size[0]

    def shape_of(self, code_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `code_shape`."""
        return code_shape

    def parts(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Returns codes `[rows, columns]` and scales `[ceil(rows / 128), ceil(columns / 128)]`."""
        check_matrix(self.name, shape)
        return {
            "weight": TensorSpec("I8", shape),
            SCALE_PART: TensorSpec("F32", block_grid(shape, self.block_size)),
        }

    def decode_into(self, items: Sequence[Parts], outs: Sequence[Tensor]) -> Tensor:
        """Dequantizes: float32 product, rounded once to the type of `outs`."""
        from dsv3_tools import kernels

        codes, scales = [item["weight"] for item in items], [item[SCALE_PART] for item in items]
        return kernels.dequantize_int8_block_into(codes, scales, outs, block_size=self.block_size)

    def encode_from(self, source: FloatSource, outs: Sequence[Parts]) -> Tensor:
        """Quantizes; a block of FP8 codes takes 4 x its FP8 scale where that loses less."""
        from dsv3_tools import kernels

        codes, scales = [out["weight"] for out in outs], [out[SCALE_PART] for out in outs]
        return kernels.quantize_int8_block_into(
            source.weights, codes, scales, block_size=self.block_size, **source.keywords()
        )

    def quantization_config(self) -> dict[str, Any]:
        """Returns SGLang's `quantization_config` for it."""
        return {
            "activation_scheme": "dynamic",
            "quant_method": "blockwise_int8",
            "weight_block_size": list(self.block_size),
        }

    @classmethod
    def from_quantization_config(cls, config: Mapping[str, Any], where: str) -> INT8Block:
        """Returns the format that a `quantization_config` of method "blockwise_int8" describes.

        Raises:
            FormatError: no usable block size.
        """
        return cls(read_block_size(config, "weight_block_size", where))


@dataclass(frozen=True)
class INT8Channel(IntegerFormat):
    """Codes `weight` (I8) and a scale for each row, `weight_scale` `[rows, 1]`, weight = code x scale.

    Attributes:
        scale_dtype: "F32" is written; other tools write "BF16" or "F16", which are read.
    """

    name = "int8_channel"
    scale_dtype: str = "F32"

    @property
    def code_dtype(self) -> str:
        """Codes are int8."""
        return "I8"

    @property
    def scale_part(self) -> str:
        """The scales' part."""
        return "weight_scale"

    @property
    def row_alignment(self) -> int:
        """Every row has its own scale."""
        return 1

    def shape_of(self, code_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `code_shape`."""
        return code_shape

    def fitted(self, specs: Mapping[str, TensorSpec]) -> INT8Channel:
        """Returns the format with the scale dtype found, if it is one that is read."""
        return replace(self, scale_dtype=found_scale_dtype("weight_scale", specs, self.scale_dtype))

    def parts(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Returns codes `[rows, columns]` and scales `[rows, 1]`."""
        check_matrix(self.name, shape)
        return {
            "weight": TensorSpec("I8", shape),
            "weight_scale": TensorSpec(self.scale_dtype, (shape[0], 1)),
        }

    def decode_into(self, items: Sequence[Parts], outs: Sequence[Tensor]) -> Tensor:
        """Dequantizes: float32 product, rounded once to the type of `outs`."""
        import torch

        from dsv3_tools import kernels

        scales = [item["weight_scale"].to(torch.float32) for item in items]
        return kernels.dequantize_int8_channel_into([item["weight"] for item in items], scales, outs)

    def encode_from(self, source: FloatSource, outs: Sequence[Parts]) -> Tensor:
        """Quantizes.

        Raises:
            FormatError: the scales are not float32.
        """
        from dsv3_tools import kernels

        if self.scale_dtype != "F32":
            raise FormatError(f"int8_channel: {self.scale_dtype} scales are only read, never written")
        codes, scales = [out["weight"] for out in outs], [out["weight_scale"] for out in outs]
        return kernels.quantize_int8_channel_into(source.weights, codes, scales, **source.keywords())
