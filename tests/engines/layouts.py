"""Checkpoints as names, specs and configuration, written down from the formats' descriptions.

Nothing here comes from `dsv3_tools.formats`: a mistake there must not hide itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsv3_tools.checkpoint.architecture import dense_tensors
from dsv3_tools.checkpoint.config import ModelConfig
from dsv3_tools.checkpoint.presets import PRESETS
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.engines import ModelView

REAL = PRESETS["deepseek-v3"]
SMALL = REAL | {
    "first_k_dense_replace": 1,
    "hidden_size": 512,
    "intermediate_size": 768,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 256,
    "n_group": 2,
    "n_routed_experts": 4,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 256,
    "topk_group": 1,
    "vocab_size": 256,
}
"""Whole blocks wherever DeepSeek-V3 has whole blocks, and 64 rows more in `kv_a_proj_with_mqa`."""

LINEAR = re.compile(
    r".*\.(self_attn\.(q|q_a|q_b|kv_b|o)_proj|self_attn\.kv_a_proj_with_mqa|self_attn\.indexer\.(wq_b|wk)"
    r"|mlp(\.experts\.\d+|\.shared_experts)?\.(gate|up|down)_proj)"
)
EXPERT = re.compile(r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj")
ATTENTION_DENSE = re.compile(r"(?!.*kv_b_proj).*")

Parts = dict[str, TensorSpec]
Encode = Callable[[int, int], Parts]


def spec(dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(dtype, shape)


def fp8(n: int, k: int) -> Parts:
    return {
        "weight": spec("F8_E4M3", n, k),
        "weight_scale_inv": spec("F32", (n + 127) // 128, (k + 127) // 128),
    }


def int8_block(n: int, k: int) -> Parts:
    return fp8(n, k) | {"weight": spec("I8", n, k)}


def int8_channel(n: int, k: int) -> Parts:
    return {"weight": spec("I8", n, k), "weight_scale": spec("F32", n, 1)}


def int4(group: int) -> Encode:
    def encode(n: int, k: int) -> Parts:
        return {
            "weight_packed": spec("I32", n, k // 8),
            "weight_scale": spec("BF16", n, k // group),
            "weight_shape": spec("I64", 2),
        }

    return encode


def gptq(n: int, k: int) -> Parts:
    return {
        "qweight": spec("I32", k // 8, n),
        "qzeros": spec("I32", k // 128, n // 8),
        "scales": spec("F16", k // 128, n),
        "g_idx": spec("I32", k),
    }


def awq(n: int, k: int) -> Parts:
    return {
        "qweight": spec("I32", k, n // 8),
        "qzeros": spec("I32", k // 128, n // 8),
        "scales": spec("F16", k // 128, n),
    }


def w4afp8(n: int, k: int) -> Parts:
    return {"weight": spec("I8", n, k // 2), "weight_scale_inv": spec("F32", n, k // 128)}


def int4_config(group: int) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
        ],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


def int8_config() -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head", "re:.*kv_b_proj$", "re:.*mlp\\.gate$", "re:.*eh_proj$", "re:.*shared_head.*"],
        "config_groups": {"group_0": group},
    }


FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
INT8_BLOCK_CONFIG = {
    "quant_method": "blockwise_int8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
W4A8_CONFIG = int4_config(128)
W4A8_CONFIG["config_groups"]["group_0"]["input_activations"] = {
    "num_bits": 8,
    "type": "float",
    "strategy": "token",
    "dynamic": True,
}
GPTQ_CONFIG = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
    "dynamic": {
        "-:.*self_attn.*": {},
        "-:.*shared_experts.*": {},
        "-:.*mlp\\.(gate|up|gate_up|down)_proj": {},
    },
}
AWQ_CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": [
        "self_attn",
        "shared_experts",
        "mlp.gate.",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
        "eh_proj",
        "lm_head",
    ],
}


@dataclass(frozen=True)
class Made:
    """A checkpoint in memory, to be changed by a test."""

    specs: dict[str, TensorSpec]
    config: dict[str, Any]
    weight_map: dict[str, str]
    has_index_metadata: bool = True

    @property
    def view(self) -> ModelView:
        return ModelView(self.specs, self.config, self.weight_map, self.has_index_metadata)

    def copy(self) -> Made:
        return replace(
            self,
            specs=dict(self.specs),
            config=copy.deepcopy(self.config),
            weight_map=dict(self.weight_map),
        )


def make(config: Mapping[str, Any], rules: list[tuple[re.Pattern[str], Encode]], quantization: Any) -> Made:
    """Returns a checkpoint whose linears are stored as the first rule that matches them says."""
    specs: dict[str, TensorSpec] = {}
    for name, dense in dense_tensors(ModelConfig.from_dict(config)).items():
        module, _, parameter = name.rpartition(".")
        encode = next((e for p, e in rules if p.fullmatch(module)), None)
        if encode is None or parameter != "weight" or not LINEAR.fullmatch(module):
            specs[name] = dense
        else:
            n, k = dense.shape
            specs |= {f"{module}.{part}": made for part, made in encode(n, k).items()}
    whole = copy.deepcopy(dict(config))
    if quantization is not None:
        whole["quantization_config"] = copy.deepcopy(quantization)
    return Made(specs, whole, dict.fromkeys(specs, "model-00001-of-000001.safetensors"))


LAYOUTS: dict[str, tuple[list[tuple[re.Pattern[str], Encode]], Any]] = {
    "bf16": ([], None),
    "fp8": ([(LINEAR, fp8)], FP8_CONFIG),
    "int8-block": ([(LINEAR, int8_block)], INT8_BLOCK_CONFIG),
    "int8-channel": ([(ATTENTION_DENSE, int8_channel)], int8_config()),
    "int4-g128": ([(EXPERT, int4(128))], int4_config(128)),
    "int4-g32": ([(EXPERT, int4(32))], int4_config(32)),
    "gptq": ([(EXPERT, gptq)], GPTQ_CONFIG),
    "awq": ([(EXPERT, awq)], AWQ_CONFIG),
    "w4afp8": ([(EXPERT, w4afp8), (LINEAR, fp8)], {"quant_method": "w4afp8"}),
    "w4a8-ct": ([(EXPERT, int4(128))], W4A8_CONFIG),
}


def layout(name: str, config: Mapping[str, Any] = SMALL) -> Made:
    rules, quantization = LAYOUTS[name]
    return make(config, rules, quantization)
