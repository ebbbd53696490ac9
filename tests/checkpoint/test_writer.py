"""Shards as safetensors writes them, visible only when complete."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dsv3_tools.checkpoint.durable import write_file
from dsv3_tools.checkpoint.specs import TensorSpec
from dsv3_tools.errors import DestinationError
from tests.checkpoint.shards import (
    DTYPES,
    NBYTES,
    PIECES,
    SPECS,
    expected_bytes,
    fill,
    make_tensors,
    open_writer,
    pieces,
)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    specs=st.dictionaries(
        st.from_regex(r"[a-z]{1,4}(\.[0-9]{1,2})?", fullmatch=True),
        st.builds(
            TensorSpec, st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 9), max_size=3).map(tuple)
        ),
        max_size=6,
    ),
    chunk=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    in_order=st.booleans(),
)
def test_as_save_file_in_any_order_and_chunking(
    tmp_path: Path, specs: dict[str, TensorSpec], chunk: int, seed: int, in_order: bool
) -> None:
    tensors = make_tensors(seed, specs)
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    order = sorted(pieces(specs, tensors, chunk))
    if not in_order:
        random.Random(seed).shuffle(order)

    with open_writer(tmp_path, specs) as shard:
        for offset, data in order:
            shard.write(offset, memoryview(data))
        digest = shard.commit()

    written = (tmp_path / "model-00001-of-000001.safetensors").read_bytes()
    assert written == (tmp_path / "expected").read_bytes()
    assert digest == hashlib.sha256(written).hexdigest()


def test_control_two_pieces_swapped_give_another_file_and_another_hash(tmp_path: Path) -> None:
    with open_writer(tmp_path, SPECS) as shard:
        fill(shard)
        right = shard.commit()
    (first, one), (second, two) = PIECES[0], PIECES[1]
    with open_writer(tmp_path, SPECS) as shard:
        for offset, data in [(first, two), (second, one), *PIECES[2:]]:
            shard.write(offset, memoryview(data))
        wrong = shard.commit()
    assert wrong != right
    assert (tmp_path / "model-00001-of-000001.safetensors").read_bytes() != expected_bytes(tmp_path / "x")


def test_hash_of_many_megabytes_written_last_first(tmp_path: Path) -> None:
    specs = {"a": TensorSpec("U8", (9_000_001,)), "b": TensorSpec("F32", (3,))}
    tensors = make_tensors(3, specs)
    with open_writer(tmp_path, specs) as shard:
        for offset, data in sorted(pieces(specs, tensors, 4_000_000), reverse=True):
            shard.write(offset, memoryview(data))
        digest = shard.commit()
    assert digest == hashlib.sha256((tmp_path / "model-00001-of-000001.safetensors").read_bytes()).hexdigest()


def test_short_writes_and_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:3], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:5]], offset))
    with open_writer(tmp_path, SPECS) as shard:
        for offset, data in reversed(PIECES):
            shard.write(offset, memoryview(data))
        digest = shard.commit()
    expected = expected_bytes(tmp_path / "x")
    assert (tmp_path / "model-00001-of-000001.safetensors").read_bytes() == expected
    assert digest == hashlib.sha256(expected).hexdigest()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0, 0o666)])
def test_mode_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with open_writer(tmp_path, SPECS) as shard:
            fill(shard)
            shard.commit()
        write_file(tmp_path / "config.json", b"{}", folder=tmp_path)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {mode}


# Nothing before it is complete.


def test_nothing_under_the_final_name_before_commit(tmp_path: Path) -> None:
    final = tmp_path / "model-00001-of-000001.safetensors"
    with open_writer(tmp_path, SPECS) as shard:
        (temporary,) = tmp_path.iterdir()
        assert temporary.name.startswith(f"{final.name}.plan.")
        assert temporary.suffix == ".tmp"
        assert temporary.stat().st_size == NBYTES
        fill(shard)
        assert list(tmp_path.iterdir()) == [temporary]
        shard.commit()
        assert list(tmp_path.iterdir()) == [final]
    assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("problem", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_leaving_without_commit_leaves_nothing(tmp_path: Path, problem: type[BaseException] | None) -> None:
    descriptors = set(os.listdir("/proc/self/fd"))

    def leave() -> None:
        with open_writer(tmp_path, SPECS) as shard:
            fill(shard)
            if problem:
                raise problem

    if problem:
        with pytest.raises(problem):
            leave()
    else:
        leave()
    assert not list(tmp_path.iterdir())
    assert set(os.listdir("/proc/self/fd")) == descriptors


def test_two_writers_of_one_shard_do_not_meet(tmp_path: Path) -> None:
    with open_writer(tmp_path, SPECS) as first, open_writer(tmp_path, SPECS) as second:
        assert len(list(tmp_path.iterdir())) == 2
        fill(first)
        fill(second)
        assert first.commit() == second.commit()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("missing", [-1, 1])
def test_a_wrong_total_is_refused(tmp_path: Path, missing: int) -> None:
    with open_writer(tmp_path, SPECS) as shard:
        fill(shard)
        if missing < 0:
            shard.write(NBYTES, memoryview(b"x"))
        else:
            shard._written -= 1
        with pytest.raises(DestinationError, match=f"bytes were written, expected {NBYTES}"):
            shard.commit()
    assert not list(tmp_path.iterdir())


def test_a_missing_piece_is_refused(tmp_path: Path) -> None:
    with open_writer(tmp_path, SPECS) as shard:
        for offset, data in PIECES[:-1]:
            shard.write(offset, memoryview(data))
        with pytest.raises(DestinationError, match="were written"):
            shard.commit()
    assert not list(tmp_path.iterdir())
