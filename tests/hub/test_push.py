"""Results go to the Hub whole: shards first, what makes them a model in the last commit, killed or not."""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import dsv3_tools
from dsv3_tools.conversion import uploading
from dsv3_tools.conversion.hub_target import PushTarget
from dsv3_tools.conversion.progress import Stop
from dsv3_tools.errors import (
    CheckpointError,
    DestinationError,
    Interrupted,
    NetworkError,
    UsageError,
)
from tests.conftest import SMALL
from tests.hub.children import in_child
from tests.hub.faults import Fault, Rule
from tests.hub.server import TOKEN, FakeHub

REPO = "team/result"
INDEX = "model.safetensors.index.json"
LAST = {"config.json", INDEX, "dsv3_manifest.json", "README.md"}


@pytest.fixture(autouse=True)
def _logged_in(client: None, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.organizations.add("team")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    dsv3_tools.sample(path, overrides=SMALL, shards=12, seed=5)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 result; must not be written to."""
    out = tmp_path_factory.mktemp("made") / "out"
    dsv3_tools.convert_fp8_to_bf16(source, out, device="cpu")
    return out


@pytest.fixture
def result(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "result"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def on_hub(hub: FakeHub, revision: str = "main", name: str = REPO) -> dict[str, bytes]:
    return {n: data for n, data in hub.repo(name).tree(revision).items() if n != ".gitattributes"}


def convert(source: Path | str, out: Path, **options: Any) -> Any:
    options = {"device": "cpu", "workers": 2, "push": REPO, **options}
    return dsv3_tools.convert_fp8_to_bf16(source, out, **options)


def index_comes_last(hub: FakeHub, revision: str = "main") -> None:
    """No commit but the last one has an index, and that one has what it lists."""
    history = hub.repo(REPO).history(revision)
    assert [INDEX in commit.tree for commit in history] == [False] * (len(history) - 1) + [True]
    assert {"README.md", "config.json"} <= set(history[-1].added)
    assert not [name for name in history[-1].added if name.endswith(".safetensors")]


# -------------------------------------------------------------------------------------------- `dsv3 push`


def test_a_result_is_pushed(hub: FakeHub, result: Path) -> None:
    done = dsv3_tools.push(result, REPO)
    assert on_hub(hub) == files(result)
    index_comes_last(hub)
    assert (done.repo, done.revision, done.nbytes_there) == (REPO, "main", 0)
    assert done.commit == hub.repo(REPO).history("main")[-1].sha
    assert ModelCard(on_hub(hub)["README.md"].decode()).data.to_dict()["pipeline_tag"] == "text-generation"


def test_pushed_again_nothing_is_sent(hub: FakeHub, result: Path) -> None:
    dsv3_tools.push(result, REPO)
    hub.forget()
    again = dsv3_tools.push(result, REPO)
    assert again.nbytes_there > 0.9 * again.nbytes
    assert not [seen for seen in hub.requests if seen.method == "PUT"]
    assert on_hub(hub) == files(result)


def test_what_stays_here(hub: FakeHub, result: Path) -> None:
    (result / "training.bin").write_bytes(b"pickle")
    (result / ".cache").mkdir()
    (result / ".cache" / "x").write_text("x")
    (result / "assets").mkdir()
    (result / "assets" / "figure.png").write_bytes(b"png")
    done = dsv3_tools.push(result, REPO)
    assert done.left_out == ("training.bin",)
    assert {"assets/figure.png", INDEX} <= on_hub(hub).keys()
    assert not {"training.bin", ".cache/x"} & on_hub(hub).keys()


def test_a_branch_and_a_private_model(hub: FakeHub, result: Path) -> None:
    dsv3_tools.push(result, REPO, revision="v2", private=True)
    assert on_hub(hub, "v2") == files(result)
    assert INDEX not in on_hub(hub)
    assert hub.repo(REPO).private


def test_a_pull_request_is_gone_on_with(hub: FakeHub, result: Path) -> None:
    hub.add_repo(REPO, {"NOTES": b"theirs"})
    done = dsv3_tools.push(result, REPO, create_pr=True)
    assert done.revision == "refs/pr/1"
    assert done.url == f"{hub.url}/{REPO}/discussions/1"
    assert dsv3_tools.push(result, REPO, create_pr=True).revision == "refs/pr/1"
    assert {name: data for name, data in on_hub(hub, "refs/pr/1").items() if name != "NOTES"} == files(result)
    assert on_hub(hub).keys() == {"NOTES"}


def test_dry_run(hub: FakeHub, result: Path) -> None:
    planned = dsv3_tools.push(result, REPO, dry_run=True)
    assert planned.commit == ""
    assert planned.files.keys() == files(result).keys()
    assert {seen.method for seen in hub.requests} <= {"GET", "HEAD"}
    dsv3_tools.push(result, REPO)
    assert dsv3_tools.push(result, REPO, dry_run=True).nbytes_there > 0.9 * planned.nbytes


def unfinished(folder: Path) -> None:
    (folder / ".dsv3").mkdir()


def without_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def without_a_shard(folder: Path) -> None:
    (folder / "model-00003-of-000012.safetensors").unlink()


def shortened(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("")


@pytest.mark.parametrize("damage", [unfinished, without_index, without_a_shard, shortened])
def test_what_is_not_finished_is_refused(hub: FakeHub, result: Path, damage: Callable[[Path], None]) -> None:
    damage(result)
    with pytest.raises(CheckpointError):
        dsv3_tools.push(result, REPO)
    assert not hub.requests


def test_a_shard_that_is_not_what_was_made(hub: FakeHub, result: Path) -> None:
    shard = result / "model-00002-of-000012.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model-00002-of-000012\.safetensors: has the SHA-256"):
        dsv3_tools.push(result, REPO)
    assert INDEX not in on_hub(hub)


def test_other_weights_are_there(hub: FakeHub, result: Path, source: Path) -> None:
    hub.add_repo(REPO, {"model-00001-of-000002.safetensors": b"theirs"})
    for act in (lambda: dsv3_tools.push(result, REPO), lambda: convert(source, result.with_name("new"))):
        with pytest.raises(DestinationError, match="no part of this result"):
            act()
    assert on_hub(hub).keys() == {"model-00001-of-000002.safetensors"}
    assert not result.with_name("new").exists()


@pytest.mark.parametrize("name", ["result", "a/b/c", "hf://a", "team/re sult", "", "team/"])
def test_no_name_of_a_model(name: str) -> None:
    with pytest.raises(UsageError, match="is no model on the Hub"):
        PushTarget.parse(name)


def test_a_pull_request_has_no_branch(result: Path) -> None:
    with pytest.raises(UsageError, match="made against main"):
        dsv3_tools.push(result, f"{REPO}@v2", create_pr=True)


def test_who_may_not_write(hub: FakeHub, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change in (
        lambda: monkeypatch.delenv("HF_TOKEN"),
        lambda: (hub.read_tokens.add("hf_r"), monkeypatch.setenv("HF_TOKEN", "hf_r")),
    ):
        change()
        with pytest.raises(NetworkError, match="a token that may do this is needed") as caught:
            dsv3_tools.push(result, REPO)
        assert "hf_r" not in str(caught.value)


@pytest.mark.parametrize(
    "fault",
    [
        Fault.status(500),
        Fault.drop(),
        Fault.rate_limited(3),
        Fault.lose_answer(),
        Fault.drop_upload_after(2000),
    ],
)
def test_faults_that_pass(hub: FakeHub, result: Path, fault: Fault) -> None:
    hub.faults = [Rule(fault, path="*", first=n, times=1) for n in range(3, 40, 7)]
    dsv3_tools.push(result, REPO)
    assert on_hub(hub) == files(result)
    index_comes_last(hub)


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_faults_that_do_not(hub: FakeHub, result: Path, method: str) -> None:
    path = "*/commit/*" if method == "POST" else "*"
    hub.faults = [Rule(Fault.status(503), method=method, path=path, times=None)]
    with pytest.raises(NetworkError, match="the Hub answers 503") as caught:
        dsv3_tools.push(result, REPO)
    assert caught.value.exit_code == 7
    assert INDEX not in on_hub(hub)
    hub.faults = []
    dsv3_tools.push(result, REPO)
    assert on_hub(hub) == files(result)


# ------------------------------------------------------------------------------------------- while it is made


def test_shards_go_as_they_come(hub: FakeHub, source: Path, made: Path, tmp_path: Path) -> None:
    done = convert(source, tmp_path / "out")
    assert on_hub(hub) == files(made)
    index_comes_last(hub)
    history = hub.repo(REPO).history("main")
    assert len([commit for commit in history if commit.message.startswith("dsv3 fp8-to-bf16")]) >= 3
    assert done.pushed == f"hf://{REPO}@{history[-1].sha}"
    assert files(tmp_path / "out").keys() - files(made).keys() == {"dsv3_push.json"}
    assert convert(source, tmp_path / "out").already_complete
    assert len(hub.repo(REPO).history("main")) == len(history)


def test_nothing_need_stay(
    hub: FakeHub, source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    monkeypatch.setattr(uploading, "_BATCH", 2)
    monkeypatch.setattr(uploading, "PENDING", 4)

    def look(_: Any) -> None:
        nonlocal most
        most = max(most, len(list((tmp_path / "out").glob("*.safetensors"))))

    convert(source, tmp_path / "out", keep_output=False, on_progress=look)
    assert on_hub(hub) == files(made)
    assert 1 <= most <= 4 + 2
    left = files(tmp_path / "out").keys()
    assert left == {*files(made), "dsv3_push.json"} - {INDEX} - {n for n in files(made) if n.endswith("rs")}
    with pytest.raises(CheckpointError):  # and nobody takes that for a checkpoint
        dsv3_tools.Checkpoint(tmp_path / "out")
    again = convert(source, tmp_path / "out", keep_output=False)
    assert again.already_complete
    assert again.pushed is not None


def test_from_one_model_to_another(hub: FakeHub, source: Path, made: Path, tmp_path: Path) -> None:
    hub.add_repo("team/source", {path.name: path for path in source.iterdir()})
    dsv3_tools.convert_fp8_to_bf16(
        "team/source", tmp_path / "out", push=REPO, keep_output=False, device="cpu"
    )
    weights = {n: data for n, data in on_hub(hub).items() if n.endswith(".safetensors")}
    assert weights == {n: data for n, data in files(made).items() if n.endswith(".safetensors")}
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_finished_result_is_pushed_when_asked_later(
    hub: FakeHub, source: Path, made: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out", push=None)
    done = convert(source, tmp_path / "out")
    assert done.already_complete
    assert on_hub(hub) == files(made)
    index_comes_last(hub)


def test_half_of_a_split(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    dsv3_tools.split_mtp(source, mtp=tmp_path / "mtp", push=REPO, keep_output=False)
    assert INDEX in on_hub(hub)
    with pytest.raises(UsageError):
        dsv3_tools.split_mtp(source, main=tmp_path / "a", mtp=tmp_path / "b", push="team/two")


def test_keeping_nothing_asks_for_a_push(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="asks for --push"):
        convert(source, tmp_path / "out", push=None, keep_output=False)


def test_a_refusal_comes_before_what_is_overwritten(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", push=None)
    before = files(tmp_path / "out")
    with pytest.raises(NetworkError):
        convert(source, tmp_path / "out", push="elsewhere/result", overwrite=True, max_shard_size=10**6)
    assert files(tmp_path / "out") == before


def test_uploading_fails(hub: FakeHub, source: Path, made: Path, tmp_path: Path) -> None:
    hub.faults = [Rule(Fault.status(500), method="PUT", path="*", first=4, times=None)]
    with pytest.raises(NetworkError, match="the Hub answers 500"):
        convert(source, tmp_path / "out", keep_output=False)
    assert INDEX not in on_hub(hub)
    hub.faults = []
    convert(source, tmp_path / "out", keep_output=False)
    assert on_hub(hub) == files(made)
    index_comes_last(hub)


def test_stopped_and_gone_on_with(hub: FakeHub, source: Path, made: Path, tmp_path: Path) -> None:
    stop = Stop()
    with pytest.raises(Interrupted):
        convert(
            source,
            tmp_path / "out",
            keep_output=False,
            stop=stop,
            on_progress=lambda now: now.shards_done > 6 and stop.set(signal.SIGINT),
        )
    convert(source, tmp_path / "out", keep_output=False)
    assert on_hub(hub) == files(made)


# ------------------------------------------------------------------------------------- what must not be lost


def test_a_resumed_run_that_keeps_its_output_makes_what_has_gone(
    hub: FakeHub, source: Path, made: Path, tmp_path: Path
) -> None:
    """Shards that went to the Hub and were removed are no part of a result that is wanted here."""
    hub.faults = [Rule(Fault.status(403), method="POST", path="*/commit/*", first=4, times=None)]
    with pytest.raises(NetworkError):
        convert(source, tmp_path / "out", keep_output=False)
    hub.faults = []
    assert len(list((tmp_path / "out").glob("*.safetensors"))) < 12
    convert(source, tmp_path / "out")
    assert {n: data for n, data in files(tmp_path / "out").items() if n != "dsv3_push.json"} == files(made)


def test_a_shard_removed_after_a_push_is_missed(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    (tmp_path / "out" / "model-00002-of-000012.safetensors").unlink()
    with pytest.raises(DestinationError):
        convert(source, tmp_path / "out", push=None)


def test_what_went_to_the_hub_alone_is_not_here(
    hub: FakeHub, source: Path, made: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out", keep_output=False)
    for options in ({"push": None}, {"push": REPO}, {"push": "team/other", "keep_output": False}):
        with pytest.raises(DestinationError, match=rf"what was left of a result that went to hf://{REPO}@"):
            convert(source, tmp_path / "out", **options)
    convert(source, tmp_path / "out", push=None, overwrite=True)
    assert files(tmp_path / "out") == files(made)


def test_it_is_looked_for_on_the_hub(hub: FakeHub, source: Path, made: Path, tmp_path: Path) -> None:
    """A result that is said to be there, and is not any more, is uploaded again if it is here."""
    convert(source, tmp_path / "out")
    hub.repo(REPO).commit({INDEX: b"{}"}, deleted=["model-00001-of-000012.safetensors"], message="broken")
    assert convert(source, tmp_path / "out").already_complete
    assert on_hub(hub) == files(made)
    convert(source, tmp_path / "out", push=f"{REPO}@v2")
    assert on_hub(hub, "v2") == files(made)


def test_another_model_of_the_same_names_is_left_alone(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    """BF16 shards have the names of the FP8 ones that they are made of: say, those of the source itself."""
    hub.add_repo(REPO, {path.name: path for path in source.iterdir()})
    before = on_hub(hub)
    with pytest.raises(DestinationError, match="holds another model"):
        convert(REPO, tmp_path / "out")
    assert on_hub(hub) == before


@pytest.mark.parametrize("names", ["the same", "others"])
def test_another_model_is_replaced_on_request(
    hub: FakeHub, source: Path, made: Path, result: Path, names: str
) -> None:
    """At no commit stand shards of both under one index."""
    theirs = {path.name: path for path in source.iterdir()}
    if names == "others":
        theirs = {INDEX: b"{}", "config.json": b"{}", "model-00001-of-000001.safetensors": b"theirs"}
    hub.add_repo(REPO, theirs)
    with pytest.raises(DestinationError):
        dsv3_tools.push(result, REPO)
    with pytest.raises(DestinationError):
        dsv3_tools.push(result, REPO, dry_run=True)
    dsv3_tools.push(result, REPO, overwrite=True)
    assert on_hub(hub) == files(made)
    history = hub.repo(REPO).history("main")
    with_index = [INDEX in commit.tree for commit in history]
    assert with_index == [True, *[False] * (len(history) - 2), True]


def test_a_users_text_on_the_hub_stays(hub: FakeHub, result: Path) -> None:
    dsv3_tools.push(result, REPO)
    card = on_hub(hub)["README.md"].decode()
    edited = card.replace("pipeline_tag: text-generation", "pipeline_tag: other") + "\nMine.\n"
    hub.repo(REPO).commit({"README.md": edited.encode()}, message="my words")
    dsv3_tools.push(result, REPO)
    assert on_hub(hub)["README.md"].decode() == edited


def test_what_is_neither_here_nor_there(hub: FakeHub, source: Path, made: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", keep_output=False)
    names = [name for name in on_hub(hub) if name.endswith(".safetensors")]
    hub.repo(REPO).commit({}, deleted=[*names, INDEX], message="gone")
    with pytest.raises(DestinationError, match="has them no more; --overwrite makes them again"):
        convert(source, tmp_path / "out", keep_output=False)
    convert(source, tmp_path / "out", keep_output=False, overwrite=True)
    assert on_hub(hub) == files(made)


def test_a_finished_result_leaves_when_asked_later(
    hub: FakeHub, source: Path, made: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out", push=None)
    convert(source, tmp_path / "out", keep_output=False)
    assert on_hub(hub) == files(made)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert not (tmp_path / "out" / INDEX).exists()


def test_a_pull_request_never_mixes_models(hub: FakeHub, source: Path, made: Path, result: Path) -> None:
    hub.add_repo(REPO, {path.name: path for path in source.iterdir()})
    with pytest.raises(DestinationError, match="holds another model"):
        dsv3_tools.push(result, REPO, create_pr=True)
    dsv3_tools.push(result, REPO, create_pr=True, overwrite=True)
    assert on_hub(hub, "refs/pr/1") == files(made)
    with_index = [INDEX in commit.tree for commit in hub.repo(REPO).history("refs/pr/1")]
    assert with_index == [True, *[False] * (len(with_index) - 2), True]


def test_offline(result: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE is set, so nothing can be uploaded"):
        dsv3_tools.push(result, REPO)
    assert not waits


def test_links_out_of_the_directory_are_refused(hub: FakeHub, result: Path) -> None:
    secret = result.parent / "secret"
    secret.write_text("secret")
    (result / "notes.txt").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"notes\.txt: is a link to"):
        dsv3_tools.push(result, REPO)
    assert not hub.requests


@pytest.mark.parametrize("what", ["push", "run"])
def test_stopping_during_a_slow_upload(hub: FakeHub, source: Path, result: Path, what: str) -> None:
    stop = Stop()
    hub.rate = 50e3
    threading.Timer(1.5, lambda: stop.set(signal.SIGTERM)).start()
    began = time.monotonic()
    acts: dict[str, Callable[[], object]] = {
        "push": lambda: dsv3_tools.push(result, REPO, stop=stop),
        "run": lambda: convert(source, result.with_name("new"), stop=stop),
    }
    with pytest.raises(Interrupted):
        acts[what]()
    assert time.monotonic() - began < 10
    hub.rate = None  # what was left to itself ends before the next test
    for thread in threading.enumerate():
        if thread.name.startswith("dsv3"):
            thread.join(20)


def test_two_branches(result: Path) -> None:
    with pytest.raises(UsageError, match="are two branches"):
        dsv3_tools.push(result, f"{REPO}@one", revision="two")


def test_integrity_on_the_hub(hub: FakeHub, result: Path) -> None:
    dsv3_tools.push(result, REPO)
    hub.forget()
    report = dsv3_tools.verify_integrity(REPO)
    assert (report.passed, report.hashes_from) == (True, "manifest")
    assert not [seen for seen in hub.requests if seen.path.startswith("/cdn/") and seen.range is None]
    shard = "model-00002-of-000012.safetensors"
    changed = bytearray((result / shard).read_bytes())
    changed[-1] ^= 1
    hub.repo(REPO).commit({shard: bytes(changed), "tokenizer.json": b"[]"}, message="changed")
    problems = dsv3_tools.verify_integrity(REPO).problems
    assert [problem.partition(":")[0] for problem in problems] == [shard, "tokenizer.json"]


def killed_often(act: Callable[[int], object], check: Callable[[int], None]) -> None:
    """Kills `act` at 20 random moments; it is run again each time."""
    chance, killed = random.Random(2), 0
    began = time.monotonic()
    act(999)
    duration = time.monotonic() - began
    for number in range(100):
        if killed == 20:
            return
        code = in_child(lambda number=number: act(number), chance.uniform(0, duration))  # type: ignore[misc]
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        act(number)
        check(number)
    raise AssertionError(f"only {killed} runs lived long enough to be killed")


def test_a_push_killed_at_twenty_moments(hub: FakeHub, result: Path) -> None:
    def check(number: int) -> None:
        assert on_hub(hub, name=f"team/r{number}") == files(result)

    killed_often(lambda number: dsv3_tools.push(result, f"team/r{number}"), check)


@pytest.mark.parametrize("keep", [True, False])
def test_a_run_that_pushes_killed_at_twenty_moments(
    hub: FakeHub, source: Path, made: Path, tmp_path: Path, keep: bool
) -> None:
    def act(number: int) -> None:
        convert(source, tmp_path / str(number), push=f"team/r{number}", keep_output=keep)

    def check(number: int) -> None:
        assert on_hub(hub, name=f"team/r{number}") == files(made)
        history = hub.repo(f"team/r{number}").history("main")
        first = next(n for n, commit in enumerate(history) if INDEX in commit.tree)
        weights = {name for name in files(made) if name.endswith(".safetensors")}
        assert all(weights <= commit.tree.keys() for commit in history[first:])

    killed_often(act, check)
