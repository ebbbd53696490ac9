"""The definition of the integer formats, against bytes, published figures and arithmetic written here.

The oracles share nothing with `reference_integer.py` but IEEE numbers: codes come from numpy in float64,
where scales are powers of two and so every quotient is exact; squared errors are summed in float64.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3_tools.kernels import reference, reference_integer

SIGNAL_TO_NOISE = {
    (128, "absmax"): 19.1,
    (64, "absmax"): 19.75,
    (32, "absmax"): 20.5,
    (128, "mse"): 19.9,
    (64, "mse"): 20.5,
    (32, "mse"): 21.3,
}
"""Decibels of symmetric INT4 on normal weights, by group size and search; tolerance 0.15."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decibels(weight: Tensor, back: Tensor) -> float:
    noise = (weight.double() - back.double()).square().sum()
    return 10 * math.log10(float(weight.double().square().sum() / noise))


def through_int4(weight: Tensor, group_size: int, **options: object) -> Tensor:
    packed, scale, zero = reference_integer.quantize_int4_group(
        weight,
        group_size=group_size,
        **options,  # type: ignore[arg-type]
    )
    return reference_integer.dequantize_int4_group(packed, scale, zero, dtype=torch.float32)


# ------------------------------------------------------------------------------------------------- packing


def test_pack_golden_bytes() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 0, 0, 0, 0, 15], [15, 0, 0, 0, 0, 0, 0, 0]])
    packed = reference_integer.pack_int4(codes.to(torch.uint8))
    assert packed.dtype == torch.int32
    assert packed.numpy().tobytes() == bytes.fromhex("21436587 000000f0 0f000000")
    assert torch.equal(reference_integer.unpack_int4(packed), codes.to(torch.uint8))


