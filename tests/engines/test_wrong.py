"""Wrong checkpoints, each a right one with one thing changed, and the rule that must notice.

Where one comes from: an issue, or the engine's file that the rule was read in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from dsv3_tools.engines import Problem, verdict
from tests.engines.layouts import REAL, SMALL, Made, fp8, gptq, int4, layout, spec

Change = Callable[[Made], Any]
A, E, D = "model.layers.1.self_attn.", "model.layers.1.mlp.experts.2.", "model.layers.0.mlp."
CT = "quantization_config"


def dropped(*names: str) -> Change:
    return lambda made: [made.specs.pop(name) for name in names]


def without(pattern: str) -> Change:
    return lambda made: [made.specs.pop(n) for n in list(made.specs) if re.search(pattern, n)]


def put(name: str, dtype: str, *shape: int) -> Change:
    return lambda made: made.specs.update({name: spec(dtype, *shape)})


def stored(module: str, encode: Callable[[int, int], Any] | None, n: int, k: int) -> Change:
    """Stores a module in another way; None is BF16."""

    def change(made: Made) -> None:
        for name in [name for name in made.specs if name.rpartition(".")[0] == module]:
            del made.specs[name]
        parts = {"weight": spec("BF16", n, k)} if encode is None else encode(n, k)
        made.specs.update({f"{module}.{part}": found for part, found in parts.items()})

    return change


def config(**values: Any) -> Change:
    return lambda made: made.config.update(values)


def quantization(**values: Any) -> Change:
    return lambda made: made.config[CT].update(values)


def weights(**values: Any) -> Change:
    return lambda made: made.config[CT]["config_groups"]["group_0"]["weights"].update(values)


def ignore(*extra: str, drop: str = "-") -> Change:
    def change(made: Made) -> None:
        kept = [entry for entry in made.config[CT].get("ignore", []) if drop not in entry]
        made.config[CT]["ignore"] = [*kept, *extra]

    return change


def both(*changes: Change) -> Change:
    return lambda made: [change(made) for change in changes]


def every(pattern: str, dtype: str) -> Change:
    def change(made: Made) -> None:
        for name, found in made.specs.items():
            if re.search(pattern, name):
                made.specs[name] = spec(dtype, *found.shape)

    return change


def dense_mtp(made: Made) -> None:
    """The MTP layer's experts in BF16, where they were quantized."""
    dense_experts(made, 3)


def dense_experts(made: Made, layer: int) -> None:
    for name in [n for n in made.specs if n.startswith(f"model.layers.{layer}.mlp.experts.")]:
        module, _, part = name.rpartition(".")
        del made.specs[name]
        if part == "weight_packed":
            shape = (512, 256) if module.endswith("down_proj") else (256, 512)
            made.specs[module + ".weight"] = spec("BF16", *shape)


def in_shard(name: str, shard: str) -> Change:
    return lambda made: made.weight_map.update({name: shard})


def no_metadata(made: Made) -> None:
    object.__setattr__(made, "has_index_metadata", False)


FP8_KEY = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
SCALE = "weight_scale_inv"

