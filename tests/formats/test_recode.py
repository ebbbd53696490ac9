"""From one format to another: through float32, and back to the same bytes where nothing changed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv3_tools.checkpoint.dtypes import torch_dtype
from dsv3_tools.errors import FormatError
from dsv3_tools.formats import FORMATS, INT4, INT4GPTQ, Dense, FP8Block, INT4Packed, INT8Block
from dsv3_tools.formats.base import Format
from dsv3_tools.formats.integer import IntegerFormat
from dsv3_tools.formats.recode import recode_into
from dsv3_tools.kernels import reference, reference_integer
from tests.formats.weights import (
    INT4_FORMATS,
    all_bits,
    bits,
    can_store,
    empty_parts,
    expected_parts,
    lay_out,
    make_grid,
    read_out,
)

BF16, FP8, UE8M0 = FORMATS["bf16"], FORMATS["fp8_block"], FORMATS["fp8_block_ue8m0"]
SHAPES = [(128, 128), (576, 200), (130, 257), (1, 1), (256, 448)]
MORE_SHAPES = [*SHAPES, (136, 384), (8, 1152), (7, 256)]


def make_fp8(shape: tuple[int, int], seed: int = 0, *, largest: int = 0x7E) -> dict[str, Tensor]:
    """Returns FP8 codes up to `largest` at random, with scales that no quantizer would have chosen."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, largest + 1, shape, dtype=torch.uint8, generator=generator)
    codes |= torch.randint(0, 2, shape, dtype=torch.uint8, generator=generator) << 7
    blocks = FP8.parts(shape)["weight_scale_inv"].shape
    scale = 10.0 ** (torch.rand(blocks, generator=generator) * 4 - 5)
    return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": scale}


