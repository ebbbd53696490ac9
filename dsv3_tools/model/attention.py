"""Multi-head latent attention (MLA), over whole sequences of equal length, without a cache.

Source: `DeepseekV3Attention` of the release. Keys and values are expanded from the latent (the released
inference code's "naive" form); scores, softmax and their sums are float32 inside torch's attention.

Shape suffixes: B sequences, L tokens of a sequence, D hidden, H heads (of this rank), Q query or key
dimensions of a head, R those of them with rope, V value dimensions, X keys without rope and values, C latent.
"""
# ruff: noqa: N803, N806 (shape suffixes are capitals)

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dsv3_tools.model.mlp import Tap
from dsv3_tools.model.rope import Rope, softmax_scale
from dsv3_tools.model.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["attend"]


def attend(
    x_BLD: Tensor, weights: Mapping[str, Tensor], settings: Settings, rope: Rope, tap: Tap | None = None
) -> Tensor:
    """Returns what some heads' attention adds to the hidden states, float32 `[B, L, D]`.

    `weights` are the modules under `self_attn`, by name; of `q_b_proj` (or `q_proj`) and `kv_b_proj` the rows
    and of `o_proj` the columns of these heads. `x_BLD` has been normalised. `tap` sees the linears' inputs;
    the first of those that share one stands for them.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from dsv3_tools.model.numerics import linear, linear_wide, rms_norm

    dims = settings.dims
    num_sequences, length, _ = x_BLD.shape
    num_heads = weights["o_proj"].shape[1] // dims.v_head_dim
    nope, rank = dims.qk_nope_head_dim, dims.kv_lora_rank
    tap = tap or _ignore
    query_BLHQ = _query(x_BLD, weights, settings.latent_norm_eps, tap).view(
        num_sequences, length, num_heads, -1
    )
    latent_and_key = linear(x_BLD, weights["kv_a_proj_with_mqa"])
    latent_BLC = rms_norm(latent_and_key[..., :rank], weights["kv_a_layernorm"], settings.latent_norm_eps)
    key_BLR = rope.rotate(latent_and_key[..., rank:])
    tap("kv_b_proj", latent_BLC.flatten(0, 1))
    expanded_BLHX = linear(latent_BLC, weights["kv_b_proj"]).view(num_sequences, length, num_heads, -1)
    query_BHLR = rope.rotate(query_BLHQ[..., nope:].transpose(1, 2))
    query_BHLQ = torch.cat((query_BLHQ[..., :nope].transpose(1, 2), query_BHLR), dim=-1)
    key_BHLR = key_BLR.unsqueeze(1).expand(-1, num_heads, -1, -1)
    key_BHLQ = torch.cat((expanded_BLHX[..., :nope].transpose(1, 2), key_BHLR), dim=-1)
    value_BHLV = expanded_BLHX[..., nope:].transpose(1, 2)
    out_BHLV = scaled_dot_product_attention(
        query_BHLQ, key_BHLQ, value_BHLV, is_causal=True, scale=softmax_scale(settings)
    )
    flat = out_BHLV.transpose(1, 2).reshape(num_sequences * length, -1)
    tap("o_proj", flat)
    return linear_wide(flat, weights["o_proj"]).view(num_sequences, length, -1)


def _query(x_BLD: Tensor, weights: Mapping[str, Tensor], eps: float, tap: Tap) -> Tensor:
    """Returns the heads' queries side by side, through the low-rank factor if there is one."""
    from dsv3_tools.model.numerics import linear, rms_norm

    if "q_proj" in weights:
        tap("q_proj", x_BLD.flatten(0, 1))
        return linear(x_BLD, weights["q_proj"])
    tap("q_a_proj", x_BLD.flatten(0, 1))
    latent = rms_norm(linear(x_BLD, weights["q_a_proj"]), weights["q_a_layernorm"], eps)
    tap("q_b_proj", latent.flatten(0, 1))
    return linear(latent, weights["q_b_proj"])


def _ignore(name: str, x: Tensor) -> None:
    """Sees nothing."""
    del name, x
