"""The Triton INT8 and INT4 kernels on a GPU, bit for bit against `reference_integer.py` run on the CPU.

What comes from FP8 runs twice: with the device's FP8 conversions, where it has them, and with the integer
arithmetic of older devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_tools import kernels
from dsv3_tools.kernels import reference, reference_integer

triton_group = pytest.importorskip("dsv3_tools.kernels.triton_group", reason="needs triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PARTIAL = [(576, 7168), (1, 8), (129, 264), (3, 128), (130, 1040), (128, 8), (24, 7176), (5, 18432)]
ODD = [(129, 257), (1, 1), (300, 5001), (7, 3)]
EXPERT = [(2048, 7168), (7168, 2048)]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BLOCK = (128, 128)


@pytest.fixture(params=["conversions", "integers"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "integers":
        monkeypatch.setattr(triton_group, "FP8_CONVERSIONS_SINCE", (1000, 0))
    elif torch.cuda.get_device_capability() < triton_group.FP8_CONVERSIONS_SINCE:
        pytest.skip("needs compute capability 8.9")


both_ways = pytest.mark.usefixtures("_both_ways")


def _blocks(shape: Sequence[int], block_size: tuple[int, int] = BLOCK) -> tuple[int, int]:
    return -(-shape[0] // block_size[0]), -(-shape[1] // block_size[1])


def _random_codes(shape: Sequence[int], g: torch.Generator, *, nan: bool = True) -> Tensor:
    codes = torch.randint(0, 256, tuple(shape), dtype=torch.uint8, generator=g)
    if not nan:
        codes[codes & 0x7F == 0x7F] ^= 1
    return codes.view(torch.float8_e4m3fn)


def _random_scale(shape: Sequence[int], g: torch.Generator) -> Tensor:
    return torch.rand(tuple(shape), generator=g) * 2e-4 + 1e-5


def _any_bits(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=g, dtype=torch.int64).to(torch.int32)


def _scales_of_all_kinds(g: torch.Generator) -> Tensor:
    """Powers of two over the whole range, subnormal numbers, random bit patterns, and what is not a scale."""
    powers = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)
    near = torch.cat([powers * 1.0000001, powers * 1.9999999, powers * 1.37]).to(F32)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, 2.0**-149, 1e-40])
    return torch.cat([powers.to(F32), near, -near, _any_bits((1000,), g).view(F32), special])


def _ranged(rows: int, g: torch.Generator, run: int = 32) -> Tensor:
    """Runs of a range each, from all subnormal to near the largest, and random bits, zeros, NaN, infinity."""
    powers = torch.arange(-150, 126, 2)
    columns = len(powers) * run
    weight = torch.randn(rows, columns, generator=g).clamp(-3, 3).to(torch.float64)
    weight *= (2.0 ** powers.to(torch.float64)).repeat_interleave(run)
    weight = weight.to(F32)
    weight[1] = _any_bits((columns,), g).view(F32)
    weight[2] = weight[2].abs()
    weight[3] = -weight[3].abs()
    weight[4, ::3] = float("nan")
    weight[5, ::7] = float("-inf")
    weight[6] = -0.0
    weight[7] = float("nan")
    return weight


def _assert_same(got: Tensor, expected: Tensor, what: str) -> None:
    """Compares bytes; the message has the first coordinate and both values."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), what
    bits = BITS[got.element_size()]
    got = got.cpu()
    if torch.equal(got.view(bits), expected.view(bits)):
        return
    different = (got.view(bits) != expected.view(bits)).nonzero()
    at = tuple(different[0].tolist())
    mask = (1 << 8 * got.element_size()) - 1
    raise AssertionError(
        f"{what}: {len(different)} of {got.numel()} differ, first at {at}: "
        f"got {got.view(bits)[at].item() & mask:#x}, expected {expected.view(bits)[at].item() & mask:#x}"
    )


