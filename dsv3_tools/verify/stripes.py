"""Reads a weight in stripes of rows, small enough to stay in the processor's cache meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import lcm, prod
from typing import TYPE_CHECKING

from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.buffers import as_bytes, view
from dsv3_tools.formats import INT4, INT4GPTQ, Dense, Format, FP8Block, INT8Block, INT8Channel
from dsv3_tools.formats.stored import StoredWeight

if TYPE_CHECKING:
    from torch import Tensor

    from dsv3_tools.kernels.compare import Steps

    Parts = Mapping[str, Tensor]

__all__ = ["STRIPE_ELEMENTS", "Buffers", "Side", "matrix_shape", "stripes"]

STRIPE_ELEMENTS = 1 << 20
"""Elements in a stripe, about: its codes and decoded weights stay in L3 cache. Smaller ones would stay in L2
cache, but take longer to set up in Python than to compare."""

_ALIGNMENT = 64


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns rows and columns; what is no matrix is one column, so that any number of elements is rows."""
    return (shape[0], shape[1]) if len(shape) == 2 else (prod(shape), 1)


def stripes(shape: tuple[int, ...], formats: tuple[Format, Format]) -> Iterator[tuple[int, int]]:
    """Yields first row and height of every stripe of a weight that both formats can decode by itself."""
    rows, columns = matrix_shape(shape)
    if rows == 0 or columns == 0:
        return
    whole = [rows if fmt.row_alignment is None else fmt.row_alignment for fmt in formats]
    together = lcm(*whole)
    wanted = max(1, STRIPE_ELEMENTS // columns)
    if wanted >= together:
        height = wanted // together * together
    else:  # a part of the rows that share scales is enough for them to be decoded
        least = lcm(*(1 if _has_blocks(fmt) else n for fmt, n in zip(formats, whole, strict=True)))
        height = together
        while height % 2 == 0 and height // 2 % least == 0 and height > wanted:
            height //= 2
    for top in range(0, rows, height):
        yield top, min(height, rows - top)


class Buffers:
    """Memory of one worker, reused for every stripe: first touches cost more than the arithmetic."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, key: str, nbytes: int) -> Tensor:
        """Returns a flat uint8 buffer of at least `nbytes`; what was under this `key` is overwritten."""
        import torch

        if key not in self._memory or self._memory[key].numel() < nbytes:
            self._memory[key] = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory[key]

    def tensor(self, key: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """Returns a tensor in such a buffer."""
        spec = TensorSpec(dtype, shape)
        return view(self.take(key, spec.nbytes), 0, spec)


class Side:
    """One checkpoint's copy of a weight.

    Args:
        checkpoint: where it is.
        weight: how it is stored.
        buffers: memory of the worker.
        key: tells this side's buffers from the other's.
    """

    def __init__(self, checkpoint: Checkpoint, weight: StoredWeight, buffers: Buffers, key: str) -> None:
        self.format = weight.format
        self._checkpoint, self._weight, self._buffers, self._key = checkpoint, weight, buffers, key
        self._rows, self._columns = matrix_shape(weight.shape)
        known = weight.format.fixed(weight.shape)
        self._parts = {part: name for part, name in weight.parts.items() if part not in known}
        self._together = weight.format.row_alignment
        self._unit = self._specs(self._rows if self._together is None else self._together)

    def fixed_problems(self) -> Iterator[str]:
        """Yields which of the parts that follow from the shape do not hold what they must."""
        for part, content in self.format.fixed(self._weight.shape).items():
            name = self._weight.parts[part]
            if self._checkpoint.read_bytes(name) != content:
                yield f"{name}: does not hold what belongs to a weight {list(self._weight.shape)}"

    def read(self, top: int, height: int) -> Parts:
        """Returns the parts of some rows, in memory that the next call overwrites."""
        specs = self._specs(height)
        starts, end = {}, 0
        for part in self._parts:
            starts[part] = end
            end += -(-specs[part].nbytes // _ALIGNMENT) * _ALIGNMENT
        buffer = self._buffers.take(f"{self._key} parts", end)
        parts = {}
        for part, name in self._parts.items():
            parts[part] = view(buffer, starts[part], specs[part])
            self._checkpoint.read_into(name, self._offset(part, top), as_bytes(parts[part]))
        return parts

    def decode(self, parts: Parts, dtype: str) -> tuple[Tensor, int]:
        """Returns the weight of `parts` as `dtype`, rounded once, and how many elements are not finite."""
        fmt = self.format
        if isinstance(fmt, Dense):
            return self._convert(parts["weight"], fmt.dtype, dtype)
        shape = (self._height(parts), self._columns)
        direct = dtype if dtype in ("BF16", "F32") else "F32"
        out = self._buffers.tensor(f"{self._key} weight", direct, shape)
        count = int(fmt.decode_into([parts], [out])[0])
        return self._convert(out, direct, dtype) if dtype != direct else (out, count)

    def decode_with_steps(self, parts: Parts) -> tuple[Tensor, int, Steps | None, bool]:
        """Returns the weight in float32, the number of elements not finite, and the steps of its codes.

        The last says whether every scale is a finite number other than 0.
        """
        fmt = self.format
        scales, zeros, span, block = self._grid(parts)
        weight, count = self.decode(parts, "F32")
        if scales is None:
            return weight, count, None, True
        import numpy as np

        from dsv3_tools.kernels.compare import Steps

        values = np.ascontiguousarray(scales.float().numpy())
        usable = np.isfinite(values) & (values != 0)
        inverse = np.zeros_like(values)
        np.divide(1.0, values, out=inverse, where=usable)
        if isinstance(fmt, FP8Block) and fmt.inverse_scales:
            inverse = np.where(usable, values, np.float32(0))
        inverse = np.where(np.isfinite(inverse), inverse, np.float32(0))
        low = np.full_like(values, -8.0 if isinstance(fmt, INT4) else -128.0)
        if zeros is not None:
            low = -zeros.float().numpy()
        return weight, count, Steps(inverse, np.ascontiguousarray(low), span, block), bool(usable.all())

    def _grid(self, parts: Parts) -> tuple[Tensor | None, Tensor | None, float | None, tuple[int, int]]:
        """Returns scales, zero points, span of the codes and size of the blocks that share a scale."""
        fmt = self.format
        if isinstance(fmt, (FP8Block, INT8Block)):
            assert fmt.scale_part is not None
            return parts[fmt.scale_part], None, None if isinstance(fmt, FP8Block) else 255.0, fmt.block_size
        if isinstance(fmt, INT8Channel):
            return parts["weight_scale"], None, 255.0, (1, self._columns)
        if not isinstance(fmt, INT4) or (isinstance(fmt, INT4GPTQ) and fmt.act_order):
            return None, None, None, (1, 1)  # columns of a group that are not neighbours: no steps
        codes = fmt.load(parts)
        return codes.scales, codes.zeros, 15.0, (1, self._columns // codes.scales.shape[1])

    def _convert(self, weight: Tensor, dtype: str, target: str) -> tuple[Tensor, int]:
        import torch

        from dsv3_tools.conversion.buffers import as_array
        from dsv3_tools.kernels.nonfinite import count_nonfinite

        if dtype == target:
            return weight, count_nonfinite(as_array(weight), dtype)
        out = torch.empty(weight.shape, dtype=torch_dtype(target))
        return out, int(Dense(target).encode_into([weight], [{"weight": out}])[0])

    def _height(self, parts: Parts) -> int:
        """Returns the rows of the weight that `parts` store."""
        codes = parts[self.format.weight_part]
        return self.format.shape_of(tuple(codes.shape))[0]

    def _specs(self, height: int) -> dict[str, TensorSpec]:
        return self.format.parts((height, self._columns))

    def _offset(self, part: str, top: int) -> int:
        """Returns the byte of a part at which row `top` of the weight, or the block that it is in, begins."""
        if self._together is None:
            return 0
        unit = self._unit[part]
        own_rows = unit.shape[0]
        return top * own_rows // self._together * (unit.nbytes // own_rows)


def _has_blocks(fmt: Format) -> bool:
    """Whether some of the rows that share scales can be decoded without the others."""
    return isinstance(fmt, (FP8Block, INT8Block))
