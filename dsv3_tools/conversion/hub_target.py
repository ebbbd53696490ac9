"""A model on the Hub that results are uploaded to, commit by commit."""

from __future__ import annotations

import glob
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dsv3_tools.checkpoint.hub_requests import patiently
from dsv3_tools.checkpoint.index import INDEX_NAME
from dsv3_tools.checkpoint.source import HubRepo, parse_source
from dsv3_tools.errors import CheckpointError, DestinationError, NetworkError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

__all__ = ["HubTarget", "PushTarget", "as_target", "unless_stopped"]

T = TypeVar("T")

_MAIN = "main"
_PULL_REQUEST = "refs/pr/"
_POLL_SECONDS = 0.2

LAST_MESSAGE = "config, index and card, which make it a model"
"""What the commit is called after which there is a model."""


@dataclass(frozen=True)
class PushTarget:
    """Where a result goes on the Hub.

    Attributes:
        repo: the model, and the branch if it is not main.
        private: of a model that is made; None is what the user's or organization's settings say.
        create_pr: propose the result in a pull request.
    """

    repo: HubRepo
    private: bool | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        if self.create_pr and self.repo.revision != _MAIN:
            raise UsageError("a pull request is made against main; leave out the branch")

    @classmethod
    def parse(cls, name: str) -> PushTarget:
        """Returns the target that `org/name`, `org/name@branch` or the same with `hf://` means.

        Raises:
            UsageError: not such a name.
        """
        parsed = parse_source(name if name.startswith("hf://") else f"hf://{name}")
        assert isinstance(parsed, HubRepo)
        return cls(parsed)

    def with_options(self, *, revision: str | None, private: bool, create_pr: bool) -> PushTarget:
        """Returns the target with what else was asked for.

        Raises:
            UsageError: two branches, or a branch and a pull request.
        """
        if revision is not None and self.repo.revision not in (_MAIN, revision):
            raise UsageError(f"{self.repo}: and --revision {revision} are two branches; leave out one")
        repo = self.repo if revision is None else replace(self.repo, revision=revision)
        return PushTarget(repo, private or self.private, create_pr or self.create_pr)


def as_target(push: str | PushTarget | None) -> PushTarget | None:
    """Returns the target that a caller means; None for none."""
    return PushTarget.parse(push) if isinstance(push, str) else push


