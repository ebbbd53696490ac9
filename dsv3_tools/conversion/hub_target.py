"""A model on the Hub that results are uploaded to, commit by commit."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dsv3_tools.checkpoint.hub_requests import patiently
from dsv3_tools.checkpoint.source import HubRepo, parse_source
from dsv3_tools.errors import CheckpointError, DestinationError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

__all__ = ["HubTarget", "PushTarget", "RemoteFile", "as_target", "refuse_foreign_weights"]

T = TypeVar("T")

_MAIN = "main"


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
            raise UsageError("a pull request is made against main; leave out the revision")

    @classmethod
    def parse(cls, name: str, *, private: bool = False, create_pr: bool = False) -> PushTarget:
        """Returns the target that `org/name`, `org/name@branch` or the same with `hf://` means.

        Raises:
            UsageError: not such a name.
        """
        parsed = parse_source(name if name.startswith("hf://") else f"hf://{name}")
        assert isinstance(parsed, HubRepo)
        return cls(parsed, True if private else None, create_pr)


def as_target(push: str | PushTarget | None) -> PushTarget | None:
    """Returns the target that a caller means; None for none."""
    return PushTarget.parse(push) if isinstance(push, str) else push


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What the Hub says of a file: its size, and for a large one its SHA-256."""

    nbytes: int
    sha256: str | None


class HubTarget:
    """Speaks with the Hub about one target; every request is tried again where that helps.

    Args:
        target: the model.
        title: of the commits, and of a pull request; an open one with this title is gone on with.
        check: called while waiting; may raise `Interrupted`.

    Attributes:
        revision: where commits go; None until the first one makes a pull request.
    """

    def __init__(self, target: PushTarget, title: str, check: Callable[[], None] = lambda: None) -> None:
        from huggingface_hub import HfApi

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
        self._ask(lambda: self._api.create_repo(self._name, private=self.target.private, exist_ok=True))
        revision = self.revision
        if revision not in (None, _MAIN):
            self._ask(lambda: self._api.create_branch(self._name, branch=str(revision), exist_ok=True))

    def files(self) -> dict[str, RemoteFile]:
        """Returns the files that are there now."""
        info = self._ask(
            lambda: self._api.model_info(self._name, revision=self.revision or _MAIN, files_metadata=True)
        )
        return {
            file.rfilename: RemoteFile(file.size or 0, None if file.lfs is None else file.lfs.sha256)
            for file in info.siblings or ()
        }

    def files_if_any(self) -> dict[str, RemoteFile]:
        """Returns the files that are there now; none where there is no model yet."""
        try:
            return self.files()
        except CheckpointError:
            return {}

    def check(self, expected: Mapping[str, str]) -> None:
        """Refuses shards on the Hub that are not what they should be.

        Args:
            expected: SHA-256 by name.

        Raises:
            CheckpointError: naming one.
        """
        there = self.files() if expected else {}
        for name, sha256 in expected.items():
            found = there[name].sha256 if name in there else None
            if found != sha256:
                raise CheckpointError(
                    f"{self.target.repo}/{name}: has the SHA-256 {found} on the Hub, expected {sha256}: the "
                    "file here was changed; dsv3 verify integrity checks it"
                )

    def upload_folder(self, folder: Path, names: Sequence[str]) -> None:
        """Uploads files of a folder, in as many commits as huggingface_hub finds right.

        Files that are there already are not sent again.
        """
        if not names:
            return
        with _quiet():
            done = self._ask(
                lambda: self._api.upload_folder(
                    repo_id=self._name,
                    folder_path=folder,
                    allow_patterns=[glob.escape(name) for name in names],
                    commit_message=f"{self._title}: weights",
                    revision=self.revision,
                    create_pr=self.revision is None,
                )
            )
        if self.revision is None:
            self.revision = done.pr_revision

    def read(self, name: str) -> bytes:
        """Returns a small file that is there now."""
        from huggingface_hub import hf_hub_download

        revision = self.revision or _MAIN
        return Path(self._ask(lambda: hf_hub_download(self._name, name, revision=revision))).read_bytes()

    def commit(self, files: Mapping[str, Path | bytes], message: str) -> str:
        """Uploads files, by name, and makes them one commit; returns its hash.

        Files that are there already are not sent again.
        """
        from huggingface_hub import CommitOperationAdd

        def make() -> CommitInfo:
            operations = [CommitOperationAdd(name, content) for name, content in files.items()]
            return self._api.create_commit(
                self._name,
                operations,
                commit_message=f"{self._title}: {message}",
                revision=self.revision,
                create_pr=self.revision is None,
            )

        with _quiet():
            done = self._ask(make)
        if self.revision is None:
            self.revision = done.pr_revision
        return str(done.oid)

    def _open_pull_request(self) -> str | None:
        """Returns the revision of our own pull request of the same title, if one is open."""
        wanted: Any = {"discussion_type": "pull_request", "discussion_status": "open"}
        found = self._api.get_repo_discussions(self._name, **wanted)
        return next((one.git_reference for one in found if one.title.startswith(self._title)), None)

    def _ask(self, request: Callable[[], T]) -> T:
        return patiently(request, f"{self.target.repo}", check=self._check)


@contextmanager
def _quiet() -> Iterator[None]:
    """Shows none of huggingface_hub's progress bars."""
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


def refuse_foreign_weights(found: Mapping[str, Any], own: set[str], target: PushTarget) -> None:
    """Refuses a model on the Hub with shards that are no part of the result: both would be loaded as one.

    Raises:
        DestinationError: naming one of them.
    """
    foreign = sorted(name for name in found if name.endswith(".safetensors") and name not in own)
    if foreign:
        raise DestinationError(
            f"{target.repo}: has {foreign[0]}, which is no part of this result; push to another model or "
            "branch, or delete it there first"
        )
