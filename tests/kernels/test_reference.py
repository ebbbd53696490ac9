"""The definition itself, against arithmetic written here from the definition of the formats.

The oracles share nothing with `reference.py` but IEEE float64: e4m3 is decoded from its bits,
rounding is a search for the nearest number, ties to the even one. Two published implementations confirm
the layout.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3_tools.kernels import reference

FP8 = torch.float8_e4m3fn


def decode_e4m3(code: int) -> float:
    """Decodes one code by "FP8 Formats for Deep Learning" (arXiv 2209.05433), table 1."""
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


VALUES = np.array([decode_e4m3(code) for code in range(256)])
MAGNITUDES = VALUES[:127]


def to_bfloat16_bits(values: np.ndarray) -> Any:
    """Rounds finite float32 to BF16 by comparing the distances to both neighbours, ties to even.

    Above the largest BF16 number, 2**128 stands in for infinity, as IEEE 754 has it.
    """
    truncated = values.view(np.uint32) & np.uint32(0x7FFF_0000)
    below = truncated.view(np.float32).astype(np.float64)
    next_up = (truncated + np.uint32(0x1_0000)).view(np.float32).astype(np.float64)
    above = np.where(np.isinf(next_up), 2.0**128, next_up)
    exact = np.abs(values.astype(np.float64))
    code = truncated >> np.uint32(16)
    up = (above - exact < exact - below) | ((above - exact == exact - below) & (code % 2 == 1))
    return ((code + up) | (np.signbit(values) * 0x8000)).astype(np.uint16)


def nearest_code(quotient: np.ndarray) -> Any:
    """Returns the e4m3 code nearest to each finite float32, found among all 127 magnitudes."""
    clamped = np.minimum(np.abs(quotient.astype(np.float64)), 448.0)
    distance = np.abs(clamped[:, None] - MAGNITUDES)
    nearest = distance == distance.min(1, keepdims=True)
    tied = nearest.sum(1) == 2
    first = nearest.argmax(1)
    return (np.where(tied, first + first % 2, first) | (np.signbit(quotient) << 7)).astype(np.uint8)


def random_codes(rows: int, columns: int, seed: int) -> Tensor:
    codes = np.random.default_rng(seed).integers(0, 256, (rows, columns), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x2A
    return torch.from_numpy(codes).view(FP8)


@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 0.00021437, 3.3e38, 1e-44, 1e-38, -0.7])
def test_dequantize_every_code(scale: float) -> None:
    scale32 = np.float32(scale)
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).view(4, 64)
    scales = torch.tensor([[float(scale32)]])
    with np.errstate(over="ignore"):  # exact in float64 (4 + 24 bits), then rounded once
        expected = (VALUES * np.float64(scale32)).astype(np.float32)
    nan = np.isnan(VALUES)

    got = reference.dequantize_fp8_block(codes, scales, dtype=torch.float32).flatten().numpy()
    bits = np.where(nan, np.uint32(0x7FC0_0000), expected.view(np.uint32))
    np.testing.assert_array_equal(got.view(np.uint32), bits)

    rounded = reference.dequantize_fp8_block(codes, scales).flatten().view(torch.uint16).numpy()
    bits = np.where(nan, np.uint16(0x7FC0), 0)
    finite = np.isfinite(expected)
    bits[finite] = to_bfloat16_bits(expected[finite])
    infinite = np.isinf(expected)
    bits[infinite] = np.where(expected[infinite] > 0, 0x7F80, 0xFF80)
    np.testing.assert_array_equal(rounded, bits)


def test_dequantize_not_finite_scale() -> None:
    codes = torch.tensor([[0x00, 0x38, 0xB8, 0x7F]], dtype=torch.uint8).view(FP8)
    for scale, expected in ((math.inf, [0x7FC0, 0x7F80, 0xFF80, 0x7FC0]), (math.nan, [0x7FC0] * 4)):
        got = reference.dequantize_fp8_block(codes, torch.tensor([[scale]])).view(torch.uint16)
        assert got.tolist() == [expected]


@pytest.mark.parametrize("block_size", [(128, 128), (2, 3)], ids=str)
def test_each_element_uses_the_scale_of_its_block(block_size: tuple[int, int]) -> None:
    rows, columns = 130, 257
    blocks = -(-rows // block_size[0]), -(-columns // block_size[1])
    scale = torch.arange(1.0, blocks[0] * blocks[1] + 1).view(blocks)
    ones = torch.full((rows, columns), 0x38, dtype=torch.uint8).view(FP8)
    got = reference.dequantize_fp8_block(ones, scale, block_size=block_size, dtype=torch.float32)
    for i in range(rows):
        for j in range(0, columns, 7):
            assert got[i, j] == scale[i // block_size[0], j // block_size[1]], (i, j)


def rounding_cases() -> np.ndarray:
    """Codes, midpoints, their float32 neighbours, numbers past 448, tiny ones and random ones."""
    middle = (MAGNITUDES[:-1] + MAGNITUDES[1:]) / 2
    points = np.concatenate([MAGNITUDES, middle]).astype(np.float32)
    near = [points, np.nextafter(points, np.float32(1e9)), np.nextafter(points, np.float32(-1e9))]
    rng = np.random.default_rng(0)
    other = [rng.uniform(0, 448, 2000), 2.0 ** rng.uniform(-149, 8, 2000), [449.0, 464.0, 1e30, 2.0**-10]]
    values = np.concatenate([*near, *other]).astype(np.float32)
    return np.concatenate([values, -values])


@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0**-9])
def test_quantize_rounds_to_the_nearest_code(scale: float) -> None:
    """Each weight in a block row of its own beside 448 x scale, which fixes the block's scale."""
    scale32 = np.float32(scale)
    cases = rounding_cases()
    cases = cases[np.abs(cases) <= 448.0]
    weights = np.stack([cases * scale32, np.full_like(cases, 448.0) * scale32], 1).astype(np.float32)
    codes, scales = reference.quantize_fp8_block(torch.from_numpy(weights), block_size=(1, 2))
    largest = np.abs(weights).max(1)
    expected_scale = (largest.astype(np.float64) / 448.0).astype(np.float32)  # correct: 53 >= 2 x 24 + 2 bits
    np.testing.assert_array_equal(scales.numpy()[:, 0], expected_scale)
    quotient = (weights.astype(np.float64) / expected_scale[:, None]).astype(np.float32)
    expected = nearest_code(quotient.flatten()).reshape(quotient.shape)
    np.testing.assert_array_equal(codes.view(torch.uint8).numpy(), expected)