def test_pack_is_that_of_compressed_tensors() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 16, (5, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = reference_integer.pack_int4(codes)
    assert torch.equal(packed, helpers.pack_to_int32(codes.to(torch.int8) - 8, 4))
    assert not torch.equal(packed, helpers.pack_to_int32(codes.flip(1).to(torch.int8) - 8, 4))


def test_unpack_reverses_pack_for_every_word() -> None:
    words = torch.randint(-(2**31), 2**31, (64, 33), generator=torch.Generator().manual_seed(1))
    packed = words.to(torch.int32)
    assert torch.equal(reference_integer.pack_int4(reference_integer.unpack_int4(packed)), packed)


# ------------------------------------------------------------------------------- codes, in exact arithmetic


def test_int8_codes_where_the_scale_is_a_power_of_two() -> None:
    """Largest magnitude 127 x 2^k: the scale is 2^k, the quotient exact, the code its nearest integer."""
    for k in (-100, -7, 0, 5):
        weight = np.random.default_rng(k + 200).uniform(-127, 127, (6, 500)).astype(np.float32)
        weight[:, 0], weight[:, 1:255] = 127, np.arange(-127, 127) + 0.5  # ties go to the even code
        codes, scale = reference_integer.quantize_int8_channel(torch.from_numpy(weight * np.float32(2.0**k)))
        assert scale.flatten().tolist() == [2.0**k] * 6
        assert np.array_equal(codes.numpy(), np.rint(weight.astype(np.float64)))


def test_int4_codes_where_the_scale_is_a_power_of_two() -> None:
    for k in (-100, 0, 5):
        weight = np.random.default_rng(k + 200).uniform(-7.5, 7.5, (6, 128)).astype(np.float32)
        weight[:, 0], weight[:, 1:16] = -7.5, np.arange(-7, 8) + 0.5
        packed, scale, _ = reference_integer.quantize_int4_group(
            torch.from_numpy(weight * np.float32(2.0**k)), search="absmax"
        )
        assert scale.flatten().tolist() == [2.0**k] * 6
        expected = np.clip(np.rint(weight.astype(np.float64)), -8, 7) + 8
        assert np.array_equal(reference_integer.unpack_int4(packed).numpy(), expected)


@pytest.mark.parametrize(("low", "high"), [(-15, 0), (0, 15), (-5, 10), (-7.5, 7.5), (3, 15), (-15, -2)])
def test_int4_zero_points(low: float, high: float) -> None:
    """Groups that reach 15 steps on both sides of zero together have scale 1."""
    weight = np.random.default_rng(1).uniform(low, high, (6, 64)).astype(np.float32)
    weight[:, 0], weight[:, 1] = low, high
    packed, scale, zero = reference_integer.quantize_int4_group(
        torch.from_numpy(weight), group_size=64, symmetric=False, search="absmax"
    )
    assert zero is not None
    assert scale.unique().tolist() == [1.0]
    expected_zero = np.clip(np.rint(-min(low, 0.0)), 0, 15)
    assert zero.unique().tolist() == [expected_zero]
    expected = np.clip(np.rint(weight.astype(np.float64)) + expected_zero, 0, 15)
    assert np.array_equal(reference_integer.unpack_int4(packed).numpy(), expected)


def test_dequantize_in_exact_arithmetic() -> None:
    """Products of 8 and 12 bits with a short scale are exact, so float64 gives the same numbers."""
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(2, 128)
    scale = torch.tensor([[0.0625 * 3], [2.0**-90]])
    back = reference_integer.dequantize_int8_channel(codes, scale, dtype=torch.float32)
    assert np.array_equal(back.numpy(), codes.numpy().astype(np.float64) * scale.numpy())
    packed = reference_integer.pack_int4(torch.arange(16, dtype=torch.uint8).repeat(2, 1))
    zero = torch.tensor([[3], [15]], dtype=torch.uint8)
    back = reference_integer.dequantize_int4_group(packed, scale, zero, dtype=torch.float32)
    expected = (np.arange(16) - zero.numpy().astype(np.float64)) * scale.numpy()
    assert np.array_equal(back.numpy(), expected)


# ---------------------------------------------------------------------------------------------- quality


@pytest.mark.parametrize(("group_size", "search"), SIGNAL_TO_NOISE)
def test_int4_signal_to_noise(group_size: int, search: str) -> None:
    weight = normal(256, 7168)
    expected = pytest.approx(SIGNAL_TO_NOISE[group_size, search], abs=0.15)
    got = decibels(weight, through_int4(weight, group_size, search=search))
    assert got == expected
    # A scale that is 5 % off is noticed.
    worse = through_int4(weight * 1.05, group_size, search=search)
    assert decibels(weight, worse) != expected


def test_int8_channel_signal_to_noise_from_fp8() -> None:
    """Against the FP8 weight itself: what the second rounding costs on rows of 7168."""
    weight = reference.dequantize_fp8_block(
        *reference.quantize_fp8_block(normal(128, 7168)), dtype=torch.float32
    )
    codes, scale = reference_integer.quantize_int8_channel(weight)
    got = decibels(weight, reference_integer.dequantize_int8_channel(codes, scale, dtype=torch.float32))
    assert got >= 40.5
    coarse = reference_integer.dequantize_int8_channel(codes // 2 * 2, scale, dtype=torch.float32)
    assert decibels(weight, coarse) < 40.5


def test_int8_block_from_fp8_keeps_most_weights_exactly() -> None:
    codes, fp8_scale = reference.quantize_fp8_block(normal(512, 1024))
    weight = reference.dequantize_fp8_block(codes, fp8_scale, dtype=torch.float32)
    results = {}
    for name, given in (("with", fp8_scale), ("without", None)):
        int8_codes, scale = reference_integer.quantize_int8_block(weight, fp8_scale=given)
        back = reference_integer.dequantize_int8_block(int8_codes, scale, dtype=torch.float32)
        results[name] = decibels(weight, back), float((back == weight).float().mean())
    assert results["with"][0] >= 44.4
    assert results["with"][1] >= 0.83
    assert results["without"][0] < 41.0
    assert results["without"][1] < 0.1


def group_errors(weight: Tensor, back: Tensor, group_size: int) -> Tensor:
    difference = weight.double() - back.double()
    return difference.square().reshape(weight.shape[0], -1, group_size).sum(2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
def test_mse_is_nowhere_worse_than_absmax(group_size: int, symmetric: bool) -> None:
    """Up to the search's resolution: every square is rounded to 1/65536 of a squared scale.

    That is 2**-17 for an element. Its quotient, below 32, is rounded to 24 bits twice, 2**-18 together,
    which times twice an error below 9 (a clamped weight's) makes 2**-13.8. Twice that, for the two
    scales that are compared, is less than 2**-12 of the square of the largest scale, 1.09 x plain.
    """
    weight = torch.cat([normal(64, 1024, seed=1), normal(64, 1024, seed=2).exp(), normal(64, 1024) ** 3])
    options = {"group_size": group_size, "symmetric": symmetric}
    searched = group_errors(weight, through_int4(weight, search="mse", **options), group_size)
    plain = group_errors(weight, through_int4(weight, search="absmax", **options), group_size)
    scale = reference_integer.quantize_int4_group(weight, search="absmax", **options)[1]
    resolution = (scale.double() * 1.1).square() * group_size * 2.0**-12
    assert (searched <= plain + resolution).all()
    assert not (plain <= searched + resolution).all()
    assert float(searched.sum()) < 0.99 * float(plain.sum())


def test_the_search_finds_the_best_factor() -> None:
    """Each factor's squared error, computed in numpy and float64, is no smaller than the chosen one's."""
    weight = normal(32, 256, seed=3)
    scale = reference_integer.quantize_int4_group(weight, group_size=64)[1].double()
    groups = weight.double().reshape(32, 4, 64).numpy()
    plain = np.abs(groups).max(2) / 7.5

    def error(candidate: np.ndarray) -> np.ndarray:
        codes = np.clip(np.rint(groups / candidate[:, :, None]), -8, 7)
        return ((groups - codes * candidate[:, :, None]) ** 2).sum(2)

    chosen = error(scale.numpy())
    factors = reference_integer.SCALE_FACTORS
    candidates = [torch.from_numpy(plain * f).to(torch.bfloat16).double().numpy() for f in factors]
    resolution = (plain * 1.1) ** 2 * 64 * 2.0**-12
    for candidate in candidates:
        assert (chosen <= error(candidate) + resolution).all()
    assert (np.stack(candidates) == scale.numpy()).any(0).all()
    assert len({tuple(row) for row in (np.stack(candidates) == scale.numpy()).argmax(0)}) > 1
