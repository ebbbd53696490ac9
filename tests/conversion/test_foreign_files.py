"""Nothing that is not the program's own is removed or written to."""

from __future__ import annotations

import pytest
from filelock import FileLock

import dsv3_tools
from dsv3_tools.conversion import start
from dsv3_tools.errors import DestinationError


def test_a_working_folder_that_is_a_link_is_refused(fp8_checkpoint, tmp_path):
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.mkdir()
    out.mkdir()
    (victim / "thesis.tex").write_text("mine")
    (victim / "plan.json").write_text("mine too")
    (out / ".dsv3").symlink_to(victim)
    for overwrite in (False, True):
        with pytest.raises(DestinationError, match="is not a folder of its own"):
            dsv3_tools.convert_fp8_to_bf16(fp8_checkpoint, out, overwrite=overwrite, device="cpu")
    assert {path.name for path in victim.iterdir()} == {"thesis.tex", "plan.json"}
    assert {path.name for path in out.iterdir()} == {".dsv3"}


def test_foreign_files_in_the_working_folder_stay(fp8_checkpoint, tmp_path):
    out = tmp_path / "out"
    (out / ".dsv3").mkdir(parents=True)
    (out / ".dsv3" / "notes.txt").write_text("mine")
    dsv3_tools.convert_fp8_to_bf16(fp8_checkpoint, out, device="cpu")
    assert [path.name for path in (out / ".dsv3").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["my_lora.safetensors", "adapter_model.safetensors"])
def test_overwrite_refuses_weights_that_are_not_the_checkpoints(fp8_checkpoint, tmp_path, name):
    out = tmp_path / "out"
    dsv3_tools.convert_fp8_to_bf16(fp8_checkpoint, out, device="cpu")
    (out / name).write_bytes(b"mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(DestinationError, match=f"{name}: is no part of the checkpoint"):
        dsv3_tools.convert_fp8_to_bf16(
            fp8_checkpoint, out, max_shard_size=100_000, overwrite=True, device="cpu"
        )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / name).unlink()
    result = dsv3_tools.convert_fp8_to_bf16(
        fp8_checkpoint, out, max_shard_size=100_000, overwrite=True, device="cpu"
    )
    assert result.shards_written == len(list(out.glob("*.safetensors")))


def test_a_manifest_with_paths_in_it_removes_nothing_outside(fp8_checkpoint, tmp_path):
    from dsv3_tools.checkpoint.manifest import encode_manifest

    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "victim.txt").write_text("mine")
    (out / "dsv3_manifest.json").write_bytes(encode_manifest({"files": {"../victim.txt": {}}}))
    dsv3_tools.convert_fp8_to_bf16(fp8_checkpoint, out, overwrite=True, device="cpu")
    assert (tmp_path / "victim.txt").read_text() == "mine"


def test_a_run_that_begins_during_the_checks_keeps_the_second_out(fp8_checkpoint, tmp_path, monkeypatch):
    """The working folder appears between the first look and the lock: the lock must be taken all the same."""
    out = tmp_path / "out"
    other = FileLock(out / ".dsv3" / "lock")

    def begin_elsewhere(*_args, **_options):
        (out / ".dsv3").mkdir(parents=True)
        other.acquire()

    monkeypatch.setattr(start, "check_scales", begin_elsewhere)
    try:
        with pytest.raises(DestinationError, match="is writing to it"):
            dsv3_tools.convert_fp8_to_bf16(fp8_checkpoint, out, device="cpu")
    finally:
        other.release()
    assert not list(out.glob("*.safetensors"))