def _poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    nbytes = torch.empty(tuple(shape), dtype=dtype, device="meta").nbytes
    return torch.full((nbytes,), 0x55, dtype=torch.uint8, device="cuda").view(dtype).view(tuple(shape))


def _on_gpu(tensors: Sequence[Tensor] | None) -> list[Tensor] | None:
    return None if tensors is None else [t.cuda() for t in tensors]


def _values(
    weights: Sequence[Tensor], scales: Sequence[Tensor] | None, block_size: tuple[int, int]
) -> list[Tensor]:
    if scales is None:
        return list(weights)
    return [
        w.to(F32) * reference.spread_blocks(s, w.shape, block_size)
        for w, s in zip(weights, scales, strict=True)
    ]


def _check_int8(
    weights: Sequence[Tensor],
    block_size: tuple[int, int] | None,
    fp8_scales: Sequence[Tensor] | None = None,
    fp8_block_size: tuple[int, int] = BLOCK,
) -> list[Tensor]:
    """Compares with the reference, and returns the scales; block size None is a row each."""
    codes = [_poisoned(w.shape, torch.int8) for w in weights]
    shapes = [(w.shape[0], 1) if block_size is None else _blocks(w.shape, block_size) for w in weights]
    scales = [_poisoned(shape, F32) for shape in shapes]
    lists = [w.cuda() for w in weights], codes, scales
    options: dict[str, Any] = {"fp8_scales": _on_gpu(fp8_scales), "fp8_block_size": fp8_block_size}
    if block_size is None:
        counts = kernels.quantize_int8_channel_into(*lists, **options)
    else:
        counts = kernels.quantize_int8_block_into(*lists, block_size=block_size, **options)
    values = _values(weights, fp8_scales, fp8_block_size)
    for i, value in enumerate(values):
        choice = None if fp8_scales is None or block_size != fp8_block_size else fp8_scales[i]
        expected, scale = reference_integer.quantize_int8_block(
            value, block_size=block_size or (1, value.shape[1]), fp8_scale=choice
        )
        what = f"{i} {tuple(value.shape)} {weights[i].dtype} {block_size}"
        _assert_same(scales[i], scale, f"scale {what}")
        _assert_same(codes[i], expected, f"codes {what}")
    assert counts.tolist() == [int((~v.isfinite()).sum()) for v in values]
    return scales


