"""`config.json`: dimensions or a refusal that names the key; edits that leave the rest alone."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from dsv3_tools.checkpoint.config import (
    MODEL_TYPES,
    ModelConfig,
    encode_config,
    parse_config,
    with_quantization,
)
from dsv3_tools.checkpoint.presets import PRESETS
from dsv3_tools.errors import CheckpointError

V3 = PRESETS["deepseek-v3"]
REQUIRED = [
    *("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "first_k_dense_replace"),
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
]
OPTIONAL = {
    "q_lora_rank": None,
    "n_shared_experts": 0,
    "num_nextn_predict_layers": 0,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "index_n_heads": None,
    "index_head_dim": None,
    "tie_word_embeddings": False,
}
MAY_BE_ZERO = {"first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"}
NUMBERS = [*REQUIRED, *(set(OPTIONAL) - {"tie_word_embeddings"})]
FP8 = {"quant_method": "fp8"}


def refuse(document: dict[str, Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=r"^the/config\.json: ") as caught:
        ModelConfig.from_dict(document, "the/config.json")
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_the_lists_here_cover_every_field() -> None:
    assert {field.name for field in fields(ModelConfig)} == {"model_type", "is_nextn", *REQUIRED, *OPTIONAL}


def test_an_exported_mtp_module_has_no_layers_of_a_model() -> None:
    exported = {"architectures": ["DeepseekV3ForCausalLMNextN"], "num_hidden_layers": 1}
    config = ModelConfig.from_dict({**V3, **exported, "is_nextn": False})
    assert config.is_nextn
    assert (config.main_layers, config.mtp_layers) == (range(0), range(1))
    assert config.is_moe_layer(0)
    whole = ModelConfig.from_dict({**V3, "is_nextn": True})
    assert not whole.is_nextn
    assert (whole.main_layers, whole.mtp_layers) == (range(61), range(61, 62))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str) -> None:
    config = ModelConfig.from_dict(parse_config(encode_config(PRESETS[preset])))
    assert not config.is_nextn
    for field in fields(ModelConfig):
        if field.name == "is_nextn":
            continue
        expected = PRESETS[preset].get(field.name)
        assert getattr(config, field.name) == (OPTIONAL.get(field.name) if expected is None else expected)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_required_key_missing_or_null(key: str) -> None:
    refuse({k: v for k, v in V3.items() if k != key}, f"{key} is missing")
    refuse({**V3, key: None}, f"{key} is missing")


@pytest.mark.parametrize("key", OPTIONAL)
def test_control_an_optional_key_missing_or_null(key: str) -> None:
    assert getattr(ModelConfig.from_dict({k: v for k, v in V3.items() if k != key}), key) == OPTIONAL[key]
    assert getattr(ModelConfig.from_dict({**V3, key: None}), key) == OPTIONAL[key]


@pytest.mark.parametrize(
    "value",
    ["1", 1.0, True, False, [1], {}, -1, 2**31, 10**4000, "x" * 10_000, "\x1b[31m"],
    ids=lambda v: str(v)[:9],
)
@pytest.mark.parametrize("key", sorted(NUMBERS))
def test_values_that_are_no_size(key: str, value: Any) -> None:
    refuse({**V3, key: value}, f"{key} is ")


@pytest.mark.parametrize("key", sorted(NUMBERS))
def test_zero(key: str) -> None:
    if key in MAY_BE_ZERO:
        assert getattr(ModelConfig.from_dict({**V3, key: 0}), key) == 0
    else:
        refuse({**V3, key: 0}, f"{key} is '0', expected a whole number from 1 to 2,147,483,647")


@pytest.mark.parametrize("value", [0, 1, "false", []])
def test_tie_word_embeddings_is_a_truth_value(value: Any) -> None:
    refuse({**V3, "tie_word_embeddings": value}, "tie_word_embeddings")


def test_model_types() -> None:
    for model_type in MODEL_TYPES:
        assert ModelConfig.from_dict({**V3, "model_type": model_type}).model_type == model_type
    refuse({**V3, "model_type": "deepseek_v4"}, "DeepSeek-V4 (model_type 'deepseek_v4')")
    refuse({**V3, "model_type": "deepseek_v4"}, "not supported")
    for other in (
        "deepseek_v2",
        "DEEPSEEK_V3",
        "llama",
        "",
        None,
        3,
        ["deepseek_v3"],
        "\x1b[31m",
        "x" * 9999,
    ):
        refuse({**V3, "model_type": other}, "expected one of deepseek_v3 (")
    refuse({**V3, "model_type": "llama"}, "'llama'")
    refuse({}, "model_type is 'None'")


def test_mtp_layers_follow_the_models_own() -> None:
    assert ModelConfig.from_dict(V3).mtp_layers == range(61, 62)
    config = ModelConfig.from_dict(
        {**V3, "num_hidden_layers": 5, "num_nextn_predict_layers": 2, "moe_layer_freq": 2}
    )
    assert config.mtp_layers == range(5, 7)
    assert [config.is_moe_layer(layer) for layer in range(7)] == [False] * 3 + [False, True, True, True]


def test_encode_gives_the_text_of_a_file_indented_by_two() -> None:
    document = {
        **V3,
        "auto_map": {"AutoConfig": "configuration.Config"},
        "note": '日本語 \U0001f600 "\\/\u2028',
        "empty": [{}, []],
    }
    text = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
    assert encode_config(parse_config(text)) == text
    assert encode_config(parse_config(text[:-1])) == text
    assert encode_config(parse_config(json.dumps(document).encode())) == text


def test_with_quantization_keeps_the_order_of_the_keys() -> None:
    keys = list(V3)
    middle = {key: V3[key] for key in keys[:5]} | {"quantization_config": {"old": 1}} | V3
    place = list(middle).index("quantization_config")

    assert keys == sorted(keys)
    assert list(with_quantization(V3, FP8)) == sorted([*keys, "quantization_config"])
    unsorted = keys[::-1]
    assert list(with_quantization({key: V3[key] for key in unsorted}, FP8)) == [
        *unsorted,
        "quantization_config",
    ]
    assert list(with_quantization(middle, FP8)).index("quantization_config") == place
    assert with_quantization(middle, FP8)["quantization_config"] == FP8
    assert list(with_quantization(middle, None)) == [key for key in middle if key != "quantization_config"]
    assert with_quantization(V3, None) == V3
    assert list(with_quantization(V3, None)) == keys


def test_with_quantization_removes_the_key_and_leaves_its_argument_alone() -> None:
    document = {"a": 1, "quantization_config": {"old": 1}, "b": 2}
    assert with_quantization(document, None) == {"a": 1, "b": 2}
    assert with_quantization({"a": 1, "quantization_config": None}, None) == {"a": 1}
    with_quantization(document, FP8)["quantization_config"]["quant_method"] = "changed"
    assert document == {"a": 1, "quantization_config": {"old": 1}, "b": 2}
    assert FP8 == {"quant_method": "fp8"}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"null",
        b'{"a":NaN}',
        b'{"a":1,"a":1}',
        b"{'a':1}",
        b"\xff",
        b"{}\0",
        b'{"a":-Infinity}',
        b'{"a":1e400}',
        b'{"a":"\\ud800"}',
    ],
)
def test_what_is_no_config(text: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^the/config\.json: ") as caught:
        parse_config(text, "the/config.json")
    assert str(caught.value).isprintable()
