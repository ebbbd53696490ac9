"""Weights and an oracle for each format, for the tests of formats."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.formats import Dense, FP8Block
from dsv3_tools.formats.base import Format
from dsv3_tools.kernels import reference


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def make_weight(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, *, seed: int = 0) -> Tensor:
    """Returns normal numbers with a few large ones, so that most FP8 codes occur, subnormal ones too."""
    generator = torch.Generator().manual_seed(seed + 1000 * sum(shape))
    weight = torch.randn(shape, generator=generator) * 0.02
    return (weight * 10.0 ** torch.randint(-3, 2, shape, generator=generator)).to(dtype)


def expected_parts(fmt: Format, weight: Tensor) -> dict[str, Tensor]:
    """What the reference arithmetic gives."""
    if isinstance(fmt, FP8Block):
        codes, scale = reference.quantize_fp8_block(
            weight, block_size=fmt.block_size, scale_fmt=fmt.scale_fmt
        )
        return {"weight": codes, "weight_scale_inv": scale}
    assert isinstance(fmt, Dense), f"no oracle for {fmt.name}"
    return {"weight": weight.to(torch_dtype(fmt.dtype))}


def expected_weight(fmt: Format, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    if isinstance(fmt, FP8Block):
        return reference.dequantize_fp8_block(
            parts["weight"], parts["weight_scale_inv"], block_size=fmt.block_size, dtype=dtype
        )
    return parts["weight"].to(dtype)
