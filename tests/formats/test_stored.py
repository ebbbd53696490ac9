"""Which weights a checkpoint stores: formats recognised, mixtures told apart, the rest refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import FormatError
from dsv3_tools.formats import (
    FORMATS,
    INT4AWQ,
    INT4GPTQ,
    Dense,
    Format,
    FP8Block,
    INT4Packed,
    INT8Block,
    INT8Channel,
)
from dsv3_tools.formats.compressed_tensors import SCALE_NAME, quantization_config
from dsv3_tools.formats.stored import StoredWeight, find_weights, read_formats
from tests.formats.weights import READ_ONLY

EXPERT = "model.layers.3.mlp.experts.7.down_proj"
OTHER = "model.layers.3.mlp.experts.8.down_proj"
SHAPE = (16, 384)

PLAIN = {
    "model.embed_tokens.weight": TensorSpec("BF16", (160, 192)),
    "model.norm.weight": TensorSpec("BF16", (192,)),
    "lm_head.weight": TensorSpec("F16", (160, 192)),
    "model.layers.0.input_layernorm.weight": TensorSpec("BF16", (192,)),
    "model.layers.0.mlp.gate.weight": TensorSpec("F32", (8, 192)),
    "model.layers.0.mlp.gate.e_score_correction_bias": TensorSpec("F32", (8,)),
    "model.layers.0.self_attn.rotary_emb.inv_freq": TensorSpec("F32", (16,)),
    "model.layers.0.self_attn.q_a_proj.bias": TensorSpec("BF16", (144,)),
}

ALL: dict[str, Format] = {name: fmt for name, fmt in FORMATS.items() if not isinstance(fmt, Dense)}
ALL |= READ_ONLY | {"fp8_block_named": FP8Block(scale_name=SCALE_NAME), "int8_f16": INT8Channel("F16")}


def specs_of(fmt: Format, prefix: str = EXPERT, shape: tuple[int, ...] = SHAPE) -> dict[str, TensorSpec]:
    return {f"{prefix}.{part}": spec for part, spec in fmt.parts(shape).items()}


def only(specs: dict[str, TensorSpec], formats: Sequence[Format]) -> StoredWeight:
    """Returns the one weight that these tensors store."""
    stored = find_weights(specs, formats)
    assert stored.refused == {}
    (weight,) = stored.weights
    return weight


@pytest.mark.parametrize("name", ALL)
def test_every_format_is_recognised(name: str) -> None:
    fmt = ALL[name]
    specs = specs_of(fmt)
    stored = find_weights(PLAIN | specs, [fmt])
    assert stored.refused == {}
    assert [weight.full_name for weight in stored.weights] == [*PLAIN, f"{EXPERT}.weight"]
    weight = stored.weights[-1]
    assert (weight.format, weight.shape) == (fmt, SHAPE)
    assert weight.parts == {part: f"{EXPERT}.{part}" for part in fmt.part_names}
    assert set(weight.parts.values()) == set(specs)
    assert weight.code_name == f"{EXPERT}.{fmt.weight_part}"
    assert (weight.name.layer, weight.name.expert, weight.name.module) == (3, 7, "mlp.experts.down_proj")
    assert weight.name.parameter == "weight"
    assert stored.logical[f"{EXPERT}.weight"].shape == SHAPE
    assert list(stored.logical) == [*PLAIN, f"{EXPERT}.weight"]


def test_the_order_of_tensors_does_not_matter() -> None:
    for fmt in ALL.values():
        specs = specs_of(fmt)
        backwards = dict(reversed(specs.items()))
        assert only(backwards, [fmt]) == only(specs, [fmt])


def test_plain_tensors_are_stored_as_they_are() -> None:
    for formats in ((), tuple(ALL.values())):
        stored = find_weights(PLAIN, formats)
        assert stored.refused == {}
        for weight, (name, spec) in zip(stored.weights, PLAIN.items(), strict=True):
            assert (weight.full_name, weight.code_name) == (name, name)
            assert (weight.format, weight.shape, weight.parts) == (
                Dense(spec.dtype),
                spec.shape,
                {"weight": name},
            )
        assert stored.logical == PLAIN


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_dtypes_of_scales_are_taken_from_the_checkpoint(dtype: str) -> None:
    """config.json says nothing of them; AWQ and GPTQ checkpoints have F16, ours BF16."""
    for stated in (INT4Packed(32), INT4GPTQ(), INT4AWQ(64, symmetric=False), INT8Channel()):
        specs = specs_of(stated)
        assert stated.scale_part is not None
        scale = f"{EXPERT}.{stated.scale_part}"
        specs[scale] = TensorSpec(dtype, specs[scale].shape)
        found = only(specs, [stated]).format
        assert type(found) is type(stated)
        assert found.parts(SHAPE)[stated.scale_part] == specs[scale]


def test_the_dtype_of_shapes_is_taken_from_the_checkpoint() -> None:
    specs = specs_of(INT4Packed(32))
    specs[f"{EXPERT}.weight_shape"] = TensorSpec("I32", (2,))
    assert only(specs, [INT4Packed(32)]).format == INT4Packed(32, shape_dtype="I32")


def test_shapes_are_those_of_the_weight() -> None:
    """Of an expert's down projection: 7,168 outputs, 2,048 inputs."""
    for fmt in ALL.values():
        weight = only(specs_of(fmt, shape=(7168, 2048)), [fmt])
        assert weight.shape == (7168, 2048)