WRONG: dict[str, tuple[str, str, Change, str, str, str]] = {
    # what: (right layout, engine, change, rule, severity, from)
    "leftover config": (
        "bf16", "vllm", config(quantization_config=FP8_KEY), "leftover-config", "misread",
        "tried on vLLM 0.32: NaN; transformers #35471, LLaMA-Factory #6777",
    ),
    "leftover config, LightLLM": (
        "bf16", "lightllm", config(quantization_config=FP8_KEY), "leftover-config", "refused",
        "lightllm/common/quantization/__init__.py",
    ),
    "config of null, LightLLM": (
        "bf16", "lightllm", config(quantization_config=None), "leftover-config", "refused",
        "lightllm/common/quantization/__init__.py",
    ),
    "leftover config, transformers": (
        "bf16", "transformers", config(quantization_config=FP8_KEY), "leftover-config", "note",
        "tried on transformers 5.23",
    ),
    "no config": (
        "fp8", "sglang", lambda made: made.config.pop(CT), "missing-config", "refused", "mlx-lm #1192",
    ),
    "no config, transformers": (
        "int4-g128", "transformers", lambda made: made.config.pop(CT), "missing-config", "misread",
        "mlx-lm #1192",
    ),
    "unknown method": (
        "fp8", "vllm", quantization(quant_method="qserve9"), "format", "refused",
        "vllm layers/quantization/__init__.py",
    ),
    "int8 declared as fp8": (
        "fp8", "vllm", every(r"\.weight$(?<!norm\.weight)", "I8"), "config-tensors", "refused", "miles #1641",
    ),
    "missing scale": (
        "fp8", "sglang", dropped(f"{A}o_proj.{SCALE}"), "scale-missing", "misread",
        "DeepSeek-V3 inference/fp8_cast_bf16.py",
    ),
    "orphan scale": (
        "bf16", "vllm", put(f"{A}o_proj.{SCALE}", "F32", 4, 4), "scale-orphan", "refused",
        "DeepSeek-V3 inference/fp8_cast_bf16.py",
    ),
    "scale of another shape": (
        "fp8", "tensorrt-llm", put(f"{A}o_proj.{SCALE}", "F32", 4, 5), "scale-shape", "refused",
        "llm-compressor #1817",
    ),
    "scale of 576 rows rounded down": (
        "fp8", "vllm", put(f"{A}kv_a_proj_with_mqa.{SCALE}", "F32", 1, 4), "scale-shape", "refused",
        "llm-compressor #1817",
    ),
    "scale in BF16": (
        "fp8", "vllm", every(SCALE, "BF16"), "scale-dtype", "note", "traps of existing tools",
    ),
    "scale in bytes": (
        "fp8", "sglang", every(SCALE, "F8_E8M0"), "scale-dtype", "refused", "README_WEIGHTS.md",
    ),
    "q_a in BF16, kv_a in FP8": (
        "fp8", "sglang", both(
            stored(f"{A}q_a_proj", None, 256, 512),
            quantization(ignored_layers=[f"{A}q_a_proj"]),
        ), "fused", "refused", "SGLang #2706",
    ),
    "q_a alone on the list, vLLM": (
        "fp8", "vllm", quantization(ignored_layers=[f"{A}q_a_proj"]), "ignore-split", "refused",
        "vllm utils/quant_utils.py; vLLM #22352",
    ),
    "gate in BF16, up in FP8": (
        "fp8", "lmdeploy", stored(f"{D}gate_proj", None, 768, 512), "fused", "refused", "vLLM #22352",
    ),
    "one expert in BF16": (
        "int4-g128", "vllm", stored(f"{E}down_proj", None, 512, 256), "fused", "refused",
        "vllm compressed_tensors_moe",
    ),
    "experts of two group sizes": (
        "int4-g128", "sglang", stored(f"{E}down_proj", int4(32), 512, 256), "group-mismatch", "refused",
        "vllm compressed_tensors wNa16",
    ),
    "dense layer not on the list, vLLM": (
        "int4-g128", "vllm", ignore(drop="gate_up"), "ignore-misses", "refused",
        "vllm compressed_tensors/utils.py",
    ),
    "fused name not on the list, SGLang": (
        "int4-g128", "sglang",
        ignore("re:.*mlp\\.(gate|up|down)_proj.*", drop="gate_up"), "ignore-misses", "refused",
        "sglang compressed_tensors/utils.py; Kimi-K2-Thinking names gate_up",
    ),
    "list covers experts": (
        "int4-g128", "vllm", ignore("re:.*experts.*"), "ignore-covers", "refused",
        "vllm compressed_tensors/utils.py",
    ),
    "list covers experts, SGLang": (
        "int4-g128", "sglang", ignore("re:.*mlp.*"), "ignore-covers", "refused",
        "sglang compressed_tensors/utils.py",
    ),
    "suffixes are no names, vLLM": (
        "fp8", "vllm", both(
            stored("model.layers.1.self_attn.o_proj", None, 512, 512),
            quantization(ignored_layers=["self_attn.o_proj"]),
        ), "ignore-misses", "misread", "vllm utils/quant_utils.py: is_layer_skipped",
    ),
    "list covers FP8, SGLang": (
        "fp8", "sglang", quantization(ignored_layers=["o_proj"]), "ignore-covers", "refused",
        "sglang quantization/utils.py",
    ),
    "pattern that is none": (
        "int4-g128", "vllm", ignore("re:*self_attn"), "ignore-pattern", "refused",
        "vllm compressed_tensors/utils.py",
    ),
    "lm_head not on the list, transformers": (
        "int4-g128", "transformers", ignore(drop="lm_head"), "ignore-misses", "misread",
        "compressed-tensors utils/match.py",
    ),
    "BF16 MTP layer by number, SGLang": (
        "int4-g128", "sglang", both(dense_mtp, ignore("re:.*layers\\.3\\..*")), "ignore-misses", "refused",
        "sglang srt/models/deepseek_nextn.py; llm-compressor #2735",
    ),
    "BF16 MTP layer not on the list, vLLM": (
        "int4-g128", "vllm", dense_mtp, "ignore-misses", "refused", "vLLM #43459, llm-compressor #2735",
    ),
    "kv_b in BF16, TensorRT-LLM": (
        "fp8", "tensorrt-llm", stored(f"{A}kv_b_proj", None, 1024, 128), "kv-b", "refused",
        "TensorRT-LLM #16437",
    ),
    "kv_b in BF16, LMDeploy": (
        "fp8", "lmdeploy", both(
            stored(f"{A}kv_b_proj", None, 1024, 128), quantization(ignored_layers=[f"{A}kv_b_proj"])
        ), "kv-b", "refused", "lmdeploy models/deepseek_v2.py",
    ),
    "kv_b in INT4, SGLang": (
        "int4-g128", "sglang", both(
            stored(f"{A}kv_b_proj", int4(128), 1024, 128), ignore("re:.*(q_a|q_b|kv_a|o)_proj", drop="self")
        ), "kv-b", "refused", "SGLang #6842; deepseek_weight_loader.py",
    ),
    "kv_b in GPTQ, SGLang": (
        "gptq", "sglang", stored(f"{A}kv_b_proj", gptq, 1024, 128), "kv-b", "refused",
        "sglang deepseek_weight_loader.py",
    ),
    "kv_b in INT8, Ascend": (
        "int8-channel", "vllm-ascend", both(
            put(f"{A}kv_b_proj.weight", "I8", 1024, 128), put(f"{A}kv_b_proj.weight_scale", "F32", 1024, 1)
        ), "kv-b", "refused", "vllm-ascend attention/mla_v1.py",
    ),
    "attention in INT4, SGLang": (
        "int4-g128", "sglang", both(
            stored(f"{A}q_a_proj", int4(128), 256, 512),
            stored(f"{A}kv_a_proj_with_mqa", int4(128), 192, 512),
        ), "packed-attention", "refused", "sglang deepseek_weight_loader.py; vLLM #36247",
    ),
    "lm_head in FP8": (
        "fp8", "vllm", stored("lm_head", fp8, 256, 512), "never-quantized", "refused", "vllm deepseek_v2.py",
    ),
    "router in FP8": (
        "fp8", "sglang", put("model.layers.1.mlp.gate.weight", "F8_E4M3", 4, 512), "never-quantized",
        "refused", "sglang deepseek_v2.py",
    ),
    "eh_proj in FP8": (
        "fp8", "tensorrt-llm", stored("model.layers.3.eh_proj", fp8, 512, 1024), "never-quantized", "refused",
        "tensorrt_llm/_torch/model_config.py",
    ),
    "no weight_shape": (
        "int4-g128", "vllm", without(r"weight_shape$"), "part-missing", "refused",
        "compressed-tensors pack_quantized",
    ),
    "packed along the wrong side": (
        "int4-g128", "sglang", put(f"{E}down_proj.weight_packed", "I32", 64, 256), "shape", "refused",
        "compressed-tensors pack_quantized/helpers.py",
    ),
    "group size of the config": (
        "int4-g128", "vllm", weights(group_size=64), "group-mismatch", "refused",
        "vllm compressed_tensors wNa16",
    ),
    "INT4 scales in F32": (
        "int4-g128", "vllm", every(r"weight_scale$", "F32"), "scale-dtype", "note",
        "vllm compressed_tensors wNa16",
    ),
    "group of 16": (
        "int4-g128", "vllm", weights(group_size=16), "group-size", "refused", "vllm marlin_utils.py",
    ),
    "act order by group": (
        "int4-g128", "vllm", weights(actorder="group"), "act-order", "refused", "vllm compressed_tensors",
    ),
    "zero points, SGLang": (
        "int4-g128", "sglang", weights(symmetric=False), "zero-points", "refused", "sglang Triton WNA16",
    ),
    "GPTQ with desc_act": (
        "gptq", "vllm", quantization(desc_act=True), "act-order", "refused", "vllm auto_gptq.py",
    ),
    "GPTQ without symmetry": (
        "gptq", "vllm", quantization(sym=False), "zero-points", "refused", "vllm auto_gptq.py",
    ),
    "GPTQ without desc_act's key": (
        "gptq", "sglang", lambda made: made.config[CT].pop("desc_act"), "gptq-keys", "refused",
        "sglang gptq.py",
    ),
    "GPTQ of 3 bits": ("gptq", "vllm", quantization(bits=3), "bits", "refused", "vllm auto_gptq.py"),
    "GPTQ without qzeros": (
        "gptq", "sglang", without("qzeros$"), "part-missing", "refused", "sglang gptq.py",
    ),
    "GPTQ rules do not name gate_up, SGLang": (
        "gptq", "sglang",
        quantization(dynamic={"-:.*self_attn.*": {}, "-:.*shared_experts.*": {}, "-:.*mlp\\.down_proj": {}}),
        "ignore-misses", "refused", "sglang gptq.py",
    ),
    "AWQ list forgets the shared experts": (
        "awq", "vllm", quantization(modules_to_not_convert=["self_attn", "lm_head"]), "ignore-misses",
        "refused", "vllm utils/quant_utils.py",
    ),
    "AWQ of 8 bits": ("awq", "vllm", quantization(bits=8), "bits", "refused", "vllm AWQ"),
    "W4A8 with groups of 32": (
        "w4a8-ct", "vllm", weights(group_size=32), "group-size", "refused", "vllm CompressedTensorsW4A8Fp8",
    ),
    "static activations": (
        "fp8", "vllm", quantization(activation_scheme="static"), "activation-scheme", "refused",
        "vllm fp8.py",
    ),
    "blocks of 64": (
        "fp8", "tensorrt-llm", quantization(weight_block_size=[64, 64]), "block-size", "refused",
        "tensorrt_llm/_torch/model_config.py",
    ),
    "reciprocal scales": (
        "fp8", "vllm", quantization(weight_scale_semantics="inverse"), "inverse-scales", "misread",
        "GPTQModel writes 448 / amax",
    ),
    "MTP weights kept, key 0": (
        "fp8", "vllm", config(num_nextn_predict_layers=0), "mtp-key", "refused",
        "tried on vLLM 0.32: KeyError",
    ),
    "MTP weights kept, key 0, SGLang": (
        "fp8", "sglang", config(num_nextn_predict_layers=0), "mtp-key", "note", "sglang deepseek_v2.py",
    ),
    "MTP weights gone, key 1": (
        "fp8", "vllm", without(r"layers\.3\."), "mtp-missing", "note", "ms-swift #7848, vLLM #43459",
    ),
    "MTP without eh_proj": (
        "fp8", "sglang", dropped("model.layers.3.eh_proj.weight"), "mtp-incomplete", "misread",
        "llm-compressor #1630, SGLang #9508",
    ),
    "MTP without its embeddings, LMDeploy": (
        "fp8", "lmdeploy", dropped("model.layers.3.embed_tokens.weight"), "mtp-shared", "note",
        "lmdeploy models/deepseek_mtp.py",
    ),
    "a norm is missing": (
        "bf16", "vllm", dropped("model.norm.weight"), "missing-tensors", "refused", "vllm loader",
    ),
    "a norm is missing, transformers": (
        "bf16", "transformers", dropped("model.norm.weight"), "missing-tensors", "misread",
        "tried on transformers 5.23 with AWQ",
    ),
    "a tensor too many": (
        "bf16", "vllm", put("model.vision.weight", "BF16", 3), "unexpected-tensors", "refused", "vllm loader",
    ),
    "only the MTP module": (
        "bf16", "tensorrt-llm", without(r"^(?!model\.layers\.3\.)"), "draft-only", "refused",
        "vLLM 0.32 (tried)",
    ),
    "wrong shape": (
        "bf16", "vllm", put("model.norm.weight", "BF16", 511), "shape", "refused", "every engine",
    ),
    "router bias in BF16": (
        "bf16", "vllm", every("correction_bias", "BF16"), "router-bias", "note",
        "vLLM #23640, transformers #42580",
    ),
    "no metadata": (
        "bf16", "transformers", no_metadata, "index-metadata", "refused", "tried on transformers 5.23",
    ),
    "llama": (
        "bf16", "vllm", config(architectures=["LlamaForCausalLM"]), "architecture", "refused",
        "vllm model registry",
    ),
    "no yarn": ("bf16", "vllm", config(rope_scaling=None), "no-yarn", "note", "tried on vLLM 0.32"),
    "kv_b's scale in an earlier shard": (
        "fp8", "lmdeploy", in_shard(f"{A}kv_b_proj.{SCALE}", "model-00000-of-000001.safetensors"),
        "scale-order", "refused", "lmdeploy models/deepseek_v2.py",
    ),
    "zero points of no use": (
        "int4-g128", "vllm", put("model.layers.1.mlp.experts.0.up_proj.weight_zero_point", "I32", 32, 4),
        "zero-points-unused", "misread", "tried on transformers 5.23: loads, other logits",
    ),
    "zero points missing": (
        "int4-g128", "vllm", weights(symmetric=False), "zero-points-missing", "refused",
        "tried on transformers 5.23: Asymmetric quant requires zero-point values",
    ),
    "no groups": (
        "int4-g128", "vllm", quantization(config_groups={}), "config-arguments", "refused",
        "tried on transformers 5.23: RuntimeError",
    ),
    "a group without a size": (
        "int4-g128", "sglang", weights(group_size=None), "config-arguments", "refused",
        "tried on transformers 5.23: refused by compressed-tensors' model",
    ),
    "a channel with a size": (
        "int4-g128", "transformers", weights(strategy="channel"), "config-arguments", "refused",
        "tried on transformers 5.23: refused by compressed-tensors' model",
    ),
    "8 bits said, 4 stored": (
        "gptq", "vllm", quantization(bits=8), "bits", "refused", "vllm auto_gptq.py",
    ),
    "AWQ for another kernel": (
        "awq", "sglang", quantization(version="gemv"), "awq-variant", "refused", "AutoAWQ linear/gemv.py",
    ),
    "one layer's experts unpacked, transformers": (
        "int4-g128", "transformers", lambda made: dense_experts(made, 2), "experts-unpacked", "refused",
        "tried on transformers 5.23: torch.cat(): expected a non-empty list of Tensors",
    ),
    "zero points, transformers": (
        "int4-g128", "transformers", weights(symmetric=False), "zero-points", "refused",
        "tried on transformers 5.23: Asymmetric quant requires zero-point values",
    ),
    "ue8m0, transformers": (
        "fp8", "transformers", quantization(scale_fmt="ue8m0"), "ue8m0", "note", "transformers #46763",
    ),
}  # fmt: skip


