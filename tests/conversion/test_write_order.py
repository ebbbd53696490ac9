"""The order of system calls of one run: what makes a crash harmless of the machine, not only of a process."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from dsv3_tools.checkpoint import durable


class Trace:
    """Every call that changes the destination, with paths instead of descriptors."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.flags: dict[str, int] = {}

    def hook(self, name, real, args, kwargs):
        if name in ("fsync", "pwrite", "write", "ftruncate"):
            path = os.readlink(f"/proc/self/fd/{args[0]}")
        else:
            path = os.fsdecode(args[0])
        if name == "rename":
            path += " -> " + os.fsdecode(args[1])
        if name == "open" and args[1] & os.O_CREAT:
            self.flags[path] = args[1]
        self.calls.append((name, path))
        return real(*args, **kwargs)


def problems_of(calls: list[tuple[str, str]]) -> list[str]:
    """Returns every rename that is not between the fsync of its file and that of its directory."""
    problems = []
    for position, (name, path) in enumerate(calls):
        if name != "rename":
            continue
        before, after = path.split(" -> ")
        if ("fsync", before) not in calls[:position]:
            problems.append(f"{after}: renamed without fsync")
            continue
        synced = max(n for n, call in enumerate(calls[:position]) if call == ("fsync", before))
        if any(call in (("pwrite", before), ("write", before)) for call in calls[synced:position]):
            problems.append(f"{after}: written to after its fsync")
        rest = calls[position + 1 :]
        following = next((n for n, (call, _) in enumerate(rest) if call == "rename"), len(rest))
        if ("fsync", str(Path(after).parent)) not in rest[:following]:
            problems.append(f"{after}: its directory was not synced after the rename")
    return problems


def trace(tools, case, out: Path) -> Trace:
    found = Trace()
    with tools.interposed(found.hook):
        case.convert(out)
    return found


def test_every_rename_is_durable(case, tools, tmp_path):
    calls = trace(tools, case, tmp_path / "out").calls
    renames = [path for name, path in calls if name == "rename"]
    assert len(renames) == len(case.expected) + 2  # every file of the result, plan and owner
    assert problems_of(calls) == []


def test_order_of_names(case, tools, tmp_path):
    out = tmp_path / "out"
    calls = trace(tools, case, out).calls
    published = [Path(path.split(" -> ")[1]).name for name, path in calls if name == "rename"]
    shards = [n for n, name in enumerate(published) if name.endswith(".safetensors")]
    assert published[-2:] == [tools.index, tools.manifest]
    assert published[-3] == "config.json"
    assert max(shards) < published.index("config.json")
    assert published.index("plan.json") < min(shards)
    assert calls[-1] == ("rmdir", str(out / ".dsv3"))
    last_rename = max(n for n, (name, _) in enumerate(calls) if name == "rename")
    removals = [n for n, (name, path) in enumerate(calls) if name == "unlink" and "journal" in path]
    assert removals
    assert min(removals) > last_rename


def test_journal_line_follows_its_shard(case, tools, tmp_path):
    calls = trace(tools, case, tmp_path / "out").calls
    journal = str(tmp_path / "out" / ".dsv3" / "journal.jsonl")
    shards = 0
    for position, (name, path) in enumerate(calls):
        if name == "rename" and path.endswith(".safetensors"):
            shards += 1
        if (name, path) == ("write", journal):
            assert sum(call == ("write", journal) for call in calls[: position + 1]) == shards
            assert calls[position + 1] == ("fsync", journal)
    assert shards == sum(name.endswith(".safetensors") for name in case.expected)


def test_nothing_is_written_under_a_final_name(case, tools, tmp_path):
    out = tmp_path / "out"
    found = trace(tools, case, out)
    writes = {path for name, path in found.calls if name in ("pwrite", "write", "ftruncate")}
    assert writes
    assert {str(Path(path).parent) for path in writes} == {str(out / ".dsv3")}
    for path, flags in found.flags.items():
        assert not path.endswith(".tmp") or flags & os.O_EXCL


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(case, tmp_path, umask):
    before = os.umask(umask)
    try:
        case.convert(tmp_path / "out")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~umask}


def test_control_publish_without_fsync(case, tools, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_tools.checkpoint.writer.publish", lambda _, old, new: os.rename(old, new))
    problems = problems_of(trace(tools, case, tmp_path / "out").calls)
    assert any("renamed without fsync" in problem for problem in problems)


def test_control_directory_not_synced(case, tools, tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "fsync_directory", lambda _: None)
    problems = problems_of(trace(tools, case, tmp_path / "out").calls)
    assert any("its directory was not synced" in problem for problem in problems)
