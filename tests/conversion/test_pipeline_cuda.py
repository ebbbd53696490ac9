"""The GPU worker's batching, buffers and threads, on a machine without a GPU.

torch.cuda is replaced by what does nothing and "device" memory lies on the host, so that the CPU kernels do
the arithmetic. What a real GPU adds (streams, pinned memory, the kernels) is tested in `tests/gpu/`.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import dsv3_tools
from dsv3_tools.conversion import executor, pipeline_cuda
from dsv3_tools.errors import CheckpointError, DestinationError


class Idle:
    """A stream or an event that has nothing to wait for."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    real_empty = torch.empty

    def empty(*args, pin_memory=False, device=None, **kwargs):
        assert device in (None, "cuda:0", torch.device("cpu"))
        return real_empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Idle)
    monkeypatch.setattr(torch.cuda, "Event", Idle)
    monkeypatch.setattr(executor, "resolve_devices", lambda device, _: [device])


pytestmark = pytest.mark.usefixtures("no_gpu_needed")


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def both(convert, source: Path, folder: Path, **options) -> None:
    """Converts on the CPU and on the pretended GPU and compares all files."""
    convert(source, folder / "cpu", device="cpu", **options)
    result = convert(source, folder / "cuda", device="cuda:0", **options)
    assert result.devices == ("cuda:0",)
    assert contents(folder / "cpu") == contents(folder / "cuda")


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch_nbytes", [96 << 20, 1 << 20, 300_000])
def test_same_bytes_as_the_cpu(fp8_checkpoint, bf16_checkpoint, tmp_path, monkeypatch, workers, batch_nbytes):
    monkeypatch.setattr(pipeline_cuda, "BATCH_NBYTES", (batch_nbytes,))
    both(dsv3_tools.convert_fp8_to_bf16, fp8_checkpoint, tmp_path / "bf16", workers=workers)
    both(dsv3_tools.convert_bf16_to_fp8, bf16_checkpoint, tmp_path / "fresh", workers=workers)
    both(
        dsv3_tools.convert_bf16_to_fp8,
        bf16_checkpoint,
        tmp_path / "like",
        like=fp8_checkpoint,
        workers=workers,
    )


def test_the_gpu_worker_was_used(fp8_checkpoint, tmp_path, monkeypatch):
    """The control of the test above: without the GPU worker's own step there is no result."""

    def broken(*_args):
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline_cuda, "recode_into", broken)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        dsv3_tools.convert_fp8_to_bf16(fp8_checkpoint, tmp_path / "out", device="cuda:0")


def test_falls_back_when_memory_runs_out(fp8_checkpoint, tmp_path, monkeypatch):
    tried = []

    class Slot(pipeline_cuda._Slot):
        def __init__(self, nbytes, device):
            tried.append(nbytes)
            if nbytes == 1 << 30:  # what torch raises when pinned memory is refused
                raise RuntimeError("CUDA error: out of memory")
            super().__init__(nbytes, device)

    monkeypatch.setattr(pipeline_cuda, "_Slot", Slot)
    monkeypatch.setattr(pipeline_cuda, "BATCH_NBYTES", (1 << 30, 1 << 12))  # a stripe does not fit the second
    both(dsv3_tools.convert_fp8_to_bf16, fp8_checkpoint, tmp_path, workers=1)
    assert tried == [1 << 30, 1 << 12, 1 << 12]


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_code_is_named_or_counted(fp8_checkpoint, copied, tmp_path, code):
    source = copied(fp8_checkpoint)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    with dsv3_tools.Checkpoint(source) as checkpoint:
        shard, offset = checkpoint.location(name)
        columns = checkpoint.specs[name].shape[1]
    with (source / shard).open("r+b") as file:
        file.seek(offset + 130 * columns + 7)
        file.write(bytes([code]))
    with pytest.raises(CheckpointError, match=rf"{name}: the element at \[130, 7\]"):
        dsv3_tools.convert_fp8_to_bf16(source, tmp_path / "refused", device="cuda:0")
    both(dsv3_tools.convert_fp8_to_bf16, source, tmp_path, nonfinite="keep")


def test_a_full_disk_stops_both_threads(fp8_checkpoint, tmp_path, monkeypatch):
    import os

    real = os.pwrite

    def full(descriptor, data, offset):
        if offset:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DestinationError, match="No space left"):
        dsv3_tools.convert_fp8_to_bf16(fp8_checkpoint, tmp_path / "out", device="cuda:0", workers=2)
    monkeypatch.setattr(os, "pwrite", real)
    both(dsv3_tools.convert_fp8_to_bf16, fp8_checkpoint, tmp_path / "again")
    result = dsv3_tools.convert_fp8_to_bf16(fp8_checkpoint, tmp_path / "out", device="cuda:0")
    assert result.shards_written
    assert contents(tmp_path / "out") == contents(tmp_path / "again" / "cpu")
