"""FP8 e4m3 with one float32 scale for each block: the released layout of DeepSeek-V3.

Source: `README_WEIGHTS.md` of the release (`quantization_config`, `weight_scale_inv`) and, for
`scale_fmt: ue8m0`, `config_v3.1.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import FormatError
from dsv3_tools.formats.base import Format

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LIKE_PART", "SCALE_PART", "FP8Block", "block_grid", "read_block_size"]

SCALE_PART = "weight_scale_inv"
"""The scales' part, DeepSeek's name on disk: what multiplies on decode."""

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
        scale_name: the scales' part, "weight_scale_inv", or "weight_scale" where FP8 blocks are written
            as compressed-tensors names them.
    """

    name = "fp8_block"
    encodes: ClassVar[frozenset[str]] = frozenset({"BF16", "F16", "F32"})
    """Element types of the weights that can be quantized."""
    block_size: tuple[int, int] = (128, 128)
    scale_fmt: str = "f32"
    inverse_scales: bool = False
    scale_name: str = SCALE_PART

    def __post_init__(self) -> None:
        if self.scale_fmt not in ("f32", "ue8m0"):
            raise FormatError(f"fp8_block: got scale_fmt {self.scale_fmt!r}, expected 'f32' or 'ue8m0'")
        if min(self.block_size) < 1:
            raise FormatError(f"fp8_block: got block_size {self.block_size}, expected two positive numbers")

    @property
    def code_dtype(self) -> str:
        """Codes are float8_e4m3fn."""
        return "F8_E4M3"

    @property
    def scale_part(self) -> str:
        """The scales' part."""
        return self.scale_name

    @property
    def row_alignment(self) -> int:
        """Rows of a block share scales."""
        return self.block_size[0]

    def shape_of(self, code_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `code_shape`."""
        return code_shape

    def same_bytes(self, other: Format) -> bool:
        """Whether the other format differs in name only; scales that are powers of two are float32, too."""
        if not isinstance(other, FP8Block) or self.scale_fmt not in (other.scale_fmt, "ue8m0"):
            return False
        return replace(self, scale_name=other.scale_name, scale_fmt=other.scale_fmt) == other

    def parts(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Returns codes `[rows, columns]` and scales `[ceil(rows / 128), ceil(columns / 128)]`."""
        if len(shape) != 2 or 0 in shape:
            raise FormatError(
                f"fp8_block: got a weight of shape {list(shape)}, expected two dimensions, none of them 0"
            )
        return {
            "weight": TensorSpec("F8_E4M3", shape),
            self.scale_name: TensorSpec("F32", block_grid(shape, self.block_size)),
        }

    def decode_into(self, items: Sequence[Mapping[str, Tensor]], outs: Sequence[Tensor]) -> Tensor:
        """Dequantizes: float32 product, rounded once to the type of `outs`."""
        from dsv3_tools import kernels

        codes = [item["weight"] for item in items]
        return kernels.dequantize_fp8_block_into(codes, self.scales(items), outs, block_size=self.block_size)

    def scales(self, items: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """Returns what the codes of each item are multiplied by."""
        stored = [item[self.scale_name] for item in items]
        return [scale.reciprocal() for scale in stored] if self.inverse_scales else stored

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
            [out[self.scale_name] for out in outs],
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
        block_size = read_block_size(config, "weight_block_size", where)
        scale_fmt = config.get("scale_fmt") or "f32"
        if scale_fmt not in ("f32", "ue8m0"):
            raise FormatError(f"{where}: scale_fmt is {scale_fmt!r}, expected 'ue8m0' or none")
        semantics = config.get("weight_scale_semantics", "multiply")
        if semantics not in ("multiply", "inverse"):
            raise FormatError(
                f"{where}: weight_scale_semantics is {semantics!r}, expected 'inverse' (the scale is stored "
                "as a reciprocal) or none"
            )
        return cls(block_size, scale_fmt, semantics == "inverse")


def block_grid(shape: tuple[int, ...], block_size: tuple[int, int]) -> tuple[int, ...]:
    """Returns how many blocks a matrix has in each direction, partial ones counted."""
    return tuple(-(-size // block) for size, block in zip(shape, block_size, strict=True))


def read_block_size(config: Mapping[str, Any], key: str, where: str) -> tuple[int, int]:
    """Returns the block size that `config` states under `key`.

    Raises:
        FormatError: not two powers of two.
    """
    block = config.get(key)
    if not isinstance(block, list) or len(block) != 2 or not all(map(_is_power_of_two, block)):
        raise FormatError(f"{where}: {key} is {block!r}, expected two powers of two such as [128, 128]")
    return block[0], block[1]


def _is_power_of_two(n: Any) -> bool:
    """Whether `n` can be a side of a block on every device: the GPU kernels know no others."""
    return type(n) is int and n > 0 and n & (n - 1) == 0
