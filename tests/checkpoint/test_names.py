"""Tensor names: every name of the family taken apart and put together; near misses refused."""

from __future__ import annotations

import pytest

from dsv3_tools.checkpoint.architecture import dense_tensors
from dsv3_tools.checkpoint.config import ModelConfig
from dsv3_tools.checkpoint.names import FP8_LINEARS, MODULES, TensorName, parse_name
from dsv3_tools.checkpoint.presets import PRESETS

INDEXER = {"index_n_heads": 64, "index_head_dim": 128, "model_type": "deepseek_v32", "num_hidden_layers": 5}


@pytest.mark.parametrize("preset", [*PRESETS, "deepseek-v3.2"])
def test_every_name_of_the_family_parses_back(preset: str) -> None:
    config = ModelConfig.from_dict(PRESETS.get(preset, PRESETS["deepseek-v3"] | INDEXER))
    layers, experts = set(), set()
    for name in dense_tensors(config):
        parsed = parse_name(name)
        assert parsed is not None, name
        assert f"{parsed.prefix}.{parsed.parameter}" == name
        assert parsed.module in MODULES
        pieces = name.split(".")
        assert parsed.layer == (int(pieces[2]) if pieces[1] == "layers" else None)
        assert parsed.expert == (int(pieces[5]) if "experts" in pieces else None)
        assert parsed.is_routed_expert == (".experts." in name)
        numbers = {"layers", str(parsed.layer), str(parsed.expert)}
        if parsed.layer is not None:
            assert parsed.module.split(".") == [p for p in pieces[1:-1] if p not in numbers]
            layers.add(parsed.layer)
        experts.add(parsed.expert)
    assert layers == set(range(config.num_hidden_layers + config.num_nextn_predict_layers))
    assert experts == {None, *range(config.n_routed_experts)}


def test_taken_apart() -> None:
    expert = "model.layers.3.mlp.experts.7.down_proj"
    for parameter in ("weight", "weight_scale_inv", "weight_packed"):
        assert parse_name(f"{expert}.{parameter}") == TensorName(
            expert, "mlp.experts.down_proj", parameter, 3, 7
        )
    assert parse_name("lm_head.weight") == TensorName("lm_head", "lm_head", "weight")
    assert parse_name("model.norm.weight") == TensorName("model.norm", "norm", "weight")
    gate = parse_name("model.layers.60.mlp.gate.e_score_correction_bias")
    assert gate == TensorName("model.layers.60.mlp.gate", "mlp.gate", "e_score_correction_bias", 60)
    assert gate is not None
    assert not gate.is_fp8_linear
    assert not gate.is_routed_expert
    shared = parse_name("model.layers.61.mlp.shared_experts.up_proj.weight")
    assert shared is not None
    assert shared.is_fp8_linear
    assert not shared.is_routed_expert


def test_which_linears_are_fp8() -> None:
    names = dense_tensors(ModelConfig.from_dict(PRESETS["deepseek-v3"]))
    matrices = {name for name, spec in names.items() if len(spec.shape) == 2}
    stay = {"embed_tokens", "lm_head", "eh_proj", "shared_head.head", "mlp.gate"}
    for name in matrices:
        parsed = parse_name(name)
        assert parsed is not None
        assert parsed.is_fp8_linear == (parsed.module not in stay), name
    assert FP8_LINEARS <= MODULES


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            ".",
            "weight",
            "model",
            "model.weight",
            "model.layers",
            "model.layers.3",
            "model.layers.3.weight",
        ),
        *("embed_tokens.weight", "norm.weight", "model.lm_head.weight", "model.layers.3.lm_head.weight"),
        *(
            "model.layers.3.norm.weight",
            "lm_head",
            "lm_head.",
            "lm_head.a.weight",
            "lm_head.weight ",
            " lm_head.weight",
        ),
        *("model.layers..self_attn.o_proj.weight", "model.layers.x.self_attn.o_proj.weight"),
        *("model.layers.03.self_attn.o_proj.weight", "model.layers.-1.self_attn.o_proj.weight"),
        *("model.layers.1234567.self_attn.o_proj.weight", "model.layers.\u0663.self_attn.o_proj.weight"),
        *(
            "model.layers.3.self_attn.o_proj",
            "model.layers.3.self_attn.o_proj.",
            "model.layers.3.self_attn.o_proj..weight",
        ),
        *("model.layers.3.self_attn.o_proj.weight\n", "model.layers.3.self_attn.o_proj.we ight"),
        *("model.layers.3.self_attn.o_projweight", "model.layers.3.self_attnxo_proj.weight"),
        *("model.layers.3.self_attn.k_proj.weight", "model.layers.3.self_attn.kv_a_proj.weight"),
        *("model.layers.3.attn.o_proj.weight", "model.layers.3.mlp.experts.weight"),
        *("model.layers.3.mlp.experts.down_proj.weight", "model.layers.3.mlp.experts.gate_up_proj"),
        *("model.layers.3.mlp.experts.7.weight", "model.layers.3.mlp.experts.07.down_proj.weight"),
        *("model.layers.3.mlp.experts.7.8.down_proj.weight", "model.layers.3.mlp.experts.7.gate.weight"),
        *(
            "model.layers.3.mlp.experts.x.down_proj.weight",
            "model.layers.3.mlp.shared_experts.0.down_proj.weight",
        ),
        *("model.layers.3.mlp.expertsx.7.down_proj.weight", "model.layers.3.mlp.experts.-7.down_proj.weight"),
        *("xmodel.layers.3.self_attn.o_proj.weight", "model.model.layers.3.self_attn.o_proj.weight"),
        *("model.layers.3.model.layers.3.self_attn.o_proj.weight", "modelxlayers.3.self_attn.o_proj.weight"),
        *("MODEL.layers.3.self_attn.o_proj.weight", "model.layers.3.self_attn.indexer.wk2.weight"),
    ],
)
def test_near_misses(name: str) -> None:
    assert parse_name(name) is None