def test_quantize_with_like_clamps_and_rounds_before_the_block_is_judged() -> None:
    """A scale of the caller's can leave quotients past 448; the code itself is judged here."""
    cases = rounding_cases()
    got = reference._encode(torch.from_numpy(cases)[:, None], torch.ones(len(cases), 1), (1, 1))
    np.testing.assert_array_equal(got.view(torch.uint8).numpy()[:, 0], nearest_code(cases))


def test_quantize_not_finite_weight() -> None:
    weight = torch.tensor([[1.0, -math.inf, math.nan, -0.0, math.inf, -448.0]])
    codes, scale = reference.quantize_fp8_block(weight)
    assert scale.tolist() == [[1.0]]
    assert codes.view(torch.uint8).tolist() == [[0x38, 0x7F, 0x7F, 0x80, 0x7F, 0xFE]]


def test_scale_of_zeros_is_one() -> None:
    for scale_fmt in ("f32", "ue8m0"):
        codes, scale = reference.quantize_fp8_block(torch.zeros(3, 3), scale_fmt=scale_fmt)
        assert scale.tolist() == [[1.0]]
        assert codes.view(torch.uint8).count_nonzero() == 0


@pytest.mark.parametrize("exponent", [-148, -139, -127, -126, -120, -1, 0, 8, 9, 100, 127])
def test_ue8m0_is_the_smallest_power_of_two_that_fits(exponent: int) -> None:
    for mantissa in (1.0, 1.0 + 2.0**-23, 1.5, 1.75, 1.75 + 2.0**-22, 2 - 2.0**-23):
        largest = float(np.float32(mantissa * 2.0**exponent))
        quotient = float(np.float32(largest / 448.0))
        _, scale = reference.quantize_fp8_block(torch.tensor([[largest]]), scale_fmt="ue8m0")
        if quotient == 0.0:
            assert scale.item() == 1.0
            continue
        power = -126
        while 2.0**power < quotient:
            power += 1
        assert scale.item() == 2.0**power, (mantissa, exponent)


def test_unknown_scale_format_is_refused() -> None:
    with pytest.raises(ValueError, match="'e8m0', expected 'f32' or 'ue8m0'"):
        reference.quantize_fp8_block(torch.ones(1, 1), scale_fmt="e8m0")


def test_like_gives_back_all_bytes_of_an_unchanged_weight() -> None:
    codes, scale = (
        random_codes(300, 400, 1),
        torch.rand(3, 4, generator=torch.Generator().manual_seed(2)) + 1e-5,
    )
    weight = reference.dequantize_fp8_block(codes, scale)
    again, scale_again = reference.quantize_fp8_block(weight, like=scale)
    assert torch.equal(scale_again, scale)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))

    weight[200, 399] = weight[200, 399] * 2 + 1
    again, scale_again = reference.quantize_fp8_block(weight, like=scale)
    fresh, fresh_scale = reference.quantize_fp8_block(weight)
    assert (scale_again != scale).nonzero().tolist() == [[1, 3]]
    assert scale_again[1, 3] == fresh_scale[1, 3]
    in_block = (slice(128, 256), slice(384, 400))
    assert torch.equal(again.view(torch.uint8)[in_block], fresh.view(torch.uint8)[in_block])
    again[in_block] = codes[in_block]
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(256, 384), (576, 300)], ids=str)
def test_compressed_tensors_dequantizes_alike(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

    codes = random_codes(*shape, 3)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=torch.Generator().manual_seed(4))
    theirs = FP8BlockDequantizer(weight_block_size=(128, 128), dtype=dtype).process(
        {"m.weight": codes, "m.weight_scale_inv": scale}
    )["m.weight"]
    assert torch.equal(reference.dequantize_fp8_block(codes, scale, dtype=dtype), theirs)


def test_transformers_dequantizes_alike() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scale = random_codes(256, 384, 5), torch.rand(2, 3, generator=torch.Generator().manual_seed(6))
    operation = Fp8Dequantize(None)
    for dtype in (torch.bfloat16, torch.float32):
        theirs = operation._dequantize_one(codes, scale, output_dtype=dtype)
        assert torch.equal(reference.dequantize_fp8_block(codes, scale, dtype=dtype), theirs)