# Mixtures.


def test_groups_of_several_sizes_are_told_apart_by_their_scales() -> None:
    """The first size does not even divide the second weight's columns."""
    sizes = [INT4Packed(128), INT4Packed(32), INT4Packed(64, symmetric=False), INT4Packed(-1)]
    shapes = {128: (16, 384), 32: (16, 160), 64: (16, 192), -1: (16, 1000)}
    specs: dict[str, TensorSpec] = {}
    for number, fmt in enumerate(sizes):
        specs |= specs_of(fmt, f"model.layers.3.mlp.experts.{number}.up_proj", shapes[fmt.group_size])
    for formats in (sizes, sizes[::-1]):
        stored = find_weights(PLAIN | specs, formats)
        assert stored.refused == {}
        quantized = stored.weights[len(PLAIN) :]
        assert [weight.format for weight in quantized] == sizes
        assert [weight.shape for weight in quantized] == [shapes[fmt.group_size] for fmt in sizes]


def test_zero_points_tell_asymmetric_weights_apart() -> None:
    symmetric, asymmetric = INT4Packed(32), INT4Packed(32, symmetric=False)
    specs = specs_of(symmetric) | specs_of(asymmetric, OTHER)
    for formats in ((symmetric, asymmetric), (asymmetric, symmetric)):
        stored = find_weights(specs, formats)
        assert stored.refused == {}
        assert [weight.format for weight in stored.weights] == [symmetric, asymmetric]


def test_int4_beside_fp8_whose_scales_have_one_name() -> None:
    """compressed-tensors calls both "weight_scale"."""
    formats = [INT4Packed(64), FP8Block(scale_name=SCALE_NAME), INT8Channel()]
    names = [f"model.layers.3.mlp.experts.{number}.up_proj" for number in range(3)]
    specs: dict[str, TensorSpec] = {}
    for name, fmt in zip(names, formats, strict=True):
        specs |= specs_of(fmt, name)
    for order in (formats, formats[::-1]):
        stored = find_weights(PLAIN | specs, order)
        assert stored.refused == {}
        assert [weight.format for weight in stored.weights[len(PLAIN) :]] == formats
    assert read_formats(
        {"quantization_config": quantization_config([(fmt, ["Linear"]) for fmt in formats], [])}, "x"
    ) == tuple(formats)


def test_what_no_group_satisfies_is_the_first_group_s() -> None:
    """It is refused later, when specs are compared, together with everything else."""
    specs = specs_of(INT4Packed(16))
    assert only(specs, [INT4Packed(32), INT4Packed(64)]).format == INT4Packed(32)


# Refusals.


def refused(specs: dict[str, TensorSpec], *formats: Format) -> dict[str, str]:
    stored = find_weights(specs, formats)
    assert all(reason.isprintable() for reason in stored.refused.values())
    assert not set(stored.refused) & {name for weight in stored.weights for name in weight.parts.values()}
    return dict(stored.refused)


@pytest.mark.parametrize("name", ALL)
def test_parts_without_codes(name: str) -> None:
    fmt = ALL[name]
    specs = specs_of(fmt)
    del specs[f"{EXPERT}.{fmt.weight_part}"]
    assert refused(specs, fmt) == dict.fromkeys(specs, "is there but its weight is missing")


@pytest.mark.parametrize("name", ALL)
def test_codes_without_parts_are_weights_all_the_same(name: str) -> None:
    """The missing tensor is an input of the step, and missing there."""
    fmt = ALL[name]
    code = f"{EXPERT}.{fmt.weight_part}"
    weight = only({code: specs_of(fmt)[code]}, [fmt])
    assert set(weight.parts.values()) == set(specs_of(fmt))


