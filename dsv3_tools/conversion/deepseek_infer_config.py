"""`ModelArgs` of DeepSeek's inference demo from a `config.json`, and what of it the demo does not know.

Source: the dataclass `ModelArgs` and its use in `inference/model.py`, and the files under
`inference/configs/`, of deepseek-ai/DeepSeek-V3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dsv3_tools.checkpoint.config import CONFIG_NAME, ModelConfig
from dsv3_tools.errors import CheckpointError
from dsv3_tools.formats import FP8Block

__all__ = ["model_args", "unlike_demo", "without_counterpart"]

_ROPE_DEFAULTS = {
    "original_seq_len": 4096,
    "rope_theta": 10000.0,
    "rope_factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
}
"""The demo's own values, which its configuration files leave out."""

_YARN = {
    "original_seq_len": "original_max_position_embeddings",
    "rope_factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale_all_dim",
}
"""Where `rope_scaling` has them. The demo scales attention by the `mscale` that is `mscale_all_dim` there."""

_DEFAULTS = {"routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "rms_norm_eps": 1e-6}
"""What keys mean that are missing. Source: `configuration_deepseek.py` of the released model."""

_BIASED_DIM = 7168
_NORM_EPS = 1e-6


def model_args(document: Mapping[str, Any], config: ModelConfig, fp8: FP8Block | None) -> dict[str, Any]:
    """Returns the demo's configuration, in the order of its own files.

    Args:
        document: the parsed `config.json`.
        config: its dimensions.
        fp8: the format of the weights; None is BF16.

    Raises:
        CheckpointError: a number in `config.json` is none.
    """
    args: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "dim": config.hidden_size,
        "inter_dim": config.intermediate_size,
        "moe_inter_dim": config.moe_intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_dense_layers": config.first_k_dense_replace,
        "n_heads": config.num_attention_heads,
        "n_routed_experts": config.n_routed_experts,
        "n_shared_experts": config.n_shared_experts,
        "n_activated_experts": config.num_experts_per_tok,
        "n_expert_groups": config.n_group,
        "n_limited_groups": config.topk_group,
        "route_scale": _number(_value(document, "routed_scaling_factor"), "routed_scaling_factor"),
        "score_func": _value(document, "scoring_func"),
        "q_lora_rank": config.q_lora_rank or 0,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
    }
    rope = _rope(document)
    args |= {key: value for key, value in rope.items() if value != _ROPE_DEFAULTS[key]}
    args["dtype"] = "bf16" if fp8 is None else "fp8"
    if fp8 is not None and fp8.scale_fmt != "f32":
        args["scale_fmt"] = fp8.scale_fmt
    return args


def without_counterpart(document: Mapping[str, Any], config: ModelConfig) -> Iterator[str]:
    """Yields what makes a model one that the demo cannot hold at all."""
    if config.model_type == "deepseek_v32" or config.index_n_heads is not None:
        yield "has the sparse-attention indexer of V3.2, for which DeepSeek-V3.2-Exp brings a demo of its own"
    if config.moe_layer_freq != 1:
        yield f"moe_layer_freq is {config.moe_layer_freq}, expected 1"
    if config.n_shared_experts == 0:
        yield "n_shared_experts is 0, expected 1 or more"
    if config.tie_word_embeddings:
        yield "tie_word_embeddings is true, expected false"
    if _value(document, "scoring_func") not in ("sigmoid", "softmax"):
        yield f"scoring_func is {str(document['scoring_func'])[:100]!r}, expected 'sigmoid' or 'softmax'"


def unlike_demo(document: Mapping[str, Any], config: ModelConfig) -> Iterator[str]:
    """Yields how the demo, as released, would compute another model than `config.json` describes."""
    if config.hidden_size != _BIASED_DIM:
        yield (
            f"the demo's class Gate has a bias only for hidden size {_BIASED_DIM}, and the demo loads "
            f"strictly; for {config.hidden_size} change that line of its model.py"
        )
    eps = _number(_value(document, "rms_norm_eps"), "rms_norm_eps")
    if eps != _NORM_EPS:
        yield f"the demo's RMSNorm has epsilon {_NORM_EPS:g}, config.json says rms_norm_eps {eps:g}"
    sigmoid = _value(document, "scoring_func") == "sigmoid"
    if document.get("norm_topk_prob", True) is not sigmoid:
        yield f"the demo {'always' if sigmoid else 'never'} normalizes the weights of the chosen experts"
    scaling = _scaling(document)
    if scaling:
        mscale, all_dim = scaling.get("mscale", 1.0), scaling.get("mscale_all_dim", 0.0)
        if mscale != all_dim:
            yield f"the demo has one mscale, rope_scaling has mscale {mscale} and mscale_all_dim {all_dim}"
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind != "yarn":
            yield f"the demo's rotary embedding is YaRN, rope_scaling has type {str(kind)[:100]!r}"


def _rope(document: Mapping[str, Any]) -> dict[str, float]:
    """Returns the arguments of the rotary embedding; without scaling a factor of 1, which is the same."""
    scaling = _scaling(document)
    theta = document.get("rope_theta") or scaling.get("rope_theta") or _ROPE_DEFAULTS["rope_theta"]
    rope = dict(_ROPE_DEFAULTS) | {"rope_theta": _number(theta, "rope_theta")}
    if not scaling:
        return rope | {"rope_factor": 1.0}
    for key, name in _YARN.items():
        if name in scaling:
            rope[key] = _number(scaling[name], f"rope_scaling.{name}")
    return rope


def _scaling(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns `rope_scaling`, or what newer files call `rope_parameters`; empty without scaling."""
    found = document.get("rope_scaling") or document.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{CONFIG_NAME}: rope_scaling is {str(found)[:100]!r}, expected an object")
    return found


def _value(document: Mapping[str, Any], key: str) -> Any:
    value = document.get(key)
    return _DEFAULTS[key] if value is None else value


def _number(value: Any, key: str) -> float:
    if type(value) not in (int, float):
        raise CheckpointError(f"{CONFIG_NAME}: {key} is {str(value)[:100]!r}, expected a number")
    return value  # type: ignore[no-any-return]
