"""The hub of the tests, as huggingface_hub sees it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.client import environment
from tests.hub.faults import Fault, Rule, Throttle
from tests.hub.server import TOKEN, FakeHub

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = bytes(range(256)) * 1000
CARD = b"---\nlicense: mit\ntags:\n- fp8\n---\n# A model\n"
FILES = {"README.md": CARD, "config.json": b'{"a": 1}', "sub/model.safetensors": WEIGHTS}


@pytest.fixture
def api(hub: FakeHub, client: None) -> HfApi:
    """A client with a token that may write."""
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture
def sha(hub: FakeHub) -> str:
    """The commit of "org/name"."""
    return hub.add_repo("org/name", FILES)


def large_url(hub: FakeHub) -> str:
    """Where the large object is, as the hub redirects to it."""
    answer = httpx2.head(f"{hub.url}/org/name/resolve/main/sub/model.safetensors")
    assert answer.status_code == 302
    return answer.headers["Location"]


def read_into(got: bytearray, answer: httpx2.Response) -> None:
    """Appends the body, as far as it comes."""
    for piece in answer.iter_raw():
        got += piece


def test_model_info_lists_files_with_sizes_and_hashes(hub: FakeHub, api: HfApi, sha: str) -> None:
    info = api.model_info("org/name", files_metadata=True)
    assert (info.id, info.sha, info.private, info.gated) == ("org/name", sha, False, False)
    assert info.card_data is not None and info.card_data.license == "mit" and info.tags == ["fp8"]
    assert info.siblings is not None
    files = {file.rfilename: file for file in info.siblings}
    assert {name: file.size for name, file in files.items()} == {n: len(data) for n, data in FILES.items()}
    config, weights = files["config.json"], files["sub/model.safetensors"]
    assert config.lfs is None
    assert config.blob_id == hashlib.sha1(b"blob 8\0" + FILES["config.json"]).hexdigest()
    assert weights.lfs is not None and weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert weights.lfs.size == len(WEIGHTS) and weights.blob_id != weights.lfs.sha256


def test_revisions_are_branches_commits_and_pull_requests(hub: FakeHub, api: HfApi, sha: str) -> None:
    repo = hub.repo("org/name")
    repo.refs["v1/x"] = sha
    later = repo.commit({"new.txt": b"new"}, deleted=["config.json"], message="Later")
    repo.open_discussion("A change", pull_request=True, start=sha)
    on_pull = repo.commit({"pull.txt": b""}, branch="refs/pr/1")
    expected = {"main": later, sha: sha, "v1/x": sha, "refs/pr/1": on_pull}
    assert {rev: api.model_info("org/name", revision=rev).sha for rev in expected} == expected
    assert [commit.title for commit in api.list_repo_commits("org/name")] == ["Later", "Add files"]
    refs = api.list_repo_refs("org/name", include_pull_requests=True)
    assert {ref.ref for ref in refs.branches} == {"refs/heads/main", "refs/heads/v1/x"}
    assert refs.pull_requests is not None and refs.pull_requests[0].target_commit == on_pull
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/name", revision="nowhere")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("org/name", "README.md", revision="nowhere")


@pytest.mark.parametrize("page_size", [1000, 2])
def test_tree_and_paths(hub: FakeHub, api: HfApi, sha: str, page_size: int) -> None:
    hub.page_size = page_size
    flat = {entry.path for entry in api.list_repo_tree("org/name")}
    assert flat == {"README.md", "config.json", "sub"}
    deep = {entry.path: entry for entry in api.list_repo_tree("org/name", recursive=True, expand=True)}
    assert set(deep) == {*flat, "sub/model.safetensors"}
    assert deep["config.json"].last_commit is not None and deep["config.json"].last_commit.oid == sha
    assert [entry.path for entry in api.list_repo_tree("org/name", "sub")] == ["sub/model.safetensors"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("org/name", "nowhere"))
    found = api.get_paths_info("org/name", ["sub", "sub/model.safetensors", "nowhere"])
    assert [entry.path for entry in found] == ["sub", "sub/model.safetensors"]
    assert found[1].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()  # type: ignore[union-attr]


def test_downloads_into_the_cache_and_into_a_folder(
    hub: FakeHub, client: None, sha: str, tmp_path: Path, hub_home: Path
) -> None:
    cached = Path(hf_hub_download("org/name", "sub/model.safetensors"))
    assert cached.read_bytes() == WEIGHTS and cached.is_relative_to(hub_home / "hub")
    assert sha in cached.parts
    assert hub.nbytes_by_path == {"sub/model.safetensors": len(WEIGHTS)}
    local = Path(hf_hub_download("org/name", "config.json", local_dir=tmp_path / "local"))
    assert local.read_bytes() == FILES["config.json"]
    hub.forget()
    assert hf_hub_download("org/name", "sub/model.safetensors") == str(cached)
    assert [(seen.method, seen.status) for seen in hub.requests] == [("HEAD", 302)]
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("org/name", "nowhere")
    assert hub.requests[-1].status == 404


def test_snapshot(hub: FakeHub, client: None, sha: str, tmp_path: Path) -> None:
    file = tmp_path / "on-disk.bin"
    file.write_bytes(WEIGHTS)
    hub.repo("org/name").commit({"on-disk.bin": file})
    for revision, extra in ((None, {"on-disk.bin": WEIGHTS}), (sha, {})):
        folder = Path(snapshot_download("org/name", revision=revision, max_workers=4))
        paths = [path for path in folder.rglob("*") if path.is_file()]
        found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        assert found == FILES | extra


def test_large_objects_come_from_elsewhere_and_without_the_token(hub: FakeHub, sha: str, api: HfApi) -> None:
    api.hf_hub_download("org/name", "sub/model.safetensors")
    head, get = hub.requests
    assert (head.method, head.status, head.token) == ("HEAD", 302, TOKEN)
    assert get.path.startswith("/cdn/org/name/") and (get.status, get.token) == (200, None)
    assert get.nbytes == len(WEIGHTS) and hub.nbytes_sent == len(WEIGHTS)
    assert httpx2.get(get.path.join([hub.cdn_url, "?Signature=old"])).status_code == 403


@pytest.mark.parametrize("name", ["config.json", "sub/model.safetensors"])
def test_ranges(hub: FakeHub, sha: str, name: str) -> None:
    data = FILES[name]
    size = len(data)
    url = f"{hub.url}/org/name/resolve/{sha}/{name}"

    def get(wanted: str) -> httpx2.Response:
        return httpx2.get(url, headers={"Range": wanted}, follow_redirects=True)

    for wanted, start, stop in (
        ("bytes=2-5", 2, 6),
        ("bytes=3-", 3, size),
        ("bytes=-3", size - 3, size),
        (f"bytes=4-{size + 100}", 4, size),
    ):
        answer = get(wanted)
        assert (answer.status_code, answer.content) == (206, data[start:stop])
        assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
        assert hub.requests[-1].range == wanted
    beyond = get(f"bytes={size}-")
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{size}")
    whole = get("bytes=0-1,3-4")
    assert (whole.status_code, whole.headers["Accept-Ranges"]) == (200, "bytes")


def test_private_repos_need_a_token(hub: FakeHub, client: None) -> None:
    hub.add_repo("org/hidden", FILES, private=True)
    for repo_id in ("org/hidden", "org/missing"):
        with pytest.raises(RepositoryNotFoundError) as caught:
            huggingface_hub.model_info(repo_id)
        assert caught.value.response.status_code == 401
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(repo_id, "README.md")
    with pytest.raises(RepositoryNotFoundError) as caught:
        huggingface_hub.model_info("org/missing", token=TOKEN)
    assert caught.value.response.status_code == 404
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        huggingface_hub.model_info("org/hidden", token="hf_unknown")
    assert huggingface_hub.model_info("org/hidden", token=TOKEN).private is True
    assert Path(hf_hub_download("org/hidden", "config.json", token=TOKEN)).read_bytes() == b'{"a": 1}'


def test_gated_repos_need_to_be_granted(hub: FakeHub, client: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.tokens |= {"hf_granted"}
    hub.add_repo("org/gated", FILES, gated=True, granted=["hf_granted"])
    assert huggingface_hub.model_info("org/gated").gated == "manual"
    for token, code in ((None, 401), (TOKEN, 403)):
        for ask in (
            lambda token: hf_hub_download("org/gated", "config.json", token=token),
            lambda token: huggingface_hub.auth_check("org/gated", token=token),
        ):
            with pytest.raises(GatedRepoError) as caught:
                ask(token)
            assert caught.value.response.status_code == code
    monkeypatch.setenv("HF_TOKEN", "hf_granted")
    assert hf_hub_download("org/gated", "config.json")


def test_who_may_write(hub: FakeHub, api: HfApi, sha: str) -> None:
    hub.read_tokens.add("hf_read")
    assert api.whoami()["name"] == "tester"
    assert api.whoami("hf_read")["auth"]["accessToken"]["role"] == "read"
    api.auth_check("org/name", write=True)
    for token, code in ((False, 401), ("hf_read", 403), ("hf_unknown", 401)):
        with pytest.raises(HfHubHTTPError) as caught:
            api.create_repo("org/other", token=token)
        assert caught.value.response.status_code == code
        with pytest.raises(HfHubHTTPError) as caught:
            api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/name", token=token)
        assert caught.value.response.status_code == code
    with pytest.raises(HfHubHTTPError, match="namespace"):
        api.create_repo("elsewhere/name")
    assert list(hub.repos) == ["org/name"]


def test_create_repo(hub: FakeHub, api: HfApi) -> None:
    url = api.create_repo("org/new", private=True)
    assert (url.repo_id, hub.repo("org/new").private) == ("org/new", True)
    assert list(hub.repo("org/new").tree()) == [".gitattributes"]
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("org/new")
    assert caught.value.response.status_code == 409
    assert api.create_repo("org/new", exist_ok=True).repo_id == "org/new"
    api.create_branch("org/new", branch="try")
    api.create_branch("org/new", branch="try", exist_ok=True)
    with pytest.raises(HfHubHTTPError):
        api.create_branch("org/new", branch="try")
    assert hub.repo("org/new").refs["try"] == hub.repo("org/new").refs["main"]


@pytest.mark.parametrize("stored", [True, False])
def test_upload_folder(hub: FakeHub, api: HfApi, tmp_path: Path, stored: bool) -> None:
    hub.storage = tmp_path if stored else None
    folder = tmp_path / "model"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    api.create_repo("org/new")
    first = api.upload_folder(repo_id="org/new", folder_path=folder, commit_message="All")
    repo = hub.repo("org/new")
    assert repo.tree() == FILES | {".gitattributes": repo.tree()[".gitattributes"]}
    newest = repo.history()[-1]
    assert (newest.sha, newest.message, set(newest.added)) == (first.oid, "All", set(FILES))
    hub.forget()
    assert api.upload_folder(repo_id="org/new", folder_path=folder).oid == first.oid  # nothing changed
    assert "PUT" not in {seen.method for seen in hub.requests}


def test_large_objects_first_then_commits_in_order(hub: FakeHub, api: HfApi, sha: str) -> None:
    names = [f"model-{index}.safetensors" for index in range(3)]
    additions = [CommitOperationAdd(name, name.encode() * 999) for name in names]
    api.preupload_lfs_files("org/name", additions[:2])
    puts = [seen for seen in hub.requests if seen.method == "PUT"]
    assert len(puts) == 2 and hub.repo("org/name").refs["main"] == sha
    api.create_commit("org/name", additions[::-1], commit_message="Weights", commit_description="All")
    newest = hub.repo("org/name").history()[-1]
    assert (newest.added, newest.parent, newest.description) == (names[::-1], sha, "All")
    assert len([seen for seen in hub.requests if seen.method == "PUT"]) == 3
    delete = [CommitOperationDelete("sub/"), CommitOperationDelete(names[0])]
    api.create_commit("org/name", delete, commit_message="Less")
    assert hub.repo("org/name").history()[-1].deleted == ["sub/model.safetensors", names[0]]
    assert set(hub.repo("org/name").tree()) == {"README.md", "config.json", *names[1:]}
    with pytest.raises(RemoteEntryNotFoundError):
        api.delete_file("nowhere", "org/name")


@pytest.mark.parametrize("on_disk", [True, False])
def test_parts(hub: FakeHub, api: HfApi, sha: str, tmp_path: Path, on_disk: bool) -> None:
    hub.part_size = 100_000
    file = tmp_path / "file"
    file.write_bytes(WEIGHTS[::-1])
    source = file if on_disk else file.read_bytes()
    api.upload_file(path_or_fileobj=source, path_in_repo="big.safetensors", repo_id="org/name")
    assert hub.repo("org/name").tree()["big.safetensors"] == WEIGHTS[::-1]
    puts = [seen.path.split("/")[:3] for seen in hub.requests if seen.method == "PUT"]
    assert puts == [["", "parts", "1"], ["", "parts", "2"], ["", "parts", "3"]]


def test_what_a_commit_must_not_do(hub: FakeHub, api: HfApi, sha: str) -> None:
    never_sent = CommitOperationAdd("x.safetensors", b"not sent")
    never_sent._upload_mode, never_sent._is_uploaded = "lfs", True
    with pytest.raises(BadRequestError, match="does not exist"):
        api.create_commit("org/name", [never_sent], commit_message="Broken")
    hub.repo("org/name").commit({"other": b"other"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit(
            "org/name", [CommitOperationAdd("x", b"x")], commit_message="Late", parent_commit=sha
        )
    with pytest.raises(RevisionNotFoundError):
        api.create_commit("org/name", [CommitOperationAdd("x", b"x")], commit_message="?", revision="no")
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md", repo_id="org/name")
    with pytest.warns(UserWarning, match="empty or missing"):
        api.upload_file(path_or_fileobj=b"# Bare\n", path_in_repo="README.md", repo_id="org/name")


def test_an_object_that_is_not_what_its_name_says_is_refused(hub: FakeHub, sha: str) -> None:
    url = f"{hub.cdn_url}/lfs/org/name/{'0' * 64}"
    assert httpx2.put(url, content=b"something").status_code == 400
    assert httpx2.put(url, content=iter([b"some", b"thing"])).status_code == 400  # without a length


def test_pull_requests(hub: FakeHub, api: HfApi, sha: str) -> None:
    hub.read_tokens.add("hf_read")
    made = api.create_commit(
        "org/name", [CommitOperationAdd("x", b"x")], commit_message="Mine", create_pr=True, token="hf_read"
    )
    assert made.pr_revision == "refs/pr/1"
    repo = hub.repo("org/name")
    assert (repo.refs["main"], repo.refs["refs/pr/1"]) == (sha, made.oid)
    more = CommitOperationAdd("y.safetensors", b"y")
    api.create_commit("org/name", [more], commit_message="More", revision="refs/pr/1")
    assert set(repo.tree("refs/pr/1")) == {*FILES, "x", "y.safetensors"}
    pull = api.create_pull_request("org/name", title="Empty")
    assert (pull.git_reference, pull.status) == ("refs/pr/2", "draft")
    api.create_discussion("org/name", title="A question")
    listed = api.get_repo_discussions("org/name", discussion_type="pull_request")
    assert [(one.num, one.title) for one in listed] == [(2, "Empty"), (1, "Mine")]
    assert Path(hf_hub_download("org/name", "x", revision="refs/pr/1")).read_bytes() == b"x"


def test_commit_whose_answer_is_lost_was_made(hub: FakeHub, api: HfApi, sha: str) -> None:
    hub.faults = [Rule(Fault.lose_answer(), "POST", "*/commit/*")]
    with pytest.raises(httpx2.RemoteProtocolError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/name")
    assert hub.repo("org/name").history()[-1].added == ["x"]
    assert hub.requests[-1].status == 0


@pytest.mark.parametrize(
    "fault", [Fault.status(500), Fault.drop(), Fault.drop(reset=True), Fault.drop_upload_after(1000)]
)
def test_uploads_are_tried_again(hub: FakeHub, api: HfApi, sha: str, fault: Fault) -> None:
    hub.faults = [Rule(fault, "PUT", times=2)]
    api.upload_file(path_or_fileobj=WEIGHTS[::-1], path_in_repo="new.safetensors", repo_id="org/name")
    assert hub.repo("org/name").tree()["new.safetensors"] == WEIGHTS[::-1]
    assert [seen.status for seen in hub.requests if seen.method == "PUT"] == [fault.code or 0] * 2 + [200]


def test_a_dropped_connection_ends_a_request(hub: FakeHub, sha: str) -> None:
    hub.faults = [Rule(Fault.drop()), Rule(Fault.drop(reset=True), first=2)]
    for error in (httpx2.RemoteProtocolError, httpx2.ReadError):
        with pytest.raises(error):
            httpx2.get(f"{hub.url}/api/models/org/name")
    assert [seen.status for seen in hub.requests] == [0, 0]
    assert httpx2.get(f"{hub.url}/api/models/org/name").status_code == 200


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault.drop_after(100_000), httpx2.ReadError),
        (Fault.truncated(100_000), httpx2.RemoteProtocolError),
    ],
)
def test_bodies_that_end_early(hub: FakeHub, sha: str, fault: Fault, error: type[Exception]) -> None:
    url = large_url(hub)
    hub.faults = [Rule(fault)]
    got = bytearray()
    with httpx2.stream("GET", url) as answer:
        assert answer.headers["Content-Length"] == str(len(WEIGHTS))
        with pytest.raises(error):
            read_into(got, answer)
    assert got == WEIGHTS[:100_000]
    assert hub.requests[-1].nbytes == 100_000


def test_the_client_resumes_a_truncated_body(
    hub: FakeHub, waits: list[float], sha: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # it resumes at whole ones
    hub.faults = [Rule(Fault.truncated(100_000), "GET", "/cdn/*")]
    path = hf_hub_download("org/name", "sub/model.safetensors")
    assert Path(path).read_bytes() == WEIGHTS
    assert waits == [1]
    assert hub.requests[-1].range == "bytes=100000-"
    assert hub.nbytes_by_path == {"sub/model.safetensors": len(WEIGHTS)}


@pytest.mark.parametrize("name", ["sub/model.safetensors", "config.json"])
def test_the_client_does_not_notice_a_changed_byte(
    hub: FakeHub, client: None, sha: str, name: str, tmp_path: Path
) -> None:
    if name == "sub/model.safetensors":
        (tmp_path / "file").write_bytes(WEIGHTS)
        hub.repo("org/name").commit({name: tmp_path / "file"})
    hub.faults = [Rule(Fault.corrupt(at=-2), "GET", "*" + name)]
    data = Path(hf_hub_download("org/name", name)).read_bytes()
    changed = [index for index, (a, b) in enumerate(zip(data, FILES[name], strict=True)) if a != b]
    assert changed == [len(data) - 2]


def test_the_client_notices_a_short_body(hub: FakeHub, client: None, sha: str) -> None:
    hub.faults = [Rule(Fault.short(by=3), "GET", "/cdn/*")]
    with pytest.raises(OSError, match="should be of size 256000 but has size 255997"):
        hf_hub_download("org/name", "sub/model.safetensors")
    assert httpx2.get(large_url(hub)).content == WEIGHTS


@pytest.mark.parametrize(
    ("fault", "waited"),
    [
        (Fault.rate_limited(3), [4.0]),
        (Fault.status(429, retry_after=7), [8.0]),
        (Fault.status(429), [1]),
    ],
)
def test_rate_limits(hub: FakeHub, waits: list[float], sha: str, fault: Fault, waited: list[float]) -> None:
    hub.faults = [Rule(fault, "GET", "/cdn/*")]
    assert Path(hf_hub_download("org/name", "sub/model.safetensors")).read_bytes() == WEIGHTS
    assert waits == waited


@pytest.mark.parametrize("code", [500, 503, 403])
def test_statuses(hub: FakeHub, client: None, sha: str, code: int) -> None:
    hub.faults = [Rule(Fault.status(code, message="Out of order"), "GET", "/api/models/*", times=None)]
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="Out of order") as caught:
            huggingface_hub.model_info("org/name")
        assert caught.value.response.status_code == code
    hub.faults = [Rule(Fault.status(code), "HEAD", times=None)]
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("org/name", "README.md")


def test_faults_by_a_function_of_the_request(hub: FakeHub, sha: str) -> None:
    asked: list[tuple[str, str, int]] = []

    def faults(method: str, path: str, nth: int) -> Fault | None:
        asked.append((method, path, nth))
        return Fault.delay(0.2) if nth == 2 else None

    hub.faults = faults
    took = []
    for _ in range(3):
        start = time.monotonic()
        assert httpx2.get(f"{hub.url}/api/models/org%2Fname?blobs=1").status_code == 200
        took.append(time.monotonic() - start >= 0.2)
    assert asked == [("GET", "/api/models/org/name", nth) for nth in (1, 2, 3)]
    assert took[1] and not took[0]


def test_rules_count_what_fits() -> None:
    rule = Rule(Fault.drop(), "GET", "*.safetensors", first=2, times=2)
    asked = [rule.consult("GET", f"/a/{name}.safetensors") for name in "abcd"]
    assert [fault is not None for fault in asked] == [False, True, True, False]
    assert rule.consult("PUT", "/a.safetensors") is None and rule.consult("GET", "/a") is None
    assert rule.seen == 4


def test_the_rate_is_shared(hub: FakeHub, sha: str) -> None:
    url = large_url(hub)
    hub.rate = 4 * len(WEIGHTS)
    bodies: list[bytes] = []
    start = time.monotonic()
    threads = [threading.Thread(target=lambda: bodies.append(httpx2.get(url).content)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bodies == [WEIGHTS] * 4
    assert 0.8 < time.monotonic() - start < 5
    hub.rate = None
    assert Throttle().piece > Throttle(1e6).piece > 1000


def test_a_process_of_its_own_serves_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").write_bytes(b"")
    (folder / "sub/model.safetensors").write_bytes(WEIGHTS)
    command = [sys.executable, "-m", "tests.hub.server", str(folder), "--repo", "org/name", "--rate", "1e9"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        try:
            code = "import huggingface_hub as h; h.snapshot_download('org/name', local_dir='got')"
            env = environment(url, tmp_path / "home")
            subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
        finally:
            server.terminate()
    assert (tmp_path / "got/sub/model.safetensors").read_bytes() == WEIGHTS
    assert not (tmp_path / "got/.hidden").exists()


def test_environment_has_no_traces_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = environment("http://127.0.0.1:1", tmp_path)
    assert "HF_TOKEN" not in made and "HF_HUB_OFFLINE" not in made and made["PATH"] == os.environ["PATH"]
    assert environment("http://127.0.0.1:1", tmp_path, token="t")["HF_TOKEN"] == "t"


def test_the_client_has_no_token(client: None) -> None:
    with pytest.raises(LocalTokenNotFoundError):
        huggingface_hub.whoami()


def test_the_hub_notes_its_own_mistakes() -> None:
    with FakeHub() as hub:
        with pytest.raises(httpx2.HTTPError):
            httpx2.post(f"{hub.url}/api/validate-yaml", content=b"[]")
        assert len(hub.errors) == 1 and "AssertionError" in hub.errors[0]
