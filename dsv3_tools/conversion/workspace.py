"""The working folder `.dsv3` of a destination: lock, plan and journal of a run that is not finished.

.dsv3/lock            held while a process writes here (good manners; safety lies in unique
                      temporary names and rename, because some cluster filesystems grant
                      every lock)
.dsv3/owner.json      who holds it
.dsv3/plan.json       digest of the plan and what its source files were
.dsv3/journal*.jsonl  one line for each finished shard, appended after its rename
.dsv3/*.tmp           files being written
.dsv3/made/           what a run that makes weights needs to go on: see `making`
.dsv3/source-*/       shards fetched from the Hub, one folder for each rank
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dsv3_tools.checkpoint.durable import destination_errors, write_file
from dsv3_tools.checkpoint.paths import WORK_FOLDER
from dsv3_tools.checkpoint.source import HubRepo
from dsv3_tools.conversion.plan import Plan, SourceFile
from dsv3_tools.errors import DestinationError

__all__ = ["JournalEntry", "Workspace"]

PLAN_NAME = "plan.json"
OWNER_NAME = "owner.json"
FAILED_NAME = "failed"

_LOCK_ATTEMPTS = 3
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What filesystems without locks answer."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A finished shard: its hash, what the file looked like right after its rename, and its findings."""

    shard: str
    sha256: str
    nbytes: int
    mtime_ns: int
    ctime_ns: int
    nonfinite: Mapping[str, int]
    blocks: int = 0
    blocks_kept: int = 0


