"""A model on the Hub opens like a directory, from its headers alone; what is read of it is what is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import dsv3_tools
from dsv3_tools.checkpoint import hub as hub_module
from dsv3_tools.checkpoint.hub_requests import ATTEMPTS
from dsv3_tools.checkpoint.source import HubRepo
from dsv3_tools.errors import CheckpointError, NetworkError
from tests.hub.faults import Fault, Rule
from tests.hub.server import TOKEN, FakeHub

pytestmark = pytest.mark.usefixtures("client")

REPO = "org/small"
SHARD = "model-00002-of-000004.safetensors"


@pytest.fixture
def commit(hub: FakeHub, fp8_checkpoint: Path) -> str:
    """The small FP8 checkpoint as a model on the hub."""
    return hub.add_repo(REPO, {path.name: path for path in fp8_checkpoint.iterdir()})


def weights_sent(hub: FakeHub) -> int:
    """Returns the bytes of shards that the hub has sent."""
    return sum(n for path, n in hub.nbytes_by_path.items() if path.endswith(".safetensors"))


def test_it_opens_from_headers_alone(
    hub: FakeHub, commit: str, fp8_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "_FIRST_NBYTES", 1000)  # less than a header has: two requests for each
    with dsv3_tools.Checkpoint(fp8_checkpoint) as local, dsv3_tools.Checkpoint(REPO) as remote:
        assert remote.source == HubRepo(REPO, "main", commit)
        assert remote.specs == local.specs
        assert remote.weight_map == local.weight_map
        assert remote.config == local.config
        assert remote.side_files() == local.side_files()
        for name, shard in local.shards.items():
            found = remote.shards[name]
            assert (found.header, found.nbytes) == (shard.header, shard.nbytes)
            assert (found.header_sha256, found.mtime_ns) == (shard.header_sha256, 0)
        headers = sum(shard.header.nbytes for shard in local.shards.values())
    assert weights_sent(hub) == headers
    assert all(
        seen.range is not None for seen in hub.requests if seen.path.endswith(".safetensors") and seen.nbytes
    )


def test_a_little_is_read_without_the_rest(hub: FakeHub, commit: str, fp8_checkpoint: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    with dsv3_tools.Checkpoint(fp8_checkpoint) as local, dsv3_tools.Checkpoint(f"hf://{REPO}") as remote:
        hub.forget()
        assert remote.read_alone(name) == local.read_bytes(name)
        assert weights_sent(hub) == local.specs[name].nbytes
        assert not remote.is_kept(remote.weight_map[name])


def test_reading_fetches_the_shard_into_the_cache(hub: FakeHub, commit: str, fp8_checkpoint: Path) -> None:
    with dsv3_tools.Checkpoint(fp8_checkpoint) as local, dsv3_tools.Checkpoint(REPO) as remote:
        for name in local.specs:
            assert remote.read_bytes(name) == local.read_bytes(name)
        assert all(remote.is_kept(shard) for shard in remote.shards)
    hub.forget()
    with dsv3_tools.Checkpoint(REPO) as again:
        assert again.specs == remote.specs
        again.read_bytes("lm_head.weight")
        again.discard(again.weight_map["lm_head.weight"])  # not ours to remove
        assert again.is_kept(again.weight_map["lm_head.weight"])
    assert weights_sent(hub) == 0


def test_commands_that_read(hub: FakeHub, commit: str, fp8_checkpoint: Path, bf16_checkpoint: Path) -> None:
    local, remote = dsv3_tools.inspect(fp8_checkpoint), dsv3_tools.inspect(REPO)
    assert (remote.parameters, remote.dtypes, remote.odd) == (local.parameters, local.dtypes, local.odd)
    assert dsv3_tools.check(REPO).verdicts == dsv3_tools.check(fp8_checkpoint).verdicts
    assert dsv3_tools.verify_structure(REPO).passed
    assert dsv3_tools.verify_tensors(REPO, bf16_checkpoint).passed


def test_revisions(hub: FakeHub, commit: str) -> None:
    repo = hub.repo(REPO)
    repo.refs["v1"] = commit
    newer = repo.commit({"NOTES": b"new"}, message="notes")
    for revision, expected in (("main", newer), ("v1", commit), (commit, commit)):
        with dsv3_tools.Checkpoint(f"{REPO}@{revision}") as found:
            assert found.source == HubRepo(REPO, revision, expected)
    with pytest.raises(CheckpointError, match="no such revision"):
        dsv3_tools.Checkpoint(f"{REPO}@v9")


def test_a_branch_that_moves_meanwhile(hub: FakeHub, commit: str, fp8_checkpoint: Path) -> None:
    with dsv3_tools.Checkpoint(fp8_checkpoint) as local, dsv3_tools.Checkpoint(REPO) as remote:
        hub.repo(REPO).commit({SHARD: b"other weights", "config.json": b"{}"}, message="another model")
        name = next(name for name, shard in remote.weight_map.items() if shard == SHARD)
        assert remote.read_bytes(name) == local.read_bytes(name)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_offline(
    hub: FakeHub, commit: str, fp8_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the cache has opens as it does online, at the commit that it is of; a run goes on either way."""
    dsv3_tools.verify_structure(REPO)
    with dsv3_tools.Checkpoint(REPO) as before:
        travel = before.side_files()[0]
        for name in travel:
            before.read_file(name, 10**6)
    offline(monkeypatch)
    hub.forget()
    with dsv3_tools.Checkpoint(REPO) as opened:
        assert opened.source == HubRepo(REPO, "main", commit)
        assert (opened.specs, opened.shards) == (before.specs, before.shards)
    result = dsv3_tools.convert_fp8_to_bf16(REPO, tmp_path / "out", device="cpu")
    assert result.shards_written == 4
    assert not hub.requests


