"""The model that is trained: transformers' DeepSeek-V3 and, beside it, an MTP layer of our own.

transformers has no MTP layer for this family, so `MtpLayer` adds what the released layer 61 has to
transformers' decoder layer, under the released names. It is fed as vLLM and SGLang feed it: position `t`
gets the main model's output *after* `model.norm` at `t` and the embedding of token `t + 1`, keeps
position `t` for RoPE, and predicts token `t + 2`.

Shape suffixes: B rows, L tokens of a row, T = B x L, H hidden, V vocabulary, E routed experts, K experts per
token, I expert intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3Experts,
    DeepseekV3RMSNorm,
    DeepseekV3TopkRouter,
)

__all__ = ["MtpLayer", "RouterLoad", "build", "evaluate", "losses", "predict", "prepare_for_training"]

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "kv_lora_rank": 128,
    "max_position_embeddings": 10240,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 256,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 64,
    "vocab_size": 2048,
}
"""config.json in the keys of the release, less `auto_map` (no code is shipped with the weights)."""


class MtpLayer(DeepseekV3DecoderLayer):
    """The released MTP layer, less the two tensors that it shares with the main model.

    `state_dict()` has the released names without the prefix `model.layers.{num_hidden_layers}.`.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config, layer_idx=config.num_hidden_layers)
        hidden = config.hidden_size
        self.enorm = DeepseekV3RMSNorm(hidden, eps=config.rms_norm_eps)
        self.hnorm = DeepseekV3RMSNorm(hidden, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.shared_head = nn.ModuleDict({"norm": DeepseekV3RMSNorm(hidden, eps=config.rms_norm_eps)})

    def join(self, hidden_BLH: Tensor, next_embedding_BLH: Tensor) -> Tensor:
        """Returns the layer's input: the embedding of the next token first, the hidden state second."""
        return self.eh_proj(torch.cat((self.enorm(next_embedding_BLH), self.hnorm(hidden_BLH)), dim=-1))


def build() -> tuple[DeepseekV3ForCausalLM, MtpLayer]:
    """Returns the main model and its MTP layer, initialized in float32 from torch's current seed."""
    released = {key: value for key, value in CONFIG.items() if key != "quantization_config"}
    config = DeepseekV3Config.from_dict(released, attn_implementation="sdpa", experts_implementation="eager")
    model = DeepseekV3ForCausalLM(config).float()
    mtp = MtpLayer(model.config).float()
    mtp.apply(model._init_weights)
    return model, mtp


def predict(model: DeepseekV3ForCausalLM, mtp: MtpLayer, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the main model's logits `[B, L-1, V]` for tokens 1… and MTP's `[B, L-2, V]` for tokens 2…."""
    hidden = model.model(input_ids=tokens_BL[:, :-1], use_cache=False).last_hidden_state
    embedding = model.model.embed_tokens(tokens_BL[:, 1:-1])
    joined = mtp.join(hidden[:, :-1], embedding)
    position_ids = torch.arange(joined.shape[1], device=joined.device).unsqueeze(0)
    # No mask: with `attention_mask=None` transformers' SDPA attention is causal.
    output = mtp(
        joined,
        position_ids=position_ids,
        position_embeddings=model.model.rotary_emb(joined, position_ids=position_ids),
    )
    return model.lm_head(hidden), model.lm_head(mtp.shared_head["norm"](output))


def losses(model: DeepseekV3ForCausalLM, mtp: MtpLayer, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean cross entropy in nats per token of the main model and of MTP."""
    main, ahead = predict(model, mtp, tokens_BL)
    return (
        F.cross_entropy(main.float().flatten(0, 1), tokens_BL[:, 1:].flatten()),
        F.cross_entropy(ahead.float().flatten(0, 1), tokens_BL[:, 2:].flatten()),
    )


@torch.no_grad()
def evaluate(
    model: DeepseekV3ForCausalLM, mtp: MtpLayer, tokens_BL: Tensor, *, rows_at_once: int = 16
) -> dict[str, float]:
    """Returns loss, MTP loss, MTP top-1 accuracy and MTP acceptance over all rows.

    Accuracy: MTP's argmax is the true token `t + 2`. Acceptance: it is the main model's argmax for that
    position, the main model having seen the true tokens up to `t + 1` (as in greedy speculative decoding).
    """
    sums = dict.fromkeys(("loss", "mtp_loss", "mtp_top1_accuracy", "mtp_acceptance"), 0.0)
    for rows in tokens_BL.split(rows_at_once):
        main, ahead = predict(model, mtp, rows)
        guess = ahead.argmax(-1)
        weight = len(rows) / len(tokens_BL)
        values = {
            "loss": F.cross_entropy(main.float().flatten(0, 1), rows[:, 1:].flatten()),
            "mtp_loss": F.cross_entropy(ahead.float().flatten(0, 1), rows[:, 2:].flatten()),
            "mtp_top1_accuracy": (guess == rows[:, 2:]).double().mean(),
            "mtp_acceptance": (guess == main[:, 1:].argmax(-1)).double().mean(),
        }
        for name, value in values.items():
            sums[name] += weight * value.item()
    return sums


def prepare_for_training(model: DeepseekV3ForCausalLM, mtp: MtpLayer) -> None:
    """Makes the modules fast and exact under autocast: experts as two products, routers in float32."""
    for module in _all_modules(model, mtp):
        if isinstance(module, DeepseekV3Experts):
            module.forward = partial(_every_expert, module)
        elif isinstance(module, DeepseekV3TopkRouter):
            module.forward = partial(_in_float32, module.forward)


class RouterLoad:
    """Counts the tokens that every router sends to each of its experts, from its creation on."""

    def __init__(self, model: DeepseekV3ForCausalLM, mtp: MtpLayer) -> None:
        self._routers = [m for m in _all_modules(model, mtp) if isinstance(m, DeepseekV3TopkRouter)]
        self._counts = [torch.zeros_like(router.e_score_correction_bias) for router in self._routers]
        for router, counts in zip(self._routers, self._counts, strict=True):
            router.register_forward_hook(partial(_count, counts))

    @torch.no_grad()
    def update_bias(self, step: float) -> None:
        """Moves every bias by `step` towards a balanced load and counts anew (DeepSeek-V3 report, 2.1.2)."""
        for router, counts in zip(self._routers, self._counts, strict=True):
            router.e_score_correction_bias.add_(torch.sign(counts.mean() - counts), alpha=step)
        self.reset()

    def reset(self) -> None:
        """Forgets all counts."""
        for counts in self._counts:
            counts.zero_()

    def max_violation(self) -> list[float]:
        """Returns, router by router, the largest load over the mean load, less 1: 0 is perfect balance."""
        return [round((counts.max() / counts.mean()).item() - 1, 4) for counts in self._counts]


def _all_modules(model: nn.Module, mtp: nn.Module) -> Iterator[nn.Module]:
    yield from model.modules()
    yield from mtp.modules()


def _count(counts: Tensor, _module: nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    index = outputs[2].flatten()
    counts.scatter_add_(0, index, torch.ones_like(index, dtype=counts.dtype))


def _in_float32(forward: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Routes outside autocast: BF16 router logits would choose other experts than inference does."""
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(hidden.float())


def _every_expert(
    experts: DeepseekV3Experts, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Returns the routed experts' output, from running every expert on every token.

    With 16 experts of 128 this costs E / K = 4 times the arithmetic of a routed product, but it is two
    matrix products without a loop or a wait for the device, and it works on every device: transformers'
    `grouped_mm` does not follow autocast and falls back to a loop for float32 weights.
    """
    num_tokens, num_experts = len(hidden_TH), experts.num_experts
    weights_TE = weights_TK.new_zeros(num_tokens, num_experts).scatter(1, index_TK, weights_TK)
    gate_up = F.linear(hidden_TH, experts.gate_up_proj.flatten(0, 1))
    gate_TEI, up_TEI = gate_up.unflatten(1, (num_experts, 2, -1)).unbind(2)
    active_TEI = F.silu(gate_TEI) * up_TEI * weights_TE.to(gate_TEI.dtype).unsqueeze(-1)
    return F.linear(active_TEI.flatten(1), experts.down_proj.transpose(0, 1).flatten(1))
