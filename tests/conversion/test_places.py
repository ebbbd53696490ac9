"""Where a run may write: beside its source, into nothing, or over what the user gives up."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.errors import DestinationError, UsageError

FIRST = "model-00001-of-000003.safetensors"


def by_dots(source: Path, tmp: Path) -> Path:
    (tmp / "beside").mkdir()
    return tmp / "beside" / ".." / source.parent.name / source.name


def by_link(source: Path, tmp: Path) -> Path:
    (tmp / "link").symlink_to(source)
    return tmp / "link"


def by_link_to_parent(source: Path, tmp: Path) -> Path:
    (tmp / "link").symlink_to(source.parent)
    return tmp / "link" / source.name


def hard_linked(source: Path, tmp: Path) -> Path:
    (tmp / "out").mkdir()
    os.link(source / FIRST, tmp / "out" / FIRST)
    return tmp / "out"


def linked_shard(source: Path, tmp: Path) -> Path:
    (tmp / "out").mkdir()
    (tmp / "out" / FIRST).symlink_to(source / FIRST)
    return tmp / "out"


PLACES = {
    "the source itself": lambda source, _: source,
    "by ..": by_dots,
    "by a link": by_link,
    "by a link to its parent": by_link_to_parent,
    "inside the source": lambda source, _: source / "bf16",
    "deep inside the source": lambda source, _: source / "a" / "b",
    "the source's parent": lambda source, _: source.parent,
    "with a hard-linked shard": hard_linked,
    "with a linked shard": linked_shard,
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
def test_destination_that_touches_the_source(case, tools, tmp_path, place, overwrite):
    own = case.with_own_source(tmp_path / "own")
    destination = place(own.source, tmp_path)
    before = tools.snapshot(tmp_path)
    with pytest.raises(UsageError, match="same"):
        own.convert(destination, overwrite=overwrite)
    assert tools.snapshot(tmp_path) == before


def test_destination_that_is_like(cases, tools, tmp_path):
    own = cases["bf16-to-fp8-like"].with_own_source(tmp_path / "own")
    before = tools.snapshot(tmp_path)
    with pytest.raises(UsageError, match="same directory"):
        own.convert(own.like, overwrite=True)
    assert tools.snapshot(tmp_path) == before


def test_directory_that_is_not_empty(case, tools, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DestinationError, match=r"is not empty \(notes.txt\); .*--overwrite"):
        case.convert(tmp_path)
    assert tools.snapshot(tmp_path) == {"notes.txt": b"mine"}


def test_empty_directory_and_link_to_one(case, tools, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    case.convert(tmp_path / "link")
    assert not tools.is_same(tools.snapshot(tmp_path / "real"), case.expected)


def test_overwrite_leaves_no_stale_shard(case, tools, tmp_path):
    out = tools.make(tmp_path / "out", shards=7, seed=1)
    with pytest.raises(DestinationError, match="is not empty"):
        case.convert(out)
    case.convert(out, overwrite=True)
    found = tools.snapshot(out)
    assert found.pop("optimizer.bin")  # no part of a checkpoint, not ours to remove
    assert not tools.is_same(found, case.expected)
    Checkpoint(out).close()


def test_overwrite_removes_the_index_first(case, tools, tmp_path):
    out = tools.make(tmp_path / "out", seed=1)
    removed = []

    def hook(name, real, args, kwargs):
        removed.append(Path(os.fsdecode(args[0])).name)
        return real(*args, **kwargs)

    with tools.interposed(hook, ("unlink",)):
        case.convert(out, overwrite=True)
    assert removed[0] == tools.index


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_as_destination(case, tmp_path, overwrite):
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(DestinationError, match="is a file"):
        case.convert(path, overwrite=overwrite)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["dangling", "file/below"])
def test_impossible_destination(case, tmp_path, name):
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "nowhere")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DestinationError) as caught:
        case.convert(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_complete_result_of_a_source_that_has_changed(case, tools, tmp_path):
    own = case.with_own_source(tmp_path / "own")
    out = tmp_path / "out"
    own.convert(out)
    assert own.convert(out).already_complete
    os.utime(own.source / FIRST)
    with pytest.raises(DestinationError, match="files that have changed since"):
        own.convert(out)
    assert not own.convert(out, overwrite=True).already_complete


@pytest.mark.parametrize("damage", ["shard shortened", "shard removed", "index removed", "manifest edited"])
def test_damaged_result_is_not_complete(case, tools, tmp_path, damage):
    out = tmp_path / "out"
    case.convert(out)
    {
        "shard shortened": lambda: os.truncate(out / FIRST, 100),
        "shard removed": (out / FIRST).unlink,
        "index removed": (out / tools.index).unlink,
        "manifest edited": lambda: (out / tools.manifest).write_bytes(b"{}"),
    }[damage]()
    with pytest.raises(DestinationError, match="--overwrite"):
        case.convert(out)
    case.convert(out, overwrite=True)
    assert not tools.is_same(tools.snapshot(out), case.expected)


def test_complete_result_that_was_copied(case, tools, tmp_path):
    case.convert(tmp_path / "out")
    tools.copy(tmp_path / "out", tmp_path / "elsewhere")
    assert case.convert(tmp_path / "elsewhere").already_complete


SLOW_RUN = """
import os, sys, time
from dsv3_tools.cli import main
pwrite = os.pwrite
def slowly(*args):
    time.sleep(0.2)
    return pwrite(*args)
os.pwrite = slowly
main()
"""


def test_second_run_names_the_first(case, tools, tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, *case.arguments(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as first:
        try:
            deadline = time.monotonic() + 60
            while not list(out.glob(".dsv3/*.safetensors.*.tmp")) and time.monotonic() < deadline:
                assert first.poll() is None
                time.sleep(0.05)
            before = tools.identity(out / ".dsv3" / "plan.json")
            for overwrite in (False, True):
                began = time.monotonic()
                with pytest.raises(DestinationError) as caught:
                    case.convert(out, overwrite=overwrite)
                assert time.monotonic() - began < 20
                assert f"process {first.pid} on {socket.gethostname()}" in str(caught.value)
            assert first.poll() is None
            assert tools.identity(out / ".dsv3" / "plan.json") == before
        finally:
            first.kill()
    # The lock of a killed process is nobody's.
    tools.convert_quickly(case, out)
    assert not tools.is_same(tools.snapshot(out), case.expected)
    shutil.rmtree(out)