def _check_int4(
    weights: Sequence[Tensor],
    group_size: int,
    fp8_scales: Sequence[Tensor] | None = None,
    fp8_block_size: tuple[int, int] = BLOCK,
    *,
    symmetric: bool = True,
    search: str = "absmax",
) -> None:
    groups = [(w.shape[0], w.shape[1] // group_size) for w in weights]
    packed = [_poisoned((w.shape[0], w.shape[1] // 8), torch.int32) for w in weights]
    scales = [_poisoned(shape, BF16) for shape in groups]
    zeros = None if symmetric else [_poisoned(shape, torch.uint8) for shape in groups]
    counts = kernels.quantize_int4_group_into(
        [w.cuda() for w in weights],
        packed,
        scales,
        zeros,
        search=search,
        fp8_scales=_on_gpu(fp8_scales),
        fp8_block_size=fp8_block_size,
    )
    values = _values(weights, fp8_scales, fp8_block_size)
    for i, value in enumerate(values):
        expected, scale, zero = reference_integer.quantize_int4_group(
            value, group_size=group_size, symmetric=symmetric, search=search
        )
        what = f"{i} {tuple(value.shape)} {weights[i].dtype} {group_size} {symmetric} {search}"
        _assert_same(scales[i], scale, f"scale {what}")
        if zero is not None and zeros is not None:
            _assert_same(zeros[i], zero, f"zero {what}")
        _assert_same(packed[i], expected, f"packed {what}")
    assert counts.tolist() == [int((~v.isfinite()).sum()) for v in values]


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("block_size", [None, BLOCK, (1, 128), (64, 32)])
def test_dequantizes_int8(dtype: torch.dtype, block_size: tuple[int, int] | None) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [*PARTIAL, *ODD, EXPERT[1]]
    codes = [torch.randint(-128, 128, shape, generator=g, dtype=torch.int8) for shape in shapes]
    blocks = [(s[0], 1) if block_size is None else _blocks(s, block_size) for s in shapes]
    scales = [_random_scale(shape, g) for shape in blocks]
    # Every code with scales of all kinds, each in a row of its own.
    every = _scales_of_all_kinds(g)
    if block_size is None or block_size[0] == 1:
        codes.append(torch.arange(-128, 128).to(torch.int8).repeat(len(every), 1))
        scales.append(every[:, None].repeat(1, 1 if block_size is None else 2))
    else:
        scales[0].view(-1)[::7] = every[
            torch.randperm(len(every), generator=g)[: len(scales[0].view(-1)[::7])]
        ]
    aligned = [i for i, code in enumerate(codes) if code.shape[1] % 16 == 0]
    for chosen in (range(len(codes)), aligned, *([i] for i in range(len(codes)))):
        outs = [_poisoned(codes[i].shape, dtype) for i in chosen]
        lists = [codes[i].cuda() for i in chosen], [scales[i].cuda() for i in chosen], outs
        if block_size is None:
            counts = kernels.dequantize_int8_channel_into(*lists)
        else:
            counts = kernels.dequantize_int8_block_into(*lists, block_size=block_size)
        expected_counts = []
        for k, i in enumerate(chosen):
            expected = reference_integer.dequantize_int8_block(
                codes[i], scales[i], block_size=block_size or (1, codes[i].shape[1]), dtype=dtype
            )
            _assert_same(outs[k], expected, f"weight {i} {tuple(codes[i].shape)}")
            expected_counts.append(int((~expected.isfinite()).sum()))
        assert counts.tolist() == expected_counts


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("scale_dtype", [BF16, F16, F32])
def test_dequantizes_int4(scale_dtype: torch.dtype, dtype: torch.dtype, symmetric: bool) -> None:
    g = torch.Generator().manual_seed(1)
    for group_size in (32, 64, 128, 56):
        width = 7168 // group_size * group_size
        shapes = [(576, width), (1, group_size), (129, group_size * 3), (3000, group_size)]
        packed = [_any_bits((rows, columns // 8), g) for rows, columns in shapes]
        scales = [_random_scale((r, c // group_size), g).to(scale_dtype) for r, c in shapes]
        every = _scales_of_all_kinds(g).to(scale_dtype)
        scales[3].view(-1)[: len(every)] = every[:3000]
        zeros = [torch.randint(0, 16, s.shape, generator=g, dtype=torch.uint8) for s in scales]
        for chosen in ([0, 1, 2, 3], [0], [3], [0, 0]):
            outs = [_poisoned(shapes[i], dtype) for i in chosen]
            counts = kernels.dequantize_int4_group_into(
                [packed[i].cuda() for i in chosen],
                [scales[i].cuda() for i in chosen],
                None if symmetric else [zeros[i].cuda() for i in chosen],
                outs,
            )
            expected_counts = []
            for k, i in enumerate(chosen):
                expected = reference_integer.dequantize_int4_group(
                    packed[i], scales[i], None if symmetric else zeros[i], dtype=dtype
                )
                _assert_same(outs[k], expected, f"weight {i} {shapes[i]} {group_size}")
                expected_counts.append(int((~expected.isfinite()).sum()))
            assert counts.tolist() == expected_counts


@pytest.mark.parametrize("block_size", [None, BLOCK, (16, 64), (1, 128)])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_quantizes_weights_to_int8(dtype: torch.dtype, block_size: tuple[int, int] | None) -> None:
    g = torch.Generator().manual_seed(2)
    weights = [(torch.randn(shape, generator=g) * 0.02).to(dtype) for shape in [*PARTIAL, EXPERT[0]]]
    _check_int8(weights, block_size)
    _check_int8([(torch.randn(shape, generator=g) * 0.02).to(dtype) for shape in ODD], block_size)
    for i in (0, 1, 4):
        _check_int8([weights[i]], block_size)
    rare = _ranged(512, g)
    _check_int8([rare.to(dtype), weights[0], rare.t().contiguous().to(dtype)], block_size)
    if dtype == BF16:
        _check_int8([(_any_bits((256, 4096), g) >> 16).to(torch.int16).view(BF16)], block_size)


@pytest.mark.parametrize("power", [-126, -62, -60, -13, 0, 59, 61, 100, 118])
def test_int8_next_to_every_rounding_boundary(power: int) -> None:
    """Float32 weights within 3 units of scale x half of every odd integer, and of every integer."""
    g = torch.Generator().manual_seed(power & 0xFF)
    targets = torch.arange(0, 254, dtype=torch.float64)[None, :, None] / 2
    largest = ((1 + torch.rand(256, 1, 1, generator=g, dtype=torch.float64)) * 2.0**power).to(F32)
    scale = largest / 127.0
    near = (scale.to(torch.float64) * targets).to(F32)
    bits = (near.view(torch.int32) + torch.arange(-3, 4, dtype=torch.int32)).clamp(min=0)
    weight = torch.minimum(bits.view(F32), largest).reshape(256, -1)
    weight = torch.cat([largest.view(256, 1), weight, -weight], 1)
    weight = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 128)).contiguous()
    _check_int8([weight], None)
    _check_int8([weight, weight], (1, 4096))
    for symmetric in (True, False):
        _check_int4([weight], 128, symmetric=symmetric)


@both_ways
@pytest.mark.parametrize("block_size", [None, BLOCK, (32, 64)])
@pytest.mark.parametrize("fp8_block_size", [BLOCK, (32, 64), (48, 80)])
def test_quantizes_fp8_to_int8(fp8_block_size: tuple[int, int], block_size: tuple[int, int] | None) -> None:
    g = torch.Generator().manual_seed(3)
    shapes = [*PARTIAL, EXPERT[0]]
    codes = [_random_codes(shape, g, nan=False) for shape in shapes]
    scales = [_random_scale(_blocks(shape, fp8_block_size), g) for shape in shapes]
    _check_int8(codes, block_size, scales, fp8_block_size)
    for i in (0, 2):
        _check_int8(codes[i : i + 1], block_size, scales[i : i + 1], fp8_block_size)
    some = [*PARTIAL[:5], *ODD]
    codes = [_random_codes(shape, g) for shape in some]
    scales = [_random_scale(_blocks(shape, fp8_block_size), g) for shape in some]
    _check_int8(codes, block_size, scales, fp8_block_size)
    every = _scales_of_all_kinds(g)
    scales[0].view(-1)[::5] = every[torch.randperm(len(every), generator=g)[: len(scales[0].view(-1)[::5])]]
    _check_int8(codes, block_size, scales, fp8_block_size)


@both_ways
@pytest.mark.parametrize("block_size", [BLOCK, (16, 16), (1, 32), (128, 2), (1, 1)])
def test_int8_blocks_take_the_scale_with_the_smaller_error(block_size: tuple[int, int]) -> None:
    """Blocks of all ranges of codes, with scales of all kinds: both choices come up."""
    g = torch.Generator().manual_seed(4)
    blocks = (24, 40) if block_size == BLOCK else (64, 128)
    shape = (blocks[0] * block_size[0], blocks[1] * block_size[1])
    codes = _random_codes(shape, g).view(torch.uint8)
    masks = torch.tensor([0x7F, 0x77, 0x6F, 0x5F, 0x3F, 0x37, 0x1F, 0x0F, 0x7E, 0x7C, 0x78, 0x70, 0x40])
    mask = masks[torch.randint(0, len(masks), blocks, generator=g)]
    mask = mask.repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)
    codes &= (mask | 0x80).to(torch.uint8)
    # Few codes above the rest, as in weights: most of the error is that of small codes.
    rare = torch.rand(shape, generator=g) < 0.002
    codes[rare] = torch.randint(0, 128, (int(rare.sum()),), generator=g, dtype=torch.uint8)
    scales = _random_scale(blocks, g)
    got = _check_int8([codes.view(torch.float8_e4m3fn)], block_size, [scales], block_size)
    chosen = (got[0].cpu() == scales * 4).float().mean()
    assert 0.02 < chosen < 0.98
    every = _scales_of_all_kinds(g)
    odd = every[torch.randint(0, len(every), blocks, generator=g)]
    _check_int8([codes.view(torch.float8_e4m3fn)], block_size, [odd], block_size)
    ue8m0 = 2.0 ** torch.randint(-20, 10, blocks, generator=g).to(F32)
    _check_int8([codes.view(torch.float8_e4m3fn)], block_size, [ue8m0], block_size)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("group_size", [8, 32, 64, 128, 256])
def test_quantizes_weights_to_int4(group_size: int, search: str, symmetric: bool) -> None:
    g = torch.Generator().manual_seed(5)
    shapes = [(576, 7168), (1, group_size), (129, group_size * 3), (24, 1024), (5, 18432)]
    for dtype in (BF16, F16, F32):
        weights = [(torch.randn(shape, generator=g) * 0.02).to(dtype) for shape in shapes]
        weights[2][5:] = weights[2][5:].abs()
        _check_int4(weights, group_size, symmetric=symmetric, search=search)
        _check_int4(weights[2:3], group_size, symmetric=symmetric, search=search)
        rare = _ranged(64, g, run=256).to(dtype)
        _check_int4([rare, weights[0]], group_size, symmetric=symmetric, search=search)
    anything = (_any_bits((64, 4096), g) >> 16).to(torch.int16).view(BF16)
    _check_int4([anything], group_size, symmetric=symmetric, search=search)


@both_ways
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_quantizes_fp8_to_int4(group_size: int, search: str, symmetric: bool) -> None:
    g = torch.Generator().manual_seed(6)
    options: dict[str, Any] = {"symmetric": symmetric, "search": search}
    shapes = [(576, 7168), (129, 1024), (3, 18432), (130, 128)]
    for fp8_block_size in (BLOCK, (32, 64), (48, 80)):
        codes = [_random_codes(shape, g, nan=False) for shape in shapes]
        scales = [_random_scale(_blocks(shape, fp8_block_size), g) for shape in shapes]
        _check_int4(codes, group_size, scales, fp8_block_size, **options)
        ue8m0 = [2.0 ** torch.randint(-20, 10, s.shape, generator=g).to(F32) for s in scales]
        _check_int4(codes[:2], group_size, ue8m0[:2], fp8_block_size, **options)
        every = _scales_of_all_kinds(g)
        scales[0].view(-1)[::5] = every[
            torch.randperm(len(every), generator=g)[: len(scales[0].view(-1)[::5])]
        ]
        _check_int4(
            [_random_codes(shape, g) for shape in shapes], group_size, scales, fp8_block_size, **options
        )


@both_ways
@pytest.mark.parametrize("shape", EXPERT)
def test_expert_weights(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(7)
    codes, scales = _random_codes(shape, g, nan=False), _random_scale(_blocks(shape), g)
    for block_size in (None, BLOCK):
        _check_int8([codes, codes], block_size, [scales, scales.flip(0)])
    for symmetric in (True, False):
        _check_int4([codes], 128, [scales], symmetric=symmetric)
    _check_int4([codes], 128, [scales], search="mse")


def test_weights_that_are_not_aligned() -> None:
    g = torch.Generator().manual_seed(8)
    buffer = _random_codes((1, 130 * 1040 + 3), g).cuda()
    codes, scale = buffer[0, 3:].view(130, 1040), _random_scale((2, 9), g)
    values = _values([codes.cpu()], [scale], BLOCK)[0]
    out = _poisoned((130 * 1040 + 1,), torch.int8)[1:].view(130, 1040)
    for block_size in (None, BLOCK):
        new_scale = _poisoned((130, 1) if block_size is None else (2, 9), F32)
        lists = [codes], [out], [new_scale]
        if block_size is None:
            kernels.quantize_int8_channel_into(*lists, fp8_scales=[scale.cuda()])
        else:
            kernels.quantize_int8_block_into(*lists, fp8_scales=[scale.cuda()])
        expected, _ = reference_integer.quantize_int8_block(
            values, block_size=block_size or (1, 1040), fp8_scale=None if block_size is None else scale
        )
        _assert_same(out, expected, f"not aligned, {block_size}")
    packed = _poisoned((130 * 130 + 1,), torch.int32)[1:].view(130, 130)
    group_scale = _poisoned((130, 130), BF16)
    kernels.quantize_int4_group_into([codes], [packed], [group_scale], None, fp8_scales=[scale.cuda()])
    expected, expected_scale, _ = reference_integer.quantize_int4_group(values, group_size=8)
    _assert_same(packed, expected, "not aligned, INT4")
    back = _poisoned((130 * 1040 + 1,), BF16)[1:].view(130, 1040)
    kernels.dequantize_int4_group_into([packed], [group_scale], None, [back])
    _assert_same(back, reference_integer.dequantize_int4_group(expected, expected_scale), "not aligned, back")


def test_a_group_of_288_mixed_weights() -> None:
    """A shard's number of weights, each an eighth of the real size, in one launch."""
    g = torch.Generator().manual_seed(9)
    sizes = [(256, 896), (896, 256), (72, 896), (1, 128), (129, 384)]
    shapes = [sizes[i % len(sizes)] for i in range(288)]
    codes = [_random_codes(shape, g, nan=i % 7 == 0) for i, shape in enumerate(shapes)]
    scales = [_random_scale(_blocks(shape), g) for shape in shapes]
    _check_int8(codes, BLOCK, scales)
    _check_int8(codes, None, scales)
    _check_int4(codes, 128, scales)


def test_many_calls_on_side_streams() -> None:
    """Nothing waits, and everything is in the order of the current stream."""
    g = torch.Generator().manual_seed(10)
    codes, scale = _random_codes((2048, 7168), g, nan=False), _random_scale((16, 56), g)
    values = _values([codes], [scale], BLOCK)[0]
    expected, expected_scale, _ = reference_integer.quantize_int4_group(values, search="absmax")
    back = reference_integer.dequantize_int4_group(expected, expected_scale)
    on_gpu, scale_on_gpu = codes.cuda(), scale.cuda()
    torch.cuda.synchronize()
    results = []
    for i in range(12):
        with torch.cuda.stream(torch.cuda.Stream()):
            n = 1 + i % 3
            packed = [_poisoned(expected.shape, torch.int32) for _ in range(n)]
            scales = [_poisoned(expected_scale.shape, BF16) for _ in range(n)]
            outs = [_poisoned(codes.shape, BF16) for _ in range(n)]
            kernels.quantize_int4_group_into(
                [on_gpu] * n, packed, scales, None, search="absmax", fp8_scales=[scale_on_gpu] * n
            )
            counts = kernels.dequantize_int4_group_into(packed, scales, None, outs)
            for nbytes in (
                128,
                256,
                512,
            ):  # takes, and spoils, the memory of a table that was freed too early
                torch.empty(nbytes, dtype=torch.uint8, device="cuda").fill_(0xFF)
            results.append((outs, counts))
    torch.cuda.synchronize()
    for outs, counts in results:
        assert counts.tolist() == [0] * len(outs)
        for out in outs:
            _assert_same(out, back, "there and back")
