"""FP8 e4m3 with one float32 scale for each block: the released layout of DeepSeek-V3.

Source: `README_WEIGHTS.md` of the release (`quantization_config`, `weight_scale_inv`) and, for
`scale_fmt: ue8m0`, `config_v3.1.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import FormatError
from dsv3_tools.formats.base import Format

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FP8Block"]

SCALE_PART = "weight_scale_inv"
"""The scales' part, DeepSeek's name on disk: what multiplies on decode."""

SCALE_SUFFIX = "_scale_inv"
"""What a weight's tensor name ends in to be its scales'."""

LIKE_PART = "like"
"""Name under which `encode_into` finds the scales of an earlier quantization among a weight's parts."""


@dataclass(frozen=True)
class FP8Block(Format):
    """Codes `weight` (F8_E4M3) and scales `weight_scale_inv` (F32), weight = code x scale.

    Attributes:
        block_size: rows and columns that share a scale; the last block may be partial.
        scale_fmt: "f32", or "ue8m0" for scales that are powers of two.
        inverse_scales: the scale on disk is the reciprocal, weight = code x (1 / scale), as some
            tools write under the same name with `weight_scale_semantics: "inverse"`. Read only.
    """

    name = "fp8_block"
    encodes: ClassVar[frozenset[str]] = frozenset({"BF16", "F16", "F32"})
    """Element types of the weights that can be quantized."""
    block_size: tuple[int, int] = (128, 128)
    scale_fmt: str = "f32"
    inverse_scales: bool = False

    def __post_init__(self) -> None:
        if self.scale_fmt not in ("f32", "ue8m0"):
            raise FormatError(f"fp8_block: got scale_fmt {self.scale_fmt!r}, expected 'f32' or 'ue8m0'")
        if min(self.block_size) < 1:
            raise FormatError(f"fp8_block: got block_size {self.block_size}, expected two positive numbers")

    @property
    def row_alignment(self) -> int:
        """Rows of a block share scales."""
        return self.block_size[0]

    def parts(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Returns codes `[rows, columns]` and scales `[ceil(rows / 128), ceil(columns / 128)]`."""
        if len(shape) != 2 or 0 in shape:
            raise FormatError(
                f"fp8_block: got a weight of shape {list(shape)}, expected two dimensions, none of them 0"
            )
        blocks = tuple(-(-size // block) for size, block in zip(shape, self.block_size, strict=True))
        return {"weight": TensorSpec("F8_E4M3", shape), SCALE_PART: TensorSpec("F32", blocks)}

    def decode_into(self, items: Sequence[Mapping[str, Tensor]], outs: Sequence[Tensor]) -> Tensor:
        """Dequantizes: float32 product, rounded once to the type of `outs`."""
        from dsv3_tools import kernels

        scales = [item[SCALE_PART] for item in items]
        if self.inverse_scales:
            scales = [scale.reciprocal() for scale in scales]
        codes = [item["weight"] for item in items]
        return kernels.dequantize_fp8_block_into(codes, scales, outs, block_size=self.block_size)

    def encode_into(self, weights: Sequence[Tensor], outs: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Quantizes. Parts that hold "like", earlier scales, keep them for blocks that did not change.

        Raises:
            FormatError: the format has inverse scales, which are only read.
        """
        from dsv3_tools import kernels

        if self.inverse_scales:
            raise FormatError("fp8_block: inverse scales are only read, never written")

        likes = [out[LIKE_PART] for out in outs] if LIKE_PART in outs[0] else None
        return kernels.quantize_fp8_block_into(
            weights,
            [out["weight"] for out in outs],
            [out[SCALE_PART] for out in outs],
            block_size=self.block_size,
            scale_fmt=self.scale_fmt,
            likes=likes,
        )

    def quantization_config(self) -> dict[str, Any]:
        """Returns the release's `quantization_config`, with `scale_fmt` as V3.1 writes it."""
        config: dict[str, Any] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(self.block_size),
        }
        if self.scale_fmt == "ue8m0":
            config["scale_fmt"] = "ue8m0"
        return config

    @classmethod
    def from_quantization_config(cls, config: Mapping[str, Any], where: str) -> FP8Block:
        """Returns the format that a checkpoint's `quantization_config` describes.

        Raises:
            FormatError: another quantization, or a value that this layout does not have.
        """
        method, fmt = config.get("quant_method"), config.get("fmt", "e4m3")
        if method != "fp8" or fmt != "e4m3":
            raise FormatError(
                f"{where}: quantization is {method!r} with fmt {fmt!r}, expected 'fp8' with 'e4m3'"
            )
        block = config.get("weight_block_size")
        if not isinstance(block, list) or len(block) != 2 or not all(map(_is_power_of_two, block)):
            raise FormatError(
                f"{where}: weight_block_size is {block!r}, expected two powers of two such as [128, 128]"
            )
        scale_fmt = config.get("scale_fmt") or "f32"
        if scale_fmt not in ("f32", "ue8m0"):
            raise FormatError(f"{where}: scale_fmt is {scale_fmt!r}, expected 'ue8m0' or none")
        semantics = config.get("weight_scale_semantics", "multiply")
        if semantics not in ("multiply", "inverse"):
            raise FormatError(
                f"{where}: weight_scale_semantics is {semantics!r}, expected 'inverse' (the scale is stored "
                "as a reciprocal) or none"
            )
        return cls((block[0], block[1]), scale_fmt, semantics == "inverse")


def _is_power_of_two(n: Any) -> bool:
    """Whether `n` can be a side of a block on every device: the GPU kernels know no others."""
    return type(n) is int and n > 0 and n & (n - 1) == 0
