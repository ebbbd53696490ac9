"""Somebody changes a file between a kill and the next run: refused, or a right result; nothing stale."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_tools.errors import CheckpointError, DestinationError, Dsv3Error

FIRST, SECOND, LAST = (f"model-0000{n}-of-000003.safetensors" for n in (1, 2, 3))


def restoring_times(path: Path, change) -> None:
    """Changes a file and gives it its old modification time back."""
    status = path.stat()
    change(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 0x10]))


def replace_by_copy(path: Path, change=flip) -> None:
    """Puts another file of the same size and time in a file's place."""
    copy = path.with_name("other")
    shutil.copy2(path, copy)
    restoring_times(copy, change)
    os.replace(copy, path)


def swap(one: Path, other: Path) -> None:
    between = one.with_name("between")
    os.rename(one, between)
    os.rename(other, one)
    os.rename(between, other)


def link_elsewhere(path: Path) -> None:
    path.rename(path.parent.parent / "moved")
    path.symlink_to(path.parent.parent / "moved")


OUTPUT_CHANGES = {
    "bit flipped": lambda out: flip(out / FIRST),
    "bit flipped, time restored": lambda out: restoring_times(out / FIRST, flip),
    "another shard's bit flipped, time restored": lambda out: restoring_times(out / SECOND, flip),
    "truncated": lambda out: os.truncate(out / FIRST, 1000),
    "truncated, time restored": lambda out: restoring_times(out / FIRST, lambda p: os.truncate(p, 1000)),
    "emptied": lambda out: os.truncate(out / SECOND, 0),
    "extended": lambda out: (out / FIRST).write_bytes((out / FIRST).read_bytes() + b"\0"),
    "replaced": lambda out: (out / FIRST).write_bytes(b"\0" * (out / FIRST).stat().st_size),
    "replaced, time restored": lambda out: replace_by_copy(out / FIRST),
    "replaced by an equal file": lambda out: replace_by_copy(out / FIRST, lambda _: None),
    "removed": lambda out: (out / FIRST).unlink(),
    "two swapped": lambda out: swap(out / FIRST, out / SECOND),
    "link to another place": lambda out: link_elsewhere(out / FIRST),
    "unfinished one appears": lambda out: (out / LAST).write_bytes(b"not what it should be"),
    "foreign shard appears": lambda out: (out / "model-00004-of-000004.safetensors").write_bytes(b"stale"),
    "journal torn": lambda out: os.truncate(
        out / ".dsv3/journal.jsonl", (out / ".dsv3/journal.jsonl").stat().st_size - 20
    ),
    "journal is garbage": lambda out: (out / ".dsv3/journal.jsonl").write_bytes(b"\xff\x00{}\n[1]\nnull\n"),
    "journal removed": lambda out: (out / ".dsv3/journal.jsonl").unlink(),
    "plan is garbage": lambda out: (out / ".dsv3/plan.json").write_bytes(b"{"),
    "plan removed": lambda out: (out / ".dsv3/plan.json").unlink(),
    "working folder removed": lambda out: shutil.rmtree(out / ".dsv3"),
    "temporary file left": lambda out: (out / ".dsv3" / f"{LAST}.0.tmp").write_bytes(b"x" * 5000),
}


@pytest.mark.parametrize("change", OUTPUT_CHANGES.values(), ids=OUTPUT_CHANGES.keys())
def test_output_changed_between_kill_and_rerun(case, tools, tmp_path, change):
    out = tmp_path / "out"
    tools.killed_before_last_shard(case, out)
    change(out)
    try:
        tools.convert_quickly(case, out)
    except DestinationError as error:
        assert "\n" not in str(error)  # noqa: PT017
        tools.convert_quickly(case, out, overwrite=True)
    assert not tools.is_same(tools.snapshot(out), case.expected)


@pytest.mark.parametrize(
    "change", [flip, lambda p: restoring_times(p, flip), replace_by_copy], ids=["flip", "utime", "replace"]
)
def test_only_the_changed_shard_is_redone(case, tools, tmp_path, change):
    out = tmp_path / "out"
    tools.killed_before_last_shard(case, out)
    untouched = tools.identity(out / SECOND)
    change(out / FIRST)
    result = tools.convert_quickly(case, out)
    assert (result.shards_resumed, result.shards_written) == (1, 2)
    assert tools.identity(out / SECOND) == untouched
    assert not tools.is_same(tools.snapshot(out), case.expected)


