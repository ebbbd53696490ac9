"""`verify integrity` finds whatever has changed since a result was written, and only that."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import dsv3_tools
from dsv3_tools.checkpoint.manifest import encode_manifest
from dsv3_tools.conversion.progress import Progress, Stop
from dsv3_tools.errors import CheckpointError, Interrupted

SHARD = "model-00002-of-000004.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "dsv3_manifest.json"


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def problems(checkpoint: Path) -> tuple[str, ...]:
    return dsv3_tools.verify_integrity(checkpoint).problems


def test_negative_control_nothing_has_changed(bf16_checkpoint: Path) -> None:
    seen: list[Progress] = []
    report = dsv3_tools.verify_integrity(bf16_checkpoint, on_progress=seen.append)
    assert report.passed
    assert (report.problems, report.hashes_from) == ((), "manifest")
    others = [path for path in bf16_checkpoint.iterdir() if path.name not in (MANIFEST, "README.md")]
    assert (report.files_hashed, report.nbytes_hashed) == (
        len(others),
        sum(path.stat().st_size for path in others),
    )
    assert seen[-1].nbytes_done == seen[-1].nbytes_total == report.nbytes_hashed
    assert seen[-1].shards_done == len(others)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_the_number_of_workers_changes_nothing(bf16_checkpoint: Path, workers: int) -> None:
    assert dsv3_tools.verify_integrity(bf16_checkpoint, workers=workers) == dsv3_tools.verify_integrity(
        bf16_checkpoint
    )


def test_every_flipped_bit_is_found(bf16_checkpoint: Path, copied: Callable[[Path], Path]) -> None:
    """Anywhere in any file, the manifest included, but the card, which is the user's."""
    checkpoint = copied(bf16_checkpoint)
    (checkpoint / "README.md").unlink()
    chance = random.Random(20250101)
    files = sorted(path for path in checkpoint.iterdir() if path.stat().st_size)
    for number in range(60):
        path = files[number % len(files)]
        before = path.read_bytes()
        flip(path, chance.randrange(len(before)), chance.randrange(8))
        found = problems(checkpoint)
        assert found, path
        assert any(path.name in problem for problem in found), (path, found)
        path.write_bytes(before)
    assert problems(checkpoint) == ()


def remove_shard(checkpoint: Path) -> None:
    (checkpoint / SHARD).unlink()


def shorten(checkpoint: Path) -> None:
    (checkpoint / SHARD).write_bytes((checkpoint / SHARD).read_bytes()[:-1])


def add_shard(checkpoint: Path) -> None:
    shutil.copy(checkpoint / SHARD, checkpoint / "extra.safetensors")


def change_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{ }\n")


def remove_index(checkpoint: Path) -> None:
    (checkpoint / INDEX).unlink()


def swap_shards(checkpoint: Path) -> None:
    other = checkpoint / SHARD.replace("2", "3", 1)
    (checkpoint / SHARD).rename(checkpoint / "x")
    other.rename(checkpoint / SHARD)
    (checkpoint / "x").rename(other)


def link_out(checkpoint: Path) -> None:
    outside = checkpoint.with_name("outside.safetensors")
    (checkpoint / SHARD).rename(outside)
    (checkpoint / SHARD).symlink_to(outside)


def interrupted(checkpoint: Path) -> None:
    (checkpoint / ".dsv3").mkdir()


