"""Ignore lists as each engine reads them; compressed-tensors' own matching is the judge of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.utils import match as ct_match
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tools.engines import is_ignored
from dsv3_tools.engines.matching import exact_or_regex
from tests.engines.layouts import AWQ_CONFIG, FP8_CONFIG, GPTQ_CONFIG, int4_config, int8_config

L = "model.layers.5."
NAMES = [
    "lm_head",
    L + "self_attn.q_a_proj",
    L + "self_attn.kv_a_proj_with_mqa",
    L + "self_attn.o_proj",
    L + "mlp.gate",
    L + "mlp.gate_proj",
    L + "mlp.down_proj",
    L + "mlp.shared_experts.up_proj",
    L + "mlp.experts.10.down_proj",
    "model.layers.61.mlp.experts.0.gate_proj",
    "model.layers.61.eh_proj",
]
ENTRIES = [
    "lm_head",
    "re:.*self_attn.*",
    "re:self_attn",
    "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    "re:.*mlp\\.gate$",
    "re:.*experts\\.\\d+\\.down_proj",
    "re:.*layers\\.61\\..*",
    L + "self_attn.o_proj",
    "o_proj",
    "mlp",
    "",
]


@given(st.lists(st.sampled_from(ENTRIES), max_size=4))
def test_transformers_matches_as_compressed_tensors(entries: list[str]) -> None:
    for name in NAMES:
        expected = any(ct_match.match_name(name, entry) for entry in entries)
        assert exact_or_regex(name, entries) == expected
        linear = torch.nn.Linear(1, 1, device="meta")
        targeted = ct_match.is_match(name, linear, "Linear", ignore=entries)
        if "experts." not in name:  # those are no modules there, and go by their tensors
            config = int4_config(128) | {"ignore": entries}
            assert is_ignored("transformers", config, name) == (not targeted), (name, entries)


@given(st.lists(st.sampled_from(ENTRIES), max_size=4))
def test_vllm_matches_fused_names_as_compressed_tensors_does_where_members_agree(entries: list[str]) -> None:
    fused = {"gate_up_proj": ["gate_proj", "up_proj"], "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"]}
    for parent, name in (("mlp.", "gate_up_proj"), ("self_attn.", "fused_qkv_a_proj")):
        members = [f"{L}{parent}{member}" for member in fused[name]]
        answers = {any(ct_match.match_name(m, entry) for entry in entries) for m in members}
        if len(answers) == 1:
            own = {any(ct_match.match_name(f"{L}{parent}{name}", e, fused) for e in entries)}
            config = int4_config(128) | {"ignore": entries}
            found = {is_ignored("vllm", config, member) for member in members}
            assert found == answers == own


def fp8(**lists: list[str]) -> dict[str, Any]:
    return FP8_CONFIG | lists


CASES = [
    # engine, config, module, ignored
    ("vllm", fp8(ignored_layers=[L + "self_attn.o_proj"]), L + "self_attn.o_proj", True),
    ("vllm", fp8(ignored_layers=["o_proj"]), L + "self_attn.o_proj", False),
    ("sglang", fp8(ignored_layers=["o_proj"]), L + "self_attn.o_proj", True),
    ("sglang", fp8(ignored_layers=["model.layers.5"]), L + "self_attn.o_proj", True),
    ("sglang", fp8(ignored_layers=["model.layers.5"]), "model.layers.51.self_attn.o_proj", False),
    ("sglang", fp8(ignored_layers=[L + "mlp.gate_proj", L + "mlp.up_proj"]), L + "mlp.up_proj", True),
    ("vllm", fp8(ignored_layers=[L + "mlp.gate_proj", L + "mlp.up_proj"]), L + "mlp.up_proj", True),
    ("vllm", fp8(modules_to_not_convert=[L + "mlp.gate_proj"]), L + "mlp.gate_proj", False),
    ("vllm", fp8(ignored_layers=[L + "mlp.experts.3.up_proj"]), L + "mlp.experts.9.down_proj", True),
    ("lmdeploy", fp8(ignored_layers=[L + "self_attn.o_proj"]), L + "self_attn.o_proj", True),
    ("lmdeploy", fp8(ignored_layers=["o_proj"]), L + "self_attn.o_proj", False),
    ("transformers", fp8(modules_to_not_convert=["o_proj"]), L + "self_attn.o_proj", True),
    ("transformers", fp8(modules_to_not_convert=["model.layers.5"]), L + "mlp.up_proj", True),
    ("transformers", fp8(modules_to_not_convert=["model.layers.1"]), "model.layers.11.mlp.up_proj", False),
    ("tensorrt-llm", fp8(ignored_layers=[L + "self_attn.o_proj"]), L + "self_attn.o_proj", False),
    ("vllm", int4_config(128), L + "self_attn.o_proj", True),
    ("vllm", int4_config(128), L + "mlp.gate_proj", True),
    ("vllm", int4_config(128), L + "mlp.experts.7.gate_proj", False),
    ("vllm", int4_config(128) | {"ignore": ["re:.*experts\\.0\\..*"]}, L + "mlp.experts.7.gate_proj", True),
    ("vllm", int4_config(128) | {"ignore": ["re:.*experts\\.7\\..*"]}, L + "mlp.experts.7.gate_proj", False),
    ("sglang", int4_config(128), L + "mlp.gate_proj", True),
    ("sglang", int4_config(128), L + "mlp.experts.7.gate_proj", False),
    ("sglang", int4_config(128) | {"ignore": ["mlp.experts"]}, L + "mlp.experts.7.gate_proj", True),
    ("sglang", int4_config(128) | {"ignore": ["o_proj"]}, L + "self_attn.o_proj", True),
    ("vllm", int4_config(128) | {"ignore": ["o_proj"]}, L + "self_attn.o_proj", False),
    ("sglang", int8_config(), L + "self_attn.kv_b_proj", True),
    ("vllm-ascend", int8_config(), L + "self_attn.kv_b_proj", True),
    ("vllm", GPTQ_CONFIG, L + "self_attn.o_proj", True),
    ("vllm", GPTQ_CONFIG, L + "mlp.experts.1.up_proj", False),
    ("sglang", GPTQ_CONFIG, L + "mlp.up_proj", True),
    ("sglang", GPTQ_CONFIG | {"dynamic": {"-:.*up_proj$": {}}}, L + "mlp.gate_proj", True),
    ("sglang", GPTQ_CONFIG | {"dynamic": {"-:.*\\.gate_proj$": {}}}, L + "mlp.gate_proj", False),
    ("vllm", AWQ_CONFIG, L + "mlp.shared_experts.up_proj", True),
    ("vllm", AWQ_CONFIG, L + "mlp.experts.1.up_proj", False),
    ("sglang", AWQ_CONFIG, L + "mlp.gate_proj", True),
    ("sglang", AWQ_CONFIG | {"modules_to_not_convert": ["gate_proj"]}, L + "mlp.gate_proj", False),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[2]} {case[3]}")
def test_lists(case) -> None:
    engine, config, module, expected = case
    assert is_ignored(engine, config, module) == expected


@pytest.mark.parametrize(
    ("entry", "vllm", "sglang"),
    [
        ("re:.*layers\\.61\\..*", True, False),
        ("re:.*decoder.*", False, True),
        ("re:model.layers.61.*", True, True),
        ("re:.*mlp\\.experts.*", True, True),
    ],
)
def test_the_mtp_layer_has_another_name_in_sglang(entry: str, vllm: bool, sglang: bool) -> None:
    """The substitution is one of plain text: an escaped dot escapes it."""
    config = int4_config(128) | {"ignore": [entry]}
    module = "model.layers.61.mlp.experts.4.up_proj"
    assert is_ignored("vllm", config, module, mtp_layer=61) == vllm
    assert is_ignored("sglang", config, module, mtp_layer=61) == sglang
    assert not is_ignored("sglang", config, "model.layers.6.self_attn.o_proj", mtp_layer=61)


def test_groups_go_by_name_and_then_by_class() -> None:
    from dsv3_tools.engines import Matcher

    config = int4_config(128)
    eight = {"num_bits": 8, "type": "float", "strategy": "block"}
    config["config_groups"]["group_1"] = {"targets": ["re:.*self_attn.*"], "weights": eight}
    config["ignore"] = []
    ask = Matcher("vllm", config)
    assert ask(L + "self_attn.o_proj").format == "fp8-ct-block"  # type: ignore[union-attr]
    assert ask(L + "mlp.down_proj").format == "int4-ct"  # type: ignore[union-attr]
    config["config_groups"]["group_0"]["targets"] = ["re:.*experts.*"]
    assert Matcher("vllm", config)(L + "mlp.down_proj") is None