def found(made: Made, engine: str, rule: str, tp: int = 1) -> list[Problem]:
    return [problem for problem in verdict(made.view, engine, tp).problems if problem.rule == rule]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_checkpoint_is_noticed_and_a_right_one_is_not(name: str) -> None:
    right, engine, change, rule, severity, _ = WRONG[name]
    made = layout(right)
    assert found(made, engine, rule) == []
    wrong = made.copy()
    change(wrong)
    problems = found(wrong, engine, rule)
    assert severity in {problem.severity for problem in problems}, verdict(wrong.view, engine)
    for problem in problems:
        assert problem.source
        assert problem.message[0] not in " :"
        assert problem.message.isprintable()
    assert verdict(wrong.view, engine).loads == (not verdict(wrong.view, engine).failures)


def test_the_table_is_long_enough_and_says_where_from() -> None:
    assert len(WRONG) >= 30
    assert all(origin for *_, origin in WRONG.values())


PARALLEL = {
    "experts of 2048 over 32": ("fp8", "sglang", 32, "tp-blocks", "refused"),
    "experts of 2048 over 32, vLLM": ("fp8", "vllm", 32, "tp-blocks", "note"),
    "128 heads over 3": ("fp8", "vllm", 3, "tp-heads", "refused"),
    "256 experts over 3, demo": ("fp8", "deepseek-infer", 3, "tp-heads", "refused"),
    "INT4 groups of 128 over 32": ("int4-g128", "vllm", 32, "tp-groups", "refused"),
    "INT4 groups of 32 over 128": ("int4-g32", "sglang", 128, "tp-groups", "refused"),
    "Marlin's 128 columns over 32": ("int4-g32", "vllm", 32, "tp-marlin", "note"),
    "INT8 blocks over 32": ("int8-block", "sglang", 32, "tp-blocks", "refused"),
    "rows that do not divide": ("bf16", "sglang", 3, "tp-shape", "refused"),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_too_many_ranks(name: str) -> None:
    """SGLang #3345, vLLM #12256, TensorRT-LLM #2776."""
    right, engine, tp, rule, severity = PARALLEL[name]
    made = layout(right, REAL)
    assert found(made, engine, rule, 8) == []
    assert severity in {problem.severity for problem in found(made, engine, rule, tp)}


def test_the_demo_and_its_literal_61() -> None:
    deeper = layout("fp8", SMALL | {"hidden_size": 7168, "num_hidden_layers": 62})
    assert {p.severity for p in found(deeper, "deepseek-infer", "layer-61")} == {"misread", "refused"}
    shallow = layout("fp8", SMALL | {"hidden_size": 7168})
    assert {p.severity for p in found(shallow, "deepseek-infer", "layer-61")} == {"refused"}
    none = layout("fp8", SMALL | {"hidden_size": 7168, "num_nextn_predict_layers": 0})
    assert verdict(none.view, "deepseek-infer").problems == ()


def test_partial_blocks_and_transformers() -> None:
    """576 rows do not divide by 5 rows of scales; 192 do by 2, but not into blocks of 128."""
    assert {p.severity for p in found(layout("fp8", REAL), "transformers", "fp8-rows")} == {"refused"}
    assert {p.severity for p in found(layout("fp8"), "transformers", "fp8-rows")} == {"misread"}
    even = layout("fp8", SMALL | {"qk_rope_head_dim": 128})
    assert found(even, "transformers", "fp8-rows") == []


def test_an_indexer() -> None:
    v32 = SMALL | {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "index_n_heads": 4,
        "index_head_dim": 128,
    }
    made = layout("fp8", v32)
    assert verdict(made.view, "vllm").loads
    assert found(made, "deepseek-infer", "indexer")
    integers = layout("int8-channel", v32)
    assert {p.severity for p in found(integers, "vllm", "indexer")} == {"refused"}


HOSTILE: list[Any] = [
    [],
    "fp8",
    7,
    {},
    {"quant_method": None},
    {"quant_method": ["fp8"]},
    {"quant_method": "fp8", "weight_block_size": "128"},
    {"quant_method": "fp8", "weight_block_size": [0, 128]},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": {"a": 1}},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": [None, 3, "re:("]},
    {"quant_method": "compressed-tensors"},
    {"quant_method": "compressed-tensors", "config_groups": []},
    {"quant_method": "compressed-tensors", "config_groups": {"a": None, "b": {"weights": [], "targets": 3}}},
    {
        "quant_method": "compressed-tensors",
        "config_groups": {"a": {"weights": {"num_bits": "4"}}},
        "ignore": 1,
    },
    {"quant_method": "gptq", "bits": "4", "group_size": [128], "dynamic": ["-:a"]},
    {"quant_method": "gptq", "bits": 4, "dynamic": {"-:(": {}}},
    {"quant_method": "awq", "modules_to_not_convert": "self_attn", "packed_modules_mapping": [1]},
]