def manifest_of_something_else(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_bytes(encode_manifest({"files": {"a": 3}}))


def manifest_that_leads_out(checkpoint: Path) -> None:
    entry = {"nbytes": 3, "sha256": "0" * 64}
    (checkpoint.parent / "secret").write_text("abc")
    (checkpoint / MANIFEST).write_bytes(encode_manifest({"files": {"../secret": entry}}))


def manifest_garbage(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_bytes(b"\xff\x00")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard is missing": (remove_shard, f"{SHARD}: cannot be opened: No such file"),
    "a shard is shorter": (shorten, f"{SHARD}: has "),
    "an unlisted shard": (add_shard, "extra.safetensors: is not in the manifest"),
    "another tokenizer": (change_tokenizer, "tokenizer.json: has 4 bytes, expected 3"),
    "no index": (remove_index, f"{INDEX}: cannot be opened"),
    "shards swapped": (swap_shards, f"{SHARD}: "),
    "a link out": (link_out, "outside the checkpoint"),
    "an interrupted conversion": (interrupted, "a conversion into it has not finished"),
    "a manifest of something else": (manifest_of_something_else, "not a manifest of dsv3-tools"),
    "a manifest that leads out": (manifest_that_leads_out, "secret"),
    "a garbage manifest": (manifest_garbage, f"{MANIFEST}: not valid JSON"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes(
    dsv3_report: Callable[[Path], tuple[str, ...]], bf16_checkpoint: Path, copied, name: str
) -> None:
    checkpoint = copied(bf16_checkpoint)
    change, expected = CHANGES[name]
    change(checkpoint)
    found = dsv3_report(checkpoint)
    assert any(expected in problem for problem in found), found
    assert all("\n" not in problem for problem in found)


@pytest.fixture
def dsv3_report() -> Callable[[Path], tuple[str, ...]]:
    def report(checkpoint: Path) -> tuple[str, ...]:
        found = dsv3_tools.verify_integrity(checkpoint)
        assert not found.passed
        assert found.hashes_from == "manifest"
        return found.problems

    return report


def test_one_change_is_one_problem(bf16_checkpoint: Path, copied) -> None:
    checkpoint = copied(bf16_checkpoint)
    flip(checkpoint / SHARD, -1)
    digest = hashlib.sha256((checkpoint / SHARD).read_bytes()).hexdigest()
    expected = json.loads((checkpoint / MANIFEST).read_text())["files"][SHARD]["sha256"]
    assert problems(checkpoint) == (
        f"{SHARD}: its SHA-256 is {digest}, expected {expected}; its content has changed",
    )


def test_without_a_manifest_only_the_structure_is_checked(fp8_checkpoint: Path, copied) -> None:
    checkpoint = copied(fp8_checkpoint)
    report = dsv3_tools.verify_integrity(checkpoint)
    assert (report.passed, report.hashes_from, report.files_hashed) == (True, None, 0)
    flip(checkpoint / SHARD, -1)  # a weight: nothing can be said of it
    assert dsv3_tools.verify_integrity(checkpoint).passed
    flip(checkpoint / SHARD, 0)  # the header
    assert not dsv3_tools.verify_integrity(checkpoint).passed


@pytest.fixture
def hub_snapshot(fp8_checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint as huggingface_hub keeps it: links into a folder of blobs named by their hashes."""
    root = tmp_path / "models--deepseek-ai--DeepSeek-V3"
    snapshot = root / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for path in fp8_checkpoint.iterdir():
        data = path.read_bytes()
        is_large = path.suffix == ".safetensors"  # small files are named by their git hash, SHA-1
        name = (hashlib.sha256 if is_large else hashlib.sha1)(data).hexdigest()
        (root / "blobs" / name).write_bytes(data)
        (snapshot / path.name).symlink_to(f"../../blobs/{name}")
    return snapshot


def test_hub_cache(hub_snapshot: Path) -> None:
    report = dsv3_tools.verify_integrity(hub_snapshot)
    assert (report.passed, report.hashes_from, report.files_hashed) == (True, "hub cache", 4)
    assert dsv3_tools.inspect(hub_snapshot).num_shards == 4


def test_hub_cache_with_a_damaged_blob(hub_snapshot: Path) -> None:
    flip((hub_snapshot / SHARD).resolve(), -1)
    (problem,) = problems(hub_snapshot)
    assert problem.startswith(f"{SHARD}: its SHA-256 is ")


def test_hub_cache_with_a_short_blob(hub_snapshot: Path) -> None:
    blob = (hub_snapshot / SHARD).resolve()
    blob.write_bytes(blob.read_bytes()[:-5])
    found = problems(hub_snapshot)
    assert any("SHA-256" in problem for problem in found)
    assert any("truncated" in problem for problem in found)


def test_hub_cache_with_a_missing_blob(hub_snapshot: Path) -> None:
    (hub_snapshot / SHARD).resolve().unlink()
    assert any(SHARD in problem for problem in problems(hub_snapshot))


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory"):
        dsv3_tools.verify_integrity(tmp_path / "nothing")


def test_an_empty_directory_is_no_checkpoint(tmp_path: Path) -> None:
    assert not dsv3_tools.verify_integrity(tmp_path).passed


def test_it_can_be_stopped(bf16_checkpoint: Path) -> None:
    stop = Stop()
    stop.set(15)
    with pytest.raises(Interrupted) as caught:
        dsv3_tools.verify_integrity(bf16_checkpoint, stop=stop)
    assert caught.value.exit_code == 143
