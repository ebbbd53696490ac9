"""Requests and answers, and the table of routes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.repos import Blob, Commit, Repo

if TYPE_CHECKING:
    from tests.hub.server import FakeHub

RANGE = re.compile(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*")


class UploadCut(Exception):
    """A fault ends the connection while the request is being read."""


class Request:
    """One request; its body is read when somebody asks for it."""

    def __init__(self, method: str, target: str, headers: Mapping[str, str], body: Iterator[bytes]) -> None:
        url = urlsplit(target)
        self.method = method
        self.raw_path = url.path
        self.path = unquote(url.path)
        self.query = parse_qs(url.query, keep_blank_values=True)
        self.headers = headers
        self.chunks = body
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        self.token = token if scheme.lower() == "bearer" and token else None

    def flag(self, name: str) -> bool:
        """Whether a parameter of the query is on."""
        return self.query.get(name, [""])[-1].lower() in {"1", "true"}

    def read(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> dict[str, Any]:
        found = json.loads(self.read() or b"{}")
        assert isinstance(found, dict)
        return found


@dataclass
class Answer:
    """Status, headers, and a body that is a part of a blob."""

    code: int
    body: Blob = field(default_factory=lambda: Blob(b""))
    headers: dict[str, str] = field(default_factory=dict)
    start: int = 0
    length: int = -1
    file: str | None = None
    """The path in the repo when the body is a file's content."""

    def __post_init__(self) -> None:
        if self.length < 0:
            self.length = self.body.size


def as_json(data: object, code: int = 200, **headers: str) -> Answer:
    """An answer in JSON."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(code, Blob(json.dumps(data).encode()), {"Content-Type": "application/json", **named})


def refuse(code: int, message: str, error_code: str | None = None) -> Answer:
    """An error as the Hub words it: in the body and in headers."""
    marks = {"X-Error-Code": error_code} if error_code else {}
    return as_json({"error": message}, code, **marks, X_Error_Message=message)


def partial(blob: Blob, wanted: str | None, headers: dict[str, str]) -> Answer:
    """The whole blob, or the range of it that was asked for."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    match = RANGE.fullmatch(wanted or "")
    if match is None or match.groups() == ("", ""):
        return Answer(200, blob, headers)
    if match[1]:
        start, stop = int(match[1]), min(blob.size, int(match[2]) + 1 if match[2] else blob.size)
    else:
        start, stop = max(0, blob.size - int(match[2])), blob.size
    if start >= stop:
        return Answer(416, Blob(b""), {"Content-Range": f"bytes */{blob.size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
    return Answer(206, blob, headers, start, stop - start)


Handle = Callable[["FakeHub", Request, Mapping[str, str]], Answer]
ROUTES: list[tuple[str, re.Pattern[str], Handle]] = []

PIECES = {
    "{repo}": r"(?P<repo>[^/]+(?:/[^/]+)?)",
    "{rev}": r"(?P<rev>[^/]+)",
    "{path}": r"(?P<path>.+)",
    "{oid}": r"(?P<oid>[0-9a-f]{64})",
    "{number}": r"(?P<number>\d+)",
}


def route(methods: str, *patterns: str) -> Callable[[Handle], Handle]:
    """Registers what answers requests of these methods for these patterns of the path, still quoted."""

    def register(handle: Handle) -> Handle:
        for pattern in patterns:
            regex = pattern.replace(".", r"\.")
            for name, piece in PIECES.items():
                regex = regex.replace(name, piece)
            ROUTES.extend((method, re.compile(regex), handle) for method in methods.split())
        return handle

    return register


def find_route(method: str, raw_path: str) -> tuple[Handle, dict[str, str]] | None:
    """What answers a request, with the parts of its path unquoted."""
    for wanted, regex, handle in ROUTES:
        if wanted == method and (match := regex.fullmatch(raw_path)):
            return handle, {name: unquote(value) for name, value in match.groupdict().items()}
    return None


def describe(repo: Repo, commit: Commit, path: str, *, expand: bool = False) -> dict[str, Any]:
    """A file as listings of a tree have it."""
    blob = commit.tree[path]
    entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    if expand:
        last = repo.last_change(commit, path)
        entry["lastCommit"] = {"id": last.sha, "title": last.message, "date": last.date}
    return entry
