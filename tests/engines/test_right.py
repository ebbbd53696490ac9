"""Right checkpoints load in exactly the engines that read their format, and quickly enough to ask."""

from __future__ import annotations

import time

import pytest

from dsv3_tools.checkpoint.presets import PRESETS
from dsv3_tools.engines import ENGINES, verdict, verdicts
from tests.engines.layouts import ATTENTION_DENSE, EXPERT, LAYOUTS, REAL, SMALL, fp8, int4, layout, make
from tests.engines.layouts import int4_config as config_of_int4

LOADED_BY = {
    "bf16": set(ENGINES),
    "fp8": {"vllm", "sglang", "lmdeploy", "tensorrt-llm", "lightllm", "deepseek-infer"},
    "int8-block": {"sglang"},
    "int8-channel": {"vllm", "sglang", "vllm-ascend"},
    "int4-g128": {"vllm", "sglang", "transformers", "vllm-ascend"},
    "int4-g32": {"vllm", "sglang", "transformers", "vllm-ascend"},
    "gptq": {"vllm", "sglang"},
    "awq": {"vllm", "sglang"},
    "w4afp8": {"sglang", "tensorrt-llm"},
    "w4a8-ct": {"vllm", "sglang", "transformers"},
}
ONLY_REAL_SIZES = {"deepseek-infer"}
"""The demo's router has a bias at DeepSeek-V3's hidden size only."""

NOTES = {
    ("int8-channel", "sglang"): "--quantization w8a8_int8",
    ("w4a8-ct", "vllm"): "compute capability 9.0",
    ("w4afp8", "sglang"): "compute capability 9.0",
    ("w4afp8", "tensorrt-llm"): "hf_quant_config.json",
    ("int8-block", "sglang"): "compute capability 8.0",
    ("bf16", "deepseek-infer"): '"dtype": "bf16"',
    ("fp8", "deepseek-infer"): "leaves the MTP module out",
}


def loaded(view) -> set[str]:
    return {name for name, found in verdicts(view).items() if found.loads}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_real_model(name: str) -> None:
    view = layout(name, REAL).view
    assert loaded(view) == LOADED_BY[name]
    for (noted, engine), text in NOTES.items():
        if noted == name:
            assert any(text in problem.message for problem in verdict(view, engine).notes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_small_model(name: str) -> None:
    assert loaded(layout(name).view) == LOADED_BY[name] - ONLY_REAL_SIZES


def test_a_misreading_is_told_from_a_refusal() -> None:
    found = verdicts(layout("int8-channel").view)
    assert {p.severity for p in found["tensorrt-llm"].failures} == {"misread"}
    assert {p.severity for p in found["transformers"].failures} == {"refused"}


def test_without_mtp() -> None:
    for name in ("bf16", "fp8", "int4-g128"):
        made = layout(name, SMALL | {"num_nextn_predict_layers": 0})
        assert loaded(made.view) == LOADED_BY[name] - ONLY_REAL_SIZES
        assert all(not p.rule.startswith("mtp") for v in verdicts(made.view).values() for p in v.problems)


def test_kimi_k2_thinking() -> None:
    made = make(PRESETS["kimi-k2"], [(EXPERT, int4(32))], config_of_int4(32))
    found = verdicts(made.view)
    assert {name for name, v in found.items() if v.loads} == LOADED_BY["int4-g32"]
    assert any("trust_remote_code" in p.message for p in found["transformers"].notes)


def test_moonlight_has_no_q_a_to_be_fused() -> None:
    """A dense kv_a beside a quantized q would be a problem if the two were read as one."""
    import re

    rules = [(re.compile(r"(?!.*kv_a_proj).*"), fp8)]
    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "ignored_layers": [f"model.layers.{n}.self_attn.kv_a_proj_with_mqa" for n in range(27)],
    }
    made = make(PRESETS["moonlight"], rules, config)
    assert {"vllm", "sglang"} <= loaded(made.view)
    assert not {"vllm", "sglang"} & loaded(make(SMALL, rules, config).view)


def test_tensor_parallel_sizes_of_the_release() -> None:
    view = layout("fp8", REAL).view
    largest = {
        engine: max(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if verdict(view, engine, n).loads)
        for engine in ("vllm", "sglang", "tensorrt-llm", "deepseek-infer")
    }
    assert largest == {"vllm": 16, "sglang": 16, "tensorrt-llm": 16, "deepseek-infer": 16}
    assert not verdict(view, "vllm", 3).loads
    assert not verdict(view, "sglang", 32).loads


@pytest.mark.parametrize(("name", "ranks"), [("int4-g128", 16), ("int4-g32", 64)])
def test_tensor_parallel_sizes_of_int4(name: str, ranks: int) -> None:
    view = layout(name, REAL).view
    assert verdict(view, "vllm", ranks).loads
    assert not verdict(view, "vllm", 2 * ranks).loads


def test_kv_b_in_int8_may_be_quantized_but_not_for_ascend() -> None:
    import re

    from tests.engines.layouts import int8_channel, int8_config

    config = int8_config() | {"ignore": ["lm_head"]}
    made = make(SMALL, [(re.compile(".*"), int8_channel)], config)
    assert loaded(made.view) == {"vllm", "sglang"}
    assert [p.rule for p in verdict(made.view, "vllm-ascend").failures] == ["kv-b"]


def test_all_engines_are_asked_in_seconds() -> None:
    """About one second of CPU time; the bound leaves room for a busy machine, none for a quadratic search."""
    for name in ("fp8", "int4-g128"):
        view = layout(name, REAL).view
        began = time.process_time()
        verdicts(view)
        assert time.process_time() - began < 8


def test_the_real_layouts_have_the_released_numbers_of_tensors() -> None:
    made = layout("fp8", REAL)
    dtypes = [spec.dtype for spec in made.specs.values()]
    counts = {dtype: dtypes.count(dtype) for dtype in set(dtypes)}
    assert counts == {"F8_E4M3": 45808, "F32": 45867, "BF16": 316}
    assert sum(spec.nbytes for spec in made.specs.values()) == 688_574_839_360
    assert ATTENTION_DENSE.fullmatch("model.layers.0.self_attn.kv_b_proj") is None
