"""The numba kernels give the bytes of `reference.py`, for every code, scale, shape and odd number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3_tools.errors import FormatError
from dsv3_tools.kernels import cpu_fp8_block, reference

FP8 = torch.float8_e4m3fn
BITS = {FP8: torch.uint8, torch.bfloat16: torch.int16, torch.float32: torch.int32}
BLOCK_SIZES = [(128, 128), (64, 32), (1, 128), (3, 5), (200, 1100)]
SHAPES = [(1, 1), (129, 257), (128, 128), (576, 7168), (7, 1025)]
SCALES = {
    "one": 1.0,
    "power of two": 2.0**-13,
    "large power of two": 2.0**118,
    "first that may overflow": 2.0**119,
    "just under it": math.nextafter(2.0**119, 0.0),
    "huge": 3.4e38,
    "smallest normal": 2.0**-126,
    "subnormal": 2.0**-149 * 12345,
    "smallest subnormal": 2.0**-149,
    "zero": 0.0,
    "negative zero": -0.0,
    "negative": -0.00037,
    "negative huge": -3.0e38,
    "infinite": math.inf,
    "negative infinite": -math.inf,
    "NaN": math.nan,
    "typical": 0.00021437,
}


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Compares bits; shows the first difference's coordinate and both values."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    a, b = got.view(BITS[got.dtype]), expected.view(BITS[got.dtype])
    if not torch.equal(a, b):
        where = tuple((a != b).nonzero()[0].tolist())
        pytest.fail(
            f"{int((a != b).sum())} of {a.numel()} differ, first at {where}: "
            f"got {float(got[where])!r} ({int(a[where]):#x}), "
            f"expected {float(expected[where])!r} ({int(b[where]):#x})"
        )


def num_nonfinite(values: Tensor) -> int:
    return int((~values.float().isfinite()).sum())


def num_blocks(shape: Sequence[int], block_size: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block_size[0]), -(-shape[1] // block_size[1])


def random_codes(shape: tuple[int, int], seed: int, *, nan: bool = True) -> Tensor:
    codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    if not nan:
        codes[(codes & 0x7F) == 0x7F] = 0x35
    return codes.view(FP8)


def random_scale(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 4e-4 + 1e-5


def random_weight(shape: tuple[int, int], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(dtype)


def random_bits(shape: tuple[int, int], seed: int, dtype: torch.dtype) -> Tensor:
    """Returns numbers of all magnitudes: subnormal, huge, infinite and NaN ones among them."""
    generator = torch.Generator().manual_seed(seed)
    nbytes = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 256, (shape[0], shape[1] * nbytes), generator=generator, dtype=torch.uint8)
    return data.view(dtype)


def check_dequantize(
    codes: Tensor, scale: Tensor, dtype: torch.dtype, block_size: tuple[int, int] = (128, 128)
) -> None:
    out = torch.full(codes.shape, 7.0, dtype=dtype)
    counts = cpu_fp8_block.dequantize_fp8_block_into([codes], [scale], [out], block_size=block_size)
    expected = reference.dequantize_fp8_block(codes, scale, block_size=block_size, dtype=dtype)
    assert_same(out, expected)
    assert counts.dtype == torch.int32
    assert counts.tolist() == [num_nonfinite(expected)]


def check_quantize(
    weight: Tensor,
    block_size: tuple[int, int] = (128, 128),
    scale_fmt: str = "f32",
    like: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    codes = torch.full(weight.shape, 0x55, dtype=torch.uint8).view(FP8)
    scale = torch.full(num_blocks(weight.shape, block_size), 7.0)
    counts = cpu_fp8_block.quantize_fp8_block_into(
        [weight],
        [codes],
        [scale],
        block_size=block_size,
        scale_fmt=scale_fmt,
        likes=None if like is None else [like],
    )
    expected = reference.quantize_fp8_block(weight, block_size=block_size, scale_fmt=scale_fmt, like=like)
    assert_same(scale, expected[1])
    assert_same(codes, expected[0])
    assert counts.dtype == torch.int32
    assert counts.tolist() == [num_nonfinite(weight)]
    return codes, scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
def test_dequantize_every_code(scale: float, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    check_dequantize(codes.view(16, 16), torch.tensor([[scale]]), dtype)
    # Finite codes only, one per row: no NaN code sends the row to the careful loop.
    check_dequantize(codes[:0x7F].view(127, 1).contiguous(), torch.tensor([[scale]]), dtype)


@pytest.mark.parametrize("payload", [0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0xFFC00000])
def test_dequantize_nan_scale_has_one_spelling(payload: int) -> None:
    scale = torch.tensor([[payload]], dtype=torch.uint32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        check_dequantize(torch.arange(256, dtype=torch.uint8).view(FP8).view(1, 256)[:, :128], scale, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_shapes(shape: tuple[int, int], block_size: tuple[int, int], dtype: torch.dtype) -> None:
    scale = random_scale(num_blocks(shape, block_size), 1)
    check_dequantize(random_codes(shape, 2, nan=False), scale, dtype, block_size)


def test_dequantize_one_nan_code_counts_once() -> None:
    codes = random_codes((300, 300), 3, nan=False)
    codes.view(torch.uint8)[131, 299] = 0xFF
    check_dequantize(codes, random_scale((3, 3), 4), torch.bfloat16)


def test_dequantize_no_rows() -> None:
    out = torch.empty(0, 128, dtype=torch.bfloat16)
    counts = cpu_fp8_block.dequantize_fp8_block_into(
        [random_codes((0, 128), 0)], [random_scale((0, 1), 0)], [out]
    )
    assert counts.tolist() == [0]


def test_dequantize_from_an_odd_address() -> None:
    """A safetensors file may hold a float32 tensor at any byte."""
    buffer = bytearray(1 + 4 * 6)
    scale = torch.frombuffer(buffer, dtype=torch.uint8)[1:].view(torch.uint8)
    scale.copy_(random_scale((2, 3), 8).view(torch.uint8).flatten())
    check_dequantize(
        random_codes((130, 300), 9),
        torch.frombuffer(buffer, dtype=torch.float32, offset=1).view(2, 3),
        torch.bfloat16,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    block_size=st.sampled_from(BLOCK_SIZES),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    nan=st.booleans(),
    any_scale=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_dequantize_property(
    *,
    rows: int,
    columns: int,
    block_size: tuple[int, int],
    dtype: torch.dtype,
    nan: bool,
    any_scale: bool,
    seed: int,
) -> None:
    blocks = num_blocks((rows, columns), block_size)
    scale = random_bits(blocks, seed, torch.float32) if any_scale else random_scale(blocks, seed)
    check_dequantize(random_codes((rows, columns), seed, nan=nan), scale, dtype, block_size)


@pytest.mark.parametrize("scale_fmt", ["f32", "ue8m0"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_shapes(shape: tuple[int, int], block_size: tuple[int, int], scale_fmt: str) -> None:
    check_quantize(random_weight(shape, 1, torch.bfloat16), block_size, scale_fmt)


@pytest.mark.parametrize("scale_fmt", ["f32", "ue8m0"])
def test_quantize_every_bfloat16(scale_fmt: str) -> None:
    """All 65,536 numbers, NaN and infinities among them, in blocks of like and of unlike magnitude."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(256, 256)
    shuffled = every.flatten()[torch.randperm(65536, generator=torch.Generator().manual_seed(5))]
    for block_size in [(1, 128), (3, 7), (128, 128)]:
        check_quantize(every, block_size, scale_fmt)
        check_quantize(shuffled.view(256, 256), block_size, scale_fmt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantize_near_every_rounding_boundary(dtype: torch.dtype) -> None:
    """A block with largest magnitude 448 has scale 1: its weights hit codes, midpoints and neighbours."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(FP8).float()
    middle = (codes[:-1] + codes[1:]) / 2
    points = torch.cat([codes, middle])
    up, down = points.nextafter(torch.tensor(1e9)), points.nextafter(torch.tensor(-1e9))
    values = torch.cat([points, up.clamp(max=448), down])
    weight = torch.cat([values, -values]).to(dtype)[None]
    _, scale = check_quantize(weight, (1, weight.shape[1]))
    assert scale.tolist() == [[1.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale_fmt", ["f32", "ue8m0"])
def test_quantize_not_finite(dtype: torch.dtype, scale_fmt: str) -> None:
    weight = random_weight((300, 300), 6, dtype)
    weight[0, 0], weight[127, 128], weight[299, 299] = math.nan, math.inf, -math.inf
    weight[130, 10:20] = -math.nan
    codes, _ = check_quantize(weight, scale_fmt=scale_fmt)
    assert int((codes.view(torch.uint8) == 0x7F).sum()) == 13


@pytest.mark.parametrize("scale_fmt", ["f32", "ue8m0"])
def test_quantize_zeros(scale_fmt: str) -> None:
    weight = torch.zeros(130, 300, dtype=torch.bfloat16)
    weight[3, :] = -0.0
    weight[5, 200] = 1.0
    codes, scale = check_quantize(weight, scale_fmt=scale_fmt)
    assert scale[0, 0] == 1.0
    assert codes.view(torch.uint8)[3, 0] == 0x80
    tiny = torch.full((2, 2), 2.0**-149)
    assert check_quantize(tiny, scale_fmt=scale_fmt)[1].tolist() == [[1.0]]
    check_quantize(torch.full((2, 2), 2.0**-140), scale_fmt=scale_fmt)
    check_quantize(torch.full((2, 2), math.nan), scale_fmt=scale_fmt)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    block_size=st.sampled_from(BLOCK_SIZES),
    scale_fmt=st.sampled_from(["f32", "ue8m0"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    wild=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_quantize_property(
    *,
    rows: int,
    columns: int,
    block_size: tuple[int, int],
    scale_fmt: str,
    dtype: torch.dtype,
    wild: bool,
    seed: int,
) -> None:
    make = random_bits if wild else random_weight
    check_quantize(make((rows, columns), seed, dtype), block_size, scale_fmt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (576, 7168), (129, 2305)], ids=str)
def test_likes_give_back_all_bytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes = random_codes(shape, 7, nan=False)
    scale = random_scale(num_blocks(shape, (128, 128)), 8)
    weight = reference.dequantize_fp8_block(codes, scale).to(dtype)
    again, scale_again = check_quantize(weight, like=scale)
    assert_same(again, codes)
    assert_same(scale_again, scale)


@pytest.mark.parametrize("where", [(0, 0), (128, 128), (255, 255), (299, 1500)], ids=str)
def test_likes_one_changed_element_changes_one_block(where: tuple[int, int]) -> None:
    codes = random_codes((300, 1501), 9, nan=False)
    codes.view(torch.uint8)[where] = 0x35
    scale = random_scale((3, 12), 10)
    weight = reference.dequantize_fp8_block(codes, scale)
    weight.view(torch.int16)[where] += 1
    _, scale_again = check_quantize(weight, like=scale)
    changed = (scale_again != scale).nonzero().tolist()
    assert changed == [[where[0] // 128, where[1] // 128]]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf], ids=str)
def test_likes_with_a_weight_that_is_not_finite(number: float) -> None:
    codes = random_codes((200, 200), 11, nan=False)
    scale = random_scale((2, 2), 12)
    weight = reference.dequantize_fp8_block(codes, scale)
    weight[150, 10] = number
    check_quantize(weight, like=scale)


@pytest.mark.parametrize("like", [0.0, -1.0, math.nan, math.inf], ids=str)
def test_likes_that_are_no_scale_are_not_kept(like: float) -> None:
    for weight in (random_weight((4, 4), 13, torch.bfloat16), torch.zeros(4, 4, dtype=torch.bfloat16)):
        codes, scale = torch.empty(4, 4, dtype=FP8), torch.empty(1, 1)
        cpu_fp8_block.quantize_fp8_block_into([weight], [codes], [scale], likes=[torch.tensor([[like]])])
        expected_codes, expected_scale = reference.quantize_fp8_block(weight)
        assert_same(scale, expected_scale)
        assert_same(codes, expected_codes)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    block_size=st.sampled_from(BLOCK_SIZES),
    scale_fmt=st.sampled_from(["f32", "ue8m0"]),
    wild=st.booleans(),
    num_changed=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_likes_property(
    *,
    rows: int,
    columns: int,
    block_size: tuple[int, int],
    scale_fmt: str,
    wild: bool,
    num_changed: int,
    seed: int,
) -> None:
    blocks = num_blocks((rows, columns), block_size)
    like = random_scale(blocks, seed)
    if wild:
        like = random_bits(blocks, seed, torch.float32).abs()
        like = torch.where(like.isfinite() & (like > 0), like, torch.ones_like(like))
    codes = random_codes((rows, columns), seed, nan=wild)
    weight = reference.dequantize_fp8_block(codes, like, block_size=block_size)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_changed):
        i = int(torch.randint(0, rows, (), generator=generator))
        j = int(torch.randint(0, columns, (), generator=generator))
        weight.view(torch.int16)[i, j] ^= 1
    check_quantize(weight, block_size, scale_fmt, like)


def test_group_equals_items_one_by_one() -> None:
    shapes = [(1, 1), (130, 300), (256, 128)]
    codes = [random_codes(shape, i) for i, shape in enumerate(shapes)]
    scales = [random_scale(num_blocks(shape, (128, 128)), i) for i, shape in enumerate(shapes)]
    outs = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
    counts = cpu_fp8_block.dequantize_fp8_block_into(codes, scales, outs)
    expected = [reference.dequantize_fp8_block(c, s) for c, s in zip(codes, scales, strict=True)]
    assert counts.tolist() == [num_nonfinite(e) for e in expected]
    for out, e in zip(outs, expected, strict=True):
        assert_same(out, e)

    new_codes, new_scales = [torch.empty_like(c) for c in codes], [torch.empty_like(s) for s in scales]
    counts = cpu_fp8_block.quantize_fp8_block_into(outs, new_codes, new_scales, likes=scales)
    assert counts.tolist() == [num_nonfinite(e) for e in expected]
    for i, out in enumerate(outs):
        expected_codes, expected_scale = reference.quantize_fp8_block(out, like=scales[i])
        assert_same(new_codes[i], expected_codes)
        assert_same(new_scales[i], expected_scale)


def test_threads_do_not_disturb_each_other() -> None:
    codes = [random_codes((256, 1024), i) for i in range(8)]
    scale = random_scale((2, 8), 1)

    def convert(c: Tensor) -> Tensor:
        out = torch.empty(c.shape, dtype=torch.bfloat16)
        cpu_fp8_block.dequantize_fp8_block_into([c], [scale], [out])
        return out

    with ThreadPoolExecutor(4) as pool:
        for c, out in zip(codes, pool.map(convert, codes), strict=True):
            assert_same(out, reference.dequantize_fp8_block(c, scale))


def test_misshaped_arguments_are_refused() -> None:
    codes, scale = random_codes((130, 130), 0), random_scale((2, 2), 0)
    out = torch.empty(130, 130, dtype=torch.bfloat16)
    dequantize, quantize = cpu_fp8_block.dequantize_fp8_block_into, cpu_fp8_block.quantize_fp8_block_into
    with pytest.raises(FormatError, match=r"item 0: scales of \(1, 2\)"):
        dequantize([codes], [scale[:1]], [out])
    with pytest.raises(FormatError, match="codes"):
        dequantize([codes.t()], [scale], [out])
    with pytest.raises(FormatError, match="weights"):
        dequantize([codes], [scale], [out.half()])
    with pytest.raises(FormatError, match="likes"):
        quantize([out], [codes], [scale], likes=[scale[:1]])
    with pytest.raises(FormatError, match="positive block sizes"):
        dequantize([codes], [scale], [out], block_size=(0, 128))
    with pytest.raises(ValueError, match="scale_fmt"):
        quantize([out], [codes], [scale], scale_fmt="e8m0")
