"""The last part of a run: small files, copied or made, the model card, and the manifest."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dsv3_tools import __version__
from dsv3_tools.checkpoint.durable import write_file
from dsv3_tools.checkpoint.manifest import MANIFEST_NAME, encode_manifest, parse_manifest
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.conversion.card import planned_card
from dsv3_tools.conversion.card_facts import card_facts
from dsv3_tools.conversion.card_yaml import CARD_NAME
from dsv3_tools.conversion.plan import PLAN_VERSION, Plan
from dsv3_tools.conversion.planning import MAX_SIDE_FILE_BYTES
from dsv3_tools.conversion.workspace import JournalEntry, Workspace
from dsv3_tools.errors import CheckpointError

__all__ = ["finish"]

MANIFEST_VERSION = 1


def finish(
    plan: Plan,
    source: Checkpoint,
    workspace: Workspace,
    done: Mapping[str, JournalEntry],
    extra: Mapping[str, bytes],
) -> dict[str, Any]:
    """Writes everything but the shards, the manifest last; returns the manifest.

    The model card is in no manifest: its user may edit it. `extra` are files that came of the run itself.

    Raises:
        CheckpointError: a small file has changed since the plan was made.
        DestinationError: the disk does not do its part.
    """
    small = {name: _unchanged(plan, source, name) for name in plan.side_files} | dict(extra)
    made = plan.made_files()
    manifest = _manifest(plan, source, done, small | made)
    encoded = encode_manifest(manifest)
    card = planned_card(plan, parse_manifest(encoded, MANIFEST_NAME), workspace.destination)
    for name, data in {**small, **({} if card is None else {CARD_NAME: card}), **made}.items():
        write_file(workspace.destination / name, data, folder=workspace.folder)
    write_file(workspace.destination / MANIFEST_NAME, encoded, folder=workspace.folder)
    return manifest


def _unchanged(plan: Plan, source: Checkpoint, name: str) -> bytes:
    data = source.read_file(name, MAX_SIDE_FILE_BYTES)
    planned = next(file for file in plan.source_files if file.name == name and file.origin == "source")
    if hashlib.sha256(data).hexdigest() != planned.sha256:
        raise CheckpointError(f"{source.where(name)}: has changed during the run; run it again")
    return data


def _manifest(
    plan: Plan, source: Checkpoint, done: Mapping[str, JournalEntry], small: Mapping[str, bytes]
) -> dict[str, Any]:
    """Returns the manifest: no time and no host in it, so that equal runs give equal manifests."""
    files = {shard.name: {"nbytes": shard.nbytes, "sha256": done[shard.name].sha256} for shard in plan.shards}
    files |= {
        name: {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in small.items()
    }
    nonfinite: Counter[str] = Counter()
    for entry in done.values():
        nonfinite.update(entry.nonfinite)
    return {
        "manifest_version": MANIFEST_VERSION,
        "program": {"name": "dsv3-tools", "version": __version__, "plan_version": PLAN_VERSION},
        "operation": plan.operation,
        "options": dict(plan.options),
        "plan_digest": plan.digest,
        "nonfinite": dict(sorted(nonfinite.items())),
        "blocks_compared": sum(entry.blocks for entry in done.values()),
        "blocks_kept": sum(entry.blocks_kept for entry in done.values()),
        "dropped": dict(plan.dropped),
        **card_facts(plan, source),
        **({"restoring": dict(plan.restoring)} if plan.restoring else {}),
        **(
            {"repositories": {origin: repo.record() for origin, repo in plan.repositories.items()}}
            if plan.repositories
            else {}
        ),
        "sources": [
            {
                "origin": f.origin,
                "name": f.name,
                "nbytes": f.nbytes,
                "mtime_ns": f.mtime_ns,
                "sha256": f.sha256,
            }
            for f in plan.source_files
        ],
        "files": dict(sorted(files.items())),
    }
