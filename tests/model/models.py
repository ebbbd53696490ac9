"""Random models whose every part matters, runs of both implementations, and the bound on their difference.

The bound is measured, not guessed, and from neither of the two float32 runs. A float32 product with inner
dimension k gives, in whatever order it is summed, what exact arithmetic gives for weights changed by relative
amounts below k u, u = 2^-24, and typically by sqrt(k) u (Higham, "Accuracy and Stability of Numerical
Algorithms", 3.1 and 2.8). So the model is run in float64 with every weight so changed at random: how far its
logits move is what one float32 run may be off by. What else is rounded (norms, softmax, rope, activations,
residuals) is rounded a few times per element, fewer than sqrt(k) for every k here. Two runs may each be off
by that much: MARGIN = 2. A choice of experts that differs is no rounding error: it moves logits by far more
than the bound, and none of the models and tokens here has one so near a tie.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsv3_tools import Checkpoint
from dsv3_tools.checkpoint.architecture import dense_tensors
from dsv3_tools.checkpoint.config import ModelConfig
from dsv3_tools.checkpoint.presets import PRESETS
from dsv3_tools.model.transformer import Transformer
from dsv3_tools.model.weights import Encoded

Tensor = torch.Tensor
UNIT = 2.0**-24
MARGIN = 2

YARN = PRESETS["deepseek-v3"]["rope_scaling"]

BASE: dict[str, Any] = PRESETS["deepseek-v3"] | {
    "first_k_dense_replace": 1,
    "hidden_size": 96,
    "intermediate_size": 160,
    "kv_lora_rank": 48,
    "max_position_embeddings": 40960,
    "moe_intermediate_size": 40,
    "n_group": 4,
    "n_routed_experts": 16,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rope_scaling": YARN | {"original_max_position_embeddings": 1024},
    "topk_group": 2,
    "v_head_dim": 24,
    "vocab_size": 200,
}
"""Of its 8 pairs YaRN keeps some, stretches some and blends some."""

CONFIGS: dict[str, dict[str, Any]] = {
    "as released, small": {},
    "no q LoRA": {"q_lora_rank": None},
    "no YaRN": {"rope_scaling": None},
    "n_group 1": {"n_group": 1, "topk_group": 1},
    "no dense layer": {"first_k_dense_replace": 0},
    "dense layers only": {"first_k_dense_replace": 3},
    "ragged sizes": {
        "hidden_size": 75,
        "intermediate_size": 131,
        "kv_lora_rank": 41,
        "moe_intermediate_size": 27,
        "n_group": 3,
        "n_routed_experts": 15,
        "num_attention_heads": 3,
        "num_experts_per_tok": 5,
        "num_key_value_heads": 3,
        "q_lora_rank": 37,
        "qk_nope_head_dim": 19,
        "qk_rope_head_dim": 10,
        "v_head_dim": 21,
        "vocab_size": 211,
    },
    "head sizes of V3": {
        "kv_lora_rank": 512,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    "unnormalised, two shared experts, other mscales and eps": {
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-3,
        "rope_scaling": YARN
        | {"original_max_position_embeddings": 1024, "factor": 10, "mscale": 0.707, "mscale_all_dim": 0.9},
        "rope_theta": 50000,
        "routed_scaling_factor": 1.5,
    },
    "rope in halves, parameters in the new spelling": {
        "rope_interleave": False,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0}
        | {k: v for k, v in YARN.items() if k != "type"}
        | {"original_max_position_embeddings": 1024},
        "rope_scaling": None,
        "rope_theta": None,
    },
}


def make(directory: Path, changes: dict[str, Any] | None = None, *, seed: int = 0) -> Path:
    """Writes a checkpoint in BF16 with random weights such that activations have about unit size."""
    config = {k: v for k, v in (BASE | (changes or {})).items() if v is not None or k == "q_lora_rank"}
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, spec in dense_tensors(ModelConfig.from_dict(config)).items():
        values = torch.randn(spec.shape, generator=generator)
        if name.endswith("e_score_correction_bias"):
            weights[name] = values * 0.2
        elif name.endswith("norm.weight"):
            weights[name] = (1 + 0.2 * values).bfloat16()
        elif "embed_tokens" in name:
            weights[name] = values.bfloat16()
        else:
            # Scores of attention and router get some spread: flat ones would hide mistakes.
            gain = 1.5 if "q_" in name or ".gate." in name else 1.0
            weights[name] = (gain * values / spec.shape[-1] ** 0.5).bfloat16()
    directory.mkdir(parents=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def some_tokens(num_sequences: int = 2, length: int = 80, *, vocab_size: int = 200, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (num_sequences, length), generator=generator)


def run(model: Transformer, tokens: Tensor) -> Tensor:
    """Returns the logits of one pass."""
    hidden = model.embed(tokens)
    for _, layer in model.layers():
        hidden, _ = layer.forward(hidden)
    return torch.cat(list(model.logits(hidden, chunk=64))).view(*tokens.shape, -1)


def run_mtp(model: Transformer, tokens: Tensor) -> Tensor:
    """Returns the logits of MTP for all tokens but the first two."""
    hidden = model.embed(tokens[:, :-1])
    for _, layer in model.layers():
        hidden, _ = layer.forward(hidden)
    mtp = model.mtp()
    ahead, _ = mtp.forward(hidden[:, :-1], tokens[:, 1:-1])
    return torch.cat(list(mtp.logits(ahead, chunk=64))).view(*ahead.shape[:2], -1)


def run_both(model: Transformer, tokens: Tensor) -> Tensor:
    """Returns the logits of the model, then those of MTP, from one pass."""
    hidden = model.embed(tokens)
    for _, layer in model.layers():
        hidden, _ = layer.forward(hidden)
    mtp = model.mtp()
    ahead, _ = mtp.forward(hidden[:, :-1], tokens[:, 1:])
    return torch.cat([*model.logits(hidden), *mtp.logits(ahead)])


def ours(directory: Path, tokens: Tensor, dtype: str = "F32") -> Tensor:
    with Checkpoint(directory) as checkpoint:
        return run(Transformer(checkpoint, dtype=dtype), tokens)


def load_theirs(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(
        directory, dtype=dtype, experts_implementation="eager", attn_implementation="eager"
    )
    return model.eval()


def theirs(directory: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = load_theirs(directory)(tokens).logits
    return found


def changed(model: Transformer, seed: int = 0) -> Transformer:
    """Changes every matrix that the model will read by sqrt(k) u at random; see above."""
    source, generator = model._source, torch.Generator().manual_seed(seed)
    decode = source.decode

    def decode_changed(unit: Encoded | dict[str, Tensor]) -> dict[str, Tensor]:
        weights = decode(unit)
        if isinstance(unit, Encoded):
            for name, weight in weights.items():
                amount = UNIT * weight.shape[-1] ** 0.5 if weight.ndim == 2 else UNIT
                noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                weights[name] = weight * (1 + amount * noise)
        return weights

    source.decode = decode_changed  # type: ignore[method-assign]
    return model


def bound(directory: Path, tokens: Tensor, what: Callable[[Transformer, Tensor], Tensor] = run) -> float:
    """Returns how far apart the float32 logits of two right implementations may be."""
    with Checkpoint(directory) as checkpoint:
        exact = what(Transformer(checkpoint, dtype="F64"), tokens)
        moved = what(changed(Transformer(checkpoint, dtype="F64", threads=1)), tokens)
    return MARGIN * (moved - exact).abs().max().item()


def check_within(found: Tensor, expected: Tensor, allowed: float) -> None:
    """Compares with a bound, which must itself be small for logits of about unit size."""
    delta = distance(found, expected)
    assert delta <= allowed < 1e-3, f"max |delta| is {delta:.2e}, bound {allowed:.2e}"


def distance(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    return (found.double() - expected.double()).abs().max().item()
