"""INT4 as GPTQ and AWQ store it: the transposed weight, inputs first.

Sources: AutoGPTQ's and GPTQModel's `qlinear` (v1 stores every zero point less one), AutoAWQ's
`WQLinear_GEMM` (columns interleaved in a word for its kernel).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import FormatError
from dsv3_tools.formats.int4 import INT4, Codes
from dsv3_tools.formats.integer import check_matrix

if TYPE_CHECKING:
    from torch import Tensor

    Parts = Mapping[str, Tensor]

__all__ = ["INT4AWQ", "INT4GPTQ", "order_problem"]


@dataclass(frozen=True)
class INT4GPTQ(INT4):
    """GPTQ: `qweight` (I32 `[columns / 8, rows]`), `qzeros` (I32 `[groups, rows / 8]`), `scales`, `g_idx`.

    `scales` is `[groups, rows]`; `g_idx` (I32 `[columns]`) names every column's group.

    Attributes:
        version: 1 stores each zero point less one (`checkpoint_format: gptq`), 2 as it is (`gptq_v2`).
        act_order: columns of a group are not neighbours (`desc_act: true`). Read only.
    """

    name = "int4_gptq"
    weight_part = "qweight"
    version: int = 1
    act_order: bool = False

    @property
    def scale_part(self) -> str:
        """The scales' part."""
        return "scales"

    @property
    def row_alignment(self) -> None:
        """The weight is stored column by column."""
        return

    def shape_of(self, code_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns rows and 8 x words, from `[words, rows]`."""
        check_matrix(self.name, code_shape)
        return code_shape[1], 8 * code_shape[0]

    def parts(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Returns packed codes, zero points, scales and each column's group."""
        groups = self.groups(shape, row_multiple=8)
        rows, columns = shape
        return {
            "qweight": TensorSpec("I32", (columns // 8, rows)),
            "qzeros": TensorSpec("I32", (groups, rows // 8)),
            "scales": TensorSpec(self.scale_dtype, (groups, rows)),
            "g_idx": TensorSpec("I32", (columns,)),
        }

    def fixed(self, shape: tuple[int, ...]) -> dict[str, bytes]:
        """Returns the content of `qzeros`, if symmetric, and of `g_idx`, if groups are neighbours."""
        parts = self.parts(shape)
        known: dict[str, bytes] = {}
        if self.symmetric:
            known["qzeros"] = (b"\x77" if self.version == 1 else b"\x88") * parts["qzeros"].nbytes
        if not self.act_order:
            group_size = shape[1] // self.groups(shape)
            known["g_idx"] = (np.arange(shape[1]) // group_size).astype("<i4").tobytes()
        return known

    def same_grid(self, other: INT4) -> bool:
        """Whether codes may be moved to the other layout; never with `act_order`."""
        return not self.act_order and super().same_grid(other)

    def decode_into(self, items: Sequence[Parts], outs: Sequence[Tensor]) -> Tensor:
        """Dequantizes; with `act_order` column by column.

        Raises:
            FormatError: a column's group does not exist.
        """
        if not self.act_order:
            return super().decode_into(items, outs)
        import torch

        from dsv3_tools.kernels.int4_layouts import dequantize_by_column

        for item in items:
            least, most = (int(bound) for bound in item["g_idx"].aminmax())
            if problem := order_problem(least, most, item["scales"].shape[0]):
                raise FormatError(f"{self.name}: {problem}")
        counts = [
            dequantize_by_column(*self.load(item), item["g_idx"], out)
            for item, out in zip(items, outs, strict=True)
        ]
        return torch.stack(counts)

    def load(self, item: Parts) -> Codes:
        """Returns the codes, columns in the order in which they are stored."""
        from dsv3_tools.kernels.int4_layouts import unpack_words

        packed, scales = item["qweight"].t().contiguous(), item["scales"].t().contiguous()
        if self.symmetric:
            return Codes(packed, scales, None)
        zeros = unpack_words(item["qzeros"]).t().contiguous()
        # In version 1 a stored 15 can only mean 0: AutoGPTQ, too, adds in four bits.
        return Codes(packed, scales, (zeros + 1) & 15 if self.version == 1 else zeros)

    def store(self, codes: Codes, out: Parts) -> None:
        """Writes the codes, words and scales transposed.

        Raises:
            FormatError: the format is only read.
        """
        self._check_stored()
        out["qweight"].copy_(codes.packed.t())
        out["scales"].copy_(codes.scales.t())

    def _check_written(self) -> None:
        self._check_stored()
        super()._check_written()

    def _check_stored(self) -> None:
        if not self.symmetric or self.act_order:
            raise FormatError(
                f"{self.name}: only symmetric codes in the columns' own order are written: version 1 cannot "
                "store a zero point of 0, and engines take neither"
            )


@dataclass(frozen=True)
class INT4AWQ(INT4):
    """AWQ: `qweight` (I32 `[columns, rows / 8]`), `qzeros` (I32 `[groups, rows / 8]`), `scales`.

    `scales` is `[groups, rows]`. A word holds eight rows of the weight in `AWQ_ORDER`.
    """

    name = "int4_awq"
    weight_part = "qweight"

    @property
    def scale_part(self) -> str:
        """The scales' part."""
        return "scales"

    @property
    def row_alignment(self) -> None:
        """The weight is stored column by column."""
        return

    def shape_of(self, code_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns 8 x words and columns."""
        check_matrix(self.name, code_shape)
        return 8 * code_shape[1], code_shape[0]

    def parts(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Returns packed codes, zero points and scales."""
        groups = self.groups(shape, row_multiple=8)
        rows, columns = shape
        return {
            "qweight": TensorSpec("I32", (columns, rows // 8)),
            "qzeros": TensorSpec("I32", (groups, rows // 8)),
            "scales": TensorSpec(self.scale_dtype, (groups, rows)),
        }

    def fixed(self, shape: tuple[int, ...]) -> dict[str, bytes]:
        """Returns the content of `qzeros`, if symmetric."""
        return {"qzeros": b"\x88" * self.parts(shape)["qzeros"].nbytes} if self.symmetric else {}

    def load(self, item: Parts) -> Codes:
        """Returns the codes, turned and packed along rows."""
        from dsv3_tools.kernels.int4_layouts import AWQ_ORDER, pack_words, unpack_words

        packed = pack_words(unpack_words(item["qweight"], AWQ_ORDER).t().contiguous())
        zeros = None if self.symmetric else unpack_words(item["qzeros"], AWQ_ORDER).t().contiguous()
        return Codes(packed, item["scales"].t().contiguous(), zeros)

    def store(self, codes: Codes, out: Parts) -> None:
        """Writes the codes, turned and packed along the weight's columns."""
        from dsv3_tools.kernels.int4_layouts import AWQ_ORDER, pack_words, unpack_words

        out["qweight"].copy_(pack_words(unpack_words(codes.packed).t().contiguous(), AWQ_ORDER))
        out["scales"].copy_(codes.scales.t())
        if codes.zeros is not None:
            out["qzeros"].copy_(pack_words(codes.zeros.t().contiguous(), AWQ_ORDER))


def order_problem(least: int, most: int, groups: int) -> str | None:
    """Returns what is wrong with a `g_idx` of these extremes; None for nothing."""
    if least >= 0 and most < groups:
        return None
    return f"g_idx names the groups {least} to {most}, expected 0 to {groups - 1}"
