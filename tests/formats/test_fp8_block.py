"""FP8 blocks: which parts and which configurations are theirs, and scales stored as reciprocals."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import FormatError
from dsv3_tools.formats import FORMATS, Dense, Format, FP8Block, INT8Block, check_parts
from dsv3_tools.kernels import reference
from tests.formats.weights import bits, expected_parts, expected_weight, make_weight


def wrong_parts() -> dict[str, tuple[dict[str, Tensor], str]]:
    codes, scale = reference.quantize_fp8_block(make_weight((300, 200)))
    right = {"weight": codes, "weight_scale_inv": scale}
    return {
        "nothing": ({}, "no part 'weight'"),
        "only the scale": ({"weight_scale_inv": scale}, "no part 'weight'"),
        "missing scale": ({"weight": right["weight"]}, r"got the parts \['weight'\]"),
        "extra part": ({**right, "bias": scale}, "got the parts"),
        "misnamed scale": ({"weight": right["weight"], "weight_scale": scale}, "got the parts"),
        "broadcastable (1, 2)": (
            {**right, "weight_scale_inv": scale[:1]},
            r"float32 \[1, 2\], expected F32 \[3, 2\]",
        ),
        "broadcastable (3, 1)": (
            {**right, "weight_scale_inv": scale[:, :1]},
            r"\[3, 1\], expected F32 \[3, 2\]",
        ),
        "broadcastable (1, 1)": ({**right, "weight_scale_inv": scale[:1, :1]}, r"\[1, 1\], expected"),
        "one scale": ({**right, "weight_scale_inv": scale[0, 0]}, r"\[\], expected F32 \[3, 2\]"),
        "transposed": ({**right, "weight_scale_inv": scale.t()}, r"\[2, 3\], expected F32 \[3, 2\]"),
        "flat": ({**right, "weight_scale_inv": scale.reshape(-1)}, r"\[6\], expected"),
        "one row too many": (
            {**right, "weight_scale_inv": torch.cat([scale, scale[:1]])},
            r"\[4, 2\], expected",
        ),
        "bfloat16 scale": ({**right, "weight_scale_inv": scale.bfloat16()}, "bfloat16 .*, expected F32"),
        "float64 scale": ({**right, "weight_scale_inv": scale.double()}, "float64"),
        "e8m0 scale": ({**right, "weight_scale_inv": scale.to(torch.float8_e8m0fnu)}, "float8_e8m0fnu"),
        "bytes": ({**right, "weight": right["weight"].view(torch.uint8)}, "weight is torch.uint8"),
        "int8": ({**right, "weight": right["weight"].view(torch.int8)}, "weight is torch.int8"),
        "e5m2": ({**right, "weight": right["weight"].view(torch.float8_e5m2)}, "float8_e5m2 "),
        "e4m3fnuz": ({**right, "weight": right["weight"].view(torch.float8_e4m3fnuz)}, "float8_e4m3fnuz"),
        "weight in bfloat16": ({**right, "weight": make_weight((300, 200))}, "weight is torch.bfloat16"),
        "one dimension": ({**right, "weight": right["weight"].reshape(-1)}, "expected two dimensions"),
        "three dimensions": ({**right, "weight": right["weight"][None]}, "expected two dimensions"),
    }


WRONG_PARTS = wrong_parts()


@pytest.mark.parametrize("case", WRONG_PARTS)
@pytest.mark.parametrize("name", ["fp8_block", "fp8_block_ue8m0"])
def test_wrong_parts_of_fp8(name: str, case: str) -> None:
    parts, expected = WRONG_PARTS[case]
    for check in (lambda: check_parts(FORMATS[name], parts), lambda: FORMATS[name].decode(parts)):
        with pytest.raises(FormatError, match=expected) as caught:
            check()
        assert str(caught.value).startswith("fp8_block: ")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"weight": torch.zeros(2, 2)},
        {"weight": torch.zeros(2, 2, dtype=torch.float8_e4m3fn)},
        {"weight": torch.zeros(2, 2, dtype=torch.bfloat16), "weight_scale_inv": torch.ones(1, 1)},
    ],
)
def test_wrong_parts_of_bf16(parts: dict[str, Tensor]) -> None:
    with pytest.raises(FormatError, match=r"^bf16: "):
        FORMATS["bf16"].decode(parts)


def test_control_the_right_parts() -> None:
    assert check_parts(FORMATS["fp8_block"], FORMATS["fp8_block"].encode(make_weight((300, 200)))) == (
        300,
        200,
    )
    assert check_parts(FORMATS["bf16"], {"weight": make_weight((7,))}) == (7,)


@pytest.mark.parametrize("shape", [(), (128,), (2, 128, 128)])
def test_fp8_stores_matrices_only(shape: tuple[int, ...]) -> None:
    for do in (FORMATS["fp8_block"].parts, lambda shape: FORMATS["fp8_block"].encode(torch.zeros(shape))):
        with pytest.raises(FormatError, match="expected two dimensions"):
            do(shape)
    assert bits(FORMATS["bf16"].encode(torch.zeros(shape))["weight"]) == bytes(2 * torch.Size(shape).numel())


# Equality, configuration.


def test_equal_parameters_equal_format() -> None:
    assert FP8Block() == FP8Block((128, 128), "f32", inverse_scales=False) == FORMATS["fp8_block"]
    assert FP8Block(scale_fmt="ue8m0") == FORMATS["fp8_block_ue8m0"]
    assert Dense() == Dense("BF16") == FORMATS["bf16"]
    different: set[Any] = {
        FP8Block(),
        FP8Block((64, 128)),
        FP8Block((128, 64)),
        FP8Block(scale_fmt="ue8m0"),
        FP8Block(inverse_scales=True),
        *(Dense(dtype) for dtype in ("BF16", "F16", "F32", "F64")),
    }
    assert len(different) == 9
    assert len(different | {FP8Block(), Dense("F32")}) == 9
    with pytest.raises(FrozenInstanceError):
        FP8Block().scale_fmt = "ue8m0"  # type: ignore[misc]


@pytest.mark.parametrize("block_size", [(0, 128), (128, -1)])
def test_impossible_block_sizes(block_size: tuple[int, int]) -> None:
    with pytest.raises(FormatError, match="block_size"):
        FP8Block(block_size)


def test_impossible_names() -> None:
    for scale_fmt in ("", "UE8M0", "e8m0", "f16"):
        with pytest.raises(FormatError, match="scale_fmt"):
            FP8Block(scale_fmt=scale_fmt)
    for dtype in ("", "bf16", "I8", "F8_E4M3"):
        with pytest.raises(FormatError, match="dense: got dtype"):
            Dense(dtype)


@pytest.mark.parametrize("name", ["fp8_block", "fp8_block_ue8m0"])
def test_the_configuration_leads_back_to_the_format(name: str) -> None:
    fmt = FORMATS[name]
    config = fmt.quantization_config()
    assert config is not None
    assert FP8Block.from_quantization_config(config, "x") == fmt


def test_configurations_of_the_releases() -> None:
    release = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    assert FP8Block().quantization_config() == release
    assert FP8Block(scale_fmt="ue8m0").quantization_config() == release | {"scale_fmt": "ue8m0"}


RELEASE: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("change", "fmt"),
    [
        ({}, FP8Block()),
        ({"scale_fmt": "ue8m0"}, FP8Block(scale_fmt="ue8m0")),
        ({"scale_fmt": None}, FP8Block()),
        ({"scale_fmt": ""}, FP8Block()),
        ({"scale_fmt": "f32"}, FP8Block()),
        ({"weight_block_size": [64, 32]}, FP8Block((64, 32))),
        ({"weight_scale_semantics": "inverse"}, FP8Block(inverse_scales=True)),
        ({"weight_scale_semantics": "multiply"}, FP8Block()),
        ({"activation_scheme": "static", "modules_to_not_convert": ["lm_head"], "unknown": 1}, FP8Block()),
    ],
)
def test_accepted_configurations(change: dict[str, Any], fmt: FP8Block) -> None:
    assert FP8Block.from_quantization_config(RELEASE | change, "config.json") == fmt


def test_fmt_may_be_left_out() -> None:
    del (config := dict(RELEASE))["fmt"]
    assert FP8Block.from_quantization_config(config, "config.json") == FP8Block()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"quant_method": "gptq"}, "quantization is 'gptq'"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
        ({"quant_method": None}, "quantization is None"),
        ({"quant_method": "FP8"}, "quantization is 'FP8'"),
        ({"quant_method": ["fp8"]}, "quantization is"),
        ({"fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"fmt": None}, "fmt None"),
        ({"weight_block_size": None}, "weight_block_size is None"),
        ({"weight_block_size": []}, "weight_block_size"),
        ({"weight_block_size": 128}, "weight_block_size"),
        ({"weight_block_size": [128]}, "weight_block_size"),
        ({"weight_block_size": [128, 128, 128]}, "weight_block_size"),
        ({"weight_block_size": [128, 0]}, "weight_block_size"),
        ({"weight_block_size": [-128, 128]}, "weight_block_size"),
        ({"weight_block_size": [128.0, 128]}, "weight_block_size"),
        ({"weight_block_size": [True, 128]}, "weight_block_size"),
        ({"weight_block_size": ["128", "128"]}, "weight_block_size"),
        ({"weight_block_size": "128,128"}, "weight_block_size"),
        ({"scale_fmt": "e8m0"}, "scale_fmt is 'e8m0'"),
        ({"scale_fmt": 8}, "scale_fmt is 8"),
        ({"scale_fmt": ["ue8m0"]}, "scale_fmt"),
        ({"weight_scale_semantics": "reciprocal"}, "weight_scale_semantics is 'reciprocal'"),
        ({"weight_scale_semantics": None}, "weight_scale_semantics is None"),
    ],
)
def test_refused_configurations(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(FormatError, match=r"^config\.json: ") as caught:
        FP8Block.from_quantization_config(RELEASE | change, "config.json")
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", ["quant_method", "weight_block_size"])
def test_configurations_that_lack_a_key(key: str) -> None:
    with pytest.raises(FormatError, match=r"^config\.json: "):
        FP8Block.from_quantization_config({k: v for k, v in RELEASE.items() if k != key}, "config.json")


def test_sizes_of_other_blocks() -> None:
    assert FP8Block((64, 32)).parts((65, 33)) == {
        "weight": TensorSpec("F8_E4M3", (65, 33)),
        "weight_scale_inv": TensorSpec("F32", (2, 2)),
    }
    assert FP8Block((64, 32)).row_alignment == 64
    weight = make_weight((130, 70))
    fmt = FP8Block((64, 32))
    parts = fmt.encode(weight)
    for name, expected in expected_parts(fmt, weight).items():
        assert bits(parts[name]) == bits(expected)
    assert bits(fmt.decode(parts)) == bits(expected_weight(fmt, parts, torch.bfloat16))


# Other names, the same bytes.


def test_a_format_of_the_same_bytes_needs_no_recoding() -> None:
    named = FP8Block(scale_name="weight_scale")
    powers = FP8Block(scale_fmt="ue8m0")
    assert FP8Block().same_bytes(named)
    assert named.same_bytes(FP8Block())
    assert powers.same_bytes(FP8Block()), "powers of two are float32, too"
    assert powers.same_bytes(named)
    assert not FP8Block().same_bytes(powers), "float32 scales are not all powers of two"
    assert not named.same_bytes(powers)
    others: list[Format] = [FP8Block((64, 128)), FP8Block(inverse_scales=True), Dense(), INT8Block()]
    for other in others:
        assert not FP8Block().same_bytes(other)
        assert not other.same_bytes(FP8Block())


def test_scales_under_another_name() -> None:
    weight, fmt = make_weight((300, 200)), FP8Block(scale_name="weight_scale")
    parts = fmt.encode(weight)
    assert fmt.part_names == tuple(parts) == ("weight", "weight_scale")
    assert fmt.scale_part == "weight_scale"
    usual = FP8Block().encode(weight)
    assert [bits(part) for part in parts.values()] == [bits(part) for part in usual.values()]
    assert bits(fmt.decode(parts)) == bits(FP8Block().decode(usual))
    for other, wrong in ((FP8Block(), parts), (fmt, usual)):
        with pytest.raises(FormatError, match="got the parts"):
            other.decode(wrong)


# compressed-tensors, whose `float-quantized` is the same under another name.


def scheme(fmt: FP8Block) -> Any:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    arguments = quantization.QuantizationArgs(
        num_bits=8, type="float", strategy="block", block_structure=list(fmt.block_size)
    )
    return quantization.QuantizationScheme(targets=["Linear"], weights=arguments)


@pytest.mark.parametrize("shape", [(256, 384), (300, 200)])
@pytest.mark.parametrize("block_size", [(128, 128), (64, 32)])
def test_compressed_tensors_decodes_blocks_alike(block_size: tuple[int, int], shape: tuple[int, int]) -> None:
    """Every code, partial blocks included."""
    naive = pytest.importorskip("compressed_tensors.compressors.naive_quantized")
    fmt = FP8Block(block_size, scale_name="weight_scale")
    parts = fmt.encode(make_weight(shape))
    codes = parts["weight"].view(torch.uint8)
    codes.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
    decoded = naive.FloatQuantizationCompressor.decompress(parts, scheme(fmt))["weight"]
    own = fmt.decode(parts, dtype="F32")
    nan = torch.isnan(own)
    assert nan.sum() == 2
    assert torch.equal(nan, torch.isnan(decoded))
    assert bits(own[~nan]) == bits(decoded[~nan])
    codes[200, 100] ^= 1
    assert bits(fmt.decode(parts, dtype="F32")[~nan]) != bits(decoded[~nan])


def test_compressed_tensors_quantizes_blocks_alike_in_float32() -> None:
    """Largest / 448, and the same codes; partial blocks included."""
    naive = pytest.importorskip("compressed_tensors.compressors.naive_quantized")
    fmt = FP8Block(scale_name="weight_scale")
    for shape in [(256, 384), (300, 200)]:
        weight = make_weight(shape, torch.float32)
        parts = fmt.encode(weight)
        made = naive.FloatQuantizationCompressor.compress(
            {"weight": weight, "weight_scale": parts["weight_scale"]}, scheme(fmt)
        )
        assert bits(made["weight"]) == bits(parts["weight"])


# Scales that are stored as reciprocals.


def test_inverse_scales_are_read_as_reciprocals() -> None:
    parts = FP8Block(scale_fmt="ue8m0").encode(make_weight((300, 200)))
    inverse = parts | {"weight_scale_inv": parts["weight_scale_inv"].reciprocal()}
    expected = bits(FP8Block().decode(parts))
    assert bits(FP8Block(inverse_scales=True).decode(inverse)) == expected
    assert bits(FP8Block().decode(inverse)) != expected
    assert bits(FP8Block(inverse_scales=True).decode(parts)) != expected


def test_inverse_scales_are_rounded_once() -> None:
    parts = FP8Block().encode(make_weight((300, 200)))
    stored = parts["weight_scale_inv"]
    scale = (1.0 / stored.double()).float()
    weight = FP8Block(inverse_scales=True).decode(parts)
    assert bits(weight) == bits(reference.dequantize_fp8_block(parts["weight"], scale))


def test_inverse_scales_are_never_written() -> None:
    with pytest.raises(FormatError, match="only read"):
        FP8Block(inverse_scales=True).encode(make_weight((130, 130)))
