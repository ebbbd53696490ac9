"""Where the files of a checkpoint are, and how they are read: those of a directory here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from dsv3_tools.checkpoint.deepseek_infer import holds_ranks
from dsv3_tools.checkpoint.header import MAX_HEADER_BYTES, Header, parse_header
from dsv3_tools.checkpoint.paths import WORK_FOLDER, read_small_file, regular_file, side_files
from dsv3_tools.checkpoint.source import Source
from dsv3_tools.errors import CheckpointError, HeaderError

__all__ = ["Files", "LocalFiles", "ShardFile", "header_nbytes", "read_part", "read_shard_header"]


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard of a checkpoint: its header, and what tells whether the file has changed since.

    The times are 0 where the content cannot change: at a commit of a model on the Hub.
    """

    name: str
    header: Header
    nbytes: int
    mtime_ns: int
    ctime_ns: int
    header_sha256: str


class Files(Protocol):
    """The files of one checkpoint, read-only."""

    source: Source

    def names(self) -> list[str]:
        """Returns all names in the top folder, sorted."""

    def side_files(self, shards: Container[str]) -> tuple[list[str], list[str]]:
        """Returns which files travel with a conversion, and which stay behind; see `paths.side_files`."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

    def read(self, name: str, max_nbytes: int) -> bytes:
        """Returns a small file.

        Raises:
            CheckpointError: no such file, too large, or not readable.
        """

    def folder_of(self, names: Collection[str]) -> Path:
        """Returns a directory in which those small files of `names` are that exist."""

    def header(self, shard: str) -> ShardFile:
        """Returns a shard's header.

        Raises:
            CheckpointError: no such file, or no safetensors file.
        """

    def stated_sha256(self) -> dict[str, str]:
        """Returns the SHA-256 of large files as whoever keeps them states it, by name."""

    def is_kept(self, shard: str) -> bool:
        """Whether the whole shard is on a disk of this machine, and will stay there."""

    def path(self, shard: str) -> Path:
        """Returns where the whole shard is on disk; it is fetched first if it is not here."""

    def stamp(self, shard: str) -> tuple[int, int]:
        """Returns time (ns) and size that the file at `path` had when it was first looked at."""

    def read_range(self, shard: str, start: int, nbytes: int) -> bytes:
        """Returns some bytes of a shard that need not be here."""

    def fetch(self, shard: str, folder: Path | None, check: Callable[[], None]) -> None:
        """Brings a shard here: into `folder`, or to stay.

        Raises:
            NetworkError: it could not be had.
            DestinationError: it could not be written.
            Interrupted: by `check`, which is called every now and then.
        """

    def discard(self, shard: str) -> None:
        """Removes a shard that was fetched into a folder; leaves any other."""


class LocalFiles:
    """The files of a directory.

    Args:
        directory: where they are.
        source: what the user named, if it is not the directory.

    Raises:
        CheckpointError: no directory, or one that cannot be a checkpoint.
    """

    def __init__(self, directory: Path, source: Source | None = None) -> None:
        _check_directory(directory)
        self.source: Source = source or directory
        self._directory = directory
        self._shards: dict[str, tuple[Path, ShardFile]] = {}

    def names(self) -> list[str]:
        """Returns all names in the directory, sorted."""
        return sorted(os.listdir(self._directory))

    def side_files(self, shards: Container[str]) -> tuple[list[str], list[str]]:
        """Returns which files travel with a conversion, and which stay behind."""
        return side_files(self._directory, shards)

    def exists(self, name: str) -> bool:
        """Whether there is such a file, be it a link to nothing."""
        return os.path.lexists(self._directory / name)

    def read(self, name: str, max_nbytes: int) -> bytes:
        """Returns a small file; see `paths.read_small_file`."""
        return read_small_file(self._directory, name, max_nbytes)

    def folder_of(self, names: Collection[str]) -> Path:
        """Returns the directory, where all files are."""
        del names
        return self._directory

    def header(self, shard: str) -> ShardFile:
        """Returns a shard's header."""
        found = read_shard_header(self._directory, shard)
        self._shards[shard] = regular_file(self._directory, shard), found
        is_at_commit = not isinstance(self.source, Path)
        return replace(found, mtime_ns=0, ctime_ns=0) if is_at_commit else found

    def stated_sha256(self) -> dict[str, str]:
        """Returns nothing: nobody states a hash here."""
        return {}

    def is_kept(self, shard: str) -> bool:
        """Whether the shard is on disk to stay, which it is."""
        del shard
        return True

    def path(self, shard: str) -> Path:
        """Returns the real path of a shard whose header has been read."""
        return self._shards[shard][0]

    def stamp(self, shard: str) -> tuple[int, int]:
        """Returns time and size that the file had when its header was read."""
        found = self._shards[shard][1]
        return found.mtime_ns, found.nbytes

    def read_range(self, shard: str, start: int, nbytes: int) -> bytes:
        """Returns some bytes of a shard."""
        return read_part(self.path(shard), start, nbytes)

    def fetch(self, shard: str, folder: Path | None, check: Callable[[], None]) -> None:
        """Does nothing: every shard is here."""

    def discard(self, shard: str) -> None:
        """Does nothing: every shard is the user's."""


def read_shard_header(directory: Path, name: str) -> ShardFile:
    """Opens one shard of a directory and returns its header.

    Raises:
        CheckpointError: not a regular file that may be read.
        HeaderError: not a safetensors file.
    """
    path = regular_file(directory, name)
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            start = file.read(8)
            text = file.read(header_nbytes(start, status.st_size, str(path)))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    header = parse_header(text, status.st_size, str(path))
    digest = hashlib.sha256(start + text).hexdigest()
    return ShardFile(name, header, status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest)


def read_part(path: Path, start: int, nbytes: int) -> bytes:
    """Returns some bytes of a file."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(nbytes)


def header_nbytes(start: bytes, file_nbytes: int, where: str) -> int:
    """Returns how long the header's text is, which the first 8 bytes of a file say.

    Raises:
        HeaderError: more than a header may have, or than the file.
    """
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, file_nbytes - 8):
        raise HeaderError(
            f"{where}: not a safetensors file of {file_nbytes:,} bytes: its header claims "
            f"{length:,} bytes, expected 2 to {MAX_HEADER_BYTES:,} (truncated or garbage)"
        )
    return length


def _check_directory(directory: Path) -> None:
    try:
        is_directory, exists = directory.is_dir(), directory.exists()
    except OSError as error:
        raise CheckpointError(f"{str(directory)[:200]}: {error.strerror}") from None
    if not is_directory:
        kind = "is a file" if exists else "does not exist"
        raise CheckpointError(f"{directory}: {kind}, expected a directory with a checkpoint")
    if (directory / WORK_FOLDER).exists():
        raise CheckpointError(
            f"{directory}: has a {WORK_FOLDER} folder, so a conversion into it has not finished; "
            "run that command again first"
        )
    if holds_ranks(directory):
        raise CheckpointError(
            f"{directory}: holds one shard for each rank of DeepSeek's inference demo, which nothing else "
            "reads; expected a Hugging Face checkpoint, such as the one that it was made from"
        )
