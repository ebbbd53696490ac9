"""The last step of a run that uploads its result: the small files, and a record of where it went."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_tools.checkpoint.durable import destination_errors, write_file
from dsv3_tools.checkpoint.manifest import MANIFEST_NAME
from dsv3_tools.checkpoint.source import HubRepo
from dsv3_tools.conversion.destination import PUSH_NAME
from dsv3_tools.conversion.options import RunOptions
from dsv3_tools.conversion.plan import Plan
from dsv3_tools.conversion.push import push
from dsv3_tools.conversion.uploading import Uploader
from dsv3_tools.conversion.workspace import Workspace

__all__ = ["publish", "publish_again", "title_of"]

_OPTIONAL = ("README.md", "dsv3_figures.json")


def title_of(operation: str, digest: str) -> str:
    """Returns what commits of a run are called."""
    return f"dsv3 {operation} {digest[:8]}"


def publish(
    plan: Plan, workspace: Workspace, manifest: Mapping[str, Any], options: RunOptions, uploader: Uploader
) -> str:
    """Uploads what makes the shards a model, and writes down where it is; returns the model at its commit.

    Raises:
        CheckpointError: the Hub does not have the shards that were written.
        NetworkError: uploading failed.
    """
    hashes = {name: str(file["sha256"]) for name, file in manifest["files"].items()}
    shards = {shard.name: hashes[shard.name] for shard in plan.shards}
    small = [name for name in (*hashes, *_OPTIONAL, MANIFEST_NAME) if name not in shards]
    paths = {name: workspace.destination / name for name in small}
    commit = uploader.finish({n: path for n, path in paths.items() if path.exists()}, shards)
    return _record(workspace, uploader, commit, hashes, plan, keep=options.hub.keep_output)


def publish_again(
    plan: Plan, workspace: Workspace, manifest: Mapping[str, Any], options: RunOptions, uploader: Uploader
) -> str:
    """Uploads a result that is here already, unless the record says that it is there; returns as `publish`.

    Raises:
        CheckpointError: its shards are not here any more.
        NetworkError: uploading failed.
    """
    found = _recorded(workspace.destination)
    assert options.hub.push is not None
    if found is not None and found.name == options.hub.push.repo.name:
        return str(found)
    done = push(workspace.destination, options.hub.push)
    hashes = {name: str(file["sha256"]) for name, file in manifest["files"].items()}
    return _record(workspace, uploader, done.commit, hashes, plan, keep=True)


def _record(
    workspace: Workspace,
    uploader: Uploader,
    commit: str,
    hashes: Mapping[str, str],
    plan: Plan,
    *,
    keep: bool,
) -> str:
    """Writes down where the result is; without `keep` nothing here is taken for a checkpoint any more."""
    repo = uploader.hub.target.repo
    there = HubRepo(repo.name, uploader.hub.revision or repo.revision, commit)
    document = {**there.record(), "files": dict(hashes)}
    text = json.dumps(document, indent=2).encode() + b"\n"
    write_file(workspace.destination / PUSH_NAME, text, folder=workspace.destination)
    if not keep and plan.index_name is not None:
        with destination_errors(workspace.destination, "removing the index"):
            (workspace.destination / plan.index_name).unlink(missing_ok=True)
    return str(there)


def _recorded(destination: Path) -> HubRepo | None:
    """Returns where an earlier run has uploaded the result to."""
    try:
        document = json.loads((destination / PUSH_NAME).read_bytes())
        return HubRepo(document["repo"], document["revision"], document["commit"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
