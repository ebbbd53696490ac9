"""What the hub answers to those who look and download."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

from tests.hub.repos import Blob, Commit, Discussion, NotFound, Repo
from tests.hub.wire import Answer, Request, as_json, describe, partial, refuse, route

if TYPE_CHECKING:
    from tests.hub.server import FakeHub

Parts = Mapping[str, str]


@route("GET", "/api/models/{repo}/revision/{rev}", "/api/models/{repo}")
def model_info(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    repo = hub.readable(request, parts["repo"])
    commit = repo.resolve(parts.get("rev", "main"))
    card = repo.card_data(commit)
    files = [sibling(path, blob, request.flag("blobs")) for path, blob in sorted(commit.tree.items())]
    info: dict[str, Any] = {
        "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.partition("/")[0],
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": repo.created,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": (card or {}).get("tags") or [],
        "siblings": files,
        "usedStorage": sum(blob.size for blob in repo.objects.values()),
    }
    if card is not None:
        info["cardData"] = card
    if "expand" in request.query:
        info = {key: value for key, value in info.items() if key in {"_id", "id", *request.query["expand"]}}
    return as_json(info)


def sibling(path: str, blob: Blob, with_blobs: bool) -> dict[str, Any]:
    """A file as the repo's description lists it."""
    if not with_blobs:
        return {"rfilename": path}
    entry: dict[str, Any] = {"rfilename": path, "size": blob.size, "blobId": blob.oid}
    if blob.lfs:
        entry["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return entry


@route("GET", "/api/models/{repo}/tree/{rev}", "/api/models/{repo}/tree/{rev}/{path}")
def list_tree(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    repo = hub.readable(request, parts["repo"])
    commit = repo.resolve(parts["rev"])
    folder = parts.get("path", "").rstrip("/")
    inside = [path for path in commit.tree if not folder or path.startswith(folder + "/")]
    if folder and not inside:
        raise NotFound("EntryNotFound", f"{folder} does not exist on {parts['rev']}")
    listed = entries_below(inside, folder, recursive=request.flag("recursive"))
    start = int(request.query.get("cursor", ["0"])[0])
    page = listed[start : start + hub.page_size]
    expand = request.flag("expand")
    answer = as_json([entry(repo, commit, path, expand=expand) for path in page])
    if start + hub.page_size < len(listed):
        flags = "".join(f"{name}={request.flag(name)}&".lower() for name in ("recursive", "expand"))
        target = f"{hub.url}{request.raw_path}?{flags}cursor={start + hub.page_size}"
        answer.headers["Link"] = f'<{target}>; rel="next"'
    return answer


def entries_below(paths: list[str], folder: str, *, recursive: bool) -> list[str]:
    """Files and folders below a folder, or directly in it; folders end with a slash."""
    depth = len(folder) + 1 if folder else 0
    found: set[str] = set()
    for path in paths:
        names = path[depth:].split("/")
        found |= {path[:depth] + "/".join(names[:count]) + "/" for count in range(1, len(names))}
        found.add(path)
    return sorted(name for name in found if recursive or "/" not in name[depth:].rstrip("/"))


def entry(repo: Repo, commit: Commit, path: str, *, expand: bool) -> dict[str, Any]:
    """A file, or a folder whose path ends with a slash."""
    if not path.endswith("/"):
        return describe(repo, commit, path, expand=expand)
    below = "".join(blob.oid for name, blob in sorted(commit.tree.items()) if name.startswith(path))
    folder = {"type": "directory", "oid": hashlib.sha1(below.encode()).hexdigest(), "size": 0}
    return {**folder, "path": path.rstrip("/")}


@route("POST", "/api/models/{repo}/paths-info/{rev}")
def paths_info(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    repo = hub.readable(request, parts["repo"])
    commit = repo.resolve(parts["rev"])
    asked = parse_qs(request.read().decode())
    expand = asked.get("expand", [""])[0].lower() == "true"
    folders = set(entries_below(list(commit.tree), "", recursive=True)) - set(commit.tree)
    paths = [path + "/" if path + "/" in folders else path for path in asked.get("paths", [])]
    known = [path for path in paths if path in commit.tree or path in folders]
    return as_json([entry(repo, commit, path, expand=expand) for path in known])


@route("GET", "/api/models/{repo}/refs")
def list_refs(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    repo = hub.readable(request, parts["repo"])
    refs: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for name, sha in repo.refs.items():
        is_pull = name.startswith("refs/pr/")
        full = name if is_pull else "refs/heads/" + name
        refs["pullRequests" if is_pull else "branches"].append(
            {"name": name, "ref": full, "targetCommit": sha}
        )
    return as_json(refs)


@route("GET", "/api/models/{repo}/commits/{rev}")
def list_commits(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    history = hub.readable(request, parts["repo"]).history(parts["rev"])
    return as_json(
        [
            {
                "id": commit.sha,
                "title": commit.message,
                "message": commit.description,
                "authors": [{"user": hub.user}],
                "date": commit.date,
            }
            for commit in reversed(history)
        ]
    )


@route("GET", "/api/models/{repo}/discussions")
def list_discussions(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    repo = hub.readable(request, parts["repo"])
    kind, status = (request.query.get(name, ["all"])[0] for name in ("type", "status"))
    found = [
        discussion
        for discussion in reversed(repo.discussions)
        if kind in ("all", "pull_request" if discussion.is_pull_request else "discussion")
        and (status == "all" or (status == "closed") == (discussion.status in {"closed", "merged"}))
    ]
    return as_json(
        {"count": len(found), "start": 0, "discussions": [discussed(hub, repo, one) for one in found]}
    )


@route("GET", "/api/models/{repo}/discussions/{number}")
def discussion_details(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    repo = hub.readable(request, parts["repo"])
    number = int(parts["number"])
    if not 1 <= number <= len(repo.discussions):
        return refuse(404, "No such discussion")
    discussion = repo.discussions[number - 1]
    details = {"events": [], "filesWithConflicts": [], "changes": {"base": discussion.base}, "diff": ""}
    return as_json({**discussed(hub, repo, discussion), **details})


def discussed(hub: FakeHub, repo: Repo, discussion: Discussion) -> dict[str, Any]:
    """A discussion as lists have it."""
    return {
        "num": discussion.number,
        "title": discussion.title,
        "author": {"name": hub.user},
        "createdAt": discussion.created,
        "status": discussion.status,
        "repo": {"name": repo.id, "type": "model"},
        "isPullRequest": discussion.is_pull_request,
    }


@route("GET", "/api/models/{repo}/auth-check")
def check_access(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    return hub.gate(request, hub.readable(request, parts["repo"])) or as_json({})


@route("GET HEAD", "/{repo}/resolve/{rev}/{path}")
def resolve(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    repo = hub.readable(request, parts["repo"])
    if (refusal := hub.gate(request, repo)) is not None:
        return refusal
    commit = repo.resolve(parts["rev"])
    path = parts["path"]
    if path not in commit.tree:
        answer = refuse(404, "Entry not found", "EntryNotFound")
        answer.headers["X-Repo-Commit"] = commit.sha
        return answer
    blob = commit.tree[path]
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.etag}"', **disposition(path)}
    if not blob.lfs:
        answer = partial(blob, request.headers.get("Range"), headers)
        answer.file = path
        return answer
    target = f"{hub.cdn_url}/cdn/{repo.id}/{blob.sha256}/{quote(path)}?Signature=valid"
    linked = {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.etag}"', "Location": target}
    text = Blob(f"Found. Redirecting to {target}".encode())
    return Answer(302, text, {**headers, **linked, "Accept-Ranges": "bytes", "Content-Type": "text/plain"})


@route("GET HEAD", "/cdn/{repo}/{oid}/{path}")
def serve_object(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    """A large object; who has the address needs no token."""
    blob = hub.repo(parts["repo"]).objects.get(parts["oid"])
    if blob is None or request.query.get("Signature") != ["valid"]:
        return refuse(403, "AccessDenied")
    headers = {"ETag": f'"{blob.sha256[:32]}"', **disposition(parts["path"])}
    answer = partial(blob, request.headers.get("Range"), headers)
    answer.file = parts["path"]
    return answer


def disposition(path: str) -> dict[str, str]:
    """The header that names the file."""
    name = path.rpartition("/")[2]
    return {"Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}; filename=\"{quote(name)}\";"}
