"""A run from the Hub gives what one from a directory gives, with a few source shards on disk at once."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dsv3_tools
from dsv3_tools.checkpoint.hub import HubFiles
from dsv3_tools.conversion import crew, fetching
from dsv3_tools.conversion.api import open_fp8_to_bf16
from dsv3_tools.conversion.destination import read_manifest
from dsv3_tools.conversion.executor import RunResult, run
from dsv3_tools.conversion.fetching import PREFETCH, SourceShard, peak_nbytes
from dsv3_tools.conversion.options import RunOptions
from dsv3_tools.conversion.progress import Stop
from dsv3_tools.errors import CheckpointError, DestinationError, Dsv3Error, Interrupted, NetworkError
from tests.conftest import SMALL
from tests.hub.children import in_child
from tests.hub.faults import Fault, Rule
from tests.hub.server import FakeHub

pytestmark = pytest.mark.usefixtures("client")

REPO = "org/model"
OWN = ("dsv3_manifest.json", "README.md")
"""What says where the source was, and so differs."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shards, some of whose scales lie in another shard than their codes."""
    path = tmp_path_factory.mktemp("source") / "model"
    dsv3_tools.sample(path, overrides=SMALL, shards=12, seed=5)
    (path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The BF16 result of a run from the directory."""
    out = tmp_path_factory.mktemp("expected") / "out"
    dsv3_tools.convert_fp8_to_bf16(source, out, device="cpu")
    return snapshot(out)


@pytest.fixture
def model(hub: FakeHub, source: Path) -> str:
    """The same on the hub; returns its commit."""
    return hub.add_repo(REPO, {path.name: path for path in source.iterdir()})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in OWN
    }


def convert(out: Path, source: str = REPO, **options: Any) -> RunResult:
    return dsv3_tools.convert_fp8_to_bf16(source, out, **{"device": "cpu", "workers": 2, **options})


def leftovers(hub_home: Path) -> list[str]:
    """Returns the shards in the cache."""
    return sorted(path.name for path in hub_home.rglob("*.safetensors"))


# -------------------------------------------------------------------------------------------- what it gives


def test_the_same_bytes(
    hub: FakeHub, model: str, expected: dict[str, bytes], tmp_path: Path, hub_home: Path
) -> None:
    result = convert(tmp_path / "out")
    assert snapshot(tmp_path / "out") == expected
    assert result.shards_written == 12
    assert leftovers(hub_home) == []
    manifest = read_manifest(tmp_path / "out")
    assert manifest["repositories"] == {"source": {"repo": REPO, "revision": "main", "commit": model}}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {REPO}" in card
    assert "license: mit" in card
    assert model in card
    assert str(tmp_path) not in card
    assert convert(tmp_path / "out").already_complete


COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("quantize_int8", {}),
    "int4": ("quantize_int4", {"group_size": 32}),
    "gptq": ("quantize_int4", {"layout": "gptq", "group_size": 32}),
    "demo": ("convert_to_deepseek_infer", {"model_parallel": 1}),
    "resharded": ("convert_fp8_to_bf16", {"max_shard_size": 700_000}),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command(hub: FakeHub, model: str, source: Path, tmp_path: Path, name: str) -> None:
    function, options = COMMANDS[name]
    for origin, out in ((source, "local"), (REPO, "remote")):
        getattr(dsv3_tools, function)(origin, tmp_path / out, device="cpu", **options)
    assert snapshot(tmp_path / "remote") == snapshot(tmp_path / "local")


def test_awq_which_is_looked_at_for_its_plan(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    dsv3_tools.quantize_int4(source, tmp_path / "awq", layout="awq", group_size=32, device="cpu")
    hub.add_repo("org/awq", {path.name: path for path in (tmp_path / "awq").iterdir()})
    for origin, out in ((tmp_path / "awq", "local"), ("org/awq", "remote")):
        dsv3_tools.convert_int4_to_bf16(origin, tmp_path / out, device="cpu")
    assert snapshot(tmp_path / "remote") == snapshot(tmp_path / "local")


def test_split_and_merge(hub: FakeHub, model: str, source: Path, tmp_path: Path, hub_home: Path) -> None:
    """Merging reads two models; shared copies are compared, for which their shards come first."""
    dsv3_tools.split_mtp(REPO, main=tmp_path / "main", mtp=tmp_path / "mtp")
    for half in ("main", "mtp"):
        hub.add_repo(f"org/{half}", {path.name: path for path in (tmp_path / half).iterdir()})
    dsv3_tools.merge_mtp("org/main", "org/mtp", tmp_path / "whole")
    assert snapshot(tmp_path / "whole") == snapshot(source)
    assert leftovers(hub_home) == []


def test_like(hub: FakeHub, model: str, source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    convert(tmp_path / "bf16")
    dsv3_tools.convert_bf16_to_fp8(tmp_path / "bf16", tmp_path / "fp8", like=REPO, device="cpu")
    assert snapshot(tmp_path / "fp8") == snapshot(source)


# ------------------------------------------------------------------------------------------- what lies around


def present(out: Path) -> list[int]:
    """Returns the sizes of the source shards that lie beside a result, half-fetched ones as well."""
    folder = f"{out}/.dsv3/source-*/*"
    names = glob(f"{folder}/*.safetensors") + glob(f"{folder}/.cache/huggingface/download/*.incomplete")
    return [size for size in map(size_of, names) if size is not None]


def size_of(name: str) -> int | None:
    try:
        return os.stat(name).st_size
    except FileNotFoundError:
        return None


class Watch:
    """Looks at a destination all the time."""

    def __init__(self, out: Path) -> None:
        self.most = self.most_nbytes = 0
        self._out, self._done = out, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.is_set():
            sizes = present(self._out)
            self.most, self.most_nbytes = max(self.most, len(sizes)), max(self.most_nbytes, sum(sizes))


def pinned_by_scales(source: Path) -> int:
    """Returns the most shards that a later output needs as well as an earlier one."""
    with dsv3_tools.Checkpoint(source) as checkpoint:
        homes = checkpoint.weight_map
        order = sorted(checkpoint.shards)
        spans: dict[str, tuple[int, int]] = {}
        for name, shard in homes.items():
            user = order.index(homes.get(name.removesuffix("_scale_inv"), shard))
            first, last = spans.get(shard, (user, user))
            spans[shard] = min(first, user), max(last, user)
    return max(sum(first < now <= last for first, last in spans.values()) for now in range(len(order)))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_few_source_shards_at_once(
    hub: FakeHub, model: str, source: Path, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "out"
    hub.rate = 40e6
    with open_fp8_to_bf16(REPO) as (plan, checkpoints):
        needs = fetching.absent_shards(plan.shards, checkpoints)
        promised = peak_nbytes(needs, checkpoints, workers + PREFETCH)
    with Watch(out) as watch:
        convert(out, workers=workers)
    allowed = workers + PREFETCH + pinned_by_scales(source)
    assert 2 <= watch.most <= allowed < 12
    assert watch.most_nbytes <= promised < sum(shard.nbytes for shard in plan.shards)
    assert present(out) == []


def test_negative_control_without_a_window(
    hub: FakeHub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "PREFETCH", 99)
    monkeypatch.setattr(HubFiles, "discard", lambda *_: None)
    with Watch(tmp_path / "out") as watch:
        convert(tmp_path / "out")
    assert watch.most >= 10


def test_the_source_is_kept_on_request(
    hub: FakeHub, model: str, expected: dict[str, bytes], tmp_path: Path, hub_home: Path
) -> None:
    convert(tmp_path / "out", keep_source=True)
    assert len(leftovers(hub_home)) == 12
    hub.forget()
    convert(tmp_path / "again")
    assert not [path for path in hub.nbytes_by_path if path.endswith(".safetensors")]
    assert len(leftovers(hub_home)) == 12
    assert snapshot(tmp_path / "again") == expected


def test_every_shard_comes_once(hub: FakeHub, model: str, source: Path, tmp_path: Path) -> None:
    convert(tmp_path / "out")
    sizes = {path.name: path.stat().st_size for path in source.glob("*.safetensors")}
    whole = [seen for seen in hub.requests if seen.path.startswith("/cdn/") and seen.range is None]
    assert sorted(seen.nbytes for seen in whole if seen.method == "GET") == sorted(sizes.values())


def test_no_room_for_what_is_fetched(
    hub: FakeHub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_fp8_to_bf16(REPO) as (plan, _):
        nbytes = plan.nbytes_out
    for free, fits in ((nbytes + 1000, False), (10 * nbytes, True)):
        monkeypatch.setattr("dsv3_tools.conversion.preflight.free_nbytes", lambda _, free=free: free)
        hub.forget()
        if fits:
            convert(tmp_path / "out")
        else:
            with pytest.raises(DestinationError, match="bytes are free, the run needs"):
                convert(tmp_path / "out")
            assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("window", [1, 2, 3, 10])
def test_the_peak_holds_in_any_order(window: int) -> None:
    """Against sets that are filled and emptied while outputs end at random; it is not far above, either."""
    chance, far = random.Random(window), 0.0
    names = [f"s{n}" for n in range(9)]
    sizes = {name: chance.randrange(50, 100) for name in names}
    sized = SimpleNamespace(shards={name: SimpleNamespace(nbytes=sizes[name]) for name in names})
    for _ in range(200):
        needs = {
            f"o{n}": tuple(SourceShard("source", s) for s in chance.sample(names, chance.randrange(0, 3)))
            for n in range(8)
        }
        unfinished, here, peak = dict(needs), set(), 0
        while unfinished:
            within = list(unfinished)[:window]
            here |= {key for output in within for key in needs[output]}
            peak = max(peak, sum(sizes[key.name] for key in here))
            del unfinished[chance.choice(within)]
            here &= {key for keys in unfinished.values() for key in keys}
        bound = peak_nbytes(needs, {"source": sized}, window)  # type: ignore[dict-item]
        assert peak <= bound
        far = max(far, bound / max(peak, 1))
    assert far < 5


# -------------------------------------------------------------------------------------------- what goes wrong


def shard_rules(fault: Fault, times: int | None = 1) -> list[Rule]:
    return [Rule(fault, method="GET", path="/cdn/*", times=times)]


def all_but_published(out: Path) -> None:
    """Nothing that failed looks finished."""
    assert not (out / "model.safetensors.index.json").exists()
    assert not (out / "dsv3_manifest.json").exists()


@pytest.mark.parametrize("seed", range(5))
def test_fifty_dropped_connections(
    hub: FakeHub,
    model: str,
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Ten a run, at random bytes of random shards, in order or not."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    chance = random.Random(seed)
    sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
    kinds: list[Callable[[int], Fault]] = [Fault.drop_after, Fault.truncated]
    faults = {n: chance.choice(kinds)(chance.randrange(min(sizes))) for n in range(1, 30, 3)}
    hub.faults = [Rule(fault, "GET", "/cdn/*", first=n, times=1) for n, fault in faults.items()]
    convert(tmp_path / "out")
    assert snapshot(tmp_path / "out") == expected


@pytest.mark.parametrize(
    "fault",
    [
        Fault.status(500),
        Fault.status(503),
        Fault.rate_limited(5),
        Fault.corrupt(at=-2),
        Fault.corrupt(at=1000),
        Fault.short(by=100),
        Fault.drop(),
    ],
)
def test_faults_that_pass(
    hub: FakeHub, model: str, expected: dict[str, bytes], tmp_path: Path, fault: Fault
) -> None:
    with dsv3_tools.Checkpoint(REPO):
        pass  # headers are read before
    hub.faults = [Rule(fault, method="GET", path="/cdn/*", times=2)]
    convert(tmp_path / "out")
    assert snapshot(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault.status(500), "the Hub answers 500"),
        (Fault.status(403), "the Hub answers 403"),
        (Fault.rate_limited(5), "the Hub answers 429"),
        (Fault.corrupt(at=-2), "its hash is"),
        (Fault.truncated(50_000), "could not be reached"),
        (Fault.drop(), "could not be reached"),
    ],
)
def test_faults_that_do_not(
    hub: FakeHub, model: str, expected: dict[str, bytes], tmp_path: Path, fault: Fault, said: str
) -> None:
    """One shard cannot be had: exit 7 within reach, nothing published, and the same command goes on later."""
    out = tmp_path / "out"
    with open_fp8_to_bf16(REPO) as (plan, checkpoints):
        hub.faults = [Rule(fault, method="GET", path="*model-00007*", times=None)]
        with pytest.raises(NetworkError, match=said) as caught:
            run(plan, checkpoints, out, RunOptions("cpu", 2))
    assert caught.value.exit_code == 7
    assert "model-00007" in str(caught.value)
    assert str(caught.value).isprintable()
    all_but_published(out)
    hub.faults = []
    hub.forget()
    done = [path.name for path in out.glob("*.safetensors")]
    assert done
    result = convert(out)
    assert snapshot(out) == expected
    assert result.shards_resumed == len(done)
    whole = [seen for seen in hub.requests if seen.path.startswith("/cdn/") and seen.range is None]
    assert len(whole) <= 12 - len(done), "a finished shard's source was fetched again"


def test_a_header_damaged_on_the_way(hub: FakeHub, model: str, tmp_path: Path) -> None:
    """It still is a header, of other names perhaps: the whole file, whose hash is right, does not agree."""
    with open_fp8_to_bf16(REPO) as (plan, checkpoints):
        files: Any = checkpoints["source"]._files
        files._headers["model-00003-of-000012.safetensors"] = "0" * 64
        with pytest.raises(NetworkError, match="its header was damaged when it came by itself"):
            run(plan, checkpoints, tmp_path / "out", RunOptions("cpu", 2))
    all_but_published(tmp_path / "out")


def test_damaged_weights_are_found_before_their_output_is_written(
    hub: FakeHub, source: Path, tmp_path: Path
) -> None:
    bad = shutil.copytree(source, tmp_path / "bad")
    with dsv3_tools.Checkpoint(bad) as checkpoint:
        name = next(name for name in checkpoint.specs if name.endswith("weight_scale_inv"))
        shard, offset = checkpoint.location(name)
    with (bad / shard).open("r+b") as file:
        file.seek(offset)
        file.write(b"\0\0\x80\x7f")  # infinity
    hub.add_repo("org/bad", {path.name: path for path in bad.iterdir()})
    with pytest.raises(CheckpointError, match="expected a finite number above 0"):
        convert(tmp_path / "out", "org/bad", workers=1)
    all_but_published(tmp_path / "out")
    assert not (tmp_path / "out" / shard).exists()


def test_a_refusal_leaves_what_was_to_be_overwritten(
    hub: FakeHub, model: str, source: Path, tmp_path: Path
) -> None:
    """Shared copies that differ are found when their shards have come, before anything is removed."""
    dsv3_tools.split_mtp(source, main=tmp_path / "main", mtp=tmp_path / "mtp")
    with dsv3_tools.Checkpoint(tmp_path / "mtp") as module:
        name = next(name for name in module.specs if name.endswith("embed_tokens.weight"))
        shard, offset = module.location(name)
    with (tmp_path / "mtp" / shard).open("r+b") as file:
        file.seek(offset)
        file.write(b"\1\1")
    for half in ("main", "mtp"):
        hub.add_repo(f"org/{half}", {path.name: path for path in (tmp_path / half).iterdir()})
    convert(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    with pytest.raises(CheckpointError, match="elements differ"):
        dsv3_tools.merge_mtp("org/main", "org/mtp", tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path / "out") == before
    with pytest.raises(CheckpointError, match="elements differ"):
        dsv3_tools.merge_mtp("org/main", "org/mtp", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_killed_runs_have_fetched_is_used_or_removed(
    hub: FakeHub, model: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stop = Stop()
    with pytest.raises(Interrupted):
        convert(out, on_progress=lambda now: now.shards_done and stop.set(2), stop=stop)
    folder = out / ".dsv3" / "source-0" / "source"
    (folder / ".cache/huggingface/download").mkdir(parents=True, exist_ok=True)
    (folder / ".cache/huggingface/download/x.1.incomplete").write_bytes(b"x" * 1000)
    (folder / "model-00001-of-000012.safetensors").write_bytes(b"of a shard that is done")
    (out / ".dsv3" / "source-7" / "source").mkdir(parents=True)
    (out / ".dsv3" / "source-7" / "source" / "model-00002-of-000012.safetensors").write_bytes(b"x")
    seen: list[int] = []
    convert(out, on_progress=lambda _: seen.append(len(glob(f"{out}/.dsv3/source-7"))))
    assert not any(seen)
    assert snapshot(out) == expected


def test_a_branch_that_moves_between_two_runs(
    hub: FakeHub, model: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The second run goes on with the commit of the first one; a fresh one takes the new commit."""
    stop = Stop()
    with pytest.raises(Interrupted):
        convert(
            tmp_path / "out", on_progress=lambda now: now.shards_done and stop.set(signal.SIGINT), stop=stop
        )
    moved = hub.repo(REPO).commit({"config.json": b"{}"}, message="broken")
    convert(tmp_path / "out")
    assert snapshot(tmp_path / "out") == expected
    with pytest.raises(Dsv3Error):
        convert(tmp_path / "fresh")
    assert moved != model


def test_a_finished_result_of_an_earlier_commit(
    hub: FakeHub, model: str, source: Path, tmp_path: Path
) -> None:
    convert(tmp_path / "out")
    newer = hub.repo(REPO).commit({"tokenizer.json": b"[]"}, message="newer")
    with pytest.raises(DestinationError, match=rf"{REPO} at commit {model}, hf://{REPO}@{newer} is newer"):
        convert(tmp_path / "out")
    convert(tmp_path / "out", overwrite=True)
    assert convert(tmp_path / "out").already_complete


def test_stopping_during_a_slow_download(hub: FakeHub, model: str, tmp_path: Path) -> None:
    stop = Stop()
    with open_fp8_to_bf16(REPO) as (plan, checkpoints):
        hub.rate = 100e3
        timer = threading.Timer(0.5, lambda: stop.set(signal.SIGTERM))
        timer.start()
        began = time.monotonic()
        with pytest.raises(Interrupted) as caught:
            dsv3_tools.conversion.executor.run(
                plan,
                checkpoints,
                tmp_path / "out",
                dsv3_tools.conversion.options.RunOptions("cpu", 2, stop=stop),
            )
        assert time.monotonic() - began < 10
    assert caught.value.exit_code == 128 + signal.SIGTERM


def test_killed_at_fifty_moments(
    hub: FakeHub, model: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    chance, out, killed = random.Random(1), tmp_path / "out", 0
    began = time.monotonic()
    convert(out)
    duration = time.monotonic() - began
    for _ in range(200):
        if killed == 50:
            return
        if killed % 2 == 0:  # else once more, while it resumes
            shutil.rmtree(out, ignore_errors=True)
        code = in_child(lambda: convert(out), chance.uniform(0, duration))
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        found = {name: data for name, data in snapshot(out).items() if not name.startswith(".dsv3")}
        assert all(data == expected[name] for name, data in found.items())
        if killed % 2 == 0:
            convert(out)
            assert snapshot(out) == expected
    raise AssertionError(f"only {killed} runs lived long enough to be killed")


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
