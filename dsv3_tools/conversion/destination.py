"""What already lies in a destination, and whether a run may begin, go on, or has nothing to do."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

from dsv3_tools.checkpoint.config import CONFIG_NAME
from dsv3_tools.checkpoint.deepseek_infer import INFER_CONFIG_NAME
from dsv3_tools.checkpoint.durable import destination_errors
from dsv3_tools.checkpoint.index import INDEX_NAME, MAX_INDEX_BYTES, parse_index
from dsv3_tools.checkpoint.manifest import (
    FIGURES_NAME,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    PUSH_NAME,
    QUANTIZATION_NAME,
    parse_manifest,
)
from dsv3_tools.checkpoint.paths import WORK_FOLDER, read_small_file
from dsv3_tools.conversion.options import HubOptions
from dsv3_tools.conversion.plan import Plan
from dsv3_tools.conversion.progress import Stop
from dsv3_tools.conversion.push_record import PushRecord, read_push_record
from dsv3_tools.conversion.workspace import JournalEntry, Workspace
from dsv3_tools.errors import CheckpointError, DestinationError

__all__ = [
    "State",
    "clear",
    "finished_shards",
    "read_manifest",
    "replaceable_nbytes",
    "survey",
    "withdraw",
]

_HASH_BYTES = 4 << 20

_MARKS = (INDEX_NAME, MANIFEST_NAME)
"""What makes shards a checkpoint, in the order of writing and of removal: without one it is none."""

_CONFIGS = (CONFIG_NAME, INFER_CONFIG_NAME)
"""What no other checkpoint's shards may lie beside."""

_FIGURES = (FIGURES_NAME, QUANTIZATION_NAME)


class State(Enum):
    """What a run finds at its destination."""

    FRESH = "nothing is there, or it may be overwritten"
    RESUME = "an interrupted run of the same plan"
    COMPLETE = "the finished result of the same plan"


def survey(plan: Plan, destination: Path, *, overwrite: bool, hub: HubOptions) -> State:
    """Returns what lies at `destination`; what a push has removed counts as there if this run would do so.

    Raises:
        DestinationError: something that is not this plan's and may not be overwritten.
    """
    with destination_errors(destination, "reading the directory"):
        if os.path.lexists(destination) and not destination.is_dir():
            raise DestinationError(
                f"{destination}: is a file or a link to nothing, expected a directory or nothing"
            )
        others = set(os.listdir(destination)) - {WORK_FOLDER} if destination.exists() else set()
    workspace = Workspace(destination)
    if workspace.has_plan():
        problem = workspace.plan_problem(plan) or _foreign_shard(plan, others)
    elif not others:
        return State.FRESH
    elif MANIFEST_NAME in others:
        record = read_push_record(destination)
        removed = frozenset() if record is None else record.removed
        goes_on = _removes_alike(hub, record) and not overwrite
        if _holds_result_of(plan, destination, removed if goes_on else frozenset()):
            return State.COMPLETE
        problem = _moved(plan, destination) or (
            "holds the result of another run, or of this one from files that have changed since"
        )
        if record is not None and removed:
            problem = f"holds what was left of a result that went to {record.repo}"
    else:
        problem = f"is not empty ({', '.join(sorted(others)[:3])}{', ...' if len(others) > 3 else ''})"
    if problem is None:
        return State.RESUME
    if overwrite:
        _refuse_to_remove(destination)
        return State.FRESH
    raise DestinationError(f"{destination}: {problem}; choose another directory, or --overwrite it")


def clear(destination: Path) -> None:
    """Removes a checkpoint that is to be overwritten: the index first, so that half of it is none.

    Removes index, manifest, config, `model*.safetensors` and what index and manifest list (an old tokenizer
    must not stay beside new weights), and figures of the old weights; other files are left, README.md with
    its user's text among them.
    """
    with destination_errors(destination, "removing what was there"):
        for path in _replaceable(destination):
            path.unlink()
    Workspace(destination).clear()


def withdraw(destination: Path) -> None:
    """Removes index and manifest of a run that was killed after them, when a shard has been damaged since.

    Until the shard is written again no loader may take the directory for a checkpoint.
    """
    with destination_errors(destination, "removing the index"):
        for name in _MARKS:
            (destination / name).unlink(missing_ok=True)


def replaceable_nbytes(destination: Path) -> int:
    """Returns the bytes that `clear` would free."""
    return sum(path.lstat().st_size for path in _replaceable(destination))


