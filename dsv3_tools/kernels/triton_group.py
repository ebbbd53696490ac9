"""One launch for a whole group of weights: the host's side of every CUDA kernel.

A group's items are cut into tiles, numbered one after the other. A program finds its item by a binary
search in a small table (first tile, rows, columns, pointers) that travels with the call, and a group of
one needs no table at all; `triton_bits.py` has the device's side. Nothing here waits for the device.

What is done per call and per item is done while the device waits for it: hence whole lists at a time, plain
integers, and no torch operation that can be spared.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from dsv3_tools.errors import FormatError

__all__ = [
    "FP8_CONVERSIONS_SINCE",
    "Group",
    "Operand",
    "Tiling",
    "check_block_size",
    "has_fp8_conversions",
    "triton_dtype",
]

FP8_CONVERSIONS_SINCE = (8, 9)
"""The first compute capability that converts to and from FP8 in hardware."""


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a weight is cut into programs.

    Args:
        rows: rows of a tile, or of the part of it that a program holds at once: each kernel says.
        columns: columns of a tile, a power of two: the contiguous run.
        vector: one-byte elements that a thread loads or stores at once, 8 or 16.
        num_warps: warps of a program.
        max_registers: of a thread, a multiple of 8, where the compiler would take too many (of groups whose
            accesses are `vector` wide); 0 for its choice.
    """

    rows: int
    columns: int
    vector: int
    num_warps: int
    max_registers: int = 0


class Operand(NamedTuple):
    """The tensors of one kind, one per item, that a call reads or writes.

    Args:
        what: they are called in errors.
        tensors: one per item; None where the call has none, and the kernels get null pointers.
        granule: rows and columns of the weight that share an element; 0 is all of them. A weight has (1, 1).
        dtype: what they must be; None is whatever the first is.
    """

    what: str
    tensors: Sequence[Tensor] | None
    granule: tuple[int, int] = (1, 1)
    dtype: torch.dtype | None = None

    def shape(self, weight: torch.Size) -> tuple[int, ...]:
        """Returns the shape that goes with a weight's."""
        (rows, columns), (high, wide) = weight, self.granule
        return -(-rows // high) if high else 1, -(-columns // wide) if wide else 1


class Group:
    """The items of one call as the kernels see them: sizes, tiles, and a pointer for each operand.

    Args:
        operands: in the order of the kernel's pointers; the first is shaped like the weight, granule (1, 1).
        tile: rows and columns of a tile; 0 is all of them.
        vector: elements that kernels access at once if all rows and pointers allow it.

    Raises:
        ValueError: for what would make a kernel read or write outside of its tensors.
    """

    def __init__(self, operands: Sequence[Operand], tile: tuple[int, int], vector: int) -> None:
        weights = operands[0].tensors
        if not weights:
            raise ValueError("a group has no items, expected at least 1")
        self.device = weights[0].device
        self.device_index = weights[0].get_device()
        shapes = [weight.shape for weight in weights]
        sizes: dict[torch.Size, tuple[int, int, int]] = {}  # rows, columns, tiles
        rows, columns, first_tiles = [], [], []
        num_tiles = any_columns = 0
        for i, shape in enumerate(shapes):
            known = sizes.get(shape)
            if known is None:
                known = sizes[shape] = _sizes(i, shape, tile)
                any_columns |= known[1]
            first_tiles.append(num_tiles)
            rows.append(known[0])
            columns.append(known[1])
            num_tiles += known[2]
        if num_tiles >= 1 << 31:
            raise ValueError(f"a group of {num_tiles} tiles, expected under 2**31; pass fewer weights")
        self._num_tiles = num_tiles
        self._table = table = [first_tiles, rows, columns]
        align = vector
        while any_columns % align:
            align = 8 if align > 8 else 1
        for operand in operands:
            tensors = operand.tensors
            if tensors is None:
                table.append([0] * len(shapes))
                continue
            pointers, any_pointer = self._pointers(operand, tensors, shapes)
            table.append(pointers)
            if operand.granule in _FINE:  # accessed as wide as the weight is
                itemsize, per_element = tensors[0].dtype.itemsize, operand.granule[1]
                while align > 1 and any_pointer % min(align * itemsize // per_element, 16):
                    align = 8 if align > 8 else 1
        self.align = align
        """Elements that every row is a multiple of, and every pointer (up to 16 bytes of them)."""

    def _pointers(
        self, operand: Operand, tensors: Sequence[Tensor], shapes: Sequence[torch.Size]
    ) -> tuple[list[int], int]:
        """Returns the addresses of an operand's tensors, and all of them ORed."""
        if len(tensors) != len(shapes):
            raise ValueError(f"{operand.what}: got {len(tensors)} items, expected {len(shapes)}")
        dtype, device = operand.dtype or tensors[0].dtype, self.device_index
        is_weight = operand.granule == (1, 1)
        expected: dict[torch.Size, tuple[int, ...]] = {}
        pointers: list[int] = []
        any_pointer = 0
        for tensor, weight in zip(tensors, shapes, strict=True):
            shape = weight if is_weight else expected.get(weight)
            if shape is None:
                shape = expected[weight] = operand.shape(weight)
            if not (
                tensor.dtype is dtype
                and tensor.shape == shape
                and tensor.is_contiguous()
                and tensor.get_device() == device
            ):
                layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
                raise ValueError(
                    f"item {len(pointers)}: {operand.what}: got {tensor.dtype} {tuple(tensor.shape)} on "
                    f"{tensor.device}, {layout}, expected {dtype} {tuple(shape)} on {self.device}, contiguous"
                )
            pointer = tensor.data_ptr()
            pointers.append(pointer)
            any_pointer |= pointer
        return pointers, any_pointer

    def launch(self, kernel: Any, constants: tuple[Any, ...], tiling: Tiling) -> Tensor:
        """Launches `kernel` on the current stream of the items' device; returns the counts."""
        if self.device_index < 0:  # Triton's interpreter
            return self._launch(kernel, constants, tiling, 0)
        if self.device_index == torch.cuda.current_device():
            return self._launch(kernel, constants, tiling, self._stream())
        with torch.cuda.device(self.device_index):
            return self._launch(kernel, constants, tiling, self._stream())

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self.device_index).cuda_stream)

    def _launch(self, kernel: Any, constants: tuple[Any, ...], tiling: Tiling, stream: int) -> Tensor:
        num_items = len(self._table[0])
        if num_items == 1:
            table = 0
            counts = _zeroed_count(self.device, stream)
        else:
            words, counts, num_items = _to_device(self._table, self._num_tiles, self.device)
            table = words.data_ptr()  # reused no sooner than this stream gets past the launch
        if not self._num_tiles:
            return counts
        constants = (*constants, table != 0, self.align)
        arguments = (table, counts.data_ptr(), num_items, *(c[0] for c in self._table[1:]), *constants)
        key = (kernel, self.device_index, tiling, *constants)
        compiled = _compiled.get(key)
        if compiled is not None:
            compiled[self._num_tiles, 1, 1](*arguments, stream=stream)
        else:
            options: dict[str, Any] = {"num_warps": tiling.num_warps, "enable_fp_fusion": False}
            if tiling.max_registers and self.align == tiling.vector:  # narrow accesses need more
                options["maxnreg"] = tiling.max_registers
            compiled = kernel[self._num_tiles,](*arguments, **options)
            if isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
                _compiled[key] = compiled
        return counts


