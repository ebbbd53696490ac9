"""The logic of the Triton FP8 block kernels, on the CPU, in Triton's interpreter.

The interpreter shows that tiles, masks, tables, branches and the integer arithmetic are right. It proves
nothing about rounding on a GPU: it computes with numpy. It even rounds `tl.fma` twice and truncates
float32 to bfloat16; `_right_arithmetic` replaces those two so that bytes can be compared at all.
`tests/gpu/test_triton_fp8_block_gpu.py` is the proof on the device.

Triton decides at import whether it interprets, so everything runs in a pytest of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_tools.errors import FormatError
from dsv3_tools.kernels import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_the_interpreter")
GROUP = [(129, 257), (1, 1), (0, 128), (256, 144), (16, 1040), (3, 128)]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@pytest.mark.skipif(INTERPRETED, reason="this is the inner pytest")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-vvv", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "test_tilings_agree PASSED" in done.stdout


@pytest.fixture(autouse=True)
def _right_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        cast = InterpreterBuilder.cast_impl

        def fma(_: Any, x: Any, y: Any, z: Any) -> Any:
            product = x.data.astype(np.float64) * y.data.astype(np.float64)
            return TensorHandle((product + z.data).astype(np.float32), z.dtype.scalar)

        def cast_impl(builder: Any, source: Any, dtype: Any) -> Any:
            if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
                rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
                return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), dtype.scalar)
            return cast(builder, source, dtype)

        monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)
        monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
        np.seterr(all="ignore")


def _blocks(shape: tuple[int, int], block_size: tuple[int, int] = (128, 128)) -> tuple[int, int]:
    return -(-shape[0] // block_size[0]), -(-shape[1] // block_size[1])


def _random_codes(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)


def _random_scale(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * 2e-4 + 1e-5


def _assert_same(got: Tensor, expected: Tensor, what: str) -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    bits = BITS[got.element_size()]
    different = (got.view(bits) != expected.view(bits)).nonzero()
    if len(different):
        at = tuple(different[0].tolist())
        raise AssertionError(
            f"{what}: {len(different)} differ, first at {at}: got {got.view(bits)[at].item():#x}, "
            f"expected {expected.view(bits)[at].item():#x}"
        )


def _dequantize(
    codes: list[Tensor], scales: list[Tensor], *, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> None:
    """Runs the kernel over poisoned outs and compares with the reference."""
    from dsv3_tools.kernels.triton_fp8_block import dequantize_fp8_block_into

    outs = [torch.full(c.shape, 123.0, dtype=dtype) for c in codes]
    counts = dequantize_fp8_block_into(codes, scales, outs, **options)
    block_size = options.get("block_size", (128, 128))
    for i, (code, scale, out) in enumerate(zip(codes, scales, outs, strict=True)):
        expected = reference.dequantize_fp8_block(code, scale, block_size=block_size, dtype=dtype)
        _assert_same(out, expected, f"item {i} {tuple(code.shape)}")
        assert counts[i] == (~expected.isfinite()).sum()
    assert counts.dtype == torch.int32


def _quantize(weights: list[Tensor], *, likes: list[Tensor] | None = None, **options: Any) -> list[Tensor]:
    """Runs the kernel over poisoned outs, compares with the reference, and returns the scales."""
    from dsv3_tools.kernels.triton_fp8_block import quantize_fp8_block_into

    block_size = options.get("block_size", (128, 128))
    codes = [torch.full(w.shape, 0x55, dtype=torch.uint8).view(torch.float8_e4m3fn) for w in weights]
    scales = [torch.full(_blocks(tuple(w.shape), block_size), 123.0) for w in weights]
    counts = quantize_fp8_block_into(weights, codes, scales, likes=likes, **options)
    for i, weight in enumerate(weights):
        expected, expected_scale = reference.quantize_fp8_block(
            weight,
            block_size=block_size,
            scale_fmt=options.get("scale_fmt", "f32"),
            like=None if likes is None else likes[i],
        )
        _assert_same(scales[i], expected_scale, f"scale of item {i} {tuple(weight.shape)}")
        _assert_same(codes[i], expected, f"item {i} {tuple(weight.shape)}")
        assert counts[i] == (~weight.isfinite()).sum()
    return scales


@inside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_codes_with_sound_and_unsound_scales(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    sound = [1.0, 2e-4, 2.0**-126, 2.0**-149, -3e-5, 2.0**117, 0.0]
    unsound = [2.0**120, 3.4e38, float("inf"), float("-inf"), float("nan"), -0.0]
    scales = torch.tensor(sound + unsound)
    codes = every.view(torch.uint8).repeat(len(scales), 1).view(torch.float8_e4m3fn)
    _dequantize(list(codes[:, None, :]), [s.repeat(1, 2) for s in scales], dtype=dtype)


@inside
def test_finite_codes_take_the_way_without_repairs() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E
    _dequantize([codes.view(torch.float8_e4m3fn)[None]], [torch.tensor([[1.7e-4, 3.1e-5]])])


@inside
def test_dequantizes_a_group_of_mixed_shapes() -> None:
    g = torch.Generator().manual_seed(0)
    codes = [_random_codes(shape, g) for shape in GROUP]
    codes[3].view(torch.uint8)[torch.isnan(codes[3].to(torch.float32))] = 0x01
    _dequantize(codes, [_random_scale(_blocks(shape), g) for shape in GROUP])


@inside
@pytest.mark.parametrize("block_size", [(1, 128), (32, 32), (128, 1), (4, 4096)])
def test_other_block_sizes(block_size: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(1)
    shapes = [(19, 272), (5, 4112)] if block_size[1] == 4096 else [(19, 272), (40, 16)]
    codes = [_random_codes(shape, g) for shape in shapes]
    _dequantize(codes, [_random_scale(_blocks(s, block_size), g) for s in shapes], block_size=block_size)
    _quantize([torch.randn(shape, generator=g) for shape in shapes], block_size=block_size)


@inside
@pytest.mark.parametrize("block_size", [(96, 128), (128, 0), (-1, 1)])
def test_refuses_block_sizes_that_are_not_powers_of_two(block_size: tuple[int, int]) -> None:
    from dsv3_tools.kernels.triton_fp8_block import dequantize_fp8_block_into, quantize_fp8_block_into

    weight, scale = torch.zeros(2, 2), torch.zeros(1, 1)
    codes = weight.to(torch.float8_e4m3fn)
    with pytest.raises(FormatError, match="powers of two"):
        dequantize_fp8_block_into([codes], [scale], [weight], block_size=block_size)
    with pytest.raises(FormatError, match="powers of two"):
        quantize_fp8_block_into([weight], [codes], [scale], block_size=block_size)


@inside
def test_refuses_a_scale_of_the_wrong_shape() -> None:
    from dsv3_tools.kernels.triton_fp8_block import dequantize_fp8_block_into

    codes = torch.zeros(129, 2, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"item 0: scale"):
        dequantize_fp8_block_into([codes], [torch.zeros(1, 1)], [torch.zeros(129, 2)])


@inside
@pytest.mark.parametrize("scale_fmt", ["f32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantizes_a_group_of_mixed_shapes(dtype: torch.dtype, scale_fmt: str) -> None:
    g = torch.Generator().manual_seed(2)
    weights = [(torch.randn(shape, generator=g) * 0.02).to(dtype) for shape in GROUP]
    _quantize(weights, scale_fmt=scale_fmt)


@inside
@pytest.mark.parametrize("scale_fmt", ["f32", "ue8m0"])
def test_quantizes_what_is_rare(scale_fmt: str) -> None:
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(7, 9 * 128, generator=g)
    powers = (0, -30, -120, -135, -147, 100, 120, 0, 0)
    for block, power in enumerate(powers):
        weight[:, block * 128 : block * 128 + 128] *= 2.0**power
    weight[:, 7 * 128 : 8 * 128] = -0.0
    weight[3, 8 * 128 :: 3] = float("nan")
    weight[4, 8 * 128 :: 5] = float("-inf")
    _quantize([weight, weight[:3]], block_size=(8, 128), scale_fmt=scale_fmt)
    as_bf16 = [weight.to(torch.bfloat16), torch.full((2, 2), float("nan"), dtype=torch.bfloat16)]
    _quantize(as_bf16, block_size=(8, 128), scale_fmt=scale_fmt)


@inside
def test_likes_give_back_codes_and_scales_of_unchanged_blocks() -> None:
    g = torch.Generator().manual_seed(4)
    shapes = [(130, 272), (64, 128)]
    codes = [_random_codes(shape, g) for shape in shapes]
    for code in codes:
        code.view(torch.uint8)[torch.isnan(code.to(torch.float32))] = 0x80
    likes = [_random_scale(_blocks(shape), g) for shape in shapes]
    weights = [reference.dequantize_fp8_block(c, s) for c, s in zip(codes, likes, strict=True)]
    weights[0][129, 200] *= 1.5
    scales = _quantize(weights, likes=likes)
    unchanged = scales[0] == likes[0]
    assert unchanged.tolist() == [[True, True, True], [True, False, True]]
    assert torch.equal(scales[1], likes[1])
    _quantize(weights, likes=likes, scale_fmt="ue8m0")


@inside
def test_tilings_agree() -> None:
    from dsv3_tools.kernels.triton_fp8_block import Tiling

    g = torch.Generator().manual_seed(5)
    codes, scale = _random_codes((130, 144), g), _random_scale((2, 2), g)
    weight = torch.randn(130, 144, generator=g).to(torch.bfloat16)
    for tiling in (Tiling(8, 128, 16, 4), Tiling(128, 256, 8, 4), Tiling(16, 512, 8, 8)):
        _dequantize([codes, codes[:1]], [scale, scale[:1]], tiling=tiling)
        _quantize([weight, weight[:1]], tiling=tiling)
