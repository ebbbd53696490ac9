"""Every number that the forward pass needs, from `config.json` alone.

Source: the released `config.json` and `modeling_deepseek.py`; `rope_parameters` as transformers 5 writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from dsv3_tools.checkpoint.config import CONFIG_NAME, ModelConfig
from dsv3_tools.errors import CheckpointError

__all__ = ["Settings", "Yarn"]


@dataclass(frozen=True, slots=True)
class Yarn:
    """Parameters of YaRN, names as in `config.json`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What `config.json` says about the forward pass; names as there.

    Attributes:
        dims: the dimensions.
        rms_norm_eps: of all norms but those of the two latents.
        latent_norm_eps: of `q_a_layernorm` and `kv_a_layernorm`, which the published code builds without
            the config's value.
        rope_interleave: rope turns neighbours (0, 1), (2, 3), ...; otherwise the two halves.
        yarn: None is plain RoPE.
        uses_bias: experts are chosen by score plus `e_score_correction_bias` ("noaux_tc").
    """

    dims: ModelConfig
    rms_norm_eps: float
    rope_theta: float
    routed_scaling_factor: float
    norm_topk_prob: bool
    yarn: Yarn | None = None
    rope_interleave: bool = True
    uses_bias: bool = True
    latent_norm_eps: float = 1e-6

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: str = CONFIG_NAME) -> Settings:
        """Returns the settings in a parsed `config.json`.

        Raises:
            CheckpointError: a value is missing, or means a computation that is not the published one.
        """
        dims = ModelConfig.from_dict(document, where)
        _check_supported(document, dims, where)
        _check_groups(dims, where)
        rope = _rope(document, where)
        return cls(
            dims=dims,
            rms_norm_eps=_positive(document, "rms_norm_eps", where),
            rope_theta=_positive(rope if "rope_theta" in rope else document, "rope_theta", where),
            routed_scaling_factor=_positive(document, "routed_scaling_factor", where),
            norm_topk_prob=_flag(document, "norm_topk_prob", None, where),
            yarn=_yarn(rope, document, where),
            rope_interleave=_flag(document, "rope_interleave", True, where),
            uses_bias=_uses_bias(document, dims, where),
        )


_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "attention_bias": (False,),
}
"""Keys with the values that the forward pass computes; a missing key means the first."""


def _check_supported(document: Mapping[str, Any], dims: ModelConfig, where: str) -> None:
    for key, allowed in _FIXED.items():
        value = document.get(key, allowed[0])
        if value not in allowed:
            expected = " or ".join(repr(one) for one in allowed)
            raise CheckpointError(f"{where}: {key} is {str(value)[:100]!r}, the forward pass has {expected}")
    if dims.model_type == "deepseek_v32" or dims.index_n_heads is not None:
        raise CheckpointError(
            f"{where}: model_type {dims.model_type!r} has sparse attention with an indexer, which the "
            "forward pass does not have; dense attention would be another model"
        )
    key_heads = document.get("num_key_value_heads", dims.num_attention_heads)
    if key_heads != dims.num_attention_heads:
        raise CheckpointError(
            f"{where}: num_key_value_heads is {str(key_heads)[:100]!r}, "
            f"expected num_attention_heads, {dims.num_attention_heads}"
        )
    if dims.qk_rope_head_dim % 2:
        raise CheckpointError(
            f"{where}: qk_rope_head_dim is {dims.qk_rope_head_dim}, expected an even number"
        )


def _check_groups(dims: ModelConfig, where: str) -> None:
    groups, experts = dims.n_group, dims.n_routed_experts
    if experts % groups or dims.topk_group > groups:
        raise CheckpointError(
            f"{where}: n_group {groups} and topk_group {dims.topk_group} do not "
            f"fit n_routed_experts {experts}: groups must divide the experts, and be as many as are chosen"
        )
    if dims.num_experts_per_tok > dims.topk_group * (experts // groups):
        raise CheckpointError(
            f"{where}: num_experts_per_tok is {dims.num_experts_per_tok}, but topk_group "
            f"{dims.topk_group} leaves {dims.topk_group * (experts // groups)} experts to choose from"
        )


def _uses_bias(document: Mapping[str, Any], dims: ModelConfig, where: str) -> bool:
    """Whether experts are chosen with the correction bias."""
    method = document.get("topk_method", "noaux_tc")
    if method == "noaux_tc":
        return True
    if method in ("greedy", None) and dims.n_group == 1:
        return False
    raise CheckpointError(
        f"{where}: topk_method is {str(method)[:100]!r} with n_group {dims.n_group}, the forward pass has "
        "'noaux_tc', and 'greedy' where n_group is 1"
    )


def _rope(document: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Returns the rope's parameters in either spelling; empty without any."""
    for key in ("rope_parameters", "rope_scaling"):
        found = document.get(key)
        if found is not None and not isinstance(found, Mapping):
            raise CheckpointError(f"{where}: {key} is {type(found).__name__}, expected an object or null")
        if found:
            return found
    return {}


def _yarn(rope: Mapping[str, Any], document: Mapping[str, Any], where: str) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise CheckpointError(
            f"{where}: rope scaling is {str(kind)[:100]!r}, the forward pass has 'yarn', or none"
        )
    for key, expected in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1.0)):
        if rope.get(key, expected) != expected:
            raise CheckpointError(f"{where}: rope scaling has {key}, which the published model does not")
    original = _positive(rope, "original_max_position_embeddings", where)
    if rope.get("factor") is None:
        factor = _positive(document, "max_position_embeddings", where) / original
    else:
        factor = _positive(rope, "factor", where)
    optional = {
        key: _positive(rope, key, where, zero=key.startswith("mscale"))
        for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        if rope.get(key) is not None
    }
    return Yarn(factor, int(original), **optional)


def _positive(values: Mapping[str, Any], key: str, where: str, *, zero: bool = False) -> float:
    value: Any = values.get(key)
    if type(value) in (int, float) and isfinite(value) and (value > 0 or (value == 0 and zero)):
        return float(value)
    found = "missing" if value is None else repr(value)[:100]
    raise CheckpointError(f"{where}: {key} is {found}, expected a positive number")


def _flag(values: Mapping[str, Any], key: str, default: bool | None, where: str) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        found = "missing" if value is None else repr(value)[:100]
        raise CheckpointError(f"{where}: {key} is {found}, expected true or false")
    return value