def finished_shards(
    plan: Plan,
    workspace: Workspace,
    *,
    keep_nonfinite: bool,
    stop: Stop,
    elsewhere: Mapping[str, str] | None = None,
) -> dict[str, JournalEntry]:
    """Returns the shards of `plan` that an earlier run finished and that are still what it wrote.

    A file whose size and times are those of its journal line is believed; any other is hashed. One
    that has changed is not in the result and will be written again. What is `elsewhere`, by name and SHA-256,
    need not be here.

    Raises:
        Interrupted: somebody has asked `stop`.
    """
    journal = workspace.read_journal()
    claimed = [
        entry
        for shard in plan.shards
        if (entry := journal.get(shard.name)) is not None
        and entry.nbytes == shard.nbytes
        and (keep_nonfinite or not entry.nonfinite)
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        there = elsewhere or {}
        intact = pool.map(
            lambda entry: (
                there.get(entry.shard) == entry.sha256 or _is_intact(workspace.destination, entry, stop)
            ),
            claimed,
        )
        return {entry.shard: entry for entry, good in zip(claimed, intact, strict=True) if good}


def _is_intact(destination: Path, entry: JournalEntry, stop: Stop) -> bool:
    path = destination / entry.shard
    if path.is_symlink() or not path.is_file():
        return False
    status = path.stat()
    if status.st_size != entry.nbytes:
        return False
    if (status.st_mtime_ns, status.st_ctime_ns) == (entry.mtime_ns, entry.ctime_ns):
        return True
    digest = hashlib.sha256()
    with destination_errors(path, "reading it again"), path.open("rb") as file:
        while block := file.read(_HASH_BYTES):
            stop.check()
            digest.update(block)
    return digest.hexdigest() == entry.sha256


def read_manifest(destination: Path) -> dict[str, Any]:
    """Returns the manifest of a finished result.

    Raises:
        CheckpointError: there is none, or it has been changed.
    """
    text = read_small_file(destination, MANIFEST_NAME, MAX_MANIFEST_BYTES)
    return parse_manifest(text, str(destination / MANIFEST_NAME))


def _holds_result_of(plan: Plan, destination: Path, removed: Container[str]) -> bool:
    try:
        manifest = read_manifest(destination)
        files: Mapping[str, Mapping[str, Any]] = manifest["files"]
        sizes_agree = all(
            name in removed or (destination / name).stat().st_size == file["nbytes"]
            for name, file in files.items()
        )
        complete = plan.commit_point in (*files, MANIFEST_NAME)
        return bool(manifest["plan_digest"] == plan.digest and complete and sizes_agree)
    except (CheckpointError, OSError, KeyError, TypeError, AttributeError):
        return False


def _moved(plan: Plan, destination: Path) -> str | None:
    """Returns what to say of a result of an earlier commit of the same branch."""
    try:
        before: Mapping[str, Mapping[str, str]] = read_manifest(destination).get("repositories", {})
    except CheckpointError:
        return None
    for origin, repo in plan.repositories.items():
        earlier = before.get(origin, {})
        same = (earlier.get("repo"), earlier.get("revision")) == (repo.name, repo.revision)
        if same and earlier.get("commit") != repo.commit:
            return f"holds the result of {repo.name} at commit {earlier.get('commit')}, {repo} is newer"
    return None


def _removes_alike(hub: HubOptions, record: PushRecord | None) -> bool:
    """Whether a run, like the one before, leaves its shards on the Hub alone, in the same place."""
    if record is None or hub.push is None or hub.keep_output:
        return False
    repo = hub.push.repo
    return record.is_at(repo.name, repo.revision, create_pr=hub.push.create_pr)


def _foreign_shard(plan: Plan, names: set[str]) -> str | None:
    own = {shard.name for shard in plan.shards}
    foreign = sorted(name for name in names if name.endswith(".safetensors") and name not in own)
    return f"holds {foreign[0]}, which is not part of this run" if foreign else None


def _replaceable(destination: Path) -> Iterator[Path]:
    """Yields the files of the checkpoint that lies at `destination`, its index first."""
    if not destination.is_dir():
        return
    listed: list[str] = []
    with suppress(CheckpointError):
        listed += read_manifest(destination)["files"]
    with suppress(CheckpointError):
        index = read_small_file(destination, INDEX_NAME, MAX_INDEX_BYTES)
        listed += parse_index(index, INDEX_NAME).values()
    shards = sorted(path.name for path in destination.glob("model*.safetensors"))
    for name in dict.fromkeys([*_MARKS, PUSH_NAME, *_CONFIGS, *_FIGURES, *listed, *shards]):
        if Path(name).name == name and os.path.lexists(destination / name):
            yield destination / name


def _refuse_to_remove(destination: Path) -> None:
    """Refuses to overwrite a directory with weights that are no part of the checkpoint there.

    Raises:
        DestinationError: naming one of them.
    """
    ours = {path.name for path in _replaceable(destination)}
    for path in sorted(destination.glob("*.safetensors")):
        if path.name not in ours:
            raise DestinationError(
                f"{path}: is no part of the checkpoint that would be overwritten; move it elsewhere first"
            )