def edit_same_size(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"bos_token_id": 0', b'"bos_token_id": 7'))


def rename_a_tensor(path: Path) -> None:
    data = path.read_bytes()
    assert b"input_layernorm" in data
    path.write_bytes(data.replace(b"input_layernorm", b"INPUT_layernorm", 1))


SOURCE_CHANGES = {
    "shard changed": lambda source: flip(source / FIRST),
    "shard changed, time restored": lambda source: restoring_times(source / FIRST, flip),
    "last shard changed, time restored": lambda source: restoring_times(source / LAST, flip),
    "shard replaced, time restored": lambda source: replace_by_copy(source / SECOND),
    "tensor renamed, time restored": lambda source: restoring_times(source / FIRST, rename_a_tensor),
    "config changed": lambda source: edit_same_size(source / "config.json"),
    "config changed, time restored": lambda source: restoring_times(source / "config.json", edit_same_size),
    "tokenizer changed": lambda source: (source / "tokenizer.json").write_bytes(b"{}"),
    "template changed, time restored": lambda source: restoring_times(
        source / "chat_template.jinja", lambda path: path.write_bytes(b"{{ MESSAGES }}\n")
    ),
    "tokenizer removed": lambda source: (source / "tokenizer.json").unlink(),
    "side file added": lambda source: (source / "vocab.json").write_bytes(b"{}"),
    "shard touched": lambda source: os.utime(source / FIRST),
}


@pytest.mark.parametrize("change", SOURCE_CHANGES.values(), ids=SOURCE_CHANGES.keys())
def test_source_changed_between_kill_and_rerun(case, tools, tmp_path, change):
    own = case.with_own_source(tmp_path / "own")
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    tools.killed_before_last_shard(own, out)
    change(own.source)
    try:
        tools.convert_quickly(own, fresh)
    except Dsv3Error as error:
        assert error.exit_code == 3  # noqa: PT017
        with pytest.raises(type(error)):
            own.convert(out)
        return
    with pytest.raises(DestinationError, match=r"has changed since an earlier run|with other options"):
        own.convert(out)
    tools.convert_quickly(own, out, overwrite=True)
    # What was copied by the first run and is no more in the source is no shard, and stays.
    assert not tools.is_same(tools.snapshot(out), tools.snapshot(fresh))


@pytest.mark.parametrize("name", [FIRST, LAST])
def test_like_changed_between_kill_and_rerun(cases, tools, tmp_path, name):
    own = cases["bf16-to-fp8-like"].with_own_source(tmp_path / "own")
    tools.killed_before_last_shard(own, tmp_path / "out")
    restoring_times(own.like / name, flip)
    with pytest.raises(DestinationError, match=rf"{name} \(like\) has changed"):
        own.convert(tmp_path / "out")


def other_options(case) -> list[dict]:
    common = [{"max_shard_size": 100_000}]
    other = {
        "convert fp8-to-bf16": {"scale_semantics": "inverse"},
        "convert bf16-to-fp8": {"scale_fmt": "ue8m0"},
        "quantize int8": {"exclude": ("*.o_proj",)},
        "quantize int4": {"scale_search": "absmax"},
    }
    return common if case.like or case.operation not in other else [*common, other[case.operation]]


def test_other_options_do_not_go_on(case, tools, tmp_path):
    out = tmp_path / "out"
    for options in other_options(case):
        shutil.rmtree(out, ignore_errors=True)
        tools.killed_before_last_shard(case, out)
        with pytest.raises(DestinationError, match=r"other options|not part of this run"):
            case.convert(out, **options)
        tools.convert_quickly(case, out)
        assert not tools.is_same(tools.snapshot(out), case.expected)


def test_other_operation_does_not_go_on(cases, tools, tmp_path):
    """With and without `like` are not the same run, even where the shards have the same headers."""
    with_like = cases["bf16-to-fp8-like"]
    without = replace(with_like, like=None)
    tools.killed_before_last_shard(with_like, tmp_path / "out")
    with pytest.raises(DestinationError, match="other options"):
        without.convert(tmp_path / "out")


def test_source_written_to_during_the_run(fp8_case, tools, tmp_path):
    changed = []

    def touch(_progress) -> None:
        if not changed:
            changed.append(os.utime(fp8_case.source / FIRST))

    with pytest.raises(CheckpointError, match=f"{FIRST}: was written to during the run"):
        fp8_case.convert(tmp_path / "out", on_progress=touch)
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_source_shortened_during_the_run(fp8_case, tools, tmp_path):
    def shorten(_progress) -> None:
        os.truncate(fp8_case.source / FIRST, 20_000)

    with pytest.raises(CheckpointError, match="shortened after it was opened"):
        fp8_case.convert(tmp_path / "out", on_progress=shorten)
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_side_file_changed_during_the_run(fp8_case, tools, tmp_path):
    def edit(_progress) -> None:
        (fp8_case.source / "tokenizer.json").write_bytes(b"other")

    with pytest.raises(CheckpointError, match=r"tokenizer\.json: has changed during the run"):
        fp8_case.convert(tmp_path / "out", on_progress=edit)
    assert not (tmp_path / "out" / tools.index).exists()


def test_index_does_not_stand_beside_shards_that_are_redone(case, tools, tmp_path):
    """A run killed after its index, a shard damaged since, a second kill: no index without all shards."""
    out = tmp_path / "out"

    def writes_manifest(number: int, name: str, args) -> bool:
        return name == "open" and tools.manifest in os.fsdecode(args[0])

    assert tools.killed_at(case, out, writes_manifest)
    assert (out / tools.index).exists()
    (out / FIRST).unlink()

    def opens_shard(number: int, name: str, args) -> bool:
        return name == "open" and FIRST + "." in os.fsdecode(args[0])

    assert tools.killed_at(case, out, opens_shard)
    assert not tools.violations(out, case.expected)
    tools.convert_quickly(case, out)
    assert not tools.is_same(tools.snapshot(out), case.expected)