@pytest.mark.parametrize("value", HOSTILE, ids=str)
@pytest.mark.parametrize("name", ["bf16", "fp8", "int4-g128", "gptq"])
def test_a_config_of_any_shape_gets_a_verdict(name: str, value: Any) -> None:
    from dsv3_tools.engines import verdicts

    made = layout(name)
    made.config[CT] = value
    for tp in (1, 2):
        for found_ in verdicts(made.view, tp).values():
            assert isinstance(found_.loads, bool)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (0, 5), (2, 2, 2)])
@pytest.mark.parametrize("part", ["weight", "weight_scale_inv", "weight_packed", "qweight", "scales"])
def test_tensors_of_any_shape_get_a_verdict(part: str, shape: tuple[int, ...]) -> None:
    from dsv3_tools.engines import verdicts

    for name in ("fp8", "int4-g128", "gptq", "awq", "w4afp8"):
        made = layout(name)
        for dtype in ("F8_E4M3", "I8", "I32", "U8"):
            made.specs[f"{E}down_proj.{part}"] = spec(dtype, *shape)
            loaded = {engine for engine, v in verdicts(made.view, 2).items() if v.loads}
            unused = name == "int4-g128" and part in ("weight_scale_inv", "scales")
            assert loaded == ({"transformers"} if unused else set())
