"""INT4 with a scale for each group of neighbours in a row: what the three layouts on disk share.

weight = (code - zero) x scale with codes 0 ... 15. In memory, between kernels and layouts, codes are packed
eight to a word along a row (`kernels.reference_integer.pack_int4`), scales are `[rows, groups]` and zeros
uint8 `[rows, groups]`, or None for 8 everywhere. The layouts move bits and calculate nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import FormatError
from dsv3_tools.formats.integer import FloatSource, IntegerFormat, check_matrix, found_scale_dtype

if TYPE_CHECKING:
    from torch import Tensor

    Parts = Mapping[str, Tensor]

__all__ = ["GROUP_SIZES", "INT4", "Codes", "INT4Packed", "is_group_size"]

GROUP_SIZES = (32, 64, 128)
"""Group sizes that are written: what the engines' kernels take."""


class Codes(NamedTuple):
    """One weight's codes in memory: packed along rows, scales and zeros `[rows, groups]`."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None


@dataclass(frozen=True)
class INT4(IntegerFormat):
    """What the INT4 layouts share.

    Attributes:
        group_size: neighbours in a row that share a scale; -1 is the whole row (read only).
        symmetric: every zero point is 8.
        scale_dtype: "BF16" is written; "F16" and "F32" are read.
        search: how a scale is chosen, "mse" or "absmax"; the layout is the same.
    """

    group_size: int = 128
    symmetric: bool = True
    scale_dtype: str = "BF16"
    search: str = field(default="mse", compare=False)

    def __post_init__(self) -> None:
        if not is_group_size(self.group_size):
            raise FormatError(
                f"{self.name}: got group_size {self.group_size}, expected a multiple of 8 or -1"
            )

    @property
    def code_dtype(self) -> str:
        """Eight codes are an int32."""
        return "I32"

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of all parts."""
        return tuple(self.parts((8, 8 * abs(self.group_size))))

    def fitted(self, specs: Mapping[str, TensorSpec]) -> INT4:
        """Returns the format with the scale dtype found, if it is one that is read."""
        assert self.scale_part is not None
        return replace(self, scale_dtype=found_scale_dtype(self.scale_part, specs, self.scale_dtype))

    def groups(self, shape: tuple[int, ...], *, row_multiple: int = 1) -> int:
        """Returns the number of groups in a row.

        Raises:
            FormatError: groups or words do not divide a weight of this shape.
        """
        check_matrix(self.name, shape)
        rows, columns = shape
        size = columns if self.group_size == -1 else self.group_size
        if columns % size or columns % 8 or rows % row_multiple:
            rows_too = f", rows in multiples of {row_multiple}" if row_multiple > 1 else ""
            raise FormatError(
                f"{self.name}: got a weight of shape {list(shape)}, expected columns in multiples of "
                f"{max(self.group_size, 8)}{rows_too}"
            )
        return columns // size

    def same_grid(self, other: INT4) -> bool:
        """Whether codes may be moved to the other layout as they are: without zero points, they are all 8."""
        same = (self.group_size, self.scale_dtype) == (other.group_size, other.scale_dtype)
        return same and (self.symmetric or not other.symmetric)

    @abstractmethod
    def load(self, item: Parts) -> Codes:
        """Returns the codes that the parts store."""

    @abstractmethod
    def store(self, codes: Codes, out: Parts) -> None:
        """Writes codes into the parts `out`."""

    def decode_into(self, items: Sequence[Parts], outs: Sequence[Tensor]) -> Tensor:
        """Dequantizes: float32 product, rounded once to the type of `outs`."""
        from dsv3_tools import kernels

        packed, scales, zeros = zip(*(self.load(item) for item in items), strict=True)
        return kernels.dequantize_int4_group_into(packed, scales, None if self.symmetric else zeros, outs)

    def encode_from(self, source: FloatSource, outs: Sequence[Parts]) -> Tensor:
        """Quantizes; scales are rounded to BF16 before codes are chosen.

        Raises:
            FormatError: the format is only read.
        """
        from dsv3_tools import kernels

        self._check_written()
        made = [
            self._target(tuple(weight.shape), weight, out)
            for weight, out in zip(source.weights, outs, strict=True)
        ]
        packed, scales, zeros = zip(*made, strict=True)
        counts = kernels.quantize_int4_group_into(
            source.weights,
            packed,
            scales,
            None if self.symmetric else zeros,
            search=self.search,
            **source.keywords(),
        )
        for codes, out in zip(made, outs, strict=True):
            self.store(codes, out)
        return counts

    def _check_written(self) -> None:
        if self.scale_dtype != "BF16" or self.group_size not in GROUP_SIZES:
            raise FormatError(
                f"{self.name}: groups of {self.group_size} with {self.scale_dtype} scales are only read; "
                f"written are groups of {', '.join(map(str, GROUP_SIZES))} with BF16 scales"
            )

    def _target(self, shape: tuple[int, ...], weight: Tensor, out: Parts) -> Codes:  # noqa: ARG002
        """Returns memory for codes on the weight's device: its own, to be stored afterwards."""
        import torch

        rows, columns = shape
        grid = (rows, self.groups(shape))
        return Codes(
            torch.empty((rows, columns // 8), dtype=torch.int32, device=weight.device),
            torch.empty(grid, dtype=torch.bfloat16, device=weight.device),
            None if self.symmetric else torch.empty(grid, dtype=torch.uint8, device=weight.device),
        )


@dataclass(frozen=True)
class INT4Packed(INT4):
    """compressed-tensors' `pack-quantized`.

    Codes `weight_packed` (I32 `[rows, columns / 8]`, the first of eight neighbours lowest), scales
    `weight_scale` `[rows, groups]`, `weight_shape` (rows and columns) and, unless symmetric,
    `weight_zero_point` (I32 `[rows / 8, groups]`, eight rows to a word).

    Source: `compressed_tensors/compressors/pack_quantized`.

    Attributes:
        shape_dtype: "I64" is written; some tools write "I32".
    """

    name = "int4_packed"
    weight_part = "weight_packed"
    shape_dtype: str = "I64"

    @property
    def scale_part(self) -> str:
        """The scales' part."""
        return "weight_scale"

    @property
    def row_alignment(self) -> int:
        """Rows share nothing, but for the words of zero points."""
        return 1 if self.symmetric else 8

    def shape_of(self, code_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns rows and 8 x words."""
        check_matrix(self.name, code_shape)
        return code_shape[0], 8 * code_shape[1]

    def fitted(self, specs: Mapping[str, TensorSpec]) -> INT4:
        """Returns the format with the dtypes of scales and shape found, if they are read."""
        found = specs.get("weight_shape")
        known = replace(self, shape_dtype=found.dtype) if found and found.dtype in ("I32", "I64") else self
        return super(INT4Packed, known).fitted(specs)

    def parts(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Returns packed codes, scales, the shape and, unless symmetric, zero points."""
        groups = self.groups(shape, row_multiple=1 if self.symmetric else 8)
        rows, columns = shape
        parts = {
            "weight_packed": TensorSpec("I32", (rows, columns // 8)),
            "weight_scale": TensorSpec(self.scale_dtype, (rows, groups)),
            "weight_shape": TensorSpec(self.shape_dtype, (2,)),
        }
        if not self.symmetric:
            parts["weight_zero_point"] = TensorSpec("I32", (rows // 8, groups))
        return parts

    def fixed(self, shape: tuple[int, ...]) -> dict[str, bytes]:
        """Returns the content of `weight_shape`."""
        size = 8 if self.shape_dtype == "I64" else 4
        return {"weight_shape": b"".join(length.to_bytes(size, "little") for length in shape)}

    def load(self, item: Parts) -> Codes:
        """Returns the codes; only zero points need unpacking."""
        from dsv3_tools.kernels.int4_layouts import unpack_words

        zeros = None if self.symmetric else unpack_words(item["weight_zero_point"].t()).t().contiguous()
        return Codes(item["weight_packed"], item["weight_scale"], zeros)

    def store(self, codes: Codes, out: Parts) -> None:
        """Writes the codes, or nothing where the kernel has written them in place."""
        from dsv3_tools.kernels.int4_layouts import pack_words

        if codes.packed is not out["weight_packed"]:
            out["weight_packed"].copy_(codes.packed)
            out["weight_scale"].copy_(codes.scales)
        if codes.zeros is not None:
            out["weight_zero_point"].copy_(pack_words(codes.zeros.t()).t())

    def _target(self, shape: tuple[int, ...], weight: Tensor, out: Parts) -> Codes:
        """Returns the parts themselves: this layout is the kernels' own."""
        import torch

        grid = (shape[0], self.groups(shape))
        zeros = None if self.symmetric else torch.empty(grid, dtype=torch.uint8, device=weight.device)
        return Codes(out["weight_packed"], out["weight_scale"], zeros)


def is_group_size(n: Any) -> TypeGuard[int]:
    """Whether groups of `n` can be read: whole words, or -1 for a whole row."""
    return type(n) is int and (n == -1 or (n >= 8 and n % 8 == 0))
