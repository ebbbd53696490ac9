"""The Triton FP8 block kernels on a GPU, bit for bit against `kernels/reference.py` run on the CPU.

Everything runs twice: with the device's FP8 conversions, where it has them, and with the integer
arithmetic of older devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dsv3_tools.kernels import dequantize_fp8_block_into, quantize_fp8_block_into, reference

triton_group = pytest.importorskip("dsv3_tools.kernels.triton_group", reason="needs triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PARTIAL = [(576, 7168), (1, 1), (129, 257), (3, 128), (130, 1040), (128, 8), (24, 7176)]
EXPERT = [(2048, 7168), (7168, 2048)]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@pytest.fixture(autouse=True, params=["conversions", "integers"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "integers":
        monkeypatch.setattr(triton_group, "FP8_CONVERSIONS_SINCE", (1000, 0))
    elif torch.cuda.get_device_capability() < triton_group.FP8_CONVERSIONS_SINCE:
        pytest.skip("needs compute capability 8.9")


def _blocks(shape: Sequence[int], block_size: tuple[int, int] = (128, 128)) -> tuple[int, int]:
    return -(-shape[0] // block_size[0]), -(-shape[1] // block_size[1])


def _random_codes(shape: Sequence[int], g: torch.Generator, *, nan: bool = True) -> Tensor:
    codes = torch.randint(0, 256, tuple(shape), dtype=torch.uint8, generator=g)
    if not nan:
        codes[codes & 0x7F == 0x7F] ^= 1
    return codes.view(torch.float8_e4m3fn)


def _random_scale(shape: Sequence[int], g: torch.Generator) -> Tensor:
    return torch.rand(tuple(shape), generator=g) * 2e-4 + 1e-5


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
        f"got {got.to(torch.float32)[at].item()!r} ({got.view(bits)[at].item() & mask:#x}), "
        f"expected {expected.to(torch.float32)[at].item()!r} ({expected.view(bits)[at].item() & mask:#x})"
    )


def _check_dequantize(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    dtype: torch.dtype = torch.bfloat16,
    block_size: tuple[int, int] = (128, 128),
) -> list[Tensor]:
    outs = [torch.full(c.shape, 123.0, dtype=dtype, device="cuda") for c in codes]
    counts = dequantize_fp8_block_into(
        [c.cuda() for c in codes], [s.cuda() for s in scales], outs, block_size=block_size
    )
    assert (counts.dtype, counts.device.type, counts.shape) == (torch.int32, "cuda", (len(codes),))
    expected_counts = []
    for i, (code, scale, out) in enumerate(zip(codes, scales, outs, strict=True)):
        expected = reference.dequantize_fp8_block(code, scale, block_size=block_size, dtype=dtype)
        _assert_same(out, expected, f"weight {i} {tuple(code.shape)}")
        expected_counts.append(int((~expected.isfinite()).sum()))
    assert counts.tolist() == expected_counts
    return outs


def _check_quantize(
    weights: Sequence[Tensor],
    *,
    likes: Sequence[Tensor] | None = None,
    scale_fmt: str = "f32",
    block_size: tuple[int, int] = (128, 128),
) -> tuple[list[Tensor], list[Tensor]]:
    poisoned = [torch.full(w.shape, 0x55, dtype=torch.uint8, device="cuda") for w in weights]
    codes = [p.view(torch.float8_e4m3fn) for p in poisoned]
    scales = [torch.full(_blocks(w.shape, block_size), 123.0, device="cuda") for w in weights]
    counts = quantize_fp8_block_into(
        [w.cuda() for w in weights],
        codes,
        scales,
        block_size=block_size,
        scale_fmt=scale_fmt,
        likes=None if likes is None else [like.cuda() for like in likes],
    )
    for i, weight in enumerate(weights):
        expected, expected_scale = reference.quantize_fp8_block(
            weight, block_size=block_size, scale_fmt=scale_fmt, like=None if likes is None else likes[i]
        )
        _assert_same(scales[i], expected_scale, f"scale {i} of {tuple(weight.shape)} {weight.dtype}")
        _assert_same(codes[i], expected, f"codes {i} of {tuple(weight.shape)} {weight.dtype}")
    assert counts.tolist() == [int((~w.isfinite()).sum()) for w in weights]
    return codes, scales


def _any_bits(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=g, dtype=torch.int64).to(torch.int32)


def _scales_of_all_kinds(g: torch.Generator) -> Tensor:
    """Powers of two over the whole range, subnormal numbers, random bit patterns, and what is not a scale."""
    powers = 2.0 ** torch.arange(-149, 128, dtype=torch.float64)
    near = torch.cat([powers * 1.0000001, powers * 1.9999999, powers * 1.37]).to(torch.float32)
    any_bits = _any_bits((2000,), g).view(torch.float32)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, 2.0**-149, 1e-40])
    return torch.cat([powers.to(torch.float32), near, -near, any_bits, special])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_codes_with_scales_of_all_kinds(dtype: torch.dtype) -> None:
    scales = _scales_of_all_kinds(torch.Generator().manual_seed(0))
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(scales), 1).view(torch.float8_e4m3fn)
    # Each scale in a row of blocks of its own, in one weight; then, as items, one row alone with its scale.
    _check_dequantize([codes], [scales[:, None].repeat(1, 2)], dtype=dtype, block_size=(1, 128))
    some = range(0, len(scales), 37)
    _check_dequantize([codes[i : i + 1] for i in some], [scales[i].repeat(1, 2) for i in some], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nan", [False, True])
def test_dequantizes_each_shape_alone_and_all_as_a_group(dtype: torch.dtype, nan: bool) -> None:
    g = torch.Generator().manual_seed(1)
    shapes = [*PARTIAL, EXPERT[1]]
    codes = [_random_codes(shape, g, nan=nan) for shape in shapes]
    scales = [_random_scale(_blocks(shape), g) for shape in shapes]
    _check_dequantize(codes, scales, dtype=dtype)
    for code, scale in zip(codes, scales, strict=True):
        _check_dequantize([code], [scale], dtype=dtype)


def test_dequantizes_a_weight_that_is_not_aligned() -> None:
    g = torch.Generator().manual_seed(2)
    buffer = _random_codes((1, 130 * 1040 + 3), g).cuda()
    codes = buffer[0, 3:].view(130, 1040)
    scale = _random_scale((2, 9), g)
    out = torch.zeros(130 * 1040 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(130, 1040)
    dequantize_fp8_block_into([codes], [scale.cuda()], [out])
    _assert_same(out, reference.dequantize_fp8_block(codes.cpu(), scale), "not aligned")


@pytest.mark.parametrize("block_size", [(1, 128), (64, 64), (128, 1), (4, 4096), (256, 256), (16, 8)])
def test_other_block_sizes(block_size: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(3)
    shapes = [(300, 5000), (17, 4096)]
    codes = [_random_codes(shape, g) for shape in shapes]
    scales = [_random_scale(_blocks(shape, block_size), g) for shape in shapes]
    _check_dequantize(codes, scales, block_size=block_size)
    _check_quantize([torch.randn(shape, generator=g) for shape in shapes], block_size=block_size)


@pytest.mark.parametrize("scale_fmt", ["f32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantizes_each_shape_alone_and_all_as_a_group(dtype: torch.dtype, scale_fmt: str) -> None:
    g = torch.Generator().manual_seed(4)
    weights = [(torch.randn(shape, generator=g) * 0.02).to(dtype) for shape in [*PARTIAL, EXPERT[0]]]
    _check_quantize(weights, scale_fmt=scale_fmt)
    for weight in weights[:4]:
        _check_quantize([weight], scale_fmt=scale_fmt)


@pytest.mark.parametrize("scale_fmt", ["f32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantizes_any_bit_pattern(dtype: torch.dtype, scale_fmt: str) -> None:
    """Random bits: every exponent, subnormal numbers, NaN and infinity; ranges of each block differ."""
    g = torch.Generator().manual_seed(5)
    bits = _any_bits((512, 4096), g)
    anything = bits.view(torch.float32)
    # Blocks of one range each, from all subnormal to near the largest, so that scales of all sizes come up.
    powers = torch.arange(-150, 126, 276 / (4 * 32)).view(4, 32)
    ranged = torch.randn(512, 4096, generator=g).clamp(-3, 3).to(torch.float64)
    ranged *= (2.0 ** powers.to(torch.float64)).repeat_interleave(128, 0).repeat_interleave(128, 1)
    weights = [anything.to(dtype), ranged.to(dtype)]
    if dtype == torch.bfloat16:  # all bfloat16 bit patterns, not only those a rounding gives
        weights.append((bits >> 16).to(torch.int16).view(torch.bfloat16))
    _check_quantize(weights, scale_fmt=scale_fmt)


@pytest.mark.parametrize("power", [-149, -133, -127, -126, -62, -60, -59, -13, 0, 59, 60, 61, 100, 118])
def test_codes_next_to_every_rounding_boundary(power: int) -> None:
    """Float32 weights within 3 units of scale x the middle of two neighbouring codes, and of each code."""
    g = torch.Generator().manual_seed(power & 0xFF)
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    middles = (numbers[1:] + numbers[:-1]) / 2
    targets = torch.cat([numbers, middles, middles])[None, :, None]
    scale = ((1 + torch.rand(64, 1, 1, generator=g, dtype=torch.float64)) * 2.0**power).to(torch.float32)
    near = (scale.to(torch.float64) * targets).to(torch.float32)
    steps = torch.arange(-3, 4, dtype=torch.int32)
    bits = (near.view(torch.int32) + steps).clamp(0, 0x7F7F_FFFF)
    weight = bits.view(torch.float32).reshape(64, -1)
    weight = torch.cat([weight, -weight], 1)
    # `likes` ask for the codes of this very scale; a block is one row. Its own scale is tested as well.
    blocks = _blocks(weight.shape, (1, 128))
    _check_quantize([weight], likes=[scale.view(64, 1).expand(blocks).contiguous()], block_size=(1, 128))
    largest = scale.view(64, 1) * 448
    fixed = torch.cat([largest, weight.clamp(-largest, largest)], 1)
    _check_quantize([fixed, fixed], block_size=(1, 4096))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_weight_over_every_largest(dtype: torch.dtype) -> None:
    """Every quotient of two 16-bit significands that a block's own scale can make, and of random `likes`.

    One remainder less than for float32 decides these; see the kernel's `_divide`.
    """
    g = torch.Generator().manual_seed(11)
    significands = 128 if dtype == torch.bfloat16 else 1024
    every = 1 + torch.arange(significands, dtype=torch.float64) / significands
    weights = torch.cat([every * 2.0**power for power in range(-18, 0)])
    weights = torch.cat([weights, -weights, torch.tensor([0.0, -0.0])])
    some = every[torch.randperm(significands, generator=g)[:128]]
    weight = torch.cat([some[:, None], weights.repeat(len(some), 1)], 1).to(dtype)
    width = 1 << (weight.shape[1] - 1).bit_length()  # a block is one row
    _check_quantize([weight], block_size=(1, width))
    likes = [(1 + torch.rand(len(weight), 1, generator=g)) * 2.0**-9 for _ in range(4)]
    _check_quantize([weight] * 4, likes=likes, block_size=(1, width))


def test_counts_weights_that_are_not_finite_per_item() -> None:
    g = torch.Generator().manual_seed(6)
    weights = [torch.randn(576, 1024, generator=g).to(torch.bfloat16) for _ in range(5)]
    for i, bad in ((1, float("nan")), (3, float("inf")), (3, float("-inf"))):
        where = torch.randint(0, weights[i].numel(), (17,), generator=g)
        weights[i].view(-1)[where] = bad
    weights[4][:128, :128] = float("nan")
    _check_quantize(weights)
    _check_quantize([weights[3]])


@pytest.mark.parametrize("scale_fmt", ["f32", "ue8m0"])
def test_round_trip_gives_back_every_byte(scale_fmt: str) -> None:
    g = torch.Generator().manual_seed(7)
    shapes = [*PARTIAL, EXPERT[0]]
    codes = [_random_codes(shape, g, nan=False) for shape in shapes]
    likes = [_random_scale(_blocks(shape), g) for shape in shapes]
    weights = [w.cpu() for w in _check_dequantize(codes, likes)]
    again, scales = _check_quantize(weights, likes=likes, scale_fmt=scale_fmt)
    for i, shape in enumerate(shapes):
        _assert_same(again[i], codes[i], f"codes of {shape}")
        _assert_same(scales[i], likes[i], f"scale of {shape}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_changed_element_changes_its_block_alone(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(8)
    codes = _random_codes((576, 1040), g, nan=False)
    like = 2.0 ** torch.randint(-9, -6, (5, 9), generator=g).to(torch.float32)  # exact in float16 too
    weight = reference.dequantize_fp8_block(codes, like).to(dtype)
    weight[200, 1030] = 10.0  # beyond 448 x like
    _, scales = _check_quantize([weight, weight[:128]], likes=[like, like[:1]])
    kept = scales[0].cpu() == like
    assert kept.sum() == kept.numel() - 1
    assert not kept[1, 8]
    weight[300, 5] = float("nan")  # the one spelling of NaN counts as unchanged, by the definition
    _check_quantize([weight], likes=[like])


def test_a_group_of_288_mixed_weights() -> None:
    """A shard's number of weights, each an eighth of the real size, in one launch."""
    g = torch.Generator().manual_seed(9)
    sizes = [(256, 896), (896, 256), (72, 896), (1, 1), (129, 257)]
    shapes = [sizes[i % len(sizes)] for i in range(288)]
    codes = [_random_codes(shape, g, nan=i % 7 == 0) for i, shape in enumerate(shapes)]
    scales = [_random_scale(_blocks(shape), g) for shape in shapes]
    weights = _check_dequantize(codes, scales)
    _check_quantize([w.cpu() for w in weights], likes=scales)
    whole = [i for i, shape in enumerate(shapes) if shape[1] % 16 == 0]  # and the ways with wide accesses
    _check_dequantize([codes[i] for i in whole], [scales[i] for i in whole])
    _check_quantize([weights[i].cpu() for i in whole])


