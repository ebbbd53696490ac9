"""compressed-tensors' `quantization_config`: accepted by its own model, read back, refused in one line."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from dsv3_tools.errors import FormatError
from dsv3_tools.formats import Format, FP8Block, INT4Packed, INT8Block, INT8Channel
from dsv3_tools.formats.compressed_tensors import SCALE_NAME, quantization_config, read_formats

WRITTEN: dict[str, tuple[Format, str]] = {
    "int4 g32": (INT4Packed(32), "pack-quantized"),
    "int4 g64": (INT4Packed(64), "pack-quantized"),
    "int4 g128": (INT4Packed(), "pack-quantized"),
    "int4 g128 absmax": (INT4Packed(search="absmax"), "pack-quantized"),
    "int4 g32 asymmetric": (INT4Packed(32, symmetric=False), "pack-quantized"),
    "int4 rows": (INT4Packed(-1), "pack-quantized"),
    "int8 channel": (INT8Channel(), "int-quantized"),
    "fp8 block": (FP8Block(scale_name=SCALE_NAME), "float-quantized"),
    "fp8 block 64 x 32": (FP8Block((64, 32), scale_name=SCALE_NAME), "float-quantized"),
}
IGNORE = ["lm_head", "re:.*self_attn.*", r"re:.*mlp\.gate$"]


def own_model(config: dict[str, Any]) -> Any:
    """Returns the config as compressed-tensors' own pydantic model; its groups forbid unknown keys."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    return quantization.QuantizationConfig.model_validate(config)


@pytest.mark.parametrize("activations", [None, "fp8"])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_we_write_is_what_compressed_tensors_understands(name: str, activations: str | None) -> None:
    fmt, on_disk = WRITTEN[name]
    config = quantization_config([(fmt, ["Linear"])], IGNORE, activations=activations)
    assert json.loads(json.dumps(config)) == config
    understood = own_model(config)
    assert (understood.format, understood.quantization_status.value) == (on_disk, "compressed")
    assert understood.ignore == IGNORE
    assert understood.kv_cache_scheme is None
    (group,) = understood.config_groups.values()
    weights, inputs = group.weights, group.input_activations
    assert group.targets == ["Linear"]
    assert group.format == on_disk
    assert not weights.dynamic
    if isinstance(fmt, INT4Packed):
        size = None if fmt.group_size == -1 else fmt.group_size
        assert (weights.num_bits, weights.type, weights.group_size) == (4, "int", size)
        assert (weights.symmetric, weights.actorder) == (fmt.symmetric, None)
        assert weights.strategy == ("channel" if size is None else "group")
        assert weights.observer == ("mse" if fmt.search == "mse" else "minmax")
        if activations is None:
            assert inputs is None
            return
        assert (inputs.num_bits, inputs.type, inputs.strategy) == (8, "float", "token")
    elif isinstance(fmt, INT8Channel):
        assert (weights.num_bits, weights.type, weights.strategy) == (8, "int", "channel")
        assert (inputs.num_bits, inputs.type, inputs.strategy) == (8, "int", "token")
    else:
        assert isinstance(fmt, FP8Block)
        assert (weights.num_bits, weights.type, weights.strategy) == (8, "float", "block")
        assert weights.block_structure == list(fmt.block_size)
        assert (inputs.num_bits, inputs.type, inputs.strategy) == (8, "float", "group")
        assert inputs.group_size == fmt.block_size[1]
    assert weights.symmetric or isinstance(fmt, INT4Packed)
    assert inputs.symmetric
    assert inputs.dynamic is True


@pytest.mark.parametrize("name", WRITTEN)
def test_what_we_write_is_read_back(name: str) -> None:
    fmt, _ = WRITTEN[name]
    for activations in (None, "fp8"):
        config = quantization_config([(fmt, ["Linear"])], IGNORE, activations=activations)
        assert read_formats(config, "x") == (fmt,)
        dumped = own_model(config).model_dump()
        assert read_formats(dumped, "x") == (fmt,), "as compressed-tensors itself would write it"


@pytest.mark.parametrize("name", WRITTEN)
def test_the_compressor_is_the_one_that_the_format_names(name: str) -> None:
    """Its parts are ours."""
    registry = pytest.importorskip("compressed_tensors.compressors.base")
    fmt, on_disk = WRITTEN[name]
    (group,) = own_model(quantization_config([(fmt, ["Linear"])], [])).config_groups.values()
    compressor = registry.BaseCompressor.get_value_from_registry(on_disk)
    assert set(compressor.compression_param_names(group)) == set(fmt.part_names)


