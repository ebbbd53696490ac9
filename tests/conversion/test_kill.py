"""kill -9 at any moment, the same command again: byte for byte what an uninterrupted run writes."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from dsv3_tools.checkpoint import writer
from dsv3_tools.conversion import crew, destination
from dsv3_tools.conversion.workspace import JournalEntry, Workspace


def resume(tools, case, folder: Path, **options) -> str:
    """Checks what a kill has left, runs again, and returns every violation of the promise."""
    problems = tools.violations(folder, case.expected)
    before = tools.journalled(folder)
    result = tools.convert_quickly(case, folder, **options)
    problems += tools.is_same(tools.snapshot(folder), case.expected)
    for name, (inode, mtime) in before.items():
        if tools.identity(folder / name) != (inode, mtime):
            problems += f"; {name} was written again"
    if not result.already_complete and result.shards_resumed != len(before):
        problems += f"; {result.shards_resumed} shards resumed, {len(before)} in the journal"
    return problems


def start_again(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("torn", [False, True], ids=["between calls", "within a write"])
def test_killed_at_every_call_that_writes(case, tools, tmp_path, torn):
    out = tmp_path / "out"
    names = ("pwrite", "write") if torn else tools.write_side
    total = tools.count_calls(case, out, names)
    assert total > (20 if torn else 60)
    # Half a write leaves what no other half would: a torn temporary file or journal line. All commands go
    # through the same executor: one is killed at every call, the others at every second, odd or even.
    step = 3 if torn else 1 if case.operation == "fp8-to-bf16" else 2
    for number in range(1 + len(case.operation) % step, total + 1, step):
        start_again(out)
        assert tools.killed_at(case, out, lambda n, *_, at=number: n == at, torn=torn, names=names)
        assert not resume(tools, case, out), f"kill at call {number} of {total}"


def comparable(folder: Path) -> dict[str, bytes]:
    """Returns what a kill leaves, but for times, process numbers and the random part of names."""
    found = {}
    for path in folder.rglob("*"):
        name = re.sub(r"\.[^.]+\.tmp$", ".tmp", str(path.relative_to(folder)))
        data = b"" if path.is_dir() or path.name == "lock" else path.read_bytes()
        found[name] = re.sub(rb'"(pid|start|mtime_ns|ctime_ns)": ("[^"]*"|\d+)', rb"\1", data)
    return found


def test_the_kills_above_leave_what_sigkill_leaves(case, tools, tmp_path):
    """They end a run within this process; here a fork gets the signal at the same call."""
    names = tuple(name for name in tools.write_side if name != "open")  # readers open when they like
    total = tools.count_calls(case, tmp_path / "out", names)
    for number in range(2, total, total // 7):
        left = []
        for really in (False, True):
            out = tmp_path / f"{number} {really}"
            torn = number % 2 == 0
            assert tools.killed_at(
                case, out, lambda n, *_, at=number: n == at, torn=torn, names=names, really=really
            )
            left.append(comparable(out))
        assert not tools.is_same(*left), f"kill at call {number} of {total}"


def test_control_a_run_that_goes_on_after_its_end(fp8_case, tools, tmp_path, monkeypatch):
    """What reaches the disk by another way than the calls that are stood in for would be seen."""
    unlink = os.unlink
    monkeypatch.setattr(writer, "remove_quietly", unlink)  # as a cleanup that no hook knows
    with pytest.raises(AssertionError, match="the run went on after its end"):
        tools.killed_at(fp8_case, tmp_path / "out", lambda _, name, *__: name == "pwrite")


def test_killed_at_random_moments(case, tools, tmp_path, chance):
    out = tmp_path / "out"
    began = time.monotonic()
    tools.in_child(lambda: tools.convert_quickly(case, out, workers=2))
    duration = time.monotonic() - began
    killed = 0
    for _ in range(150):
        if killed == 25:
            return
        start_again(out)
        moment = chance.uniform(0, duration)
        code = tools.in_child(lambda: tools.convert_quickly(case, out, workers=2), kill_after=moment)
        assert code in (0, -9)
        killed += code == -9
        # Follows the machine's load, so that most moments lie within the run.
        duration *= 1.01 if code else 0.9
        assert not resume(tools, case, out, workers=2), f"kill after {moment:.4f} s"
    raise AssertionError(f"only {killed} of 150 runs lived long enough to be killed")


def test_killed_again_while_resuming(case, tools, tmp_path, chance):
    out = tmp_path / "out"
    total = tools.count_calls(case, out)
    for _ in range(15):
        start_again(out)
        for _ in range(3):
            at = chance.randrange(1, total)
            tools.killed_at(case, out, lambda n, *_, at=at: n == at)
            assert not tools.violations(out, case.expected)
        assert not resume(tools, case, out)


def test_killed_in_another_run_of_overwriting(case, tools, tmp_path, chance):
    """The old checkpoint's shards are never taken for the new one's, and none of them stays."""
    out = tmp_path / "out"
    for _ in range(15):
        start_again(out)
        tools.make(out, layers=1, shards=5, seed=1)
        at = chance.randrange(1, 60)
        tools.killed_at(case, out, lambda n, *_, at=at: n == at, overwrite=True)
        tools.convert_quickly(case, out, overwrite=True)
        (out / "optimizer.bin").unlink(missing_ok=True)
        assert not tools.is_same(tools.snapshot(out), case.expected)


def test_finished_run_has_nothing_left_to_do(case, tools, tmp_path):
    out = tmp_path / "out"
    case.convert(out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert case.convert(out).already_complete
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert not tools.is_same(tools.snapshot(out), case.expected)


def kill_everywhere(tools, case, out: Path, names: tuple[str, ...]) -> list[str]:
    """Returns the violations found by kills at every such call, until the first one."""
    for number in range(1, tools.count_calls(case, out, names) + 1):
        start_again(out)
        tools.killed_at(case, out, lambda n, *_, at=number: n == at, names=names)
        if problems := resume(tools, case, out):
            return [problems]
    return []


def test_control_without_temporary_file(case, tools, tmp_path, monkeypatch):
    """A program that writes under the final name is caught by the checks above."""

    def at_final_name(folder, name):
        path = folder.parent / (name.split(".safetensors")[0] + ".safetensors")
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666), path

    monkeypatch.setattr(writer, "create_temporary", at_final_name)
    assert kill_everywhere(tools, case, tmp_path / "out", ("pwrite",))


def test_control_journal_before_rename(case, tools, tmp_path, monkeypatch):
    """A program that notes a shard before it is there, and believes its notes, is caught as well."""
    commit = crew.ShardWriter.commit

    def note_first(self, **options):
        entry = JournalEntry(self._final.name, "0" * 64, self._nbytes, 0, 0, {})
        Workspace(self._final.parent).append_journal(entry, 0)
        return commit(self, **options)

    monkeypatch.setattr(crew.ShardWriter, "commit", note_first)
    monkeypatch.setattr(destination, "_is_intact", lambda *_: True)
    assert kill_everywhere(tools, case, tmp_path / "out", ("rename",))