@pytest.mark.parametrize("name", ALL)
def test_parts_beside_a_weight_of_another_kind(name: str) -> None:
    fmt = ALL[name]
    specs = specs_of(fmt)
    code = f"{EXPERT}.{fmt.weight_part}"
    wrong = TensorSpec("BF16", specs[code].shape)
    found = refused(specs | {code: wrong}, fmt)
    reason = f"is there but its weight is {wrong}, expected {fmt.code_dtype}"
    others = {name: reason for name in specs if name != code}
    assert {name: text for name, text in found.items() if name != code} == others
    if fmt.weight_part == "weight":
        assert code not in found, "a BF16 weight is a weight"
    else:
        assert found[code] == f"({wrong}) is neither a quantized weight nor an unquantized tensor"


def test_a_code_dtype_decides_never_the_size_of_an_element() -> None:
    name = f"{EXPERT}.weight"
    for dtype in ("U8", "I8", "F8_E5M2", "F8_E4M3FNUZ", "BOOL"):
        spec = TensorSpec(dtype, SHAPE)
        reason = f"({spec}) is neither a quantized weight nor an unquantized tensor"
        assert refused({name: spec}, FP8Block()) == {name: reason}
    for dtype, fmt in (("F8_E4M3", FP8Block()), ("I8", INT8Block())):
        assert only({name: TensorSpec(dtype, SHAPE)}, [FP8Block(), INT8Block()]).format == fmt


@pytest.mark.parametrize(
    "name",
    [
        f"{EXPERT}.weight_g_idx",
        f"{EXPERT}.weight_zero_point",
        f"{EXPERT}.input_scale",
        f"{EXPERT}.qzeros",
        f"{EXPERT}.weight_scale_inv",
        "model.layers.3.self_attn.k_scale",
    ],
)
def test_parts_of_no_stated_format(name: str) -> None:
    specs = specs_of(INT4Packed(32))
    found = refused(specs | {name: TensorSpec("I32", (384,))}, INT4Packed(32))
    assert list(found) == [name]
    family = "is not a tensor of this family"
    assert found[name] in (family, "(I32 [384]) is neither a quantized weight nor an unquantized tensor")


def test_quantized_weights_of_an_unquantized_checkpoint() -> None:
    for fmt in ALL.values():
        found = refused(specs_of(fmt))
        assert f"{EXPERT}.{fmt.weight_part}" in found
        assert set(found.values()) == {
            f"({spec}) is neither a quantized weight nor an unquantized tensor"
            for name, spec in specs_of(fmt).items()
        }


@pytest.mark.parametrize(
    "name",
    [
        "transformer.h.0.attn.weight",
        "model.layers.3.mlp.experts.weight",
        "model.layers.3.mlp.experts.x.up_proj.qweight",
        "vision_tower.blocks.0.weight",
        "weight",
        "",
    ],
)
def test_tensors_of_no_family(name: str) -> None:
    found = refused({name: TensorSpec("I32", (8, 8))}, *ALL.values())
    assert found == {name: "is not a tensor of this family"}


@pytest.mark.parametrize("shape", [(), (8,), (2, 8, 48), (0, 48), (8, 0)], ids=str)
def test_codes_that_are_no_matrix(shape: tuple[int, ...]) -> None:
    for fmt in (INT4Packed(32), INT4GPTQ(), INT4AWQ()):
        found = refused({f"{EXPERT}.{fmt.weight_part}": TensorSpec("I32", shape)}, fmt)
        (reason,) = found.values()
        assert reason.startswith(f"({TensorSpec('I32', shape)}): {fmt.name}: got a weight of shape ")


# config.json.


def stated(**config: Any) -> tuple[Format, ...]:
    return read_formats({"model_type": "deepseek_v3", "quantization_config": config}, "config.json")


def test_an_unquantized_model() -> None:
    assert read_formats({}, "x") == ()
    assert read_formats({"quantization_config": None}, "x") == ()


def test_every_method() -> None:
    block = {"weight_block_size": [128, 128]}
    assert stated(quant_method="fp8", fmt="e4m3", **block) == (FP8Block(),)
    assert stated(quant_method="fp8", scale_fmt="ue8m0", **block) == (FP8Block(scale_fmt="ue8m0"),)
    assert stated(quant_method="blockwise_int8", **block) == (INT8Block(),)
    assert stated(**INT8Block((64, 128)).quantization_config()) == (INT8Block((64, 128)),)
    assert stated(quant_method="w8a8_int8", is_dynamic=True) == (INT8Channel(),)
    assert stated(**quantization_config([(INT4Packed(32), ["Linear"])], [])) == (INT4Packed(32),)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


