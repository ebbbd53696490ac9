"""Weights, shapes and an oracle for each format, for the tests of formats.

The oracle's arithmetic is that of `kernels.reference` and `kernels.reference_integer`; its INT4 layouts are
written here, in numpy, and share nothing with `formats` and `kernels.int4_layouts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.formats import (
    FORMATS,
    INT4,
    INT4AWQ,
    INT4GPTQ,
    Dense,
    FP8Block,
    INT4Packed,
    INT8Block,
    INT8Channel,
)
from dsv3_tools.formats.base import Format
from dsv3_tools.kernels import reference, reference_integer

Words = NDArray[np.uint8]

IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

READ_ONLY: dict[str, Format] = {
    "int4_packed_g16": INT4Packed(group_size=16),
    "int4_packed_rows": INT4Packed(group_size=-1),
    "int4_packed_f32_i32": INT4Packed(group_size=32, scale_dtype="F32", shape_dtype="I32"),
    "int4_gptq_f16": INT4GPTQ(scale_dtype="F16"),
    "int4_gptq_v2": INT4GPTQ(group_size=64, version=2),
    "int4_gptq_rows": INT4GPTQ(group_size=-1, scale_dtype="F16"),
    "int4_gptq_asymmetric": INT4GPTQ(symmetric=False, scale_dtype="F16"),
    "int4_gptq_v2_asymmetric": INT4GPTQ(group_size=32, symmetric=False, version=2),
    "int4_awq_f16_asymmetric": INT4AWQ(symmetric=False, scale_dtype="F16"),
    "int4_awq_rows_asymmetric": INT4AWQ(group_size=-1, symmetric=False, scale_dtype="F16"),
}
"""INT4 as other tools write it: read only, or written in layouts that `FORMATS` has in other sizes."""

INT4_FORMATS: dict[str, INT4] = {
    name: fmt for name, fmt in {**FORMATS, **READ_ONLY}.items() if isinstance(fmt, INT4)
}


class Grid(NamedTuple):
    """INT4 codes before any layout: uint8 `[rows, columns]`, scales and uint8 zeros `[rows, groups]`."""

    codes: Words
    scales: Tensor
    zeros: Words

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(code - zero) x scale, in float64, which is exact, then rounded to `dtype`."""
        size = self.codes.shape[1] // self.scales.shape[1]
        zeros = np.repeat(self.zeros, size, 1).astype(np.float64)
        differences = torch.from_numpy(self.codes.astype(np.float64) - zeros)
        return (differences * self.scales.double().repeat_interleave(size, 1)).to(dtype)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def all_bits(parts: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in parts.items()}


