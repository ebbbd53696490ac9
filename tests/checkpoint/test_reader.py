"""Opening and reading a checkpoint: the same bytes as safetensors reads, from every honest layout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dsv3_tools.checkpoint.dtypes import DTYPES, torch_dtype
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.errors import CheckpointError
from tests.checkpoint.corruptions import CONFIG, INDEX, SHARDS, make_tensors


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def assert_reads_like_safetensors(path: Path) -> None:
    """Compares every tensor with what safetensors itself reads from the same directory."""
    seen = set()
    with Checkpoint(path) as checkpoint:
        for shard in sorted(path.glob("*.safetensors")):
            with safe_open(shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    expected = file.get_tensor(name)
                    tensor = checkpoint.read(name)
                    assert tensor.dtype == expected.dtype
                    assert tensor.shape == expected.shape
                    assert bits(tensor) == bits(expected) == bytes(checkpoint.read_bytes(name))
                    assert checkpoint.weight_map[name] == shard.name
                    seen.add(name)
        assert seen == set(checkpoint.specs) == set(checkpoint.weight_map)
        assert checkpoint.nbytes == sum(spec.nbytes for spec in checkpoint.specs.values())


def one_file(checkpoint: Path) -> None:
    tensors = make_tensors()
    for name in [INDEX, *SHARDS]:
        (checkpoint / name).unlink()
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def make_snapshot(checkpoint: Path, root: Path) -> Path:
    """Lays a checkpoint out as the Hugging Face cache does: links into `../../blobs`."""
    blobs, snapshot = root / "models--a--b" / "blobs", root / "models--a--b" / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        blob = f"{number:064x}"
        shutil.copy(file, blobs / blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob)
    return snapshot


def test_sharded_with_an_index(pristine: Path) -> None:
    assert_reads_like_safetensors(pristine)
    with Checkpoint(pristine) as checkpoint:
        assert checkpoint.has_index
        assert list(checkpoint.shards) == SHARDS


def test_control_one_changed_byte_is_read(checkpoint: Path) -> None:
    with Checkpoint(checkpoint) as opened:
        before = opened.read("lm_head.weight")
        shard, offset = opened.location("lm_head.weight")
    data = bytearray((checkpoint / shard).read_bytes())
    data[offset + 5] ^= 1
    (checkpoint / shard).write_bytes(data)
    with Checkpoint(checkpoint) as opened:
        assert bits(opened.read("lm_head.weight")) != bits(before)
        assert (opened.read("lm_head.weight") != before).sum() == 1


def test_one_file_without_an_index(checkpoint: Path) -> None:
    one_file(checkpoint)
    assert_reads_like_safetensors(checkpoint)
    with Checkpoint(checkpoint) as opened:
        assert not opened.has_index


def test_one_file_with_a_broken_link_as_index_is_refused(checkpoint: Path) -> None:
    one_file(checkpoint)
    (checkpoint / INDEX).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=INDEX):
        Checkpoint(checkpoint)


def test_by_way_of_a_linked_directory_and_a_relative_path(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(pristine)
    assert_reads_like_safetensors(tmp_path / "link")
    monkeypatch.chdir(pristine)
    assert_reads_like_safetensors(Path())
    assert_reads_like_safetensors(Path("..") / pristine.name)


def test_links_inside_the_directory(checkpoint: Path) -> None:
    (checkpoint / "weights").mkdir()
    shutil.move(checkpoint / SHARDS[0], checkpoint / "weights" / "first")
    (checkpoint / SHARDS[0]).symlink_to(Path("weights") / "first")
    assert_reads_like_safetensors(checkpoint)


def test_a_snapshot_of_the_hugging_face_cache(pristine: Path, tmp_path: Path) -> None:
    snapshot = make_snapshot(pristine, tmp_path)
    assert_reads_like_safetensors(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    assert_reads_like_safetensors(tmp_path / "link")


@pytest.mark.parametrize("target", ["../../../outside", "../../blobs/deeper/x", "../../refs"])
def test_control_a_snapshot_may_link_to_its_blobs_only(pristine: Path, tmp_path: Path, target: str) -> None:
    snapshot = make_snapshot(pristine, tmp_path)
    link = snapshot / SHARDS[0]
    (snapshot / target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(link, snapshot / target)
    link.unlink()
    link.symlink_to(target)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        Checkpoint(snapshot)


def test_every_dtype_and_shape(checkpoint: Path) -> None:
    tensors = make_tensors()
    for name, dtype in DTYPES.items():
        if dtype.torch_name is not None:
            for shape in [(), (0,), (3, 0, 2), (2, 3)]:
                nbytes = torch.Size(shape).numel() * dtype.bits // 8
                data = torch.arange(nbytes, dtype=torch.uint8) % 2
                tensors[f"extra.{name}.{len(shape)}"] = data.view(torch_dtype(name)).reshape(shape)
    for name in [INDEX, *SHARDS]:
        (checkpoint / name).unlink()
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert_reads_like_safetensors(checkpoint)


def test_read_into_at_offsets(pristine: Path) -> None:
    with Checkpoint(pristine) as checkpoint:
        name = "model.layers.1.mlp.experts.3.down_proj.weight"
        whole = bytes(checkpoint.read_bytes(name))
        assert len(whole) == 192 * 136
        for start, count in [
            (0, 1),
            (0, len(whole)),
            (1, 7),
            (4095, 4098),
            (len(whole) - 1, 1),
            (len(whole), 0),
            (5, 0),
        ]:
            buffer = bytearray(b"\xee" * (count + 8))
            checkpoint.will_need(name, start, count)
            checkpoint.read_into(name, start, memoryview(buffer)[4 : 4 + count])
            assert buffer == b"\xee" * 4 + whole[start : start + count] + b"\xee" * 4


def test_short_reads_are_continued(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    with Checkpoint(pristine) as checkpoint:
        expected = checkpoint.read_bytes("lm_head.weight")
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:1000]], offset))
        assert checkpoint.read_bytes("lm_head.weight") == expected


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("close_first", [False, True])
@pytest.mark.parametrize(
    "damage", [cut, lambda path: os.truncate(path, 0)], ids=["by one byte", "to nothing"]
)
def test_truncation_after_opening(
    checkpoint: Path, damage: Callable[[Path], None], close_first: bool
) -> None:
    with Checkpoint(checkpoint) as opened:
        shard = opened.shards[SHARDS[1]]
        last = max(shard.header.specs, key=lambda name: shard.header.offsets[name])
        opened.read(last)
        if close_first:
            opened.close()
        damage(checkpoint / SHARDS[1])
        with pytest.raises(
            CheckpointError, match=r"the file ended at byte [\d,]+; it was shortened"
        ) as caught:
            opened.read(last)
        assert last in str(caught.value)
        assert SHARDS[1] in str(caught.value)


def test_a_shard_removed_after_opening(checkpoint: Path) -> None:
    with Checkpoint(checkpoint) as opened:
        name = next(n for n, shard in opened.weight_map.items() if shard == SHARDS[2])
        (checkpoint / SHARDS[2]).unlink()
        for read in (lambda: opened.read(name), lambda: opened.will_need(name, 0, 1)):
            with pytest.raises(CheckpointError, match=f"{SHARDS[2]}: No such file"):
                read()


def test_a_disk_that_fails_to_read(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    with Checkpoint(pristine) as checkpoint:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(CheckpointError, match=r"lm_head\.weight: Input/output error"):
            checkpoint.read("lm_head.weight")


def test_reading_leaves_no_descriptor_open(pristine: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Checkpoint(pristine) as checkpoint:
        for name in checkpoint.specs:
            checkpoint.read_bytes(name)
        assert len(set(os.listdir("/proc/self/fd")) - before) == len(SHARDS)
        checkpoint.close()
        checkpoint.read("lm_head.weight")
    assert set(os.listdir("/proc/self/fd")) == before


def test_opening_reads_no_tensor_and_writes_nothing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in checkpoint.iterdir()}
    monkeypatch.setattr(os, "preadv", None)
    with Checkpoint(checkpoint) as opened:
        assert opened.config.num_hidden_layers == 2
    assert {
        file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in checkpoint.iterdir()
    } == before


@pytest.mark.parametrize(
    "path", ["a" * 300, "a/" * 3000, "a\0b", "/dev/null", ""], ids=lambda path: ascii(path)[:9]
)
def test_paths_that_are_no_directory(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(path)
    assert len(str(caught.value)) < 500


def test_all_bad_shards_are_named_in_one_message(checkpoint: Path) -> None:
    for shard in SHARDS[:2]:
        cut(checkpoint / shard)
    (checkpoint / SHARDS[2]).unlink()
    with pytest.raises(CheckpointError, match=r"^3 problems: ") as caught:
        Checkpoint(checkpoint)
    assert all(shard in str(caught.value) for shard in SHARDS)


def test_fingerprint_of_a_header_changes_with_it(checkpoint: Path) -> None:
    with Checkpoint(checkpoint) as opened:
        before = {shard.name: shard.header_sha256 for shard in opened.shards.values()}
    assert len(set(before.values())) == 3
    data = (checkpoint / SHARDS[0]).read_bytes()
    (checkpoint / SHARDS[0]).write_bytes(data.replace(b'"format":"pt"', b'"format":"px"'))
    with Checkpoint(checkpoint) as opened:
        after = {shard.name: shard.header_sha256 for shard in opened.shards.values()}
    assert [name for name in SHARDS if before[name] != after[name]] == [SHARDS[0]]


def test_a_hundred_and_sixty_three_shards_open_soon(checkpoint: Path) -> None:
    """The same number of shards and tensors as the release, each tensor of no size."""
    import json
    import time

    for name in [INDEX, *SHARDS]:
        (checkpoint / name).unlink()
    weight_map = {}
    for number in range(163):
        shard = f"model-{number + 1:05d}-of-000163.safetensors"
        names = [f"model.layers.{number}.mlp.experts.{n}.down_proj.weight" for n in range(564)]
        entry = {"dtype": "F8_E4M3", "shape": [7168, 0], "data_offsets": [0, 0]}
        text = json.dumps(dict.fromkeys(names, entry)).encode()
        (checkpoint / shard).write_bytes(len(text).to_bytes(8, "little") + text)
        weight_map |= dict.fromkeys(names, shard)
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    start = time.monotonic()
    with Checkpoint(checkpoint) as opened:
        assert len(opened.specs) == 163 * 564
    assert time.monotonic() - start < 10
    assert opened.config_json["model_type"] == "deepseek_v3"
    assert (checkpoint / CONFIG).exists()