@pytest.mark.parametrize(
    ("change", "fmt"),
    [
        ({}, INT4GPTQ()),
        ({"checkpoint_format": "gptq"}, INT4GPTQ()),
        ({"checkpoint_format": "gptq_v2"}, INT4GPTQ(version=2)),
        ({"pack_dtype": "int32"}, INT4GPTQ()),
        ({"group_size": -1}, INT4GPTQ(-1)),
        ({"group_size": 32}, INT4GPTQ(32)),
        ({"sym": False}, INT4GPTQ(symmetric=False)),
        ({"sym": False, "checkpoint_format": "gptq_v2"}, INT4GPTQ(symmetric=False, version=2)),
        ({"desc_act": True}, INT4GPTQ(act_order=True)),
        ({"desc_act": True, "sym": False}, INT4GPTQ(symmetric=False, act_order=True)),
        ({"desc_act": None}, INT4GPTQ()),
        ({"static_groups": False, "lm_head": False, "dynamic": {"-:.*self_attn.*": {}}}, INT4GPTQ()),
    ],
)
def test_gptq(change: dict[str, Any], fmt: Format) -> None:
    assert stated(**(GPTQ | change)) == (fmt,)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize(
    ("change", "fmt"),
    [
        ({}, INT4AWQ(symmetric=False)),
        ({"version": "GEMM"}, INT4AWQ(symmetric=False)),
        ({"group_size": 64, "modules_to_not_convert": ["self_attn"]}, INT4AWQ(64, symmetric=False)),
        ({"group_size": -1}, INT4AWQ(-1, symmetric=False)),
    ],
)
def test_awq(change: dict[str, Any], fmt: Format) -> None:
    """Zero points are always read: those of symmetric weights are 8, one by one."""
    assert stated(**(AWQ | change)) == (fmt,)


def test_awq_by_its_older_keys() -> None:
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True}
    assert stated(**config) == (INT4AWQ(64, symmetric=False),)


@pytest.mark.parametrize(
    ("base", "change", "expected"),
    [
        (GPTQ, {"bits": 8}, "GPTQ with 8 bits"),
        (GPTQ, {"bits": 3}, "GPTQ with 3 bits"),
        (GPTQ, {"bits": None}, "GPTQ with None bits"),
        (GPTQ, {"bits": "4"}, "GPTQ with '4' bits"),
        (GPTQ, {"group_size": None}, "group_size None"),
        (GPTQ, {"group_size": "128"}, "group_size '128'"),
        (GPTQ, {"group_size": 0}, "group_size 0"),
        (GPTQ, {"group_size": 4}, "group_size 4"),
        (GPTQ, {"group_size": True}, "group_size True"),
        (GPTQ, {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        (GPTQ, {"checkpoint_format": None}, "checkpoint_format None"),
        (GPTQ, {"checkpoint_format": ["gptq"]}, "checkpoint_format ['gptq']"),
        (GPTQ, {"checkpoint_format": {}}, "checkpoint_format {}"),
        (GPTQ, {"pack_dtype": "int64"}, "bits in 'int64'"),
        (AWQ, {"bits": 8}, "AWQ with 8 bits"),
        (AWQ, {"bits": None}, "AWQ with None bits"),
        (AWQ, {"group_size": None}, "group_size None"),
        (AWQ, {"group_size": 12}, "group_size 12"),
        (AWQ, {"group_size": [128]}, "group_size [128]"),
        (AWQ, {"version": "gemv"}, "version 'gemv'"),
        (AWQ, {"version": "marlin"}, "version 'marlin'"),
        (AWQ, {"version": None}, "version 'none'"),
        (AWQ, {"zero_point": False}, "zero_point False"),
        (AWQ, {"zero_point": None}, "zero_point None"),
        ({}, {"quant_method": "bitsandbytes"}, "quantization is 'bitsandbytes'"),
        ({}, {"quant_method": "w4afp8"}, "quantization is 'w4afp8'"),
        ({}, {"quant_method": "GPTQ"}, "quantization is 'GPTQ'"),
        ({}, {"quant_method": None}, "quantization is 'None'"),
        ({}, {"quant_method": ["fp8"]}, "quantization is"),
        ({}, {"quant_method": "two\nlines"}, r"'two\nlines'"),
        ({}, {"bits": 4}, "quantization is 'None'"),
        ({}, {"quant_method": "blockwise_int8"}, "weight_block_size is None"),
        ({}, {"quant_method": "compressed-tensors"}, "with 0 config_groups"),
    ],
)
def test_refused_configurations(base: dict[str, Any], change: dict[str, Any], expected: str) -> None:
    with pytest.raises(FormatError, match=r"^config\.json: ") as caught:
        stated(**(base | change))
    assert expected in str(caught.value)
    assert "expected" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("config", [[], "gptq", 4, True, [{"quant_method": "gptq"}]], ids=repr)
def test_configurations_that_are_none(config: Any) -> None:
    with pytest.raises(FormatError, match=r"^config\.json: quantization is 'None'"):
        read_formats({"quantization_config": config}, "config.json")
