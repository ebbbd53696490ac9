"""The logic of the Triton INT8 and INT4 kernels, on the CPU, in Triton's interpreter.

As in `test_triton_fp8_block.py`: tiles, masks, tables, branches and integers are what this can show;
`tests/gpu/test_triton_integer_gpu.py` is the proof on the device. Everything runs in a pytest of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3_tools.errors import FormatError
from dsv3_tools.kernels import reference, reference_integer

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")  # of what a branch then does not use
inside = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_the_interpreter")
GROUP = [(33, 136), (1, 8), (0, 128), (5, 528), (3, 128)]
ODD = [(5, 257), (1, 1), (20, 3)]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
POISON = 0x55


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
    """Makes the interpreter round `tl.fma` once, and float32 to bfloat16 to nearest even."""
    if INTERPRETED:
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


def _random_codes(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=g).view(torch.float8_e4m3fn)


def _random_scale(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=g) * 2e-4 + 1e-5


def _sound(codes: Tensor) -> Tensor:
    raw = codes.view(torch.uint8)
    return (raw ^ ((raw & 0x7F) == 0x7F).to(torch.uint8)).view(torch.float8_e4m3fn)


def _assert_same(got: Tensor, expected: Tensor, what: str) -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), what
    bits = BITS[got.element_size()]
    different = (got.view(bits) != expected.view(bits)).nonzero()
    if len(different):
        at = tuple(different[0].tolist())
        raise AssertionError(
            f"{what}: {len(different)} differ, first at {at}: got {got.view(bits)[at].item():#x}, "
            f"expected {expected.view(bits)[at].item():#x}"
        )


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    nbytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
    return torch.full((nbytes,), POISON, dtype=torch.uint8).view(dtype).view(shape)


def _values(weight: Tensor, scale: Tensor | None, block_size: tuple[int, int]) -> Tensor:
    if scale is None:
        return weight
    return weight.to(torch.float32) * reference.spread_blocks(scale, weight.shape, block_size)


def _check_int8(
    weights: list[Tensor],
    block_size: tuple[int, int] | None,
    fp8_scales: list[Tensor] | None = None,
    fp8_block_size: tuple[int, int] = (128, 128),
    **options: Any,
) -> list[Tensor]:
    """Runs the kernel over poisoned memory and compares with the reference; block size None is a row each."""
    from dsv3_tools.kernels import triton_integer

    codes = [_poisoned(tuple(w.shape), torch.int8) for w in weights]
    shapes = [(w.shape[0], 1) if block_size is None else _blocks(tuple(w.shape), block_size) for w in weights]
    scales = [_poisoned(shape, torch.float32) for shape in shapes]
    options |= {"fp8_scales": fp8_scales, "fp8_block_size": fp8_block_size}
    if block_size is None:
        counts = triton_integer.quantize_int8_channel_into(weights, codes, scales, **options)
    else:
        counts = triton_integer.quantize_int8_block_into(
            weights, codes, scales, block_size=block_size, **options
        )
    for i, weight in enumerate(weights):
        fp8_scale = None if fp8_scales is None else fp8_scales[i]
        values = _values(weight, fp8_scale, fp8_block_size)
        choice = fp8_scale if block_size == fp8_block_size else None
        if not weight.numel():
            continue
        expected, expected_scale = reference_integer.quantize_int8_block(
            values, block_size=block_size or (1, weight.shape[1]), fp8_scale=choice
        )
        _assert_same(scales[i], expected_scale, f"scale of item {i} {tuple(weight.shape)} {block_size}")
        _assert_same(codes[i], expected, f"item {i} {tuple(weight.shape)} {block_size}")
        assert counts[i] == (~values.isfinite()).sum()
    assert counts.dtype == torch.int32
    return scales


def _check_int4(
    weights: list[Tensor],
    group_size: int,
    fp8_scales: list[Tensor] | None = None,
    fp8_block_size: tuple[int, int] = (128, 128),
    *,
    symmetric: bool = True,
    search: str = "absmax",
    **options: Any,
) -> None:
    from dsv3_tools.kernels.triton_group import Tiling
    from dsv3_tools.kernels.triton_integer import quantize_int4_group_into

    def groups(weight: Tensor) -> tuple[int, int]:
        return weight.shape[0], weight.shape[1] // group_size

    options.setdefault("tiling", Tiling(rows=4, columns=256, vector=16, num_warps=4))  # few: quick
    packed = [_poisoned((w.shape[0], w.shape[1] // 8), torch.int32) for w in weights]
    scales = [_poisoned(groups(w), torch.bfloat16) for w in weights]
    zeros = None if symmetric else [_poisoned(groups(w), torch.uint8) for w in weights]
    counts = quantize_int4_group_into(
        weights, packed, scales, zeros, search=search, fp8_scales=fp8_scales,
        fp8_block_size=fp8_block_size, **options
    )  # fmt: skip
    for i, weight in enumerate(weights):
        values = _values(weight, None if fp8_scales is None else fp8_scales[i], fp8_block_size)
        what = f"of item {i} {tuple(weight.shape)} {group_size} {symmetric} {search}"
        if not weight.numel():
            continue
        expected, scale, zero = reference_integer.quantize_int4_group(
            values, group_size=group_size, symmetric=symmetric, search=search
        )
        _assert_same(scales[i], scale, f"scale {what}")
        if zero is not None and zeros is not None:
            _assert_same(zeros[i], zero, f"zero {what}")
        _assert_same(packed[i], expected, f"packed {what}")
        assert counts[i] == (~values.isfinite()).sum()


def _rare(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    """Stretches of 64 columns of sizes from subnormal to the largest, of zeros, and of NaN and infinity."""
    weight = torch.randn(shape, generator=g)
    powers = (0, -30, -120, -126, -135, -147, 100, 120, 125, 0, 0, 0)
    for i in range(-(-shape[1] // 64)):
        weight[:, i * 64 : i * 64 + 64] *= 2.0 ** powers[i % len(powers)]
    weight[:, 9 * 64 : 10 * 64] = -0.0
    weight[1, 10 * 64 :: 3] = float("nan")
    weight[-1, 10 * 64 :: 5] = float("-inf")
    weight[-1, 11 * 64 :] = float("nan")
    return weight


SCALES = [
    1.0,
    2e-4,
    2.0**-149,
    -3e-5,
    2.0**117,
    0.0,
    2.0**120,
    3.4e38,
    float("inf"),
    float("nan"),
    -0.0,
    2.0**-129,
]


@inside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_size", [None, (32, 128), (8, 64)])
def test_dequantizes_int8(dtype: torch.dtype, block_size: tuple[int, int] | None) -> None:
    from dsv3_tools.kernels import triton_integer

    g = torch.Generator().manual_seed(0)
    shapes = [*GROUP, *ODD]
    codes = [torch.randint(-128, 128, shape, generator=g, dtype=torch.int8) for shape in shapes]
    scale_shapes = [(s[0], 1) if block_size is None else _blocks(s, block_size) for s in shapes]
    scales = [_random_scale(shape, g) for shape in scale_shapes]
    some = torch.tensor(SCALES)
    scales[0].view(-1)[: len(some)] = some[: scales[0].numel()]
    scales[-1].view(-1)[:1] = float("nan")
    for chosen in ([*range(len(shapes))], [0, 3, 4], [0]):
        outs = [_poisoned(shapes[i], dtype) for i in chosen]
        lists = [codes[i] for i in chosen], [scales[i] for i in chosen], outs
        if block_size is None:
            counts = triton_integer.dequantize_int8_channel_into(*lists)
        else:
            counts = triton_integer.dequantize_int8_block_into(*lists, block_size=block_size)
        for k, i in enumerate(chosen):
            expected = reference_integer.dequantize_int8_block(
                codes[i], scales[i], block_size=block_size or (1, shapes[i][1]), dtype=dtype
            )
            _assert_same(outs[k], expected, f"item {i} {shapes[i]}")
            assert counts[k] == (~expected.isfinite()).sum()


@inside
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantizes_int4(dtype: torch.dtype, symmetric: bool) -> None:
    from dsv3_tools.kernels.triton_integer import dequantize_int4_group_into

    g = torch.Generator().manual_seed(1)
    for group_size, scale_dtype in ((8, torch.float32), (24, torch.float16), (128, torch.bfloat16)):
        shapes = [(5, group_size * 3), (0, group_size), (17, group_size), (2, group_size * 9)]
        packed = [
            torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=g).to(torch.int32)
            for rows, columns in shapes
        ]
        scales = [_random_scale((r, c // group_size), g).to(scale_dtype) for r, c in shapes]
        scales[0].view(-1)[: len(SCALES)] = torch.tensor(SCALES)[: scales[0].numel()].to(scale_dtype)
        zeros = [torch.randint(0, 16, s.shape, generator=g, dtype=torch.uint8) for s in scales]
        outs = [_poisoned(shape, dtype) for shape in shapes]
        counts = dequantize_int4_group_into(packed, scales, None if symmetric else zeros, outs)
        for i in (0, 2, 3):
            expected = reference_integer.dequantize_int4_group(
                packed[i], scales[i], None if symmetric else zeros[i], dtype=dtype
            )
            _assert_same(outs[i], expected, f"item {i} {shapes[i]} {scale_dtype}")
            assert counts[i] == (~expected.isfinite()).sum()


@inside
@pytest.mark.parametrize("block_size", [None, (32, 128), (4, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantizes_weights_to_int8(dtype: torch.dtype, block_size: tuple[int, int] | None) -> None:
    g = torch.Generator().manual_seed(2)
    sound = [(torch.randn(shape, generator=g) * 0.02).to(dtype) for shape in GROUP]
    _check_int8(sound, block_size)
    _check_int8([*sound[3:], _rare((6, 12 * 64), g).to(dtype)], block_size)
    _check_int8([torch.randn(shape, generator=g).to(dtype) for shape in ODD], block_size)


@inside
@pytest.mark.parametrize("block_size", [None, (32, 128), (8, 64)])
@pytest.mark.parametrize("fp8_block_size", [(32, 128), (3, 24)])
def test_quantizes_fp8_to_int8(fp8_block_size: tuple[int, int], block_size: tuple[int, int] | None) -> None:
    g = torch.Generator().manual_seed(3)
    shapes = [*GROUP, *ODD]
    codes = [_random_codes(shape, g) for shape in shapes]
    codes[:3] = [_sound(c) for c in codes[:3]]
    scales = [_random_scale(_blocks(shape, fp8_block_size), g) for shape in shapes]
    _check_int8(codes[:5], block_size, scales[:5], fp8_block_size)
    scales[3].view(-1)[: len(SCALES)] = torch.tensor(SCALES)[: scales[3].numel()]
    _check_int8(codes, block_size, scales, fp8_block_size)


@inside
def test_int8_blocks_take_the_scale_with_the_smaller_error() -> None:
    """Codes of all ranges, scales of all kinds, and errors that are nearly or exactly equal."""
    g = torch.Generator().manual_seed(4)
    codes = _random_codes((16 * 16, 128), g)
    for block in range(16):  # ever fewer exponents, and then NaN for some
        part = codes.view(torch.uint8)[block * 16 : block * 16 + 16]
        part &= 0x8F | (0x7F >> (block // 2) << 3 & 0x78)
        if block > 13:
            part[3, 5:7] = 0x7F
    scales = _random_scale((16, 8), g)
    scales[4:, :3] = torch.tensor(SCALES)[:, None]
    got = _check_int8([codes], (16, 16), [scales], (16, 16))[0]
    assert 0 < (got == scales * 4).sum() < got.numel()
    # Only codes that both scales reproduce: no error at either.
    even = torch.tensor([0x00, 0x7E, 0xFE], dtype=torch.uint8).repeat(16, 43)[:, :128].contiguous()
    _check_int8([even.view(torch.float8_e4m3fn)], (16, 16), [scales[:1]], (16, 16))
    _check_int8([codes[:2, :5].contiguous()], (1, 1), [_random_scale((2, 5), g)], (1, 1))


@inside
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_quantizes_to_int4(search: str, symmetric: bool) -> None:
    g = torch.Generator().manual_seed(5)
    options = {"symmetric": symmetric, "search": search}
    for group_size, dtype in ((8, torch.float16), (128, torch.float32)):
        shapes = [(4, group_size * 3), (0, group_size), (1, group_size)]
        weights = [torch.randn(shape, generator=g) * 0.02 for shape in shapes]
        weights.append(_rare((2, 12 * 64), g))
        weights[0][1] = weights[0][1].abs()
        weights[0][2] = -weights[0][2].abs()
        _check_int4([w.to(dtype) for w in weights], group_size, **options)
        _check_int4([weights[0].to(dtype)], group_size, **options)
    shapes = [(9, 256), (1, 384)]
    for fp8_block_size in ((8, 128), (3, 24)):
        codes = [_random_codes(shape, g) for shape in shapes]
        scales = [_random_scale(_blocks(shape, fp8_block_size), g) for shape in shapes]
        _check_int4([_sound(c) for c in codes], 64, scales, fp8_block_size, **options)
        scales[1].view(-1)[: len(SCALES)] = torch.tensor(SCALES)[: scales[1].numel()]
        _check_int4(codes, 128, scales, fp8_block_size, **options)


@inside
def test_the_kernel_tries_the_reference_factors() -> None:
    import triton
    import triton.language as tl

    from dsv3_tools.kernels import triton_int4

    @triton.jit
    def kernel(out):  # type: ignore[no-untyped-def]
        i = tl.arange(0, 16)
        tl.store(out + i, triton_int4._factor(i))

    got = torch.zeros(16)
    globals()["triton_int4"] = triton_int4
    kernel[1,](got)
    assert torch.equal(got, torch.tensor(reference_integer.SCALE_FACTORS))


@inside
def test_refuses_what_the_tiles_cannot_be() -> None:
    from dsv3_tools.kernels import triton_integer

    weight, codes = torch.zeros(2, 96), torch.zeros(2, 96, dtype=torch.int8)
    with pytest.raises(FormatError, match="powers of two"):
        triton_integer.quantize_int8_block_into([weight], [codes], [torch.zeros(1, 1)], block_size=(2, 96))
    with pytest.raises(FormatError, match="powers of two"):
        triton_integer.dequantize_int8_block_into([codes], [torch.zeros(1, 1)], [weight], block_size=(0, 1))
    packed, bf16 = torch.zeros(2, 12, dtype=torch.int32), torch.bfloat16
    with pytest.raises(FormatError, match="group_size: got 96"):
        triton_integer.quantize_int4_group_into([weight], [packed], [torch.zeros(2, 1, dtype=bf16)], None)
    with pytest.raises(FormatError, match="a multiple of 8"):
        triton_integer.dequantize_int4_group_into([packed], [torch.zeros(2, 24)], None, [weight])
    with pytest.raises(ValueError, match="item 0: scale"):
        triton_integer.quantize_int8_channel_into([weight], [codes], [torch.zeros(1, 2)])
    with pytest.raises(ValueError, match="item 0: read"):
        triton_integer.quantize_int8_channel_into(
            [weight], [codes], [torch.zeros(2, 1)], fp8_scales=[torch.zeros(1, 1)]
        )
    with pytest.raises(ValueError, match="search"):
        triton_integer.quantize_int4_group_into([weight], [packed], [], None, search="best")


@inside
def test_tilings_agree() -> None:
    from dsv3_tools.kernels.triton_group import Tiling

    g = torch.Generator().manual_seed(6)
    codes, scale = _sound(_random_codes((17, 144), g)), _random_scale((1, 2), g)
    weight = torch.randn(3, 384, generator=g).to(torch.bfloat16)
    for tiling in (Tiling(8, 128, 16, 4), Tiling(2, 256, 8, 4)):
        _check_int8([codes, codes[:1]], (128, 128), [scale, scale[:1]], tiling=tiling)
        _check_int8([codes], None, [scale], tiling=tiling)
        _check_int8([weight], (128, 128), tiling=tiling)
        _check_int4([weight, weight[:1]], 128, tiling=tiling)


def test_one_remainder_rounds_every_quotient_to_the_right_int8() -> None:
    """What `triton_int8._codes` rests on, by exact arithmetic, for a sample of what is enumerated there.

    One remainder rounds a quotient V / S of 24-bit integers wrongly only within 2**-22 units of the middle N
    between two float32, and that matters only next to a half of an odd integer. So V 2**k is S N + D with
    a tiny D: all S are looked through for those (here every 64th of those whose last bits allow it).
    """
    scales = (np.arange(64, 128, dtype=np.int64) << 17)[:, None] + np.arange(-16, 17)
    scales = scales[(scales >= 1 << 23) & (scales < 1 << 24)]
    found = []
    for odd in range(1, 256, 2):
        half = odd << (25 - odd.bit_length())  # odd / 2, in units of half its last place
        for middle in (half + 1, half - 1):
            for k in (23, 24, 25):
                product = scales * middle
                value = (product + (1 << (k - 1))) >> k
                near = (np.abs((value << k) - product) <= 16) & (value >= 1 << 23) & (value < 1 << 24)
                found += [(int(v), int(s), k, odd) for v, s in zip(value[near], scales[near], strict=True)]
    assert len(found) > 1000
    for value, scale, k, odd in found:
        v = Fraction(value << k, 1 << (25 - odd.bit_length())) / 2
        true, reciprocal = _float32(v / scale), _float32(Fraction(1, scale))
        quotient = _float32(v * reciprocal)
        once = _float32(quotient - reciprocal * (quotient * scale - v))
        assert abs(true - Fraction(odd, 2)) < Fraction(1, 1000)
        assert round(once) == round(true)


def _float32(x: Fraction) -> Fraction:
    """Returns x, normal and positive, rounded to 24 significant bits, to nearest even."""
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > x
    unit = Fraction(2) ** (exponent - 23)
    return round(x / unit) * unit
