"""Logits are those of transformers' DeepseekV3ForCausalLM, in float32, on random and on trained weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dsv3_tools
from dsv3_tools import Checkpoint
from dsv3_tools.model import layer as layer_module
from dsv3_tools.model import moe
from dsv3_tools.model.moe import Routes
from dsv3_tools.model.rope import Ropes
from dsv3_tools.model.transformer import Transformer
from tests.model.models import CONFIGS, bound, check_within, distance, make, ours, run, some_tokens, theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_random_models(name: str, tmp_path: Path) -> None:
    model, tokens = make(tmp_path / "model", CONFIGS[name]), some_tokens()
    check_within(ours(model, tokens), theirs(model, tokens), bound(model, tokens))


@pytest.fixture(scope="module")
def converted(miniature: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "bf16"
    dsv3_tools.convert_fp8_to_bf16(miniature, path, device="cpu")
    return path


def test_the_shipped_model(miniature: Path, converted: Path) -> None:
    tokens = load_file(miniature.with_name("heldout_tokens.safetensors"))["tokens"].long()[:4, :128]
    check_within(ours(converted, tokens), theirs(converted, tokens), bound(converted, tokens))


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor, float]:
    """A model, tokens, transformers' logits and the bound."""
    model = make(tmp_path_factory.mktemp("controls") / "model", {"rms_norm_eps": 1e-3})
    tokens = some_tokens()
    return model, tokens, theirs(model, tokens), bound(model, tokens)


WRONG = {
    "rope in halves": lambda s: replace(s, rope_interleave=False),
    "mscale left out": lambda s: replace(s, yarn=replace(s.yarn, mscale_all_dim=0.0, mscale=0.0)),
    "no YaRN": lambda s: replace(s, yarn=None),
    "another beta_fast": lambda s: replace(s, yarn=replace(s.yarn, beta_fast=4.0)),
    "another rope_theta": lambda s: replace(s, rope_theta=10100.0),
    "bias left out": lambda s: replace(s, uses_bias=False),
    "weights not normalised": lambda s: replace(s, norm_topk_prob=False),
    "not scaled": lambda s: replace(s, routed_scaling_factor=1.0),
    "no groups": lambda s: replace(s, dims=replace(s.dims, n_group=1, topk_group=1)),
    "one group too many": lambda s: replace(s, dims=replace(s.dims, topk_group=3)),
    "another eps": lambda s: replace(s, rms_norm_eps=1.3e-3),
    "the layers' eps for latents": lambda s: replace(s, latent_norm_eps=1e-3),
}


@pytest.mark.parametrize("name", WRONG)
def test_negative_control_settings(right, name: str) -> None:
    directory, tokens, expected, allowed = right
    with Checkpoint(directory) as checkpoint:
        model = Transformer(checkpoint)
        assert distance(run(model, tokens), expected) <= allowed
        model = Transformer(checkpoint)
        model.settings = WRONG[name](model.settings)
        model._ropes = Ropes(model.settings, model.device)
        assert distance(run(model, tokens), expected) > 20 * allowed


def _bias_in_weights(scores, settings):
    indices, _ = moe.route(scores, settings)
    weights = scores.choice.gather(1, indices)
    return Routes(indices, weights / weights.sum(1, keepdim=True) * settings.routed_scaling_factor)


def test_negative_control_bias_in_the_weights(right, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, tokens, expected, allowed = right
    monkeypatch.setattr(layer_module, "route", _bias_in_weights)
    assert distance(ours(directory, tokens), expected) > 20 * allowed


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.input_layernorm.weight",
        "model.layers.2.post_attention_layernorm.weight",
        "model.layers.0.self_attn.q_a_layernorm.weight",
        "model.layers.0.self_attn.kv_a_layernorm.weight",
        "model.norm.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "model.layers.2.mlp.experts.3.down_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
    ],
)
def test_negative_control_one_weight_off_by_a_percent(right, name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    directory, tokens, expected, allowed = right
    weights = load_file(directory / "model.safetensors")
    weights[name] = weights[name].float() * 1.01
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    assert distance(ours(tmp_path, tokens), expected) > 20 * allowed


def test_negative_control_two_experts_swapped(right, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    directory, tokens, expected, allowed = right
    weights = load_file(directory / "model.safetensors")
    one, other = (f"model.layers.1.mlp.experts.{e}.gate_proj.weight" for e in (2, 5))
    weights[one], weights[other] = weights[other], weights[one]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    assert distance(ours(tmp_path, tokens), expected) > 20 * allowed


def test_bf16_is_as_near_to_float32_as_theirs(miniature: Path, converted: Path) -> None:
    """Loss on held-out tokens, where routing flips average out."""
    from tests.model.models import load_theirs

    tokens = load_file(miniature.with_name("heldout_tokens.safetensors"))["tokens"].long()[:8]
    with torch.no_grad():
        reference = load_theirs(converted, torch.bfloat16)(tokens[:, :-1]).logits
    exact = ours(converted, tokens[:, :-1], "F64")
    mine = ours(converted, tokens[:, :-1], "BF16")
    assert mine.dtype == torch.float32
    off = [(logits.double() - exact).square().mean().sqrt().item() for logits in (mine, reference)]
    assert off[0] <= 1.1 * off[1]


def test_the_checkpoint_says_which_numbers(tmp_path: Path) -> None:
    """transformers reads the same config.json; its defaults, too, would do for other numbers."""
    config = json.loads((make(tmp_path / "model") / "config.json").read_text())
    assert config["n_group"] != 8
    assert config["rope_scaling"]["original_max_position_embeddings"] == 1024