def test_offline_without_a_cache(hub: FakeHub, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE"):
        dsv3_tools.Checkpoint(REPO)
    assert not hub.requests


# ------------------------------------------------------------------------------------------------ its faults


def test_no_such_model(hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match=r"hf://org/none@main: the Hub has no such model"):
        dsv3_tools.Checkpoint("org/none")
    hub.add_repo("org/empty", {"NOTES": b""})
    with pytest.raises(CheckpointError, match=r"config\.json: there is no such file on the Hub"):
        dsv3_tools.Checkpoint("org/empty")


def test_gated_and_private(hub: FakeHub, fp8_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path.name: path for path in fp8_checkpoint.iterdir()}
    hub.add_repo("org/gated", files, gated=True)
    hub.add_repo("org/private", files, private=True)
    with pytest.raises(NetworkError, match="is gated: ask for access"):
        dsv3_tools.Checkpoint("org/gated")
    with pytest.raises(CheckpointError, match="shows it to others only"):
        dsv3_tools.Checkpoint("org/private")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    dsv3_tools.Checkpoint("org/private").close()


def test_no_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match="the Hub could not be reached") as caught:
        dsv3_tools.Checkpoint("org/name")
    assert caught.value.exit_code == 7
    assert len(waits) >= ATTEMPTS - 1


@pytest.mark.parametrize(
    "fault",
    [Fault.status(500), Fault.status(503), Fault.drop(), Fault.drop(reset=True), Fault.rate_limited(3)],
)
@pytest.mark.parametrize("pattern", ["/api/models/*", "*/config.json", f"*/{SHARD}"])
def test_what_passes_by_itself(hub: FakeHub, commit: str, fault: Fault, pattern: str) -> None:
    hub.faults = [Rule(fault, path=pattern, times=2)]
    with dsv3_tools.Checkpoint(REPO) as opened:
        assert len(opened.shards) == 4


@pytest.mark.parametrize("fault", [Fault.status(500), Fault.drop(), Fault.rate_limited(3), Fault.status(403)])
@pytest.mark.parametrize("pattern", ["/api/models/*", f"*/{SHARD}"])
def test_what_does_not_pass(hub: FakeHub, commit: str, fault: Fault, pattern: str) -> None:
    hub.faults = [Rule(fault, path=pattern, times=None)]
    with pytest.raises(NetworkError) as caught:
        dsv3_tools.Checkpoint(REPO)
    assert str(caught.value).isprintable()


def test_the_hub_says_how_long_to_wait(hub: FakeHub, commit: str, waits: list[float]) -> None:
    hub.faults = [Rule(Fault.rate_limited(37), path="/api/models/*", times=1)]
    dsv3_tools.Checkpoint(REPO).close()
    assert any(37 <= wait <= 40 for wait in waits)


@pytest.mark.parametrize(
    "fault", [Fault.corrupt(at=-2), Fault.short(by=1), Fault.truncated(20), Fault.drop_after(20)]
)
def test_small_files_are_compared_with_their_hash(hub: FakeHub, commit: str, fault: Fault) -> None:
    hub.faults = [Rule(fault, method="GET", path="*/config.json", times=1)]
    dsv3_tools.Checkpoint(REPO).close()
    hub.faults = [Rule(fault, method="GET", path="*/modeling_deepseek.py", times=None)]
    with dsv3_tools.Checkpoint(REPO) as opened, pytest.raises(NetworkError):
        opened.read_file("modeling_deepseek.py", 10**6)


def test_a_server_that_ignores_ranges(hub: FakeHub, commit: str) -> None:
    """It would send gigabytes for a header."""
    hub.faults = [Rule(Fault.status(200), path=f"*/{SHARD}", times=None)]
    with pytest.raises(NetworkError, match="a part was asked for, the answer is 200"):
        dsv3_tools.Checkpoint(REPO)


def hostile(change: Callable[[dict[str, Any]], Any], files: dict[str, Any]) -> dict[str, Any]:
    change(files)
    return files


INDEX_OUTSIDE = json.dumps({"weight_map": {"a": "../x.safetensors"}}).encode()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.pop(SHARD), "no such file on the Hub"),
        (lambda f: f.update({SHARD: b"garbage" * 10}), "not a safetensors file"),
        (lambda f: f.update({SHARD: b""}), "not a safetensors file"),
        (lambda f: f.update({SHARD: (10**12).to_bytes(8, "little") + b"{}"}), "not a safetensors file"),
        (lambda f: f.update({"model-left.safetensors": b"x"}), "is not in the index"),
        (lambda f: f.update({"config.json": b"[]"}), "config.json"),
        (
            lambda f: f.update(
                {
                    "model.safetensors.index.json": json.dumps(
                        {"weight_map": {"a": "../x.safetensors"}}
                    ).encode()
                }
            ),
            "without folders",
        ),
    ],
)
def test_models_that_are_not_what_they_claim(
    hub: FakeHub, fp8_checkpoint: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    hub.add_repo("org/bad", hostile(change, {path.name: path for path in fp8_checkpoint.iterdir()}))
    with pytest.raises(CheckpointError, match=said) as caught:
        dsv3_tools.Checkpoint("org/bad")
    assert "hf://org/bad@" in str(caught.value)
    assert str(caught.value).isprintable()
