"""The last step of a run that uploads its result: the small files, and a record of where it went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv3_tools.checkpoint.durable import destination_errors
from dsv3_tools.checkpoint.manifest import FIGURES_NAME, MANIFEST_NAME
from dsv3_tools.checkpoint.source import HubRepo
from dsv3_tools.conversion.card_yaml import CARD_NAME
from dsv3_tools.conversion.options import RunOptions
from dsv3_tools.conversion.plan import Plan
from dsv3_tools.conversion.push import push, with_card_there
from dsv3_tools.conversion.push_record import PushRecord, read_push_record
from dsv3_tools.conversion.uploading import Uploader
from dsv3_tools.errors import DestinationError

__all__ = ["publish", "publish_again", "title_of"]


def title_of(operation: str, digest: str) -> str:
    """Returns what commits of a run are called."""
    return f"dsv3 {operation} {digest[:8]}"


def publish(
    plan: Plan, directory: Path, manifest: Mapping[str, Any], options: RunOptions, uploader: Uploader
) -> str:
    """Uploads what makes the shards a model, and writes down where it is; returns the model at its commit.

    Without `keep_output` the shards have gone, and the index goes now: nobody must take the rest for a model.

    Raises:
        CheckpointError: the Hub does not have the shards that were written.
        NetworkError: uploading failed.
    """
    shards = _shards(plan, manifest)
    small = [
        name for name in (*manifest["files"], CARD_NAME, FIGURES_NAME, MANIFEST_NAME) if name not in shards
    ]
    paths = {name: directory / name for name in small if (directory / name).exists()}
    commit = uploader.finish(with_card_there(uploader.hub, paths), shards)
    there = HubRepo(uploader.hub.target.repo.name, str(uploader.hub.revision), commit)
    _settle(plan, directory, shards, there, options)
    return str(there)


def publish_again(
    plan: Plan, directory: Path, manifest: Mapping[str, Any], options: RunOptions, uploader: Uploader
) -> str:
    """Uploads a result that is here already, unless it is there; returns as `publish`.

    Raises:
        DestinationError: another model is there, or the shards are neither here nor there.
        NetworkError: uploading failed.
    """
    target, record = uploader.hub.target, read_push_record(directory)
    place, shards = (target.repo.name, target.repo.revision), _shards(plan, manifest)
    if record is not None and record.is_at(*place, create_pr=target.create_pr):
        uploader.hub.revision = record.repo.revision
        if uploader.hub.has(shards):
            _settle(plan, directory, shards, record.repo, options)
            return str(record.repo)
    if record is not None and record.removed:
        raise DestinationError(
            f"{directory}: its shards were removed here, and {record.repo} has them no more; --overwrite "
            "makes them again"
        )
    done = push(directory, target, overwrite=options.overwrite, stop=options.stop)
    there = HubRepo(target.repo.name, done.revision, done.commit)
    _settle(plan, directory, shards, there, options)
    return str(there)


def _settle(
    plan: Plan, directory: Path, shards: Mapping[str, str], there: HubRepo, options: RunOptions
) -> None:
    """Writes down where a result is; without `keep_output` its shards go, and the index with them."""
    index = [plan.index_name] if plan.index_name is not None else []
    removed = () if options.hub.keep_output else (*shards, *index)
    PushRecord(there, frozenset(removed)).write(directory)
    with destination_errors(directory, "removing what was uploaded"):
        for name in reversed(removed):  # the index first
            (directory / name).unlink(missing_ok=True)


def _shards(plan: Plan, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Returns the SHA-256 of every shard, by name."""
    return {shard.name: str(manifest["files"][shard.name]["sha256"]) for shard in plan.shards}