def test_several_groups_are_mixed_precision() -> None:
    experts = INT4Packed(64)
    rest = FP8Block(scale_name=SCALE_NAME)
    groups = [(experts, [r"re:.*mlp\.experts.*"]), (rest, ["Linear"])]
    config = quantization_config(groups, IGNORE, activations="fp8")
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == [
        "pack-quantized",
        "float-quantized",
    ]
    assert list(config["config_groups"]) == ["group_0", "group_1"]
    assert read_formats(config, "x") == (experts, rest)
    understood = own_model(config)
    assert [group.input_activations.strategy for group in understood.config_groups.values()] == [
        "token",
        "group",
    ]


def test_activations_are_those_of_the_first_group() -> None:
    config = quantization_config([(INT4Packed(), ["a"]), (INT4Packed(32), ["b"])], [], activations="fp8")
    first, second = config["config_groups"].values()
    assert first["input_activations"]["num_bits"] == 8
    assert second["input_activations"] is None
    assert config["format"] == "pack-quantized"
    assert read_formats(config, "x") == (INT4Packed(), INT4Packed(32))


def test_equal_groups_are_one_format() -> None:
    config = quantization_config([(INT4Packed(), ["a"]), (INT4Packed(), ["b"])], [])
    assert read_formats(config, "x") == (INT4Packed(),)


def test_formats_that_compressed_tensors_does_not_have() -> None:
    with pytest.raises(KeyError):
        quantization_config([(INT8Block(), ["Linear"])], [])


# Configurations of others.

KIMI_K2_THINKING: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    ],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
"""As engines that load the model describe it: the format is named once for all groups."""


def test_kimi_k2_thinking() -> None:
    assert read_formats(KIMI_K2_THINKING, "config.json") == (INT4Packed(32),)
    assert own_model(KIMI_K2_THINKING).config_groups["group_0"].weights.group_size == 32


def changed(where: str, value: Any) -> dict[str, Any]:
    """Returns Kimi's config with the value under a dotted path changed, or deleted if it is `...`."""
    config = copy.deepcopy(KIMI_K2_THINKING)
    *path, key = where.split(".")
    inner = config
    for step in path:
        inner = inner[step]
    if value is ...:
        del inner[key]
    else:
        inner[key] = value
    return config


WEIGHTS = "config_groups.group_0.weights"

FP8_BLOCK = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
INT8_CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}


@pytest.mark.parametrize(
    ("where", "value", "fmt"),
    [
        (f"{WEIGHTS}.group_size", 128, INT4Packed(128)),
        (f"{WEIGHTS}.group_size", 16, INT4Packed(16)),
        (f"{WEIGHTS}.group_size", -1, INT4Packed(-1)),
        (f"{WEIGHTS}.strategy", "channel", INT4Packed(-1)),
        (f"{WEIGHTS}.symmetric", False, INT4Packed(32, symmetric=False)),
        (f"{WEIGHTS}.symmetric", ..., INT4Packed(32)),
        (f"{WEIGHTS}.actorder", "weight", INT4Packed(32)),
        (f"{WEIGHTS}.actorder", "static", INT4Packed(32)),
        (f"{WEIGHTS}.actorder", ..., INT4Packed(32)),
        (f"{WEIGHTS}.observer", "mse", INT4Packed(32)),
        ("quantization_status", ..., INT4Packed(32)),
        ("config_groups.group_0.format", "pack-quantized", INT4Packed(32)),
        ("config_groups.group_0.format", None, INT4Packed(32)),
        ("ignore", None, INT4Packed(32)),
        ("something_new", 1, INT4Packed(32)),
    ],
)
def test_accepted_configurations(where: str, value: Any, fmt: Format) -> None:
    assert read_formats(changed(where, value), "config.json") == (fmt,)


@pytest.mark.parametrize(
    ("on_disk", "weights", "fmt"),
    [
        ("float-quantized", FP8_BLOCK, FP8Block(scale_name=SCALE_NAME)),
        ("naive-quantized", FP8_BLOCK, FP8Block(scale_name=SCALE_NAME)),
        ("int-quantized", INT8_CHANNEL, INT8Channel()),
        ("naive-quantized", INT8_CHANNEL, INT8Channel()),
    ],
)
def test_eight_bits(on_disk: str, weights: dict[str, Any], fmt: Format) -> None:
    config = changed(WEIGHTS, weights) | {"format": on_disk}
    assert read_formats(config, "config.json") == (fmt,)
    own_model(config)