class Workspace:
    """The working folder of one destination."""

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        self.folder = destination / WORK_FOLDER

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the lock; goes on without one where the filesystem has none.

        Raises:
            DestinationError: another run holds it (with its process and host), or the folder is not one.
        """
        lock = self._acquire()
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "start": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        }
        try:
            write_file(self.folder / OWNER_NAME, json.dumps(owner).encode(), folder=self.folder)
            yield
        finally:
            lock.release()

    def _acquire(self) -> FileLock:
        self.check_folder()
        lock = FileLock(self.folder / "lock", timeout=0)
        for attempt in range(_LOCK_ATTEMPTS):
            with destination_errors(self.folder, "creating the working folder"):
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    lock.acquire()
                except Timeout:
                    raise DestinationError(
                        f"{self.destination}: {self._owner()} is writing to it; wait for it to end"
                    ) from None
                except FileNotFoundError:  # another run has just finished and removed the folder
                    if attempt == _LOCK_ATTEMPTS - 1:
                        raise
                    continue
                # A filesystem without locks; older releases of filelock say NotImplementedError.
                except (NotImplementedError, OSError) as error:
                    if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                        raise
            break
        return lock

    def check_folder(self) -> None:
        """Refuses a working folder that is a link or a file: what it holds is not this program's to remove.

        Raises:
            DestinationError: it is not a folder.
        """
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise DestinationError(
                f"{self.folder}: is not a folder of its own; remove it or choose another place"
            )

    def plan_problem(self, plan: Plan) -> str | None:
        """Returns why what lies here cannot be resumed with `plan`; None when it can.

        A folder without a plan is one whose run was killed before it wrote anything.
        """
        try:
            record = json.loads((self.folder / PLAN_NAME).read_bytes())
            digest, sources = record["digest"], [SourceFile(**entry) for entry in record["sources"]]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return "the plan of an earlier run here cannot be read"
        if changed := _changed(sources, plan.source_files):
            return f"{changed} has changed since an earlier run into this directory began"
        if digest != plan.digest:
            return f"an earlier run with other options ({record.get('operation')}) has not finished here"
        return None

    def record_plan(self, plan: Plan) -> None:
        """Writes down what this run is, so that only the same run may go on with it."""
        record: dict[str, Any] = {
            "digest": plan.digest,
            "operation": plan.operation,
            "options": plan.options,
            "sources": [asdict(file) for file in plan.source_files],
            "repositories": {origin: asdict(repo) for origin, repo in plan.repositories.items()},
            "shards": [[shard.name, shard.nbytes, shard.header_sha256] for shard in plan.shards],
        }
        write_file(self.folder / PLAN_NAME, json.dumps(record).encode(), folder=self.folder)

    def begun_repositories(self) -> dict[str, HubRepo]:
        """Returns the sources on the Hub of a run that has not finished here, by origin."""
        try:
            record = json.loads((self.folder / PLAN_NAME).read_bytes())
            return {origin: HubRepo(**repo) for origin, repo in record["repositories"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def has_plan(self) -> bool:
        """Whether a run has begun here."""
        return (self.folder / PLAN_NAME).exists()

    def read_journal(self) -> dict[str, JournalEntry]:
        """Returns the finished shards by name; a torn last line counts as not written."""
        entries = {}
        for path in sorted(self.folder.glob("journal*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    entry = JournalEntry(**json.loads(line))
                except (ValueError, TypeError):
                    continue
                entries[entry.shard] = entry
        return entries

    def append_journal(self, entry: JournalEntry, rank: int) -> None:
        """Adds a finished shard, durably; every rank has a journal of its own."""
        path = self.folder / ("journal.jsonl" if rank == 0 else f"journal-{rank}.jsonl")
        with destination_errors(path, "adding a line"):
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                # The newline in front ends a line that a crash has torn.
                os.write(descriptor, b"\n" + json.dumps(asdict(entry)).encode() + b"\n")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def temporary_nbytes(self) -> int:
        """Returns the bytes that killed runs left half written; files that vanish meanwhile count nothing."""
        total = 0
        for path in (*self.folder.glob("*.tmp"), *self.making_folder.glob("*.tmp")):
            with suppress(FileNotFoundError):
                total += path.stat().st_blocks * 512
        return total

    def remove_temporaries(self) -> None:
        """Removes what killed runs left half written."""
        with destination_errors(self.folder, "removing temporary files"):
            for path in (*self.folder.glob("*.tmp"), *self.making_folder.glob("*.tmp")):
                path.unlink(missing_ok=True)

    def source_folder(self, rank: int) -> Path:
        """Returns where a rank keeps shards from the Hub while it needs them."""
        return self.folder / f"source-{rank}"

    @property
    def making_folder(self) -> Path:
        """Where whoever makes weights keeps what it needs to go on."""
        return self.folder / "made"

    def source_nbytes(self) -> int:
        """Returns the bytes of such shards, whole or not, from runs that were stopped."""
        return sum(path.lstat().st_blocks * 512 for path in self.folder.glob("source-*/**/*"))

    def tidy_sources(self, needed: Container[tuple[str, str]], world_size: int) -> None:
        """Removes what runs that were stopped have fetched, but whole shards that are `needed` again.

        Args:
            needed: origins and names.
            world_size: ranks of this run; others have gone.
        """
        ranks = {self.source_folder(rank) for rank in range(world_size)}
        with destination_errors(self.folder, "removing fetched shards"):
            for path in self.folder.glob("source-*"):
                if path not in ranks or path.is_symlink() or not path.is_dir():
                    _remove(path)
            for path in self.folder.glob("source-*/*/*.safetensors"):
                if (path.parent.name, path.name) not in needed:
                    path.unlink()
            for path in self.folder.glob("source-*/**/*.incomplete"):
                path.unlink()

    def clear(self) -> None:
        """Forgets an earlier run: its plan, journals and temporary files."""
        with destination_errors(self.folder, "removing an earlier run's records"):
            for path in self._own_files():
                path.unlink(missing_ok=True)
            if self.making_folder.is_dir():
                _remove(self.making_folder)

    def remove(self) -> None:
        """Removes the folder, the last act of a finished run.

        The result is complete by then: what another run has just put here, waiting for the lock, is left to
        that run.
        """
        with suppress(OSError):
            for path in self.folder.glob("source-*"):
                _remove(path)
            for path in self._own_files():
                path.unlink(missing_ok=True)
            if self.making_folder.is_dir():  # after the plan: without that nobody goes on from here
                _remove(self.making_folder)
            for name in (OWNER_NAME, "lock"):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()

    def announce_failure(self) -> None:
        """Tells the other ranks of this run to stop; the next run forgets it."""
        with suppress(OSError):
            (self.folder / FAILED_NAME).touch()

    def has_failed(self) -> bool:
        """Whether a rank of this run has announced that it failed."""
        return (self.folder / FAILED_NAME).exists()

    def forget_failure(self) -> None:
        """Lets a new run begin where one has failed."""
        with destination_errors(self.folder, "removing an earlier run's records"):
            (self.folder / FAILED_NAME).unlink(missing_ok=True)

    def _own_files(self) -> list[Path]:
        """Returns the records of runs; the plan last, for a folder without one is taken as untouched."""
        journals, temporaries = self.folder.glob("journal*.jsonl"), self.folder.glob("*.tmp")
        return [*journals, *temporaries, self.folder / FAILED_NAME, self.folder / PLAN_NAME]

    def _owner(self) -> str:
        try:
            owner = json.loads((self.folder / OWNER_NAME).read_bytes())
            return f"another run (process {owner['pid']} on {owner['host']}, since {owner['start']})"
        except (OSError, ValueError, KeyError, TypeError):
            return "another run"


def _remove(path: Path) -> None:
    """Removes a folder and all in it; a link or a file alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _changed(before: Sequence[SourceFile], now: Sequence[SourceFile]) -> str | None:
    """Returns the first file that both plans read and that is not what it was."""
    known = {(file.origin, file.name): file for file in before}
    for file in now:
        earlier = known.get((file.origin, file.name))
        if earlier is not None and earlier != file:
            return file.name if file.origin == "source" else f"{file.name} ({file.origin})"
    return None
