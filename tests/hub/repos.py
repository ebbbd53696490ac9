"""What the hub stores: repos with branches, commits, pull requests and large objects, all in memory.

The contents of files may lie on disk.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

LFS_THRESHOLD = 10 << 20
"""A file larger than this is a large object."""
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")
INITIAL_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
"""What a repo has that was created over HTTP."""
FRONT_MATTER = re.compile(rb"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)


class NotFound(Exception):
    """No such repo, revision or entry; `code` is what X-Error-Code says."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Blob:
    """The content of a file."""

    source: bytes | Path
    lfs: bool = False

    @cached_property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """Of the content, read in pieces."""
        return self._digest(hashlib.sha256())

    @property
    def pointer(self) -> bytes:
        """What git itself stores of a large object, as long as the real one."""
        text = f"version https://lfspointer.invalid/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        return text.encode()

    @cached_property
    def oid(self) -> str:
        """What git calls the blob: the pointer's for a large object."""
        if self.lfs:
            return hashlib.sha1(b"blob %d\0" % len(self.pointer) + self.pointer).hexdigest()
        return self._digest(hashlib.sha1(b"blob %d\0" % self.size))

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    def _digest(self, digest: Any) -> str:
        if isinstance(self.source, bytes):
            digest.update(self.source)
        else:
            with self.source.open("rb") as file:
                while piece := file.read(1 << 22):
                    digest.update(piece)
        return str(digest.hexdigest())


def is_large(path: str, size: int) -> bool:
    """Whether a file of this name and size is stored as a large object; empty ones never are."""
    return size > 0 and (size > LFS_THRESHOLD or path.endswith(LFS_SUFFIXES))


def front_matter(card: bytes) -> dict[str, Any] | None:
    """The YAML between the dashes at the start of a model card, if there is any.

    Raises:
        yaml.YAMLError: it is no YAML.
        ValueError: it is no mapping.
    """
    match = FRONT_MATTER.match(card)
    if match is None:
        return None
    data = yaml.safe_load(match[1])
    if data is not None and not isinstance(data, dict):
        raise ValueError("the metadata are no mapping")
    return data or {}


class Operation(NamedTuple):
    """One step of a commit."""

    kind: str
    """"add" or "delete"."""
    path: str
    lfs: bool


@dataclass(frozen=True)
class Commit:
    """One commit with its whole tree."""

    sha: str
    parent: str | None
    message: str
    description: str
    operations: tuple[Operation, ...]
    tree: Mapping[str, Blob]
    date: str

    @property
    def added(self) -> list[str]:
        """The paths that it added or changed, in the order in which the client named them."""
        return [operation.path for operation in self.operations if operation.kind == "add"]

    @property
    def deleted(self) -> list[str]:
        return [operation.path for operation in self.operations if operation.kind == "delete"]


def timestamp() -> str:
    """Now, as the hub writes it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass
class Discussion:
    """A discussion or pull request."""

    number: int
    title: str
    is_pull_request: bool
    base: str = "main"
    status: str = "open"
    created: str = field(default_factory=timestamp)


class Repo:
    """A model repo. Its methods may be called from any thread."""

    def __init__(
        self, repo_id: str, *, private: bool = False, gated: bool = False, granted: Iterable[str] = ()
    ) -> None:
        self.id = repo_id
        self.private = private
        self.gated = gated
        self.granted = set(granted)
        """Tokens that may download from it although it is gated."""
        self.refs: dict[str, str] = {}
        """The newest commit of each branch ("main") and pull request ("refs/pr/1")."""
        self.commits: dict[str, Commit] = {}
        self.objects: dict[str, Blob] = {}
        """Large objects that were uploaded, by SHA-256, whether a commit names them or not."""
        self.discussions: list[Discussion] = []
        self.created = timestamp()
        self.lock = threading.RLock()

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, `refs/pr/N`, or commit sha means."""
        with self.lock:
            sha = self.refs.get(revision.removeprefix("refs/heads/"), revision)
            if sha in self.commits:
                return self.commits[sha]
        raise NotFound("RevisionNotFound", f"Invalid rev id: {revision}")

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits up to a revision, oldest first."""
        found: list[Commit] = []
        commit: Commit | None = self.resolve(revision)
        while commit is not None:
            found.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return found[::-1]

    def tree(self, revision: str = "main") -> dict[str, bytes]:
        """All files of a revision with their contents, for comparisons."""
        return {path: blob.read() for path, blob in self.resolve(revision).tree.items()}

    def commit(
        self,
        files: Mapping[str, bytes | Path],
        *,
        deleted: Collection[str] = (),
        message: str = "A commit",
        branch: str = "main",
    ) -> str:
        """Commits from within the process, as somebody else would have; gives the sha."""
        blobs = {path: self.blob(path, source) for path, source in files.items()}
        with self.lock:
            self.objects.update({blob.sha256: blob for blob in blobs.values() if blob.lfs})
            return self.add_commit(branch, message, "", [*deleted, *blobs.items()]).sha

    def blob(self, path: str, source: bytes | Path) -> Blob:
        """The content of a file to be, stored as its name and size demand."""
        return Blob(source, lfs=is_large(path, Blob(source).size))

    def add_commit(
        self, branch: str, message: str, description: str, steps: Collection[str | tuple[str, Blob]]
    ) -> Commit:
        """Appends a commit to a branch; a step is a path to delete or a path with its new content."""
        with self.lock:
            parent = self.commits[self.refs[branch]] if branch in self.refs else None
            tree = dict(parent.tree) if parent else {}
            operations: list[Operation] = []
            for step in steps:
                if isinstance(step, str):
                    operations += _delete(tree, step)
                else:
                    tree[step[0]] = step[1]
                    operations.append(Operation("add", step[0], step[1].lfs))
            contents = " ".join(step if isinstance(step, str) else step[0] + step[1].etag for step in steps)
            identity = f"{self.id} {len(self.commits)} {parent and parent.sha} {message} {contents}"
            sha = hashlib.sha1(identity.encode()).hexdigest()
            parent_sha = parent.sha if parent else None
            commit = Commit(sha, parent_sha, message, description, tuple(operations), tree, timestamp())
            self.commits[sha] = commit
            self.refs[branch] = sha
            return commit

    def open_discussion(self, title: str, *, pull_request: bool, start: str | None = None) -> Discussion:
        """Opens a discussion; a pull request gets a branch that starts at a revision."""
        with self.lock:
            discussion = Discussion(len(self.discussions) + 1, title, pull_request)
            if pull_request:
                self.refs[f"refs/pr/{discussion.number}"] = self.resolve(start or "main").sha
            self.discussions.append(discussion)
            return discussion

    def card_data(self, commit: Commit) -> dict[str, Any] | None:
        """The metadata of the model card, None if there are none that can be read."""
        if "README.md" not in commit.tree:
            return None
        try:
            return front_matter(commit.tree["README.md"].read())
        except (yaml.YAMLError, ValueError):
            return None

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The commit that last touched a file or something below a folder."""
        for candidate in reversed(self.history(commit.sha)):
            if any(step.path == path or step.path.startswith(path + "/") for step in candidate.operations):
                return candidate
        return commit


def _delete(tree: dict[str, Blob], path: str) -> list[Operation]:
    """Removes a file, or a folder whose name ends with a slash."""
    gone = [name for name in tree if name == path or (path.endswith("/") and name.startswith(path))]
    if not gone:
        raise NotFound("EntryNotFound", f"A file with this name doesn't exist: {path}")
    return [Operation("delete", name, tree.pop(name).lfs) for name in gone]
