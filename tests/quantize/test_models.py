"""Models that have less, or more, than DeepSeek-V3: each is calibrated in all layers that have work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dsv3_tools
from dsv3_tools.checkpoint.manifest import QUANTIZATION_NAME
from tests.quantize.conftest import TINY

MODELS: dict[str, tuple[dict[str, Any], set[int]]] = {
    "two MTP layers": ({"num_nextn_predict_layers": 2}, {1, 2, 3, 4, 5}),
    "no MTP layer": ({"num_nextn_predict_layers": 0}, {1, 2, 3}),
    "no low-rank query": ({"q_lora_rank": None}, {1, 2, 3, 4}),
    "no shared experts": ({"n_shared_experts": 0}, {1, 2, 3, 4}),
    "one group": ({"n_group": 1, "topk_group": 1}, {1, 2, 3, 4}),
    "no dense layer": ({"first_k_dense_replace": 0}, {0, 1, 2, 3, 4}),
    "an expert that nobody asks": ({"n_routed_experts": 64, "n_group": 1}, {1, 2, 3, 4}),
}


@pytest.mark.parametrize("name", MODELS)
def test_int4(name: str, tokens: Path, tmp_path: Path) -> None:
    changes, layers = MODELS[name]
    dsv3_tools.sample(tmp_path / "source", overrides={**TINY, **changes}, shards=2, seed=7)
    dsv3_tools.quantize_int4(
        tmp_path / "source",
        tmp_path / "out",
        method="gptq",
        calibration=tokens,
        device="cpu",
        group_size=32,
        max_tokens=240,
    )
    report = json.loads((tmp_path / "out" / QUANTIZATION_NAME).read_bytes())
    assert {line["layer"] for line in report["summary"]} == layers
    assert all(line["without_factor"] == 0 for line in report["summary"])
    assert dsv3_tools.verify_structure(tmp_path / "out").passed
    assert dsv3_tools.verify_tensors(tmp_path / "source", tmp_path / "out", min_snr=5.0).passed


def test_int8_of_dense_layers_alone(tokens: Path, tmp_path: Path) -> None:
    changes = {"first_k_dense_replace": 4, "num_nextn_predict_layers": 0, "q_lora_rank": None}
    dsv3_tools.sample(tmp_path / "source", overrides={**TINY, **changes}, shards=2, seed=7)
    dsv3_tools.quantize_int8(
        tmp_path / "source", tmp_path / "out", method="gptq", calibration=tokens, device="cpu"
    )
    report = json.loads((tmp_path / "out" / QUANTIZATION_NAME).read_bytes())
    kinds = {line["kind"] for line in report["summary"]}
    assert kinds == {
        "self_attn.q_proj",
        "self_attn.kv_a_proj_with_mqa",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    }
    assert dsv3_tools.verify_tensors(tmp_path / "source", tmp_path / "out").passed
