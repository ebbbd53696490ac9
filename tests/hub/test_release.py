"""DeepSeek-V3 on the hub, 688.6 GB in 163 shards: what it takes to look at it and to plan with it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import dsv3_tools
from dsv3_tools.conversion.api import open_fp8_to_bf16
from dsv3_tools.conversion.options import RunOptions
from dsv3_tools.conversion.preview import preview
from tests.hub.repos import Blob
from tests.hub.server import FakeHub

MOST_NBYTES = 50_000_000


@pytest.fixture
def release(hub: FakeHub, client: None, v3: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sparse files, whose hash nobody asks for here: it would take ten minutes."""

    def hash_of_name(blob: Blob) -> str:
        return hashlib.sha256(str(blob.source).encode()).hexdigest()

    monkeypatch.setattr(Blob, "sha256", property(hash_of_name))
    hub.add_repo("org/DeepSeek-V3", {path.name: path for path in v3.iterdir() if path.is_file()})
    return "org/DeepSeek-V3"


def test_inspecting_and_planning_read_headers_alone(hub: FakeHub, release: str, tmp_path: Path) -> None:
    found = dsv3_tools.inspect(release)
    assert (found.num_tensors, found.num_shards) == (91_991, 163)
    assert found.nbytes == 688_574_839_360
    assert 12_000_000 < hub.nbytes_sent < MOST_NBYTES
    hub.forget()
    with open_fp8_to_bf16(release) as (plan, checkpoints):
        seen = preview(plan, checkpoints, tmp_path / "out", RunOptions("cpu", 4))
    assert hub.nbytes_sent < MOST_NBYTES
    assert seen.nbytes_to_fetch == sum(shard.nbytes for shard in checkpoints["source"].shards.values())
    largest = max(shard.nbytes for shard in checkpoints["source"].shards.values())
    assert 6 * largest * 0.5 < seen.nbytes_staged <= 8 * largest
    assert not (tmp_path / "out").exists()
    assert plan.payload_nbytes == 1_368_979_721_216