@pytest.mark.parametrize(
    ("where", "value", "expected"),
    [
        ("quantization_status", "frozen", "quantization_status is 'frozen'"),
        ("quantization_status", "initialized", "quantization_status is 'initialized'"),
        ("quantization_status", None, "quantization_status is None"),
        ("config_groups", {}, "with 0 config_groups"),
        ("config_groups", None, "with 0 config_groups"),
        ("config_groups", ..., "with 0 config_groups"),
        ("config_groups", 7, "with 0 config_groups"),
        ("config_groups", ["group_0"], "with 0 config_groups"),
        ("config_groups.group_0", None, "group_0: no weights"),
        ("config_groups.group_0", ["Linear"], "group_0: no weights"),
        (WEIGHTS, None, "group_0: no weights"),
        (WEIGHTS, [], "group_0: no weights"),
        (f"{WEIGHTS}.num_bits", 8, "'pack-quantized' with 8 bits"),
        (f"{WEIGHTS}.num_bits", 2, "'pack-quantized' with 2 bits"),
        (f"{WEIGHTS}.num_bits", "4", "'pack-quantized' with '4' bits"),
        (f"{WEIGHTS}.type", "float", "bits of type 'float'"),
        (f"{WEIGHTS}.strategy", "block", "strategy 'block'"),
        (f"{WEIGHTS}.strategy", "tensor", "strategy 'tensor'"),
        (f"{WEIGHTS}.strategy", None, "strategy None"),
        (f"{WEIGHTS}.actorder", "group", "actorder is 'group'"),
        (f"{WEIGHTS}.actorder", "dynamic", "actorder is 'dynamic'"),
        (f"{WEIGHTS}.actorder", "Group", "actorder is 'Group'"),
        (f"{WEIGHTS}.actorder", True, "actorder is True"),
        (f"{WEIGHTS}.actorder", ["group"], "actorder is ['group']"),
        (f"{WEIGHTS}.group_size", None, "group_size is None"),
        (f"{WEIGHTS}.group_size", "32", "group_size is '32'"),
        (f"{WEIGHTS}.group_size", 0, "group_size is 0"),
        (f"{WEIGHTS}.group_size", 4, "group_size is 4"),
        (f"{WEIGHTS}.group_size", 12, "group_size is 12"),
        (f"{WEIGHTS}.group_size", True, "group_size is True"),
        ("format", "mxfp4-pack-quantized", "'mxfp4-pack-quantized' with 4 bits"),
        ("format", "nvfp4-pack-quantized", "'nvfp4-pack-quantized'"),
        ("format", "int-quantized", "'int-quantized' with 4 bits"),
        ("format", "mixed-precision", "'mixed-precision'"),
        ("format", "dense", "'dense'"),
        ("format", ..., "None with 4 bits"),
        ("format", ["pack-quantized"], "['pack-quantized']"),
        ("format", "two\nlines", "'two\\nlines'"),
        ("config_groups.group_0.format", "marlin-24", "'marlin-24' with 4 bits"),
    ],
)
def test_refused_configurations(where: str, value: Any, expected: str) -> None:
    with pytest.raises(FormatError, match=r"^config\.json: ") as caught:
        read_formats(changed(where, value), "config.json")
    assert expected in str(caught.value)
    assert "expected" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("on_disk", "weights", "expected"),
    [
        ("int-quantized", INT8_CHANNEL | {"symmetric": False}, "symmetric False"),
        ("int-quantized", INT8_CHANNEL | {"strategy": "group", "group_size": 128}, "strategy 'group'"),
        ("int-quantized", INT8_CHANNEL | {"strategy": "tensor"}, "strategy 'tensor'"),
        ("int-quantized", FP8_BLOCK, "of type 'float'"),
        ("float-quantized", INT8_CHANNEL, "of type 'int'"),
        ("float-quantized", FP8_BLOCK | {"strategy": "channel"}, "strategy 'channel'"),
        ("float-quantized", FP8_BLOCK | {"strategy": "tensor"}, "strategy 'tensor'"),
        ("float-quantized", FP8_BLOCK | {"block_structure": None}, "block_structure is None"),
        ("float-quantized", FP8_BLOCK | {"block_structure": [100, 128]}, "block_structure is [100, 128]"),
        ("pack-quantized", INT8_CHANNEL, "'pack-quantized' with 8 bits"),
    ],
)
def test_refused_eight_bits(on_disk: str, weights: dict[str, Any], expected: str) -> None:
    config = changed(WEIGHTS, weights) | {"format": on_disk}
    with pytest.raises(FormatError, match=r"^config\.json: group_0: ") as caught:
        read_formats(config, "config.json")
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()


def test_one_unknown_group_of_several_is_refused() -> None:
    config = copy.deepcopy(KIMI_K2_THINKING)
    config["config_groups"]["group_1"] = {"weights": {"num_bits": 8, "type": "int", "strategy": "group"}}
    with pytest.raises(FormatError, match=r"^config\.json: group_1: 'pack-quantized' with 8 bits"):
        read_formats(config, "config.json")
