"""Which weights are read together, and in which order, for one rank.

A layer is its attention, then its router, then its dense MLP or shared experts, then one routed expert after
the other: nothing larger is ever in memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from dsv3_tools.model.mlp import MLP_PARTS
from dsv3_tools.model.parallel import RankGroup
from dsv3_tools.model.prefetch import Order
from dsv3_tools.model.settings import Settings
from dsv3_tools.model.weights import Unit, Wanted

__all__ = ["layer_orders", "mtp_unit", "stripe"]


def layer_orders(settings: Settings, layer: int, ranks: RankGroup) -> Iterator[Order]:
    """Yields the units of a layer; keys are (layer, "attention" | "router" | "mlp" | expert number)."""

    def order(part: Hashable, unit: Unit) -> Order:
        return Order((layer, part), unit)

    dims, prefix = settings.dims, f"model.layers.{layer}."
    yield order("attention", _attention(settings, prefix, ranks))
    norm = Wanted(f"{prefix}post_attention_layernorm.weight", is_wide=True)
    if not dims.is_moe_layer(layer):
        yield order("router", {"norm": norm})
        yield order("mlp", _mlp(f"{prefix}mlp.", ranks.share(dims.intermediate_size)))
        return
    yield order("router", {"norm": norm, **_router(settings, f"{prefix}mlp.gate.")})
    if dims.n_shared_experts:
        width = ranks.share(dims.n_shared_experts * dims.moe_intermediate_size)
        yield order("mlp", _mlp(f"{prefix}mlp.shared_experts.", width))
    for expert in ranks.share(dims.n_routed_experts):
        yield order(expert, _mlp(f"{prefix}mlp.experts.{expert}.", None))


def mtp_unit(layer: int) -> Unit:
    """Returns what an MTP layer has before its layer proper."""
    prefix = f"model.layers.{layer}."
    return {
        "enorm": Wanted(f"{prefix}enorm.weight", is_wide=True),
        "hnorm": Wanted(f"{prefix}hnorm.weight", is_wide=True),
        "eh_proj": Wanted(f"{prefix}eh_proj.weight"),
    }


def stripe(name: str, rows: range) -> Order:
    """Returns some rows of a large matrix."""
    return Order((name, rows.start), {"weight": Wanted(name, rows)})


def _attention(settings: Settings, prefix: str, ranks: RankGroup) -> Unit:
    """Returns the norm before attention, what leads to the latents, and the weights of this rank's heads."""
    dims, inside = settings.dims, f"{prefix}self_attn."
    heads = ranks.share(dims.num_attention_heads)
    norm = {"norm": Wanted(f"{prefix}input_layernorm.weight", is_wide=True)}
    if not heads:
        return norm
    query_rows, value_columns = _times(heads, dims.qk_head_dim), _times(heads, dims.v_head_dim)
    if dims.q_lora_rank is None:
        query = {"q_proj": Wanted(f"{inside}q_proj.weight", query_rows)}
    else:
        query = {
            "q_a_proj": Wanted(f"{inside}q_a_proj.weight"),
            "q_a_layernorm": Wanted(f"{inside}q_a_layernorm.weight", is_wide=True),
            "q_b_proj": Wanted(f"{inside}q_b_proj.weight", query_rows),
        }
    key_rows = _times(heads, dims.qk_nope_head_dim + dims.v_head_dim)
    return {
        **norm,
        **query,
        "kv_a_proj_with_mqa": Wanted(f"{inside}kv_a_proj_with_mqa.weight"),
        "kv_a_layernorm": Wanted(f"{inside}kv_a_layernorm.weight", is_wide=True),
        "kv_b_proj": Wanted(f"{inside}kv_b_proj.weight", key_rows),
        "o_proj": Wanted(f"{inside}o_proj.weight", columns=value_columns),
    }


def _router(settings: Settings, prefix: str) -> Unit:
    gate = {"gate": Wanted(f"{prefix}weight", is_wide=True)}
    if not settings.uses_bias:
        return gate
    return {**gate, "bias": Wanted(f"{prefix}e_score_correction_bias", is_wide=True)}


def _mlp(prefix: str, width: range | None) -> Unit:
    """Returns the three weights, or the rows and columns of some of the intermediate dimensions."""
    if width is None:
        return {part: Wanted(f"{prefix}{part}.weight") for part in MLP_PARTS}
    if not width:
        return {}
    gate, up, down = MLP_PARTS
    return {
        gate: Wanted(f"{prefix}{gate}.weight", width),
        up: Wanted(f"{prefix}{up}.weight", width),
        down: Wanted(f"{prefix}{down}.weight", columns=width),
    }


def _times(heads: range, size: int) -> range:
    return range(heads.start * size, heads.stop * size)
