"""`quantize` and the way back on a GPU give the bytes that the CPU gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dsv3_tools
from dsv3_tools.conversion import pipeline_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "vocab_size": 1000,
    "num_attention_heads": 4,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "first_k_dense_replace": 1,
}

COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8 channel": ("quantize_int8", {}),
    "int8 block": ("quantize_int8", {"scheme": "block"}),
    "int4": ("quantize_int4", {}),
    "int4 absmax g32": ("quantize_int4", {"scale_search": "absmax", "group_size": 32}),
    "int4 asymmetric g64": ("quantize_int4", {"symmetric": False, "group_size": 64}),
    "int4 gptq, everything": ("quantize_int4", {"layout": "gptq", "include": ("*_proj*",)}),
    "int4 awq asymmetric": ("quantize_int4", {"layout": "awq", "symmetric": False}),
    "int4 beside fp8": ("quantize_int4", {"rest": "fp8"}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "fp8"
    dsv3_tools.sample(path, layers=3, experts=16, shards=4, overrides=SMALL)
    return path


@pytest.fixture(scope="module")
def bf16(source: Path) -> Path:
    dsv3_tools.convert_fp8_to_bf16(source, source.with_name("bf16"), device="cpu")
    return source.with_name("bf16")


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def on_both(function: str, source: Path, place: Path, **options: Any) -> Path:
    """Runs a command on CPU and GPU, compares every file, returns the result."""
    run = getattr(dsv3_tools, function)
    for device in ("cpu", "cuda"):
        run(source, place / device, device=device, workers=2, **options)
    assert contents(place / "cpu") == contents(place / "cuda")
    return place / "cuda"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("batch_nbytes", [64 << 20, 3 << 20])
def test_same_bytes_as_the_cpu(
    source: Path, bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, batch_nbytes: int
) -> None:
    """From FP8 and from BF16, and decoded again, in large batches and in small ones."""
    monkeypatch.setattr(pipeline_cuda, "BATCH_NBYTES", (batch_nbytes,))
    function, options = COMMANDS[name]
    back = "convert_int4_to_bf16" if function == "quantize_int4" else "convert_int8_to_bf16"
    for kind, directory in (("fp8", source), ("bf16", bf16)):
        made = on_both(function, directory, tmp_path / kind, **options)
        on_both(back, made, tmp_path / f"{kind} back")


def test_whole_weights_larger_than_a_batch_stay_on_the_gpu(
    bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPTQ's weights are coded whole: the batch grows, the worker does not fall back to the CPU."""
    made: list[int] = []

    class Slot(pipeline_cuda._Slot):
        def __init__(self, nbytes: int, device: str) -> None:
            made.append(nbytes)
            super().__init__(nbytes, device)

    monkeypatch.setattr(pipeline_cuda, "_Slot", Slot)
    monkeypatch.setattr(pipeline_cuda, "BATCH_NBYTES", (1 << 20,))
    dsv3_tools.quantize_int4(
        bf16, tmp_path / "gpu", layout="gptq", include=("*_proj*",), device="cuda", workers=1
    )
    assert len(made) == 2
    assert min(made) > 1024 * 512 * 2  # the largest weight, in BF16
    dsv3_tools.quantize_int4(bf16, tmp_path / "cpu", layout="gptq", include=("*_proj*",), device="cpu")
    assert contents(tmp_path / "cpu") == contents(tmp_path / "gpu")
