"""A disk that is full or broken: one line, nothing half-written under a final name, and a resume."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from dsv3_tools.checkpoint import durable
from dsv3_tools.errors import DestinationError

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


def is_in(path, folder: Path) -> bool:
    return os.fsdecode(path).startswith(str(folder))


def failing(number: int, code: int, folder: Path):
    """Returns a hook that fails the `number`-th call that writes in `folder`."""
    count = iter(range(1, 1_000_000))

    def hook(name, real, args, kwargs):
        writes = name in ("pwrite", "write", "fsync", "ftruncate", "rename", "mkdir") or (
            name == "open" and is_in(args[0], folder)
        )
        if writes and next(count) == number:
            raise OSError(code, os.strerror(code))
        return None if name == "fsync" else real(*args, **kwargs)

    return hook


def test_injected_errors(case, tools, tmp_path, chance):
    out = tmp_path / "out"
    total, injected = tools.count_calls(case, out) - 20, 0
    for _ in range(75):
        shutil.rmtree(out, ignore_errors=True)
        number, code = chance.randrange(1, total), chance.choice(ERRORS)
        try:
            with tools.interposed(failing(number, code, out)):
                case.convert(out)
        except DestinationError as error:
            message = str(error)
            assert "\n" not in message
            assert str(out) in message
            assert os.strerror(code) in message
            injected += 1
        assert not tools.violations(out, case.expected), f"{errno.errorcode[code]} at call {number}"
        assert not list(out.glob("**/*.tmp")), f"{errno.errorcode[code]} at call {number}"
        tools.convert_quickly(case, out)
        assert not tools.is_same(tools.snapshot(out), case.expected)
    assert injected >= 70


def test_short_writes_are_continued(case, tools, tmp_path, chance):
    """The system may write less than it was asked to."""

    def hook(name, real, args, kwargs):
        if name in ("pwrite", "write") and len(args[1]) > 1:
            return real(args[0], args[1][: chance.randint(1, len(args[1]))], *args[2:])
        return tools.unsynced(name, real, args, kwargs)

    with tools.interposed(hook):
        case.convert(tmp_path / "out")
    assert not tools.is_same(tools.snapshot(tmp_path / "out"), case.expected)


def test_short_reads_are_continued(case, tools, tmp_path, chance):
    def hook(name, real, args, kwargs):
        buffer = args[1][0]
        return real(args[0], [buffer[: chance.randint(1, len(buffer))]], *args[2:])

    with tools.interposed(hook, ("preadv",)):
        case.convert(tmp_path / "out")
    assert not tools.is_same(tools.snapshot(tmp_path / "out"), case.expected)


@pytest.mark.parametrize("code", ERRORS)
def test_space_that_cannot_be_reserved(case, tools, tmp_path, monkeypatch, code):
    def fallocate(*_):
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(
        durable, "_libc_function", lambda name, *_: fallocate if name == "fallocate" else None
    )
    with pytest.raises(DestinationError, match=r"model-00001.*creating a file of [\d,]+ bytes"):
        case.convert(tmp_path / "out")
    assert not tools.violations(tmp_path / "out", case.expected)
    assert not list(tmp_path.glob("out/.dsv3/*.tmp"))
    monkeypatch.undo()
    case.convert(tmp_path / "out")
    assert not tools.is_same(tools.snapshot(tmp_path / "out"), case.expected)


def test_filesystem_that_cannot_reserve(case, tools, tmp_path, monkeypatch):
    def fallocate(*_):
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(
        durable, "_libc_function", lambda name, *_: fallocate if name == "fallocate" else None
    )
    case.convert(tmp_path / "out")
    assert not tools.is_same(tools.snapshot(tmp_path / "out"), case.expected)


def with_free(monkeypatch, nbytes: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**15, 0, nbytes))


def test_too_little_room_is_seen_before_anything_is_created(case, tmp_path, monkeypatch):
    shards = sum(len(data) for name, data in case.expected.items() if name.endswith(".safetensors"))
    with_free(monkeypatch, shards - 1)
    with pytest.raises(DestinationError, match=rf"{shards - 1:,} bytes are free, the run needs {shards:,}"):
        case.convert(tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_room_counts_what_a_resume_still_needs(case, tools, tmp_path, monkeypatch):
    out = tmp_path / "out"
    tools.killed_before_last_shard(case, out)
    last = max(name for name in case.expected if name.endswith(".safetensors"))
    with_free(monkeypatch, len(case.expected[last]) - 1)
    with pytest.raises(DestinationError, match="bytes are free"):
        case.convert(out)
    with_free(monkeypatch, len(case.expected[last]))
    case.convert(out)
    assert not tools.is_same(tools.snapshot(out), case.expected)


def test_room_counts_what_is_overwritten(case, tools, tmp_path, monkeypatch):
    out = tools.make(tmp_path / "out", layers=3, experts=16)
    with_free(monkeypatch, 0)
    case.convert(out, overwrite=True)
    assert tools.snapshot(out).items() >= case.expected.items()


def test_directory_without_permission(case, tools, tmp_path):
    """Root may write everywhere, so the refusal is injected."""

    def hook(name, real, args, kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with (
        tools.interposed(hook, ("mkdir",)),
        pytest.raises(DestinationError, match="Permission denied; choose a destination that can be written"),
    ):
        case.convert(tmp_path / "out")


def test_source_that_cannot_be_read(case, tools, tmp_path):
    """A read error is the checkpoint's fault, not the destination's, and names the tensor."""
    count = iter(range(1, 1_000_000))

    def hook(name, real, args, kwargs):
        is_source = f"{tmp_path}/out" not in os.readlink(f"/proc/self/fd/{args[0]}")
        if is_source and next(count) == 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **kwargs)

    with (
        tools.interposed(hook, ("preadv",)),
        pytest.raises(
            Exception, match=r"model-0000\d-of-00000\d.safetensors: model\.\S+: Input/output error"
        ) as caught,
    ):
        case.convert(tmp_path / "out")
    assert type(caught.value).__name__ == "CheckpointError"
    assert not tools.violations(tmp_path / "out", case.expected)
