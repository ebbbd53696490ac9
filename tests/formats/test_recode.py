"""From one format to another: through float32, and back to the same bytes where nothing changed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.formats import FORMATS, Dense, FP8Block
from dsv3_tools.formats.base import Format
from dsv3_tools.formats.recode import recode_into
from dsv3_tools.kernels import reference
from tests.formats.weights import bits

BF16, FP8, UE8M0 = FORMATS["bf16"], FORMATS["fp8_block"], FORMATS["fp8_block_ue8m0"]
SHAPES = [(128, 128), (576, 200), (130, 257), (1, 1), (256, 448)]


def all_bits(parts: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in parts.items()}


def make_fp8(shape: tuple[int, int], seed: int = 0, *, largest: int = 0x7E) -> dict[str, Tensor]:
    """Returns FP8 codes up to `largest` at random, with scales that no quantizer would have chosen."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, largest + 1, shape, dtype=torch.uint8, generator=generator)
    codes |= torch.randint(0, 2, shape, dtype=torch.uint8, generator=generator) << 7
    blocks = FP8.parts(shape)["weight_scale_inv"].shape
    scale = 10.0 ** (torch.rand(blocks, generator=generator) * 4 - 5)
    return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": scale}


def recode(source: Format, target: Format, *items: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    outs = [
        {
            name: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
            for name, spec in target.parts(tuple(item["weight"].shape)).items()
        }
        for item in items
    ]
    counts = recode_into(source, target, items, outs)
    assert counts.shape == (len(items),)
    assert counts.dtype == torch.int32
    return outs


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_pair_is_decode_in_float32_then_encode(
    source: str, target: str, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    item = FORMATS[source].encode(torch.randn(shape, generator=generator) * 0.02)
    weight = FORMATS[source].decode(item, dtype="F32")
    (out,) = recode(FORMATS[source], FORMATS[target], item)
    assert all_bits(out) == all_bits(FORMATS[target].encode(weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_to_fp8_goes_through_float32(shape: tuple[int, int]) -> None:
    item = make_fp8(shape)
    (out,) = recode(FP8, UE8M0, item)

    weight = reference.dequantize_fp8_block(item["weight"], item["weight_scale_inv"], dtype=torch.float32)
    codes, scale = reference.quantize_fp8_block(weight, scale_fmt="ue8m0")
    assert all_bits(out) == {"weight": bits(codes), "weight_scale_inv": bits(scale)}
    mantissas = scale.view(torch.int32) & 0x7F_FFFF
    assert (mantissas == 0).all(), "the scales are powers of two"


def test_control_through_bf16_the_bytes_would_differ() -> None:
    item = make_fp8((576, 200))
    (direct,) = recode(FP8, UE8M0, item)
    assert all_bits(UE8M0.encode(FP8.decode(item, dtype="BF16"))) != all_bits(direct)
    assert all_bits(UE8M0.encode(FP8.decode(item, dtype="F32"))) == all_bits(direct)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_fp8_to_bf16_and_back_with_like_gives_the_same_bytes(shape: tuple[int, int], seed: int) -> None:
    item = make_fp8(shape, seed)
    (weight,) = recode(FP8, BF16, item)
    (back,) = recode(BF16, FP8, weight | {"like": item["weight_scale_inv"]})
    assert all_bits(back) == all_bits(item)


def test_control_without_like_the_bytes_differ() -> None:
    item = make_fp8((576, 200), largest=0x7D)  # 416, so that 448 is of no use for the blocks' scales
    (weight,) = recode(FP8, BF16, item)
    (back,) = recode(BF16, FP8, weight)
    assert bits(back["weight"]) != bits(item["weight"])
    assert not (back["weight_scale_inv"] == item["weight_scale_inv"]).any()
    (back,) = recode(BF16, FP8, weight | {"like": item["weight_scale_inv"]})
    assert all_bits(back) == all_bits(item)


def test_like_keeps_the_blocks_that_did_not_change_only() -> None:
    item = make_fp8((300, 300), largest=0x7D)
    (weight,) = recode(FP8, BF16, item)
    weight["weight"][130, 5] *= 1.03  # no code of the old scale
    (back,) = recode(BF16, FP8, weight | {"like": item["weight_scale_inv"]})
    same = back["weight_scale_inv"] == item["weight_scale_inv"]
    assert same.logical_not().nonzero().tolist() == [[1, 0]]
    changed = back["weight"].view(torch.uint8) != item["weight"].view(torch.uint8)
    assert changed[128:256, :128].any()
    changed[128:256, :128] = False
    assert not changed.any()
    own, scale = reference.quantize_fp8_block(weight["weight"][128:256, :128])
    assert bits(back["weight"][128:256, :128]) == bits(own)
    assert back["weight_scale_inv"][1, 0] == scale[0, 0]


def test_a_group_is_recoded_as_each_weight_alone() -> None:
    items = [make_fp8(shape, seed) for seed, shape in enumerate(SHAPES)]
    for target in (BF16, UE8M0):
        together = recode(FP8, target, *items)
        alone = [recode(FP8, target, item)[0] for item in items]
        assert [all_bits(out) for out in together] == [all_bits(out) for out in alone]
    weights = recode(FP8, BF16, *items)
    likes = [weight | {"like": item["weight_scale_inv"]} for weight, item in zip(weights, items, strict=True)]
    assert [all_bits(out) for out in recode(BF16, FP8, *likes)] == [all_bits(item) for item in items]


def test_recoding_leaves_its_items_alone() -> None:
    item = make_fp8((130, 130))
    before = all_bits(item)
    for target in (BF16, UE8M0):
        recode(FP8, target, item)
    (weight,) = recode(FP8, BF16, item)
    weight["like"] = item["weight_scale_inv"]
    kept = all_bits(weight)
    recode(BF16, FP8, weight)
    assert (all_bits(item), all_bits(weight)) == (before, kept)


def test_inverse_scales_to_scales_that_multiply() -> None:
    item = make_fp8((300, 200))
    item["weight_scale_inv"] = reference.round_up_to_power_of_two(item["weight_scale_inv"])
    inverse = item | {"weight_scale_inv": item["weight_scale_inv"].reciprocal()}
    for target in (BF16, FP8, UE8M0):
        (expected,) = recode(FP8, target, item)
        (out,) = recode(FP8Block(inverse_scales=True), target, inverse)
        assert all_bits(out) == all_bits(expected)
        (wrong,) = recode(FP8, target, inverse)
        assert all_bits(wrong) != all_bits(expected)


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_unquantized_sources(dtype: str) -> None:
    weight = torch.randn((130, 140), generator=torch.Generator().manual_seed(2)).to(torch_dtype(dtype))
    (fp8,) = recode(Dense(dtype), FP8, {"weight": weight})
    assert all_bits(fp8) == all_bits(FP8.encode(weight))
    (bf16,) = recode(Dense(dtype), BF16, {"weight": weight})
    assert bits(bf16["weight"]) == bits(weight.bfloat16())


@pytest.mark.parametrize("target", FORMATS)
def test_what_is_not_finite_is_counted_per_weight(target: str) -> None:
    items = [make_fp8((130, 140), seed) for seed in range(3)]
    items[0]["weight"].view(torch.uint8)[5, 7] = 0x7F
    items[2]["weight"].view(torch.uint8)[129, 138:] = 0xFF
    outs = [
        {
            n: torch.empty(s.shape, dtype=torch_dtype(s.dtype))
            for n, s in FORMATS[target].parts((130, 140)).items()
        }
        for _ in items
    ]
    assert recode_into(FP8, FORMATS[target], items, outs).tolist() == [1, 0, 2]
    back = FORMATS[target].decode(outs[2])
    assert torch.isnan(back).nonzero().tolist() == [[129, 138], [129, 139]]
    assert (back[129, 138:].view(torch.int16) == 0x7FC0).all()
