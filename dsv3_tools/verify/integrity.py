"""Is a checkpoint still what was written? Hashes against the manifest, index against headers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_tools.checkpoint.deepseek_infer import check_ranks, holds_ranks
from dsv3_tools.checkpoint.files import read_shard_header
from dsv3_tools.checkpoint.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, parse_manifest
from dsv3_tools.checkpoint.paths import hub_blob_sha256, read_small_file, regular_file
from dsv3_tools.checkpoint.reader import Checkpoint
from dsv3_tools.checkpoint.source import HubRepo, Source, SourceLike, parse_source
from dsv3_tools.conversion.progress import Meter, Progress, Stop
from dsv3_tools.errors import CheckpointError, Dsv3Error, NetworkError
from dsv3_tools.verify.threads import wait_for

__all__ = ["IntegrityReport", "verify_integrity"]

_BLOCK_NBYTES = 4 << 20


@dataclass(frozen=True)
class IntegrityReport:
    """What was found.

    `hashes_from` is "manifest", "hub cache" (whose blobs are named by their SHA-256), or None when
    there is nothing to compare hashes with and only the structure was checked.
    """

    directory: Source
    hashes_from: str | None
    files_hashed: int
    nbytes_hashed: int
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems


def verify_integrity(
    directory: SourceLike,
    *,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    stop: Stop | None = None,
) -> IntegrityReport:
    """Compares every file with the manifest, and the index with the shards' headers.

    Example:
        >>> report = verify_integrity("miniature/checkpoint")
        >>> report.passed, report.hashes_from
        (True, None)

    Args:
        directory: a finished result, or any checkpoint; on the Hub, whose own hashes are compared then.
        workers: files hashed at once; None is one for each core.
        on_progress: called with every block, from any thread.
        stop: lets a signal handler end it.

    Returns:
        The findings; a failed check is a finding, not an exception.

    Raises:
        CheckpointError: `directory` is no directory.
    """
    folder = parse_source(directory)
    if isinstance(folder, HubRepo):
        return _verify_on_hub(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is no directory, expected a checkpoint")
    problems: list[str] = []
    hashes_from, expected = _expected_hashes(folder, problems)
    total = sum(nbytes for nbytes, _ in expected.values())
    meter, stop = Meter(total, len(expected), on_progress), stop or Stop()
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        tasks = [
            pool.submit(_check_file, folder, name, nbytes, sha256, meter, stop)
            for name, (nbytes, sha256) in expected.items()
        ]
        wait_for(tasks, stop)
        problems += [problem for task in tasks if (problem := task.result()) is not None]
    if hashes_from == "manifest":
        unlisted = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in expected)
        problems += [f"{name}: is not in the manifest" for name in unlisted]
    try:
        _check_structure(folder)
    except Dsv3Error as error:
        problems.append(str(error))
    return IntegrityReport(folder, hashes_from, len(expected), total, tuple(problems))


def _verify_on_hub(repo: HubRepo) -> IntegrityReport:
    """Compares the hashes that the Hub states with the manifest there: not one weight is fetched."""
    try:
        opened = Checkpoint(repo)
    except NetworkError:
        raise
    except Dsv3Error as error:
        return IntegrityReport(repo, None, 0, 0, (str(error),))
    with opened as checkpoint:
        if not checkpoint.has_file(MANIFEST_NAME):
            return IntegrityReport(checkpoint.source, None, 0, 0, ())
        where = checkpoint.where(MANIFEST_NAME)
        manifest = parse_manifest(checkpoint.read_file(MANIFEST_NAME, MAX_MANIFEST_BYTES), where)
        expected, stated = _manifest_hashes(manifest, where), checkpoint.stated_sha256()
        problems = [
            f"{name}: has the SHA-256 {found} on the Hub, the manifest says {sha256}"
            for name, (nbytes, sha256) in expected.items()
            if (found := stated.get(name) or _sha256_of_small(checkpoint, name, nbytes)) != sha256
        ]
        total = sum(nbytes for nbytes, _ in expected.values())
        return IntegrityReport(checkpoint.source, "manifest", len(expected), total, tuple(problems))


def _sha256_of_small(checkpoint: Checkpoint, name: str, nbytes: int) -> str | None:
    """Returns the SHA-256 of a file beside the shards; None without one."""
    if not checkpoint.has_file(name):
        return None
    return hashlib.sha256(checkpoint.read_file(name, max(nbytes, 1) * 2)).hexdigest()


def _check_structure(folder: Path) -> None:
    """Opens whatever kind of checkpoint `folder` holds, which reads every header.

    Raises:
        Dsv3Error: it is none, or its files do not agree.
    """
    if holds_ranks(folder):
        for name in check_ranks(folder):
            read_shard_header(folder, name)
    else:
        Checkpoint(folder).close()


def _expected_hashes(folder: Path, problems: list[str]) -> tuple[str | None, dict[str, tuple[int, str]]]:
    """Returns where hashes are known from, and size and SHA-256 of every file."""
    if (folder / MANIFEST_NAME).exists():
        try:
            text = read_small_file(folder, MANIFEST_NAME, MAX_MANIFEST_BYTES)
            where = str(folder / MANIFEST_NAME)
            return "manifest", _manifest_hashes(parse_manifest(text, where), where)
        except CheckpointError as error:
            problems.append(str(error))
            return "manifest", {}
    known = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            sha256 = hub_blob_sha256(folder, path.name)
            nbytes = path.stat().st_size
        except (OSError, RuntimeError):
            continue  # a link into nowhere or a loop, which opening the checkpoint will name
        if sha256 is not None:
            known[path.name] = (nbytes, sha256)
    return ("hub cache" if known else None), known


def _manifest_hashes(manifest: dict[str, Any], where: str) -> dict[str, tuple[int, str]]:
    try:
        return {name: (int(file["nbytes"]), str(file["sha256"])) for name, file in manifest["files"].items()}
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{where}: not a manifest of dsv3-tools") from None


def _check_file(folder: Path, name: str, nbytes: int, sha256: str, meter: Meter, stop: Stop) -> str | None:
    """Returns what is wrong with one file, or None."""
    try:
        path = regular_file(folder, name)
        found = path.stat().st_size
        if found != nbytes:
            return f"{name}: has {found:,} bytes, expected {nbytes:,}"
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK_NBYTES):
                stop.check()
                digest.update(block)
                meter.add(len(block))
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{name}: cannot be read: {error.strerror}"
    meter.add(0, shards=1)
    if digest.hexdigest() != sha256:
        return f"{name}: its SHA-256 is {digest.hexdigest()}, expected {sha256}; its content has changed"
    return None