def test_many_calls_on_side_streams() -> None:
    """Tables and counts of calls in flight do not get in each other's way, nor in that of freed memory."""
    g = torch.Generator().manual_seed(10)
    shapes = [(2048, 7168), (576, 7168), (129, 1024)]
    codes = [_random_codes(shape, g) for shape in shapes]
    scales = [_random_scale(_blocks(shape), g) for shape in shapes]
    expected = [reference.dequantize_fp8_block(c, s) for c, s in zip(codes, scales, strict=True)]
    expected_counts = [int((~e.isfinite()).sum()) for e in expected]
    on_gpu = [c.cuda() for c in codes], [s.cuda() for s in scales]
    torch.cuda.synchronize()
    results = []
    for i in range(24):
        with torch.cuda.stream(torch.cuda.Stream()):
            chosen = [(i + k) % 3 for k in range(1 + i % 3)]  # groups of one take the way without a table
            outs = [torch.full(shapes[k], 123.0, dtype=torch.bfloat16, device="cuda") for k in chosen]
            picked = [[tensors[k] for k in chosen] for tensors in on_gpu]
            counts = dequantize_fp8_block_into(*picked, outs)
            # Takes, and spoils, the memory of a table that was freed too early.
            for nbytes in (128, 256, 512):
                torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).fill_(0xFF)
                torch.empty(nbytes, dtype=torch.uint8, device="cuda").fill_(0xFF)
            results.append((chosen, outs, counts))
    torch.cuda.synchronize()
    for chosen, outs, counts in results:
        assert counts.tolist() == [expected_counts[k] for k in chosen]
        for k, out in zip(chosen, outs, strict=True):
            _assert_same(out, expected[k], f"shape {shapes[k]}")
