"""Between a format on disk and the grid of codes that calibration works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import UsageError
from dsv3_tools.formats import INT4, Format, INT8Channel
from dsv3_tools.formats.int4 import Codes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dsv3_tools.kernels.reference_gptq import Grid
    from dsv3_tools.quantize.matrix import Coded

__all__ = ["Memory", "baseline", "grid_of", "store"]


def grid_of(fmt: Format, columns: int) -> Grid:
    """Returns the grid of a format's codes, for weights with so many columns.

    Raises:
        UsageError: a format that calibration does not know.
    """
    import torch

    from dsv3_tools.kernels.reference_gptq import Grid

    if isinstance(fmt, INT4):
        return Grid(15, 7.5, fmt.group_size, fmt.symmetric, torch.bfloat16)
    if isinstance(fmt, INT8Channel):
        return Grid(255, 127.0, columns, True, torch.float32)
    raise UsageError(f"{fmt.name}: calibration is for INT4 and for INT8 with a scale for each row")


def baseline(fmt: Format) -> Format:
    """Returns the format whose scales are those of the largest weight: what gains are measured against."""
    return replace(fmt, search="absmax") if isinstance(fmt, INT4) else fmt


class Memory:
    """The parts of some weights in one piece of memory, so that they go to other ranks at once.

    Args:
        formats: of each weight, by name.
        shapes: of each weight.
        device: where.

    Attributes:
        flat: uint8, all of it.
        parts: per weight and part, views of `flat`; those that follow from the shape are filled in.
    """

    def __init__(
        self,
        formats: Mapping[str, Format],
        shapes: Mapping[str, tuple[int, ...]],
        device: torch.device,
    ) -> None:
        import torch

        self._places: dict[tuple[str, str], tuple[int, TensorSpec]] = {}
        total = 0
        for name, fmt in formats.items():
            for part, spec in fmt.parts(shapes[name]).items():
                self._places[name, part] = total, spec
                total += -(-spec.nbytes // 16) * 16
        self.flat = torch.empty(total, dtype=torch.uint8, device=device)
        self.parts = self.views(self.flat)
        for name, fmt in formats.items():
            for part, content in fmt.fixed(shapes[name]).items():
                known = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                self.parts[name][part].flatten().view(torch.uint8).copy_(known)

    def views(self, flat: Tensor) -> dict[str, dict[str, Tensor]]:
        """Returns the parts in a copy of `flat`."""
        found: dict[str, dict[str, Tensor]] = {}
        for (name, part), (start, spec) in self._places.items():
            view = flat[start : start + spec.nbytes].view(torch_dtype(spec.dtype)).view(spec.shape)
            found.setdefault(name, {})[part] = view
        return found


def store(fmt: Format, coded: Coded, rows: slice, parts: Mapping[str, Tensor]) -> None:
    """Writes some rows of a quantized weight into the parts of a format."""
    import torch

    from dsv3_tools.kernels.reference_integer import pack_int4

    codes = coded.codes_NK[rows]
    if isinstance(fmt, INT4):
        zeros = None if coded.zero_NG is None else coded.zero_NG[rows].to(torch.uint8)
        fmt.store(Codes(pack_int4(codes), coded.scale_NG[rows].to(torch.bfloat16), zeros), parts)
        return
    parts["weight"].copy_((codes.to(torch.int16) - 128).to(torch.int8))
    parts["weight_scale"].copy_(coded.scale_NG[rows])
