"""transformers with compressed-tensors loads our INT4 results: its logits are those of our own decoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv3_tools

OPTIONS: dict[str, dict[str, Any]] = {
    "g128": {},
    "g32, absmax": {"group_size": 32, "scale_search": "absmax"},
    "MTP kept, shared experts too": {"mtp": "keep", "include": ("*.shared_experts.*",)},
}

REFUSED: dict[str, dict[str, Any]] = {
    "zero points": {"symmetric": False},  # those of experts do not reach compressed-tensors
    "one layer's experts unpacked": {"exclude": ("model.layers.2.mlp.experts.*",)},
}


def load_model(directory: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import DeepseekV3ForCausalLM

    model, info = DeepseekV3ForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.bfloat16, experts_implementation="eager"
    )
    return model.eval(), info


@torch.no_grad()
def logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    model, info = load_model(directory)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all("layers.5." in key for key in info["unexpected_keys"]), "more than the MTP module"
    found: torch.Tensor = model(tokens).logits
    return found


@pytest.fixture(scope="module")
def tokens(miniature: Path) -> torch.Tensor:
    return load_file(miniature.with_name("heldout_tokens.safetensors"))["tokens"][:4, :128].long()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_are_those_of_our_own_decoding(
    miniature: Path, tokens: torch.Tensor, tmp_path: Path, options: dict[str, Any]
) -> None:
    dsv3_tools.quantize_int4(miniature, tmp_path / "int4", device="cpu", **options)
    dsv3_tools.convert_int4_to_bf16(tmp_path / "int4", tmp_path / "bf16", device="cpu")
    found, expected = logits(tmp_path / "int4", tokens), logits(tmp_path / "bf16", tokens)
    assert found.isfinite().all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_what_transformers_refuses_is_said(
    miniature: Path, tokens: torch.Tensor, tmp_path: Path, options: dict[str, Any]
) -> None:
    dsv3_tools.quantize_int4(miniature, tmp_path / "int4", device="cpu", **options)
    assert not dsv3_tools.check(tmp_path / "int4", engine="transformers").passed
    with pytest.raises(RuntimeError, match="automatic conversion"):
        logits(tmp_path / "int4", tokens)


def test_control_one_code_changes_the_logits(miniature: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    """The comparison above sees a single scale of a single expert that is doubled."""
    dsv3_tools.quantize_int4(miniature, tmp_path / "int4", device="cpu")
    dsv3_tools.convert_int4_to_bf16(tmp_path / "int4", tmp_path / "bf16", device="cpu")
    wrong = Path(shutil.copytree(tmp_path / "int4", tmp_path / "wrong"))
    name = "model.layers.1.mlp.experts.3.down_proj.weight_scale"
    shard = json.loads((wrong / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(wrong / shard)
    tensors[name] *= 2
    save_file(tensors, wrong / shard, metadata={"format": "pt"})
    assert not torch.equal(logits(wrong, tokens), logits(tmp_path / "bf16", tokens))
