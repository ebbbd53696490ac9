"""Durable before it is visible, and nothing half-written, whatever the disk does."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv3_tools.checkpoint import durable, writer
from dsv3_tools.checkpoint.durable import fsync_directory, publish, write_file
from dsv3_tools.checkpoint.header import encode_header
from dsv3_tools.checkpoint.writer import ShardWriter
from dsv3_tools.errors import DestinationError
from tests.checkpoint.shards import (
    NBYTES,
    PIECES,
    SPECS,
    expected_bytes,
    fill,
    open_writer,
)

# The order of the calls.

Event = tuple[str, ...]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Every fsync (of which path) and rename (from, to) of the test, as they happen."""
    seen: list[Event] = []
    fsync, rename = os.fsync, os.rename

    def traced_fsync(descriptor: int) -> None:
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def traced_rename(source: Path, target: Path) -> None:
        seen.append(("rename", str(source), str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", traced_rename)
    return seen


def violations(events: list[Event]) -> list[Event]:
    """Returns the renames without an fsync of the file before and of its directory after them."""
    return [
        event
        for at, event in enumerate(events)
        if event[0] == "rename"
        and not (
            ("fsync", event[1]) in events[:at] and ("fsync", str(Path(event[2]).parent)) in events[at + 1 :]
        )
    ]


def test_fsync_rename_fsync_of_the_directory(tmp_path: Path, events: list[Event]) -> None:
    folder = tmp_path / ".dsv3"
    folder.mkdir()
    text, _ = encode_header(SPECS)
    final = tmp_path / "a.safetensors"
    with ShardWriter(final, folder=folder, label="x", header=text, nbytes=NBYTES) as shard:
        (temporary,) = folder.iterdir()
        fill(shard)
        assert not events
        shard.commit()
    assert events == [
        ("fsync", str(temporary)),
        ("rename", str(temporary), str(final)),
        ("fsync", str(tmp_path)),
    ]
    events.clear()

    write_file(tmp_path / "config.json", b"{}", folder=folder)
    assert [event[0] for event in events] == ["fsync", "rename", "fsync"]
    assert not violations(events)


def rename_first(descriptor: int, temporary: Path, final: Path) -> None:
    os.rename(temporary, final)
    os.fsync(descriptor)
    fsync_directory(final.parent)


def forget_the_directory(descriptor: int, temporary: Path, final: Path) -> None:
    os.fsync(descriptor)
    os.rename(temporary, final)


def wrong_directory(descriptor: int, temporary: Path, final: Path) -> None:
    os.fsync(descriptor)
    os.rename(temporary, final)
    fsync_directory(temporary.parent)


def directory_too_early(descriptor: int, temporary: Path, final: Path) -> None:
    os.fsync(descriptor)
    fsync_directory(final.parent)
    os.rename(temporary, final)


@pytest.mark.parametrize("broken", [rename_first, forget_the_directory, wrong_directory, directory_too_early])
def test_control_a_broken_order_is_seen(
    tmp_path: Path, events: list[Event], monkeypatch: pytest.MonkeyPatch, broken: Callable[..., None]
) -> None:
    folder = tmp_path / ".dsv3"
    folder.mkdir()
    for module in (writer, durable):
        monkeypatch.setattr(module, "publish", broken)
    text, _ = encode_header(SPECS)
    with ShardWriter(tmp_path / "a", folder=folder, label="x", header=text, nbytes=NBYTES) as shard:
        fill(shard)
        shard.commit()
    assert violations(events)
    events.clear()
    write_file(tmp_path / "b", b"{}", folder=folder)
    assert violations(events)


def test_the_file_is_complete_at_the_moment_of_its_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    rename = os.rename

    def look(source: Path, target: Path) -> None:
        seen.append(Path(source).read_bytes())
        rename(source, target)

    monkeypatch.setattr(os, "rename", look)
    with open_writer(tmp_path, SPECS) as shard:
        fill(shard)
        shard.commit()
    assert seen == [expected_bytes(tmp_path / "x")]


# A disk that does not do its part.


class FailAt:
    """Calls `real`, but fails at the call numbered `number` (from 0) and all later ones."""

    def __init__(self, real: Callable[..., Any], number: int, code: int) -> None:
        self.real, self.number, self.code, self.calls = real, number, code, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls > self.number:
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*arguments, **options)


CODES = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES]
CALLS = {
    "open of the file": ("open", 0, "creating a file of"),
    "ftruncate": ("ftruncate", 0, "creating a file of"),
    "pwrite of the header": ("pwrite", 0, "writing "),
    "first pwrite": ("pwrite", 1, "writing 1 bytes at "),
    "last pwrite": ("pwrite", len(PIECES), "writing "),
    "preadv": ("preadv", 0, "reading "),
    "fsync of the file": ("fsync", 0, f"making {NBYTES} bytes durable"),
    "rename": ("rename", 0, f"making {NBYTES} bytes durable"),
    "open of the directory": ("open", 1, f"making {NBYTES} bytes durable"),
    "fsync of the directory": ("fsync", 1, f"making {NBYTES} bytes durable"),
}


