"""One checkpoint's copy of a weight: where it lies in files, read, decoded, or as kernels take it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.conversion.buffers import as_array
from dsv3_tools.formats import INT4, INT4GPTQ, Dense, FP8Block, INT8Block, INT8Channel
from dsv3_tools.formats.stored import StoredWeight
from dsv3_tools.verify.stripes import Buffers, matrix_shape

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from dsv3_tools.kernels.compare import Steps
    from dsv3_tools.kernels.cpu_errors import Coded

    Parts = Mapping[str, Tensor]

__all__ = ["Side", "bits_of"]


_AHEAD_NBYTES = 1 << 20  # the system takes note of little more at once


class _Grid(NamedTuple):
    """The numbers that codes can stand for: `span` is the largest less the smallest code, None for e4m3."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    span: float | None
    block_size: tuple[int, int]


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
        self._fixed = weight.format.fixed(weight.shape)
        self._together = weight.format.row_alignment or self._rows
        self._unit = self._specs(self._together)

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row's codes."""
        return self._unit[self.format.weight_part].nbytes // self._together

    def fixed_problems(self) -> Iterator[str]:
        """Yields which of the parts that follow from the shape do not hold what they must."""
        for part, content in self._fixed.items():
            name = self._weight.parts[part]
            if self._checkpoint.read_bytes(name) != content:
                yield f"{name}: does not hold what belongs to a weight {list(self._weight.shape)}"

    def part_sizes(self) -> Iterator[tuple[str, int]]:
        """Yields name and bytes of every part that does not follow from the shape."""
        for part, name in self._weight.parts.items():
            if part not in self._fixed:
                yield part, self._checkpoint.specs[name].nbytes

    def place(self, part: str, start: int) -> tuple[int, int]:
        """Returns an open file's descriptor and the offset in it of a part's byte `start`."""
        shard, offset = self._checkpoint.location(self._weight.parts[part])
        return self._checkpoint.descriptor(shard), offset + start

    def read_ahead(self, part: str, start: int, nbytes: int) -> None:
        """Asks the system for bytes of a part, unless the first one is in its cache: asking takes time."""
        descriptor, offset = self.place(part, start)
        try:
            os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
        except OSError:
            for first in range(start, start + nbytes, _AHEAD_NBYTES):
                size = min(_AHEAD_NBYTES, start + nbytes - first)
                self._checkpoint.will_need(self._weight.parts[part], first, size)

    def read_bytes(self, part: str, start: int, nbytes: int) -> NDArray[Any]:
        """Returns bytes of a part, in memory that the next call overwrites."""
        data = as_array(self._buffers.tensor(f"{self._key} bytes", "U8", (nbytes,)))
        self._checkpoint.read_into(self._weight.parts[part], start, data.data)
        return data

    def read(self, top: int, height: int) -> Parts:
        """Returns the parts of some rows, in memory that the next call overwrites."""
        return {part: self._read_part(part, top, spec) for part, spec in self._specs(height).items()}

    def coded(self, top: int, height: int, at_once: int) -> Coded | None:
        """Returns some rows as they are stored, for kernels that read and decode them; None if none can.

        Args:
            top: the first row.
            height: how many there are.
            at_once: how many to read at once.
        """
        from dsv3_tools.kernels.cpu_errors import Coded
        from dsv3_tools.kernels.cpu_files import IN_MEMORY

        fmt, part = self.format, self.format.weight_part
        if fmt in (Dense("F16"), Dense("F64")) or not self._has_neighbours():
            return None
        if fmt.row_alignment is None:
            parts, place = self.read(top, height), IN_MEMORY
        else:
            specs = self._specs(height)
            spec = specs.pop(part)
            room = self._buffers.tensor(
                f"{self._key} {part}", spec.dtype, (min(at_once, height), *spec.shape[1:])
            )
            parts = {name: self._read_part(name, top, spec) for name, spec in specs.items()} | {part: room}
            start = self._offset(part, top)
            self.read_ahead(part, start, spec.nbytes)
            place = self.place(part, start)
        if isinstance(fmt, Dense):
            return Coded.floats(bits_of(parts[part]), place)
        grid = self._grid(parts)
        scales = fmt.scales([parts])[0] if isinstance(fmt, FP8Block) else grid.scales.float()
        zeros = None if grid.zeros is None else grid.zeros.numpy()
        return Coded(bits_of(grid.codes), scales.numpy(), zeros, grid.block_size, place)

    def decode(self, parts: Parts, dtype: str) -> tuple[Tensor, int]:
        """Returns the weight of `parts` as `dtype`, rounded once, and how many elements are not finite."""
        fmt = self.format
        if isinstance(fmt, Dense):
            return self._convert(parts["weight"], fmt.dtype, dtype)
        shape = (self._height(parts), self._columns)
        direct = dtype if dtype in ("BF16", "F32") else "F32"
        out = self._buffers.tensor(f"{self._key} decoded", direct, shape)
        count = int(fmt.decode_into([parts], [out])[0])
        return self._convert(out, direct, dtype) if dtype != direct else (out, count)

    def decode_with_steps(self, parts: Parts) -> tuple[Tensor, int, Steps | None, bool]:
        """Returns the weight in float32, the number of elements not finite, and the steps of its codes.

        The last says whether every scale is a finite number other than 0.
        """
        fmt = self.format
        weight, count = self.decode(parts, "F32")
        if not self._has_neighbours():
            return weight, count, None, True
        import numpy as np

        from dsv3_tools.kernels.compare import Steps

        grid = self._grid(parts)
        values = np.ascontiguousarray(grid.scales.float().numpy())
        usable = np.isfinite(values) & (values != 0)
        inverse = np.zeros_like(values)
        np.divide(1.0, values, out=inverse, where=usable)
        if isinstance(fmt, FP8Block) and fmt.inverse_scales:
            inverse = np.where(usable, values, np.float32(0))
        inverse = np.where(np.isfinite(inverse), inverse, np.float32(0))
        low = np.full_like(values, -8.0 if isinstance(fmt, INT4) else -128.0)
        if grid.zeros is not None:
            low = np.ascontiguousarray(-grid.zeros.float().numpy())
        return weight, count, Steps(inverse, low, grid.span, grid.block_size), bool(usable.all())

    def _has_neighbours(self) -> bool:
        """Whether columns that share a scale are neighbours."""
        return not (isinstance(self.format, INT4GPTQ) and self.format.act_order)

    def _grid(self, parts: Parts) -> _Grid:
        """Returns codes in the weight's order, and what they stand for."""
        fmt = self.format
        if isinstance(fmt, INT4):
            codes = fmt.load(parts)
            size = self._columns // codes.scales.shape[1]
            return _Grid(codes.packed, codes.scales, codes.zeros, 15.0, (1, size))
        assert isinstance(fmt, (FP8Block, INT8Block, INT8Channel))
        block_size = (1, self._columns) if isinstance(fmt, INT8Channel) else fmt.block_size
        span = None if isinstance(fmt, FP8Block) else 255.0
        return _Grid(parts["weight"], parts[fmt.scale_part], None, span, block_size)

    def _convert(self, weight: Tensor, dtype: str, target: str) -> tuple[Tensor, int]:
        import torch

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
        """Returns the specs of the parts of so many rows, but for those that follow from the shape."""
        specs = self.format.parts((height, self._columns))
        return {part: spec for part, spec in specs.items() if part not in self._fixed}

    def _read_part(self, part: str, top: int, spec: TensorSpec) -> Tensor:
        tensor = self._buffers.tensor(f"{self._key} {part}", spec.dtype, spec.shape)
        self._checkpoint.read_into(self._weight.parts[part], self._offset(part, top), as_array(tensor).data)
        return tensor

    def _offset(self, part: str, top: int) -> int:
        """Returns the byte of a part at which row `top` of the weight, or the block that it is in, begins."""
        unit = self._unit[part]
        own_rows = unit.shape[0]
        return top * own_rows // self._together * (unit.nbytes // own_rows)


def bits_of(tensor: Tensor) -> NDArray[Any]:
    """Returns a contiguous tensor's elements, those that are not integers as their bits."""
    import torch

    kinds = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
    return (tensor.view(kinds[tensor.element_size()]) if tensor.is_floating_point() else tensor).numpy()