def recode(source: Format, target: Format, *items: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Returns the new parts, those included that follow from the shape and that somebody else writes."""
    outs = []
    for item in items:
        shape = source.shape_of(tuple(item[source.weight_part].shape))
        out = empty_parts(target, shape)
        for part, content in target.fixed(shape).items():
            known = torch.frombuffer(bytearray(content), dtype=out[part].dtype)
            out[part].copy_(known.reshape(out[part].shape))
        outs.append(out)
    counts = recode_into(source, target, items, outs)
    assert counts.shape == (len(items),)
    assert counts.dtype == torch.int32
    return outs


def moves(source: Format, target: Format) -> bool:
    """Whether both have the same codes, scales and zeros: then nothing is quantized again."""
    return (
        isinstance(source, INT4)
        and isinstance(target, INT4)
        and source.group_size == target.group_size
        and (source.symmetric or not target.symmetric)
    )


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_every_pair_is_decode_in_float32_then_encode(source: str, target: str) -> None:
    """But for INT4 of the same groups, which is moved, and for scales that FP8 hands down to INT8 blocks."""
    before, after = FORMATS[source], FORMATS[target]
    shapes = [shape for shape in MORE_SHAPES if can_store(before, shape) and can_store(after, shape)]
    assert shapes
    for shape in shapes:
        generator = torch.Generator().manual_seed(1)
        item = before.encode(torch.randn(shape, generator=generator) * 0.02)
        (out,) = recode(before, after, item)
        if moves(before, after):
            assert isinstance(before, INT4)
            assert isinstance(after, INT4)
            assert all_bits(out) == all_bits(lay_out(after, read_out(before, item)))
            assert bits(after.decode(out, dtype="F32")) == bits(before.decode(item, dtype="F32"))
            continue
        weight = before.decode(item, dtype="F32")
        if isinstance(before, FP8Block) and isinstance(after, IntegerFormat):
            scale = item["weight_scale_inv"]
            assert all_bits(out) == all_bits(expected_parts(after, weight, fp8_scale=scale))
        else:
            assert all_bits(out) == all_bits(after.encode(weight))


@pytest.mark.parametrize("target", FORMATS)
def test_every_int4_source_is_decoded_in_float32_then_encoded_or_moved(target: str) -> None:
    """Whatever other tools wrote: other groups, dtypes of scales, zero points, row order of columns."""
    after = FORMATS[target]
    for number, (name, before) in enumerate(INT4_FORMATS.items()):
        grid = make_grid(before, (136, 384), seed=number)
        item = lay_out(before, grid)
        (out,) = recode(before, after, item)
        weight = grid.weight()
        assert bits(before.decode(item, dtype="F32")) == bits(weight), name
        if moves(before, after) and before.scale_dtype == "BF16":
            assert isinstance(after, INT4)
            if before.symmetric and not after.symmetric:  # every zero point is 8
                grid = grid._replace(zeros=np.full(grid.scales.shape, 8, dtype=np.uint8))
            assert all_bits(out) == all_bits(lay_out(after, grid)), name
        else:
            assert all_bits(out) == all_bits(after.encode(weight)), name


def test_control_moved_codes_are_not_those_that_would_be_chosen() -> None:
    source, target = INT4Packed(), INT4GPTQ(search="absmax")
    item = lay_out(source, make_grid(source, (136, 384)))
    (moved,) = recode(source, target, item)
    chosen = target.encode(source.decode(item, dtype="F32"))
    assert bits(moved["scales"]) != bits(chosen["scales"])
    assert bits(moved["qweight"]) != bits(chosen["qweight"])


# FP8 as a source of integers.


@pytest.mark.parametrize("target", [name for name, fmt in FORMATS.items() if isinstance(fmt, IntegerFormat)])
@pytest.mark.parametrize("block_size", [(128, 128), (64, 32)])
def test_integers_are_made_of_fp8_without_bf16_in_between(target: str, block_size: tuple[int, int]) -> None:
    source = FP8Block(block_size)
    weight = torch.randn((136, 384), generator=torch.Generator().manual_seed(4)) * 0.02
    item = source.encode(weight)
    (out,) = recode(source, FORMATS[target], item)
    exact = reference.dequantize_fp8_block(
        item["weight"], item["weight_scale_inv"], block_size=block_size, dtype=torch.float32
    )
    scale = item["weight_scale_inv"]
    expected = expected_parts(FORMATS[target], exact, fp8_scale=scale, fp8_block_size=block_size)
    assert all_bits(out) == all_bits(expected)
    through_bf16 = FORMATS[target].encode(source.decode(item))
    part = FORMATS[target].weight_part
    assert bits(out[part]) != bits(through_bf16[part])


def test_an_int8_block_takes_four_times_the_fp8_scale_where_that_loses_less() -> None:
    item = make_fp8((384, 256))
    small = torch.tensor([1.0, -1.5, 2.0, 0.25]).repeat(128, 32).to(torch.float8_e4m3fn)
    item["weight"].view(torch.uint8)[:128, :128] = small.view(torch.uint8)
    (out,) = recode(FP8, INT8Block(), item)
    taken = out["weight_scale_inv"] == 4 * item["weight_scale_inv"]
    assert not taken[0, 0], "codes below 32 are no multiples of 4: 2 / 127 as a scale is finer"
    assert taken.sum() == 5
    weight = FP8.decode(item, dtype="F32")
    error = (INT8Block().decode(out, dtype="F32") - weight).double().square()
    own = (INT8Block().decode(INT8Block().encode(weight), dtype="F32") - weight).double().square()
    assert error[128:].sum() < own[128:].sum()
    assert error.sum() < own.sum()


def test_inverse_scales_are_turned_around_before_integers_are_made() -> None:
    item = make_fp8((136, 384))
    item["weight_scale_inv"] = reference.round_up_to_power_of_two(item["weight_scale_inv"])
    inverse = item | {"weight_scale_inv": item["weight_scale_inv"].reciprocal()}
    for name in ("int8_block", "int8_channel", "int4_packed", "int4_gptq", "int4_awq"):
        (expected,) = recode(FP8, FORMATS[name], item)
        (out,) = recode(FP8Block(inverse_scales=True), FORMATS[name], inverse)
        assert all_bits(out) == all_bits(expected)


# FP8 and BF16.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_to_fp8_goes_through_float32(shape: tuple[int, int]) -> None:
    item = make_fp8(shape)
    (out,) = recode(FP8, UE8M0, item)

    weight = reference.dequantize_fp8_block(item["weight"], item["weight_scale_inv"], dtype=torch.float32)
    codes, scale = reference.quantize_fp8_block(weight, scale_fmt="ue8m0")
    assert all_bits(out) == {"weight": bits(codes), "weight_scale_inv": bits(scale)}
    mantissas = scale.view(torch.int32) & 0x007F_FFFF
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
    fmt = FORMATS[target]
    items = [make_fp8((136, 256), seed) for seed in range(3)]
    items[0]["weight"].view(torch.uint8)[5, 7] = 0x7F
    items[2]["weight"].view(torch.uint8)[129, 254:] = 0xFF
    outs = [empty_parts(fmt, (136, 256)) for _ in items]
    assert recode_into(FP8, fmt, items, outs).tolist() == [1, 0, 2]
    back = fmt.decode(outs[2])
    if isinstance(fmt, IntegerFormat):
        assert torch.isfinite(back).all()
        assert (back[129, 254:] == 0).all()
        return
    assert torch.isnan(back).nonzero().tolist() == [[129, 254], [129, 255]]
    assert (back[129, 254:].view(torch.int16) == 0x7FC0).all()


@pytest.mark.parametrize("target", FORMATS)
def test_a_scale_that_is_not_finite_counts_for_each_of_its_elements(target: str) -> None:
    """Counted alike whether codes are decoded or moved."""
    source = INT4Packed(group_size=64, symmetric=False)
    for fmt in (FORMATS[target], INT4Packed(group_size=64, symmetric=False, shape_dtype="I32")):
        items = [lay_out(source, make_grid(source, (16, 256), seed)) for seed in range(3)]
        items[0]["weight_scale"][3, 1] = torch.nan
        items[2]["weight_scale"][3, :2] = torch.inf
        outs = [empty_parts(fmt, (16, 256)) for _ in items]
        assert recode_into(source, fmt, items, outs).tolist() == [64, 0, 128]


@pytest.mark.parametrize(
    "target",
    [
        INT4GPTQ(symmetric=False),
        INT4GPTQ(symmetric=False, version=2),
        INT4GPTQ(act_order=True),
        INT4Packed(group_size=16),
        INT4Packed(group_size=-1),
        INT4Packed(scale_dtype="F16"),
    ],
    ids=str,
)
def test_what_is_only_read_is_never_made_by_recoding(target: INT4) -> None:
    """No source has the same grid, or its codes could be stored but not all that belongs to them."""
    sources: list[Format] = [BF16, FP8, INT8Block(), INT4Packed(), INT4Packed(symmetric=False)]
    for source in sources:
        item = source.encode(torch.randn((16, 128), generator=torch.Generator().manual_seed(6)))
        with pytest.raises(FormatError, match=r"are only read|are written") as caught:
            recode_into(source, target, [item], [empty_parts(target, (16, 128))])
        assert str(caught.value).startswith(f"{target.name}: ")


def test_reference_and_kernels_agree_on_the_smallest_scale() -> None:
    """A group below it becomes zeros with a scale of 1.0 whichever way it comes."""
    weight = torch.full((8, 128), 2.0**-124)
    scale = reference_integer.quantize_int4_group(weight)[1]
    assert (scale == 1.0).all()
    (out,) = recode(Dense("F32"), FORMATS["int4_packed"], {"weight": weight})
    assert bits(out["weight_scale"]) == bits(scale)