_FINE = ((1, 1), (1, 8))
"""Granules of weights, and of packed INT4."""


def _sizes(i: int, shape: torch.Size, tile: tuple[int, int]) -> tuple[int, int, int]:
    """Returns rows, columns and the number of tiles of item i."""
    if len(shape) != 2:
        raise ValueError(f"item {i}: got shape {tuple(shape)}, expected a matrix")
    rows, columns = shape
    return rows, columns, -(-rows // (tile[0] or rows or 1)) * -(-columns // (tile[1] or columns or 1))


_compiled: dict[tuple[Any, ...], CompiledKernel] = {}
"""Compiled kernels by (function, device, tiling, constants).

Triton's own look-up specializes every argument of every launch again, which takes longer than the launch.
"""


def _to_device(
    table: Sequence[Sequence[int]], num_tiles: int, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """Returns the table, int64 `[columns, length]`, a zeroed int32 count per item, and the length.

    The length is a power of two, for the binary search; what pads the table comes after all tiles. One copy,
    and nothing waits. The pinned source may be dropped at once: torch's host allocator does not reuse it
    before the copy is done. The device memory comes from the current stream's pool, so its reuse comes
    after the launch that reads it.
    """
    num_items = len(table[0])
    length = 1 << (num_items - 1).bit_length()
    num_table = length * len(table)
    num_words = num_table + (num_items + 1) // 2
    host = torch.empty(num_words, dtype=torch.int64, pin_memory=device.type == "cuda")
    array = host.numpy()
    array[:length] = num_tiles
    array[num_table:] = 0
    items = np.fromiter(itertools.chain.from_iterable(table), np.int64, num_items * len(table))
    array[:num_table].reshape(-1, length)[:, :num_items] = items.reshape(-1, num_items)
    words = host.to(device, non_blocking=True)
    return words, words[num_table:].view(torch.int32)[:num_items], length


_zeros = threading.local()


def _zeroed_count(device: torch.device, stream: int) -> Tensor:
    """Returns one int32 zero of its own.

    A launch that zeroes four bytes takes a tenth of the time of dequantizing one expert weight. So zeros
    are made 1024 at a time, per thread and stream, and each is given out once.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():  # a replay must zero it again
        return torch.zeros(1, dtype=torch.int32, device=device)
    pools: dict[tuple[torch.device, int], list[Tensor]] = _zeros.__dict__.setdefault("pools", {})
    pool = pools.get((device, stream))
    if not pool:
        pool = pools[device, stream] = list(torch.zeros(1024, dtype=torch.int32, device=device).split(1))
    return pool.pop()


@functools.cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def has_fp8_conversions(tensors: Sequence[Tensor]) -> bool:
    """Returns whether the tensors' device converts FP8 in hardware; Triton's interpreter does not."""
    device_index = tensors[0].get_device() if len(tensors) else -1
    return device_index >= 0 and _capability(device_index) >= FP8_CONVERSIONS_SINCE


def check_block_size(block_size: tuple[int, int], *, max_elements: int | None = None) -> None:
    """Refuses what the kernels' tiles cannot be.

    Raises:
        FormatError: a `block_size` that is not two powers of two, or of more than `max_elements`.
    """
    if any(size < 1 or size & (size - 1) for size in block_size):
        raise FormatError(
            f"block_size: got {tuple(block_size)}, expected powers of two (the tiles of the CUDA kernels are)"
        )
    if max_elements is not None and block_size[0] * block_size[1] > max_elements:
        raise FormatError(
            f"block_size: got {tuple(block_size)}, expected at most {max_elements} elements (a block must "
            "fit into the registers of one CUDA program); quantize on the CPU"
        )


_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Returns Triton's name for the dtype of a weight.

    Raises:
        ValueError: not bfloat16, float16 or float32.
    """
    try:
        return _TRITON_DTYPES[dtype]
    except KeyError:
        raise ValueError(f"dtype: got {dtype}, expected bfloat16, float16 or float32") from None
