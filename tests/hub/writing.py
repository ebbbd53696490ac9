"""What the hub answers to those who create repos, upload and commit."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from tests.hub.repos import INITIAL_FILES, Blob, NotFound, Repo, front_matter, is_large
from tests.hub.wire import Answer, Request, as_json, refuse, route

if TYPE_CHECKING:
    from tests.hub.server import FakeHub

Parts = Mapping[str, str]


class Refused(Exception):
    """A commit that the hub does not take."""


@route("GET", "/api/whoami-v2")
def whoami(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    if not hub.knows(request.token):
        return refuse(401, "Invalid username or password.")
    role = "read" if request.token in hub.read_tokens else "write"
    orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in sorted(hub.organizations)]
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
    return as_json({"type": "user", "name": hub.user, "orgs": orgs, "auth": auth})


@route("POST", "/api/repos/create")
def create_repo(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    asked = request.json()
    if (refusal := hub.writer(request)) is not None:
        return refusal
    repo_id = f"{asked.get('organization') or hub.user}/{asked['name']}"
    if repo_id.partition("/")[0] not in {hub.user, *hub.organizations}:
        return refuse(403, f"You don't have the rights to create a model under that namespace: {repo_id}")
    created = {"url": f"{hub.url}/{repo_id}", "name": repo_id}
    if repo_id in hub.repos:
        return as_json({"error": "You already created this model repo", **created}, 409)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    hub.add_repo(repo_id, INITIAL_FILES, private=private, message="initial commit")
    return as_json(created)


@route("POST", "/api/validate-yaml")
def validate_card(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    try:
        data = front_matter(request.json()["content"].encode())
    except (yaml.YAMLError, ValueError) as error:
        return as_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    empty = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
    return as_json({"errors": [], "warnings": empty})


@route("GET", "/api/models/{repo}/auth-check/write")
def check_write_access(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    hub.readable(request, parts["repo"])
    return hub.writer(request, parts["repo"]) or as_json({})


@route("POST", "/api/models/{repo}/branch/{rev}")
def create_branch(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    repo = hub.readable(request, parts["repo"])
    start = request.json().get("startingPoint", "main")
    if (refusal := hub.writer(request, repo.id)) is not None:
        return refusal
    if parts["rev"].startswith("refs/"):
        return refuse(400, "Invalid reference for a branch")
    with repo.lock:
        if parts["rev"] in repo.refs:
            return refuse(409, "Reference already exists")
        repo.refs[parts["rev"]] = repo.resolve(start).sha
    return as_json({"success": True})


@route("POST", "/api/models/{repo}/discussions")
def open_discussion(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    repo = hub.readable(request, parts["repo"])
    asked = request.json()
    if not hub.knows(request.token):
        return refuse(401, "Invalid username or password.")
    discussion = repo.open_discussion(asked["title"], pull_request=bool(asked.get("pullRequest")))
    if discussion.is_pull_request:
        discussion.status = "draft"
    return as_json({"num": discussion.number, "pullRequest": discussion.is_pull_request})


@route("POST", "/api/models/{repo}/preupload/{rev}")
def preupload(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    repo = hub.readable(request, parts["repo"])
    files = request.json()["files"]
    if (refusal := hub.writer(request, repo.id, for_pull=request.flag("create_pr"))) is not None:
        return refusal
    tree = repo.resolve(parts["rev"]).tree

    def advise(path: str, size: int) -> dict[str, Any]:
        mode = "lfs" if is_large(path, size) else "regular"
        known = {"oid": tree[path].etag} if path in tree else {}
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, **known}

    return as_json({"files": [advise(file["path"], file["size"]) for file in files]})


@route("POST", "/{repo}.git/info/lfs/objects/batch")
def batch(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    """Says of each large object where it is to be sent; those that are here need nothing."""
    repo = hub.readable(request, parts["repo"])
    asked = request.json()
    if not hub.knows(request.token):
        return refuse(401, "Invalid username or password.")
    in_parts = "multipart" in asked.get("transfers", ["basic"])
    objects = [plan(hub, repo, one["oid"], one["size"], in_parts) for one in asked["objects"]]
    split = any("header" in one.get("actions", {}).get("upload", {}) for one in objects)
    return as_json({"transfer": "multipart" if split else "basic", "objects": objects})


def plan(hub: FakeHub, repo: Repo, oid: str, size: int, in_parts: bool) -> dict[str, Any]:
    """How one object is to be uploaded, in one piece or in parts."""
    planned: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
    if oid in repo.objects:
        return planned
    upload: dict[str, Any] = {"href": f"{hub.cdn_url}/lfs/{repo.id}/{oid}"}
    if in_parts and size > hub.part_size:
        count = -(-size // hub.part_size)
        urls = {str(part): f"{hub.cdn_url}/parts/{part}/{repo.id}/{oid}" for part in range(1, count + 1)}
        upload = {
            "href": f"{hub.url}/{repo.id}.git/complete/{oid}",
            "header": {"chunk_size": str(hub.part_size), **urls},
        }
    return {**planned, "actions": {"upload": upload, "verify": {"href": f"{hub.url}/{repo.id}.git/verify"}}}


@route("PUT", "/lfs/{repo}/{oid}")
def put_object(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    return keep(hub.repo(parts["repo"]), parts["oid"], hub.store(request.chunks))


@route("PUT", "/parts/{number}/{repo}/{oid}")
def put_part(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    piece = hub.store(request.chunks)
    with hub.lock:
        hub.parts.setdefault((parts["repo"], parts["oid"]), {})[int(parts["number"])] = piece
    return Answer(200, headers={"ETag": f'"{piece.sha256[:32]}"'})


@route("POST", "/{repo}.git/complete/{oid}")
def complete(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    """Puts the parts together, if they are those that the client lists."""
    listed = request.json()["parts"]
    with hub.lock:
        pieces = dict(hub.parts.get((parts["repo"], parts["oid"]), {}))
    etags = [(number, f'"{pieces[number].sha256[:32]}"') for number in sorted(pieces)]
    if [(part["partNumber"], part["etag"]) for part in listed] != etags:
        return refuse(400, "One or more of the specified parts could not be found")
    whole = hub.store(pieces[number].read() for number in sorted(pieces))
    return keep(hub.repo(parts["repo"]), parts["oid"], whole)


def keep(repo: Repo, oid: str, blob: Blob) -> Answer:
    """Takes an object into the repo if it is what its name says."""
    if blob.sha256 != oid:
        return refuse(400, "The SHA-256 you specified did not match what we received")
    with repo.lock:
        repo.objects[oid] = blob
    return Answer(200, headers={"ETag": f'"{oid[:32]}"'})


@route("POST", "/{repo}.git/verify")
def verify(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    asked = request.json()
    blob = hub.readable(request, parts["repo"]).objects.get(asked["oid"])
    if blob is None or blob.size != asked["size"]:
        return refuse(404, "Object not found or of another size")
    return as_json({})


@route("POST", "/api/models/{repo}/commit/{rev}")
def commit(hub: FakeHub, request: Request, parts: Parts) -> Answer:
    repo = hub.readable(request, parts["repo"])
    lines = [json.loads(line) for line in request.read().splitlines()]
    for_pull = request.flag("create_pr")
    if (refusal := hub.writer(request, repo.id, for_pull=for_pull)) is not None:
        return refusal
    header = next(line["value"] for line in lines if line["key"] == "header")
    try:
        with repo.lock:
            return take_commit(hub, repo, parts["rev"], header, lines, for_pull=for_pull)
    except Refused as refused:
        return refuse(400, str(refused))


def take_commit(
    hub: FakeHub, repo: Repo, branch: str, header: Mapping[str, str], lines: list[Any], *, for_pull: bool
) -> Answer:
    """Makes the commit on its branch or on a new pull request."""
    head, wanted = repo.resolve(branch), header.get("parentCommit")
    if wanted and not for_pull and not head.sha.startswith(wanted):
        return refuse(412, "A commit has happened since. Please refresh and try again.")
    if not for_pull and branch not in repo.refs:
        raise NotFound("RevisionNotFound", f"Not a branch: {branch}")
    steps = [step for line in lines if (step := read_step(repo, line)) is not None]
    if missing := [step for step in steps if isinstance(step, str) and not exists(head.tree, step)]:
        raise NotFound("EntryNotFound", f"A file with this name doesn't exist: {missing[0]}")
    pull_url = None
    if for_pull:
        pull = repo.open_discussion(header["summary"], pull_request=True, start=wanted or branch)
        branch, pull_url = f"refs/pr/{pull.number}", f"{hub.url}/{repo.id}/discussions/{pull.number}"
    made = repo.add_commit(branch, header["summary"], header.get("description", ""), steps)
    url = f"{hub.url}/{repo.id}/commit/{made.sha}"
    data = {"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": ""}
    return as_json({**data, "pullRequestUrl": pull_url} if pull_url else data)


def exists(tree: Mapping[str, Blob], path: str) -> bool:
    """Whether there is such a file, or such a folder if it ends with a slash."""
    return path in tree or (path.endswith("/") and any(name.startswith(path) for name in tree))


def read_step(repo: Repo, line: dict[str, Any]) -> str | tuple[str, Blob] | None:
    """One line of a commit: a path to delete, a path with its content, or None for the header."""
    key, value = line["key"], line["value"]
    if key == "header":
        return None
    path: str = value["path"]
    if key in {"deletedFile", "deletedFolder"}:
        return path if key == "deletedFile" else path.rstrip("/") + "/"
    if key == "file":
        content = base64.b64decode(value["content"])
        if is_large(path, len(content)):
            raise Refused(f"Your push was rejected because {path} must be stored as a large object")
        return path, Blob(content)
    if key != "lfsFile":
        raise Refused(f"Unknown operation {key}")
    blob = repo.objects.get(value["oid"])
    if blob is None or value.get("size", blob.size) != blob.size:
        raise Refused(f"LFS pointer of {path} points to a file that does not exist: {value['oid']}")
    return path, blob