def write_backwards(folder: Path) -> None:
    with open_writer(folder, SPECS) as shard:
        for offset, data in reversed(PIECES):
            shard.write(offset, memoryview(data))
        shard.commit()


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", CALLS)
def test_injected_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    function, number, expected = CALLS[call]
    descriptors = set(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, function, FailAt(getattr(os, function), number, code))
        with pytest.raises(DestinationError) as caught:
            write_backwards(tmp_path)

    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'model-00001-of-000001.safetensors'}: {expected}")
    assert "bytes" in message
    assert os.strerror(code) in message
    assert message.isprintable()
    assert caught.value.exit_code == 5
    assert not list(tmp_path.glob("*.tmp"))
    complete = call in ("open of the directory", "fsync of the directory")
    assert [f.read_bytes() for f in tmp_path.iterdir()] == (
        [expected_bytes(tmp_path / "x")] if complete else []
    )
    assert set(os.listdir("/proc/self/fd")) == descriptors
    write_backwards(tmp_path)  # and once the disk is well, the same works


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_no_space_to_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fallocate(descriptor: int, mode: int, start: int, nbytes: int) -> int:
        assert (mode, start, nbytes) == (0, 0, NBYTES)
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(
        durable, "_libc_function", lambda name, *_: fallocate if name == "fallocate" else None
    )
    with pytest.raises(DestinationError, match=f"creating a file of {NBYTES} bytes: {os.strerror(code)}"):
        write_backwards(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, None])
def test_filesystems_that_cannot_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def fallocate(*arguments: int) -> int:
        ctypes.set_errno(code or 0)
        return -1

    monkeypatch.setattr(durable, "_libc_function", lambda *_: fallocate if code else None)
    write_backwards(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_space_is_reserved(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10_000_000)
    with (tmp_path / "reserved").open("wb") as file:
        durable.preallocate(file.fileno(), 10_000_000)
    reserved = (tmp_path / "reserved").stat()
    assert reserved.st_size == 10_000_000
    if reserved.st_blocks == (tmp_path / "sparse").stat().st_blocks:
        pytest.skip("this filesystem reserves nothing")
    assert reserved.st_blocks * 512 >= 10_000_000


@pytest.mark.parametrize("function", ["close", "unlink"])
def test_errors_that_no_longer_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    real = getattr(os, function)

    def complain(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        shard = open_writer(tmp_path, SPECS)
        fill(shard)
        shard.commit()
        patch.setattr(os, function, complain)
        shard.__exit__(None, None, None)
        with pytest.raises(ValueError, match="the first error"), open_writer(tmp_path, SPECS):
            raise ValueError("the first error")
    assert len(list(tmp_path.iterdir())) == 1


# Small files.


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize(
    ("function", "number"), [("open", 0), ("write", 0), ("write", 1), ("fsync", 0), ("rename", 0)]
)
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_write_file_changes_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int, code: int, old: bytes | None
) -> None:
    final = tmp_path / "config.json"
    if old is not None:
        final.write_bytes(old)
    with monkeypatch.context() as patch:
        real = os.write
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:4]))
        patch.setattr(os, function, FailAt(getattr(os, function), number, code))
        with pytest.raises(DestinationError) as caught:
            write_file(final, b"0123456789", folder=tmp_path)
    assert str(caught.value).startswith(f"{final}: writing 10 bytes: {os.strerror(code)}")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if old is None else [old])
    write_file(final, b"0123456789", folder=tmp_path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"0123456789"]


def test_write_file_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a", b"x", folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_destination_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="No such file or directory"):
        write_file(tmp_path / "no" / "a", b"x", folder=tmp_path / "no")
    with pytest.raises(DestinationError, match="No such file or directory"):
        open_writer(tmp_path / "no", SPECS)


def test_control_publish_itself_raises_what_the_system_says(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file, pytest.raises(FileNotFoundError):
        publish(file.fileno(), tmp_path / "missing", tmp_path / "b")
