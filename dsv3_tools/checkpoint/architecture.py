"""Every tensor that a model of the family has, from its dimensions.

Source: the released index and shapes of DeepSeek-V3 (91,991 tensors with scales) and the module
definitions in its `modeling_deepseek.py`; the indexer from DeepSeek-V3.2-Exp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from dsv3_tools.checkpoint.config import ModelConfig
from dsv3_tools.checkpoint.names import list_names
from dsv3_tools.checkpoint.specs import TensorSpec

__all__ = ["dense_tensors", "differences", "is_mtp_alone", "mtp_copies"]

_MAX_LISTED = 5

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def dense_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Returns the specs of every tensor of the unquantized checkpoint, in the model's order.

    All are BF16 but the router's `e_score_correction_bias`, which the release keeps in float32.
    """
    return {
        name: TensorSpec("F32" if name.endswith("e_score_correction_bias") else "BF16", shape)
        for name, shape in _model(config)
    }


def mtp_copies(config: ModelConfig) -> dict[str, str]:
    """Returns the MTP module's tensors that repeat tensors of the main model, with the originals' names.

    Released checkpoints hold them twice; engines load one of the two, or both.
    """
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return {
        f"model.layers.{layer}.{own}": original
        for layer in config.mtp_layers
        for own, original in (
            ("embed_tokens.weight", "model.embed_tokens.weight"),
            ("shared_head.head.weight", head),
        )
    }


def is_mtp_alone(config: ModelConfig, names: Iterable[str]) -> bool:
    """Whether there are tensors of the MTP module and no others."""
    mtp, found = _prefixes(config), list(names)
    return bool(mtp and found) and all(name.startswith(mtp) for name in found)


def differences(
    config: ModelConfig, specs: Mapping[str, TensorSpec], *, mtp_alone: bool = False
) -> Iterator[str]:
    """Yields how a checkpoint's parameters differ from those that its `config.json` promises.

    `specs` has them as an unquantized checkpoint would. Rotary caches (`inv_freq`, in some older files) do
    not count. With `mtp_alone` only the MTP module is looked at, and what it has in common with the main
    model may be missing.
    """
    expected = dense_tensors(config)
    found = {name for name in specs if not name.endswith(".inv_freq")}
    mtp = _prefixes(config)
    if mtp_alone or config.is_nextn:
        copies = mtp_copies(config).keys()
        expected = {n: spec for n, spec in expected.items() if n.startswith(mtp) and n not in copies}
        found -= copies
    missing = sorted(expected.keys() - found)
    if mtp and not any(name.startswith(mtp) for name in found):
        yield (
            f"config.json says num_nextn_predict_layers {len(mtp)}, but the MTP module's weights are missing"
        )
        missing = [name for name in missing if not name.startswith(mtp)]
    if missing:
        yield f"{len(missing)} of the model's tensors are missing: {list_names(missing)}"
    if unexpected := sorted(found - expected.keys()):
        yield f"{len(unexpected)} tensors do not belong to the model: {list_names(unexpected)}"
    wrong = sorted(n for n in found & expected.keys() if specs[n].shape != expected[n].shape)
    for name in wrong[:_MAX_LISTED]:
        yield f"{name} is {specs[name]}, config.json makes it {list(expected[name].shape)}"
    if len(wrong) > _MAX_LISTED:
        yield f"{len(wrong) - _MAX_LISTED} more tensors have other shapes than config.json makes them"


def _prefixes(config: ModelConfig) -> tuple[str, ...]:
    return tuple(f"model.layers.{layer}." for layer in config.mtp_layers)


def _model(config: ModelConfig) -> Shapes:
    embedding = (config.vocab_size, config.hidden_size)
    if not config.is_nextn:
        yield "model.embed_tokens.weight", embedding
        for layer in config.main_layers:
            yield from _layer(config, layer)
        yield "model.norm.weight", (config.hidden_size,)
        if not config.tie_word_embeddings:
            yield "lm_head.weight", embedding
    for layer in config.mtp_layers:
        prefix = f"model.layers.{layer}."
        if not config.is_nextn:
            yield prefix + "embed_tokens.weight", embedding
        yield prefix + "enorm.weight", (config.hidden_size,)
        yield prefix + "hnorm.weight", (config.hidden_size,)
        yield prefix + "eh_proj.weight", (config.hidden_size, 2 * config.hidden_size)
        yield from _layer(config, layer)
        yield prefix + "shared_head.norm.weight", (config.hidden_size,)
        if not config.is_nextn:
            yield prefix + "shared_head.head.weight", embedding


def _layer(config: ModelConfig, layer: int) -> Shapes:
    prefix = f"model.layers.{layer}."
    yield prefix + "input_layernorm.weight", (config.hidden_size,)
    yield from _attention(config, prefix + "self_attn.")
    yield prefix + "post_attention_layernorm.weight", (config.hidden_size,)
    if not config.is_moe_layer(layer):
        yield from _mlp(config.hidden_size, config.intermediate_size, prefix + "mlp.")
        return
    yield prefix + "mlp.gate.weight", (config.n_routed_experts, config.hidden_size)
    yield prefix + "mlp.gate.e_score_correction_bias", (config.n_routed_experts,)
    for expert in range(config.n_routed_experts):
        yield from _mlp(config.hidden_size, config.moe_intermediate_size, f"{prefix}mlp.experts.{expert}.")
    if config.n_shared_experts:
        width = config.moe_intermediate_size * config.n_shared_experts
        yield from _mlp(config.hidden_size, width, prefix + "mlp.shared_experts.")


def _attention(config: ModelConfig, prefix: str) -> Shapes:
    heads, hidden = config.num_attention_heads, config.hidden_size
    if config.q_lora_rank is None:
        yield prefix + "q_proj.weight", (heads * config.qk_head_dim, hidden)
    else:
        yield prefix + "q_a_proj.weight", (config.q_lora_rank, hidden)
        yield prefix + "q_a_layernorm.weight", (config.q_lora_rank,)
        yield prefix + "q_b_proj.weight", (heads * config.qk_head_dim, config.q_lora_rank)
    yield prefix + "kv_a_proj_with_mqa.weight", (config.kv_lora_rank + config.qk_rope_head_dim, hidden)
    yield prefix + "kv_a_layernorm.weight", (config.kv_lora_rank,)
    per_head = config.qk_nope_head_dim + config.v_head_dim
    yield prefix + "kv_b_proj.weight", (heads * per_head, config.kv_lora_rank)
    yield prefix + "o_proj.weight", (hidden, heads * config.v_head_dim)
    if config.index_n_heads is not None and config.index_head_dim is not None:
        query_rank = config.q_lora_rank or hidden
        yield prefix + "indexer.wq_b.weight", (config.index_n_heads * config.index_head_dim, query_rank)
        yield prefix + "indexer.wk.weight", (config.index_head_dim, hidden)
        yield prefix + "indexer.k_norm.weight", (config.index_head_dim,)
        yield prefix + "indexer.k_norm.bias", (config.index_head_dim,)
        yield prefix + "indexer.weights_proj.weight", (config.index_n_heads, hidden)


def _mlp(hidden: int, width: int, prefix: str) -> Shapes:
    yield prefix + "gate_proj.weight", (width, hidden)
    yield prefix + "up_proj.weight", (width, hidden)
    yield prefix + "down_proj.weight", (hidden, width)
