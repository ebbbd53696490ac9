"""What each engine accepts, as data: formats, names, and which modules it reads together.

Every entry says where it comes from. "tried" is a toy checkpoint given to the engine while these facts
were gathered; "read" is the engine's source, not run; "page" is its documentation; "deduced" follows
from one of these. Of the engines, only transformers runs in this project's tests.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsv3_tools.engines.engine import Engine, Support

__all__ = ["ENGINES"]

_V3, _V32 = "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM"
_ALL_FUSED = frozenset({"q_a and kv_a", "gate and up", "experts"})


def _loads(source: str, note: str = "") -> Support:
    return Support("flag" if note else "loads", note, source)


_CT_VLLM = "vLLM 0.32, layers/quantization/compressed_tensors"
_VLLM = Engine(
    "vllm",
    "vLLM",
    "0.32",
    "vllm",
    {
        "bf16": _loads("vLLM 0.32 (tried)"),
        "fp8-block": _loads("vLLM 0.32, layers/quantization/fp8.py (tried)"),
        "int8-channel": _loads(f"{_CT_VLLM}: w8a8_int8 linears and experts (tried)"),
        "int4-ct": _loads(f"{_CT_VLLM}: wNa16 linears and experts (tried)"),
        "gptq": _loads("vLLM 0.32, layers/quantization/auto_gptq.py (tried)"),
        "awq": _loads("vLLM 0.32, layers/quantization AWQ (tried)"),
        "w4a8-ct": _loads(f"{_CT_VLLM}: CompressedTensorsW4A8Fp8 (read)", "needs compute capability 9.0"),
        "fp8-ct-block": _loads(f"{_CT_VLLM} (read)"),
        "fp8-ct-channel": _loads(f"{_CT_VLLM} (read)"),
    },
    "vLLM 0.32, layers/quantization/__init__.py: QUANTIZATION_METHODS (read)",
    frozenset({_V3, _V32}),
    _ALL_FUSED,
    leftover=Support("misread", "loads without complaint and puts out NaN", "vLLM 0.32 (tried)"),
    group_sizes=frozenset({-1, 32, 64, 128}),
)

_SGLANG_NEEDS_DENSE = (
    "dense",
    "SGLang 0.5.23, srt/models/deepseek_common/deepseek_weight_loader.py: the absorbed kv_b looks for "
    "weight, or takes qweight for AWQ (read)",
)
_SGLANG = Engine(
    "sglang",
    "SGLang",
    "0.5.23",
    "sglang",
    {
        "bf16": _loads("SGLang 0.5.23 (read)"),
        "fp8-block": _loads("SGLang 0.5.23, srt/layers/quantization/fp8.py (read)"),
        "int8-block": _loads(
            "SGLang 0.5.23, srt/layers/quantization/blockwise_int8.py (read)",
            "needs compute capability 8.0, its experts run in Triton only",
        ),
        "int8-channel": _loads(
            "SGLang 0.5.23, srt/layers/quantization/w8a8_int8.py and srt/configs/model_config.py (read)",
            "needs --quantization w8a8_int8: without it, INT8 experts are refused as for NPU only",
        ),
        "int4-ct": _loads("SGLang 0.5.23, srt/layers/quantization/compressed_tensors (read)"),
        "gptq": _loads("SGLang 0.5.23, srt/layers/quantization/gptq.py: runs as gptq_marlin (read)"),
        "awq": _loads("SGLang 0.5.23, srt/layers/quantization/awq.py (read)"),
        "w4afp8": _loads(
            "SGLang 0.5.23, srt/layers/quantization/w4afp8.py (read)",
            "needs compute capability 9.0; takes 1.0 for input scales that are not there",
        ),
        "w4a8-ct": _loads("SGLang 0.5.23, CompressedTensorsW4AFP8MoE (read)", "needs compute capability 9.0"),
        "fp8-ct-block": _loads("SGLang 0.5.23, srt/layers/quantization/compressed_tensors (read)"),
        "fp8-ct-channel": _loads("SGLang 0.5.23, srt/layers/quantization/compressed_tensors (read)"),
        "w8a8-int8": _loads("SGLang 0.5.23, srt/layers/quantization/w8a8_int8.py (read)"),
    },
    "SGLang 0.5.23, srt/layers/quantization/__init__.py (read)",
    frozenset({_V3, _V32, "DeepseekV3ForCausalLMNextN"}),
    _ALL_FUSED,
    kv_b=dict.fromkeys(("int4-ct", "gptq", "w4a8-ct"), _SGLANG_NEEDS_DENSE),
    leftover=Support("misread", "reads scales that are not there", "deduced from SGLang 0.5.23, fp8.py"),
    group_sizes=frozenset({-1, 32, 64, 128}),
)

_KV_B_PAIR = "reads the pair of kv_b_proj whatever the configuration says (read)"
_LMDEPLOY = Engine(
    "lmdeploy",
    "LMDeploy",
    "2026-08 (PyTorch engine)",
    "lmdeploy",
    {
        "bf16": _loads("LMDeploy 2026-08, docs/en/supported_models (page)"),
        "fp8-block": _loads("LMDeploy 2026-08, lmdeploy/pytorch/nn/linear/blocked_fp8.py (read)"),
        "awq": Support("refused", "raises for MoE", "LMDeploy 2026-08, lmdeploy/pytorch/nn/moe (read)"),
    },
    "LMDeploy 2026-08, lmdeploy/pytorch/config.py (read)",
    frozenset({_V3, _V32}),
    frozenset({"gate and up", "experts"}),
    kv_b={"fp8-block": ("quantized", f"LMDeploy 2026-08, models/deepseek_v2.py: {_KV_B_PAIR}")},
    leftover=Support("refused", "waits for scales", "deduced from LMDeploy 2026-08, pytorch/config.py"),
)

_TENSORRT = Engine(
    "tensorrt-llm",
    "TensorRT-LLM",
    "2025-2026 (several commits)",
    "none",
    {
        "bf16": _loads("TensorRT-LLM, _torch/models/modeling_deepseekv3.py (read)"),
        "fp8-block": _loads("TensorRT-LLM, tensorrt_llm/_torch/model_config.py (read)"),
        "int8-channel": Support(
            "misread",
            "takes eight bits by channel for FP8 without looking at the type",
            "TensorRT-LLM, tensorrt_llm/models/quant_config_utils.py (read)",
        ),
        "gptq": Support(
            "refused",
            "reads it for linears, not for experts",
            "TensorRT-LLM, _torch/models/checkpoints/hf/gptq.py (read)",
        ),
        "w4afp8": _loads(
            "TensorRT-LLM, examples/quantization/quantize_mixed_precision_moe.py (read)",
            "needs hf_quant_config.json and quant_cfg.json in place of quantization_config, an input scale "
            "for every expert, and compute capability 8.9 or 9.0",
        ),
        "fp8-ct-block": _loads("TensorRT-LLM, tensorrt_llm/models/quant_config_utils.py (read)"),
        "fp8-ct-channel": _loads("TensorRT-LLM, tensorrt_llm/models/quant_config_utils.py (read)"),
    },
    "TensorRT-LLM, tensorrt_llm/models/quant_config_utils.py (read)",
    frozenset({_V3, _V32}),
    _ALL_FUSED,
    kv_b={"fp8-block": ("quantized", f"TensorRT-LLM, modeling_deepseekv3.py: {_KV_B_PAIR}")},
    leftover=Support("refused", "waits for scales", "deduced from TensorRT-LLM, model_config.py"),
)

_LIGHTLLM = Engine(
    "lightllm",
    "LightLLM",
    "2025-07",
    "none",
    {
        "bf16": _loads("LightLLM 2025-07 (read)"),
        "fp8-block": _loads("LightLLM 2025-07, lightllm/common/quantization/__init__.py (read)"),
    },
    "LightLLM 2025-07, lightllm/common/quantization/__init__.py (read)",
    frozenset(),
    frozenset({"q_a and kv_a", "gate and up", "experts"}),
    kv_b={
        "fp8-block": (
            "quantized",
            f"LightLLM 2025-07, models/deepseek2/layer_weights/transformer_layer_weight.py: {_KV_B_PAIR}",
        )
    },
    leftover=Support(
        "refused",
        "goes by the presence of the key and then needs the scales",
        "LightLLM 2025-07, lightllm/common/quantization/__init__.py (read)",
    ),
)

_EXPERTS_LOST = "builds the experts as one tensor and leaves them random, with a warning only"
_TRANSFORMERS = Engine(
    "transformers",
    "transformers",
    "5.23 (compressed-tensors 0.20)",
    "transformers",
    {
        "bf16": _loads("transformers 5.23 (tried)"),
        "fp8-block": _loads(
            "transformers 5.23, quantizers/quantizer_finegrained_fp8.py (tried on a CPU)",
            "keeps FP8 only on a GPU and with hub kernels; a CPU dequantizes",
        ),
        "int8-channel": Support(
            "refused",
            "fails on the experts: torch.cat(): expected a non-empty list",
            "transformers 5.23, integrations/compressed_tensors.py (tried)",
        ),
        "int4-ct": _loads("transformers 5.23, integrations/compressed_tensors.py (tried)"),
        "w4a8-ct": _loads(
            "transformers 5.23, integrations/compressed_tensors.py (tried)",
            "computes with activations that are not quantized",
        ),
        "gptq": Support(
            "misread",
            f"{_EXPERTS_LOST}; GPTQModel.load reads it",
            "transformers 5.23 (deduced from AWQ, which was tried); GPTQModel 7.7 (tried)",
        ),
        "awq": Support("misread", _EXPERTS_LOST, "transformers 5.23 (tried)"),
        "fp8-ct-channel": _loads("transformers 5.23, integrations/compressed_tensors.py (read)"),
    },
    "transformers 5.23, quantizers/auto.py (read)",
    frozenset({_V3, _V32}),
    frozenset({"experts"}),
    leftover=Support(
        "flag", "loads on a CPU, which passes weights without scales through", "transformers 5.23 (tried)"
    ),
    skips_mtp=True,
    unknown_names="loads",
)

_INFER = Engine(
    "deepseek-infer",
    "DeepSeek-Infer demo",
    "DeepSeek-V3 at 9b4e978",
    "none",
    {
        "bf16": _loads("DeepSeek-V3, inference/model.py (read)", 'needs "dtype": "bf16" in its own config'),
        "fp8-block": _loads("DeepSeek-V3, inference/convert.py and inference/model.py (read)"),
    },
    "DeepSeek-V3, inference/model.py: Linear knows BF16 and FP8 (read)",
    frozenset(),
    frozenset(),
    leftover=Support("loads", "", "DeepSeek-V3, inference/convert.py: config.json is not read (read)"),
    skips_mtp=True,
)

_ASCEND_NEEDS_DENSE = ("dense", "vllm-ascend 0.23, attention/mla_v1.py and sfa_v1.py: assert (read)")
_ASCEND = Engine(
    "vllm-ascend",
    "vllm-ascend",
    "0.23",
    "vllm",
    {
        "bf16": _loads("vllm-ascend 0.23 (read)"),
        "fp8-block": Support("refused", "has it for DeepSeek-V4 only", "vllm-ascend 0.23 (read)"),
        "int8-channel": _loads("vllm-ascend 0.23: W8A8_DYNAMIC (read)"),
        "int4-ct": _loads("vllm-ascend 0.23: W4A16 experts (read)"),
    },
    "vllm-ascend 0.23, quantization (read)",
    frozenset({_V3, _V32}),
    _ALL_FUSED,
    kv_b=dict.fromkeys(("int8-channel", "int4-ct"), _ASCEND_NEEDS_DENSE),
    leftover=Support("misread", "reads scales that are not there", "deduced from vLLM, whose loader it has"),
)

ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (_VLLM, _SGLANG, _TRANSFORMERS, _LMDEPLOY, _TENSORRT, _LIGHTLLM, _INFER, _ASCEND)
}
"""Engines by name."""