class HubTarget:
    """Speaks with the Hub about one target; every request is tried again where that helps.

    Args:
        target: the model.
        title: of the commits and of a pull request; this user's open one of that title is gone on with.
        check: called while waiting; may raise `Interrupted`.

    Attributes:
        revision: where commits go; None until the first one makes a pull request.
    """

    def __init__(self, target: PushTarget, title: str, check: Callable[[], None] = lambda: None) -> None:
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            raise NetworkError(f"{target.repo}: HF_HUB_OFFLINE is set, so nothing can be uploaded")
        self.target = target
        self.revision: str | None = None if target.create_pr else target.repo.revision
        self._title = title
        self._check = check
        self._api = HfApi()
        self._name = target.repo.name

    def prepare(self) -> None:
        """Makes the model and the branch if they are not there yet.

        Raises:
            NetworkError: the Hub cannot be reached, or does not let this user write there.
        """
        if self.target.create_pr:
            self.revision = self._ask(self._open_pull_request)
            return
        private, branch = self.target.private, self.target.repo.revision
        self._ask(lambda: self._api.create_repo(self._name, private=private, exist_ok=True))
        if branch != _MAIN:
            self._ask(lambda: self._api.create_branch(self._name, branch=branch, exist_ok=True))

    @property
    def url(self) -> str:
        """The page of the model, or of the pull request."""
        place = f"{self._api.endpoint}/{self._name}"
        if self.revision is not None and self.revision.startswith(_PULL_REQUEST):
            return f"{place}/discussions/{self.revision.removeprefix(_PULL_REQUEST)}"
        return place if self.revision in (None, _MAIN) else f"{place}/tree/{self.revision}"

    def files(self) -> dict[str, str | None]:
        """Returns the files that are there now: for a large one its SHA-256."""
        info = self._ask(
            lambda: self._api.model_info(self._name, revision=self.revision or _MAIN, files_metadata=True)
        )
        return {f.rfilename: None if f.lfs is None else f.lfs.sha256 for f in info.siblings or ()}

    def files_if_any(self) -> dict[str, str | None]:
        """Returns the files that are there now; none where there is no model yet."""
        try:
            return self.files()
        except CheckpointError:
            return {}

    def has(self, expected: Mapping[str, str]) -> bool:
        """Whether a model is there with these shards, by name and SHA-256."""
        there = self.files_if_any()
        return INDEX_NAME in there and all(there.get(name) == sha256 for name, sha256 in expected.items())

    def check(self, expected: Mapping[str, str]) -> None:
        """Refuses shards on the Hub that are not what they should be.

        Args:
            expected: SHA-256 by name.

        Raises:
            CheckpointError: naming one.
        """
        there = self.files() if expected else {}
        for name, sha256 in expected.items():
            if there.get(name) != sha256:
                raise CheckpointError(
                    f"{self.target.repo}/{name}: has the SHA-256 {there.get(name)} on the Hub, the manifest "
                    f"says {sha256}: the file was changed before it was uploaded, or since"
                )

    def make_way(
        self, there: Mapping[str, str | None], own: Mapping[str, str | None], *, overwrite: bool
    ) -> None:
        """Refuses a target with another model, or, to overwrite it, ends that one: its index goes first.

        Two models' shards, of the same names or not, must never stand under one index.

        Args:
            there: what the target has; see `files`.
            own: the shards of the result, with their SHA-256 as far as they are made.
            overwrite: replace what is there.

        Raises:
            DestinationError: another model is there.
        """
        weights = [name for name in there if name.endswith(".safetensors")]
        foreign = sorted(name for name in weights if name not in own)
        other = [name for name in sorted(weights) if name in own and there[name] != own[name]]
        other = other if INDEX_NAME in there else []
        if not foreign and not other:
            return
        if not overwrite:
            what = f"has {foreign[0]}, which is no part of this result" if foreign else ""
            what = what or f"holds another model, or this one damaged or of another run ({other[0]})"
            raise DestinationError(
                f"{self.target.repo}: {what}; push to another model or branch, or --overwrite it"
            )
        self._delete([name for name in (INDEX_NAME, *foreign) if name in there])

    def upload_folder(self, folder: Path, names: Sequence[str]) -> None:
        """Uploads files of a folder, in as many commits as huggingface_hub finds right.

        Files that are there already are not sent again.
        """

        def upload() -> CommitInfo:
            if self.revision is None:
                self.revision = self._open_pull_request()
            return self._api.upload_folder(
                repo_id=self._name,
                folder_path=folder,
                allow_patterns=[glob.escape(name) for name in names],
                commit_message=f"{self._title}: weights",
                revision=self.revision,
                create_pr=self.revision is None,
            )

        if names:
            self._upload(upload)

    def commit(self, files: Mapping[str, Path | bytes], message: str) -> str:
        """Uploads files, by name, and makes them one commit; returns its hash.

        Files that are there already are not sent again.
        """
        from huggingface_hub import CommitOperationAdd

        return self._commit([CommitOperationAdd(name, content) for name, content in files.items()], message)

    def read_if_any(self, name: str) -> bytes | None:
        """Returns a small file that is there now."""
        from huggingface_hub import hf_hub_download

        revision = self.revision or _MAIN
        try:
            return Path(self._ask(lambda: hf_hub_download(self._name, name, revision=revision))).read_bytes()
        except CheckpointError:
            return None

    def _delete(self, names: Sequence[str]) -> None:
        from huggingface_hub import CommitOperationDelete

        if names:
            self._commit([CommitOperationDelete(name) for name in names], "the model that was here goes")

    def _commit(self, operations: Sequence[Any], message: str) -> str:
        def make() -> CommitInfo:
            if self.revision is None:  # an answer may have been lost
                self.revision = self._open_pull_request()
            return self._api.create_commit(
                self._name,
                operations,
                commit_message=f"{self._title}: {message}",
                revision=self.revision,
                create_pr=self.revision is None,
            )

        return str(self._upload(make).oid)

    def _upload(self, act: Callable[[], CommitInfo]) -> CommitInfo:
        """Does something that may take hours, and that huggingface_hub cannot be stopped in."""
        done = unless_stopped(lambda: self._ask(act), self._check)
        if self.revision is None:
            self.revision = done.pr_revision
        return done

    def _open_pull_request(self) -> str | None:
        """Returns the revision of this user's own pull request of the same title, if one is open."""
        wanted: Any = {"discussion_type": "pull_request", "discussion_status": "open"}
        found = self._api.get_repo_discussions(self._name, **wanted)
        ours = (one for one in found if one.title.startswith(f"{self._title}: "))
        me = self._api.whoami()["name"]
        return next((one.git_reference for one in ours if one.author == me), None)

    def _ask(self, request: Callable[[], T]) -> T:
        with _quiet():
            return patiently(request, str(self.target.repo), check=self._check)


def unless_stopped(act: Callable[[], T], check: Callable[[], None]) -> T:
    """Returns what `act` returns, which goes on in a thread of its own; that is left when `check` raises."""
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(act())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="dsv3 on the Hub", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        check()
    if failed:
        raise failed[0]
    return found[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Shows none of huggingface_hub's progress bars, in this thread or any other."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