def empty_parts(fmt: Format, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Returns memory for the parts, filled with 0xA5 so that what is not written shows."""
    parts = {}
    for name, spec in fmt.parts(shape).items():
        filled = torch.full((spec.nbytes,), 0xA5, dtype=torch.uint8)
        parts[name] = filled.view(torch_dtype(spec.dtype)).reshape(spec.shape)
    return parts


def make_weight(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, *, seed: int = 0) -> Tensor:
    """Returns normal numbers with a few large ones, so that most FP8 codes occur, subnormal ones too."""
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    weight = torch.randn(shape, generator=generator) * 0.02
    return (weight * 10.0 ** torch.randint(-3, 2, shape, generator=generator)).to(dtype)


def make_grid(fmt: INT4, shape: tuple[int, int], seed: int = 0) -> Grid:
    """Returns codes and zeros at random, all sixteen of each, and scales that no quantizer would choose."""
    random = np.random.default_rng(seed)
    groups = shape[1] // (shape[1] if fmt.group_size == -1 else fmt.group_size)
    zeros = random.integers(0, 16, (shape[0], groups), np.uint8)
    scales = torch.from_numpy(10.0 ** random.uniform(-4, -1, (shape[0], groups)))
    return Grid(
        random.integers(0, 16, shape, np.uint8),
        scales.to(torch_dtype(fmt.scale_dtype)),
        np.full_like(zeros, 8) if fmt.symmetric else zeros,
    )


def can_store(fmt: Format, shape: tuple[int, ...]) -> bool:
    """Whether a weight of `shape` has parts in `fmt`, from what the layouts are."""
    if isinstance(fmt, Dense):
        return True
    if len(shape) != 2 or 0 in shape:
        return False
    if not isinstance(fmt, INT4):
        return True
    rows, columns = shape
    packs_rows = isinstance(fmt, (INT4GPTQ, INT4AWQ)) or not fmt.symmetric
    whole_groups = fmt.group_size == -1 or columns % fmt.group_size == 0
    return columns % 8 == 0 and whole_groups and (rows % 8 == 0 or not packs_rows)


# Layouts.


def to_words(codes: Words, order: tuple[int, ...] = IN_ORDER) -> Tensor:
    """Packs uint8 `[m, 8 x n]` into int32 `[m, n]`; `order` names the neighbour in each four bits."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for place, neighbour in enumerate(order):
        words += codes[:, neighbour::8].astype(np.uint32) * np.uint32(16**place)
    return torch.from_numpy(words.view(np.int32))


def from_words(words: Tensor, order: tuple[int, ...] = IN_ORDER) -> Words:
    """Returns uint8 `[m, 8 x n]` of int32 `[m, n]`: the reverse of `to_words`."""
    unsigned = words.contiguous().numpy().view(np.uint32)
    codes = np.zeros((unsigned.shape[0], 8 * unsigned.shape[1]), np.uint8)
    for place, neighbour in enumerate(order):
        codes[:, neighbour::8] = unsigned // np.uint32(16**place) % np.uint32(16)
    return codes


def less(fmt: INT4GPTQ) -> int:
    """What version 1 of GPTQ takes off a zero point, in four bits."""
    return 1 if fmt.version == 1 else 0


def lay_out(fmt: INT4, grid: Grid) -> dict[str, Tensor]:
    """Returns the parts that store `grid`."""
    codes, scales, zeros = grid
    rows, columns = codes.shape
    if isinstance(fmt, INT4Packed):
        integer = torch.int64 if fmt.shape_dtype == "I64" else torch.int32
        parts = {"weight_packed": to_words(codes), "weight_scale": scales}
        parts["weight_shape"] = torch.tensor([rows, columns], dtype=integer)
        if not fmt.symmetric:
            parts["weight_zero_point"] = to_words(zeros.T).t().contiguous()
        return parts
    if isinstance(fmt, INT4GPTQ):
        stored = (zeros.T - less(fmt)) % 16
        return {
            "qweight": to_words(codes).t().contiguous(),
            "qzeros": to_words(stored.astype(np.uint8)),
            "scales": scales.t().contiguous(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // scales.shape[1]),
        }
    assert isinstance(fmt, INT4AWQ), f"no oracle for {fmt.name}"
    return {
        "qweight": to_words(codes.T, AWQ_ORDER),
        "qzeros": to_words(zeros.T, AWQ_ORDER),
        "scales": scales.t().contiguous(),
    }


def read_out(fmt: INT4, parts: Mapping[str, Tensor]) -> Grid:
    """Returns what the parts store, codes in the order of the columns on disk; the reverse of `lay_out`."""
    if isinstance(fmt, INT4Packed):
        scales = parts["weight_scale"]
        zeros = np.full(tuple(scales.shape), 8, np.uint8)
        if not fmt.symmetric:
            zeros = from_words(parts["weight_zero_point"].t()).T
        return Grid(from_words(parts["weight_packed"]), scales, zeros)
    scales = parts["scales"].t().contiguous()
    if isinstance(fmt, INT4GPTQ):
        zeros = (from_words(parts["qzeros"]).T + less(fmt)) % 16
        return Grid(from_words(parts["qweight"].t()), scales, zeros)
    assert isinstance(fmt, INT4AWQ), f"no oracle for {fmt.name}"
    zeros = from_words(parts["qzeros"], AWQ_ORDER).T
    return Grid(from_words(parts["qweight"], AWQ_ORDER).T, scales, zeros)


# What the reference arithmetic gives.


def expected_parts(
    fmt: Format,
    weight: Tensor,
    *,
    fp8_scale: Tensor | None = None,
    fp8_block_size: tuple[int, int] = (128, 128),
) -> dict[str, Tensor]:
    """Returns the parts of a weight, which was decoded from FP8 if there is an `fp8_scale`."""
    if isinstance(fmt, FP8Block):
        codes, scale = reference.quantize_fp8_block(
            weight, block_size=fmt.block_size, scale_fmt=fmt.scale_fmt
        )
        return {"weight": codes, fmt.scale_name: scale}
    if isinstance(fmt, INT8Block):
        like = fp8_scale if fp8_block_size == fmt.block_size else None
        codes, scale = reference_integer.quantize_int8_block(
            weight, block_size=fmt.block_size, fp8_scale=like
        )
        return {"weight": codes, "weight_scale_inv": scale}
    if isinstance(fmt, INT8Channel):
        codes, scale = reference_integer.quantize_int8_channel(weight)
        return {"weight": codes, "weight_scale": scale}
    if isinstance(fmt, INT4):
        packed, scale, zero = reference_integer.quantize_int4_group(
            weight, group_size=fmt.group_size, symmetric=fmt.symmetric, search=fmt.search
        )
        zeros = np.full(tuple(scale.shape), 8, np.uint8) if zero is None else zero.numpy()
        return lay_out(fmt, Grid(from_words(packed), scale, zeros))
    assert isinstance(fmt, Dense), f"no oracle for {fmt.name}"
    return {"weight": weight.to(torch_dtype(fmt.dtype))}


def expected_weight(fmt: Format, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    if isinstance(fmt, FP8Block):
        return reference.dequantize_fp8_block(
            parts["weight"], parts[fmt.scale_name], block_size=fmt.block_size, dtype=dtype
        )
    if isinstance(fmt, INT8Block):
        return reference_integer.dequantize_int8_block(
            parts["weight"], parts["weight_scale_inv"], block_size=fmt.block_size, dtype=dtype
        )
    if isinstance(fmt, INT8Channel):
        scale = parts["weight_scale"].float()
        return reference_integer.dequantize_int8_channel(parts["weight"], scale, dtype=dtype)
    if isinstance(fmt, INT4):
        grid = read_out(fmt, parts)
        zeros = torch.from_numpy(np.ascontiguousarray(grid.zeros))
        return reference_integer.dequantize_int4_group(to_words(grid.codes), grid.scales, zeros, dtype=dtype)
    assert isinstance(fmt, Dense), f"no oracle for {fmt.name}"
    return parts["weight"].to(dtype)


def spread_scale(fmt: Format, parts: Mapping[str, Tensor]) -> Tensor:
    """Returns the scale of every element, float64 `[rows, columns]`."""
    if isinstance(fmt, INT4):
        grid = read_out(fmt, parts)
        return grid.scales.double().repeat_interleave(grid.codes.shape[1] // grid.scales.shape[1], 1)
    rows, columns = parts["weight"].shape
    assert fmt.scale_part is not None
    scale: Any = parts[fmt.scale_part].double()
    if isinstance(fmt, INT8Channel):
        return scale.expand(rows, columns)
    assert isinstance(fmt, (FP8Block, INT8Block)), f"no scales of {fmt.name}"
    scale = scale.repeat_interleave(fmt.block_size[0], 0)[:rows]
    return scale.repeat_interleave(fmt.block_size[1], 1)[:, :columns]
