"""A hub of model repos on this machine, over real HTTP, for tests and benchmarks.

It speaks what `huggingface_hub` asks of the Hub without Xet. Large objects come from a second port, as the
Hub's come from another host. As a process of its own:

    python -m tests.hub.server FOLDER --repo org/name [--rate BYTES_PER_S] [--port 0]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# The two modules of routes register them when they are imported.
from tests.hub import reading, writing  # noqa: F401
from tests.hub.connection import Server
from tests.hub.faults import NO_FAULT, Fault, Rule, Throttle
from tests.hub.repos import Blob, NotFound, Repo
from tests.hub.wire import Answer, Request, find_route, refuse

TOKEN = "hf_test"
"""A token that may write."""

Faults = list[Rule] | Callable[[str, str, int], Fault | None]


class Seen(NamedTuple):
    """A request and what it was answered; the path is unquoted, without the query."""

    method: str
    path: str
    status: int
    """0 when the connection ended before the answer."""
    nbytes: int
    """Of the answer's body that were sent."""
    range: str | None
    token: str | None


@dataclass
class Entry:
    seen: Seen
    nbytes: int = 0


class FakeHub:
    """Repos, who may do what with them, what goes wrong, and what was asked; a context manager that serves.

    Args:
        storage: a folder for uploaded objects; without one they are kept in memory.
        rate: a limit in bytes/s for all bodies together.
        port: where to listen; 0 takes a free port.
    """

    def __init__(self, *, storage: Path | None = None, rate: float | None = None, port: int = 0) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens = {TOKEN}
        """Who is known; of these `read_tokens` may not write."""
        self.read_tokens: set[str] = set()
        self.user = "tester"
        self.organizations = {"org"}
        """Namespaces besides the user's in which repos may be created."""
        self.faults: Faults = []
        """Rules, or a function of method, path and how often that request came, from 1."""
        self.page_size = 1000
        """Entries on one page of a tree's listing."""
        self.part_size = 100 << 20
        """Larger objects are uploaded in parts of this size by clients that can."""
        self.errors: list[str] = []
        """Tracebacks of this hub's own mistakes; none, or a test's result means nothing."""
        self.parts: dict[tuple[str, str], dict[int, Blob]] = {}
        self.lock = threading.RLock()
        self.throttle = Throttle(rate)
        self.storage = storage
        self._log: list[Entry] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._by_path: Counter[str] = Counter()
        self._servers = [Server(("127.0.0.1", number), self) for number in (port, 0)]
        self._threads: list[threading.Thread] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def cdn_url(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    @property
    def rate(self) -> float | None:
        """Bytes/s that all connections share, for bodies in both directions; None is no limit."""
        return self.throttle.rate

    @rate.setter
    def rate(self, rate: float | None) -> None:
        self.throttle.rate = rate

    @property
    def requests(self) -> list[Seen]:
        """All requests so far, in the order of their answers."""
        with self.lock:
            return [entry.seen._replace(nbytes=entry.nbytes) for entry in self._log]

    @property
    def nbytes_sent(self) -> int:
        """Bytes of all answers' bodies."""
        with self.lock:
            return sum(entry.nbytes for entry in self._log)

    @property
    def nbytes_by_path(self) -> dict[str, int]:
        """Bytes of contents that were sent, by the file's path in its repo."""
        with self.lock:
            return dict(self._by_path)

    def forget(self) -> None:
        """Sets the counters back."""
        with self.lock:
            self._log.clear()
            self._by_path.clear()

    def __enter__(self) -> FakeHub:
        for server in self._servers:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
            server.end_connections()
        for thread in self._threads:
            thread.join()

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path] | None = None,
        *,
        private: bool = False,
        gated: bool = False,
        granted: Iterable[str] = (),
        message: str = "Add files",
    ) -> str:
        """Adds a repo with one commit, and gives its sha.

        A path is served from where it lies. `granted` tokens may download although the repo is gated.
        """
        repo = Repo(repo_id, private=private, gated=gated, granted=granted)
        sha = repo.commit(files or {}, message=message)
        with self.lock:
            self.repos[repo_id] = repo
        return sha

    def repo(self, repo_id: str) -> Repo:
        with self.lock:
            if repo_id not in self.repos:
                raise NotFound("RepoNotFound", "Repository not found")
            return self.repos[repo_id]

    def knows(self, token: str | None) -> bool:
        return token in self.tokens or token in self.read_tokens

    def readable(self, request: Request, repo_id: str) -> Repo:
        """The repo, if the request may see that it exists."""
        repo = self.repo(repo_id)
        if repo.private and not self.knows(request.token):
            raise NotFound("RepoNotFound", "Repository not found")
        return repo

    def gate(self, request: Request, repo: Repo) -> Answer | None:
        """What keeps a request from a gated repo's files, if anything does."""
        if not repo.gated or request.token in repo.granted:
            return None
        code = 403 if request.token else 401
        return refuse(code, f"Access to model {repo.id} is restricted. Ask for access to it.", "GatedRepo")

    def writer(self, request: Request, repo_id: str = "a repo", *, for_pull: bool = False) -> Answer | None:
        """What keeps a request from writing, if anything does; to open a pull request any token is enough."""
        if not self.knows(request.token):
            return refuse(401, "Invalid username or password.")
        if request.token in self.read_tokens and not for_pull:
            return refuse(403, f"You don't have the rights to write to {repo_id} with this token.")
        return None

    def store(self, chunks: Iterable[bytes]) -> Blob:
        """Keeps an upload, in memory or in the folder for it."""
        digest, pieces = hashlib.sha256(), []
        path = self.storage / uuid.uuid4().hex if self.storage else None
        with path.open("wb") if path else contextlib.nullcontext() as file:
            for chunk in chunks:
                digest.update(chunk)
                if file is None:
                    pieces.append(chunk)
                else:
                    file.write(chunk)
        blob = Blob(path or b"".join(pieces), lfs=True)
        blob.__dict__["sha256"] = digest.hexdigest()  # where its cached_property looks
        return blob

    def answer(self, request: Request) -> Answer:
        """What a request is answered when nothing goes wrong."""
        signed = request.path.startswith(("/cdn/", "/lfs/", "/parts/"))
        if request.token is not None and not signed and not self.knows(request.token):
            return refuse(401, "Invalid credentials in Authorization header")
        found = find_route(request.method, request.raw_path)
        if found is None:
            return refuse(404, f"No such page: {request.method} {request.path}")
        handle, parts = found
        try:
            return handle(self, request, parts)
        except NotFound as missing:
            hidden = missing.code == "RepoNotFound" and request.token is None
            return refuse(401 if hidden else 404, str(missing), missing.code)

    def consult(self, method: str, path: str) -> Fault:
        """What is to go wrong with this request."""
        with self.lock:
            self._counts[method, path] += 1
            if callable(self.faults):
                return self.faults(method, path, self._counts[method, path]) or NO_FAULT
            found = [rule.consult(method, path) for rule in self.faults]
        return next((fault for fault in found if fault is not None), NO_FAULT)

    def record(self, request: Request, status: int) -> Entry:
        """Notes that a request is answered."""
        wanted = request.headers.get("Range")
        entry = Entry(Seen(request.method, request.path, status, 0, wanted, request.token))
        with self.lock:
            self._log.append(entry)
        return entry

    def count(self, entry: Entry, file: str | None, nbytes: int) -> None:
        """Counts bytes before they are sent, so that who has received them finds them counted."""
        with self.lock:
            entry.nbytes += nbytes
            if file is not None:
                self._by_path[file] += nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description="Serves a folder as a model repo.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repo", required=True, help="the repo's name, org/name")
    parser.add_argument("--rate", type=float, help="bytes/s for all connections together")
    parser.add_argument("--port", type=int, default=0)
    asked = parser.parse_args()
    paths = sorted(path for path in asked.folder.rglob("*") if path.is_file())
    names = {path.relative_to(asked.folder): path for path in paths}
    files = {name.as_posix(): path for name, path in names.items() if not name.parts[0].startswith(".")}
    with FakeHub(rate=asked.rate, port=asked.port) as hub, contextlib.suppress(KeyboardInterrupt):
        hub.add_repo(asked.repo, files)
        sys.stdout.write(hub.url + "\n")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main()
