"""Whole conversions on a GPU give the bytes that the CPU gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dsv3_tools
from dsv3_tools.conversion import pipeline_cuda
from dsv3_tools.errors import CheckpointError

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


@pytest.fixture(scope="module", params=["fp8", "fp8-ue8m0"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / request.param
    dsv3_tools.sample(path, weights=request.param, layers=4, experts=16, shards=5, overrides=SMALL)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch_nbytes", [64 << 20, 1 << 20])
def test_same_bytes_as_the_cpu(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, batch_nbytes: int
) -> None:
    monkeypatch.setattr(pipeline_cuda, "BATCH_NBYTES", (batch_nbytes,))
    dsv3_tools.convert_fp8_to_bf16(source, tmp_path / "cpu", device="cpu")
    dsv3_tools.convert_fp8_to_bf16(source, tmp_path / "gpu", device="cuda", workers=workers)
    assert contents(tmp_path / "cpu") == contents(tmp_path / "gpu")
    for name, options in {"like": {"like": source}, "fresh": {}, "ue8m0": {"scale_fmt": "ue8m0"}}.items():
        for device in ("cpu", "cuda"):
            place = tmp_path / f"{name}-{device}"
            dsv3_tools.convert_bf16_to_fp8(tmp_path / "cpu", place, device=device, workers=workers, **options)
        assert contents(tmp_path / f"{name}-cpu") == contents(tmp_path / f"{name}-cuda")
    with dsv3_tools.Checkpoint(source) as before, dsv3_tools.Checkpoint(tmp_path / "like-cuda") as after:
        assert before.specs == after.specs
        assert all(before.read_bytes(name) == after.read_bytes(name) for name in before.specs)


def test_out_of_memory_falls_back_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    class Slot(pipeline_cuda._Slot):
        def __init__(self, nbytes: int, device: str) -> None:
            tried.append(nbytes)
            if nbytes == 1 << 30:  # what torch raises when pinned memory is refused
                raise RuntimeError("CUDA error: out of memory")
            super().__init__(nbytes, device)

    monkeypatch.setattr(pipeline_cuda, "_Slot", Slot)
    monkeypatch.setattr(
        pipeline_cuda, "BATCH_NBYTES", (1 << 30, 1 << 16)
    )  # a stripe does not fit into the second
    dsv3_tools.convert_fp8_to_bf16(source, tmp_path / "gpu", device="cuda", workers=1)
    dsv3_tools.convert_fp8_to_bf16(source, tmp_path / "cpu", device="cpu")
    assert tried == [1 << 30, 1 << 16, 1 << 16]
    assert contents(tmp_path / "cpu") == contents(tmp_path / "gpu")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_code_is_named(source: Path, tmp_path: Path, code: int) -> None:
    import shutil

    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    with dsv3_tools.Checkpoint(copy) as checkpoint:
        shard, offset = checkpoint.location(name)
        columns = checkpoint.specs[name].shape[1]
    with (copy / shard).open("r+b") as file:
        file.seek(offset + 130 * columns + 7)
        file.write(bytes([code]))
    with pytest.raises(CheckpointError, match=rf"{name}: the element at \[130, 7\]"):
        dsv3_tools.convert_fp8_to_bf16(copy, tmp_path / "refused", device="cuda")
    kept = {}
    for device in ("cpu", "cuda"):
        result = dsv3_tools.convert_fp8_to_bf16(copy, tmp_path / device, device=device, nonfinite="keep")
        kept[device] = result.nonfinite
    assert kept["cpu"] == kept["cuda"] == {name: 1}
    assert contents(tmp_path / "cpu") == contents(tmp_path / "cuda")
