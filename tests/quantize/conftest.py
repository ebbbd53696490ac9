"""A small model with everything that calibration meets, tokens for it, and inputs of known statistics."""

# ruff: noqa: N806 (shape suffixes are capitals)

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import dsv3_tools

TINY = {
    "first_k_dense_replace": 1,
    "hidden_size": 128,
    "intermediate_size": 192,
    "kv_lora_rank": 64,
    "moe_intermediate_size": 64,
    "n_group": 2,
    "n_routed_experts": 6,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "topk_group": 1,
    "v_head_dim": 32,
    "vocab_size": 160,
}
"""A dense layer, three MoE layers and an MTP layer; groups of 32 and 64 divide every weight."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in FP8; must not be written to."""
    path = tmp_path_factory.mktemp("quantize") / "tiny"
    dsv3_tools.sample(path, overrides=TINY, shards=2, seed=5)
    return path


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 sequences of 40 tokens."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(0, 160, (12, 40)))
    return path


@pytest.fixture(scope="session")
def inputs() -> Callable[[str, int, int], Tensor]:
    """Returns inputs `[tokens, 1024]` of one kind, by a seed."""
    return inputs_of


def inputs_of(kind: str, count: int, seed: int) -> Tensor:
    """Returns inputs `[count, 1024]`: "white", "ar RHO", "power law" or "power law with outliers"."""
    generator = torch.Generator().manual_seed(seed)
    size = 1024
    x_TK = torch.randn(count, size, generator=generator)
    if kind.startswith("ar "):
        rho = float(kind[3:])
        for column in range(1, size):
            x_TK[:, column].mul_(math.sqrt(1 - rho * rho)).add_(x_TK[:, column - 1], alpha=rho)
    elif kind.startswith("power law"):
        rotation = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(77)))[0]
        x_TK = (x_TK * torch.arange(1, size + 1).float().rsqrt()) @ rotation.t()
        if kind == "power law with outliers":
            x_TK[:, ::128] *= 20.0
    else:
        assert kind == "white"
    return x_TK
