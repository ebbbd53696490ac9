"""A checkpoint on the Hugging Face Hub, at one commit: headers by range requests, shards when needed.

What huggingface_hub knows how to do (tokens, cache, retries, Xet) it does. Added here: reading headers alone,
keeping shards in a folder for a while only, and comparing every download with the hash that the Hub states.
"""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Container
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3_tools.checkpoint.config import CONFIG_NAME
from dsv3_tools.checkpoint.files import (
    Files,
    LocalFiles,
    ShardFile,
    header_nbytes,
    read_part,
    read_shard_header,
)
from dsv3_tools.checkpoint.header import parse_header
from dsv3_tools.checkpoint.hub_requests import DamagedDownload, patiently
from dsv3_tools.checkpoint.index import INDEX_NAME
from dsv3_tools.checkpoint.paths import may_travel, read_small_file
from dsv3_tools.checkpoint.source import HubRepo, Source
from dsv3_tools.errors import CheckpointError, HeaderError, NetworkError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

__all__ = ["HubFiles", "open_hub"]

_FIRST_NBYTES = 100_000
"""Bytes of a shard that are asked for at first: a released shard's header has 77,000."""

_HEADER_ATTEMPTS = 3

_HASH_NBYTES = 4 << 20


def open_hub(repo: HubRepo) -> Files:
    """Returns the files of a model on the Hub; with HF_HUB_OFFLINE, those of it in the Hugging Face cache.

    Raises:
        CheckpointError: no such model or revision.
        NetworkError: the Hub cannot be asked.
    """
    from huggingface_hub import constants

    return _open_cached(repo) if constants.HF_HUB_OFFLINE else HubFiles(repo)


def _open_cached(repo: HubRepo) -> LocalFiles:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo.name, CONFIG_NAME, revision=repo.commit or repo.revision)
    if not isinstance(found, str):
        raise NetworkError(f"{repo}: HF_HUB_OFFLINE is set, and the Hugging Face cache does not have this")
    folder = Path(found).parent
    return LocalFiles(folder, replace(repo, commit=folder.name))


class HubFiles:
    """The files of a model at the commit that its revision has now.

    Args:
        repo: the model; with a commit, at that commit.

    Raises:
        CheckpointError: no such model or revision.
        NetworkError: the Hub cannot be asked.
    """

    def __init__(self, repo: HubRepo) -> None:
        from huggingface_hub import HfApi

        revision = repo.commit or repo.revision
        info = patiently(
            lambda: HfApi().model_info(repo.name, revision=revision, files_metadata=True), str(repo)
        )
        self.repo = replace(repo, commit=info.sha)
        self.source: Source = self.repo
        self._siblings: dict[str, RepoSibling] = {file.rfilename: file for file in info.siblings or ()}
        self._paths: dict[str, Path] = {}
        self._stamps: dict[str, tuple[int, int]] = {}
        self._headers: dict[str, str] = {}
        self._temporary: set[str] = set()
        self._fetching: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def names(self) -> list[str]:
        """Returns the names of all files in the top folder, sorted."""
        return sorted(name for name in self._siblings if "/" not in name)

    def side_files(self, shards: Container[str]) -> tuple[list[str], list[str]]:
        """Returns which files travel with a conversion, and which stay behind."""
        folders = {name.partition("/")[0] + "/" for name in self._siblings if "/" in name}
        others = [n for n in self.names() if n not in (CONFIG_NAME, INDEX_NAME) and n not in shards]
        travel = [name for name in others if may_travel(name)]
        return travel, sorted({*others, *folders}.difference(travel))

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return name in self._siblings

    def read(self, name: str, max_nbytes: int) -> bytes:
        """Returns a small file, which is in the Hugging Face cache afterwards."""
        nbytes = self._sibling(name).size or 0
        if nbytes > max_nbytes:
            raise CheckpointError(f"{self.source}/{name}: {nbytes:,} bytes, too large for such a file")
        path = self._small(name)
        return read_small_file(path.parent, path.name, max_nbytes)

    def folder_of(self, names: Collection[str]) -> Path:
        """Returns the cached snapshot, in which those small files of `names` are that exist."""
        paths = [self._small(name) for name in (CONFIG_NAME, *names) if name in self._siblings]
        return paths[0].parent

    def header(self, shard: str) -> ShardFile:
        """Returns a shard's header, of the cached file or by a range request."""
        nbytes, where = self._sibling(shard).size or 0, f"{self.source}/{shard}"
        cached = self._cached(shard)
        if cached is not None:
            return replace(read_shard_header(cached.parent, cached.name), mtime_ns=0, ctime_ns=0)
        for _ in range(_HEADER_ATTEMPTS - 1):
            with suppress(HeaderError):  # damaged on the way, perhaps: parts of a file have no hash
                return self._ask_for_header(shard, nbytes, where)
        return self._ask_for_header(shard, nbytes, where)

    def stated_sha256(self) -> dict[str, str]:
        """Returns the SHA-256 of the large files, by name."""
        return {name: file.lfs.sha256 for name, file in self._siblings.items() if file.lfs is not None}

    def is_kept(self, shard: str) -> bool:
        """Whether the whole shard is in the Hugging Face cache, where nobody will `discard` it."""
        return shard not in self._temporary and self._cached(shard) is not None

    def path(self, shard: str) -> Path:
        """Returns where the shard is on disk; it is fetched into the Hugging Face cache if it is not here."""
        if shard not in self._paths:
            self.fetch(shard, None, lambda: None)
        return self._paths[shard]

    def stamp(self, shard: str) -> tuple[int, int]:
        """Returns time and size of the shard's file when it came, or was found."""
        return self._stamps[shard]

    def read_range(self, shard: str, start: int, nbytes: int) -> bytes:
        """Returns some bytes of a shard, over the network if it is not in the Hugging Face cache."""
        cached = self._cached(shard)
        if cached is not None:
            return read_part(cached, start, nbytes)
        if not nbytes:
            return b""
        return patiently(lambda: self._ask_for_range(shard, start, nbytes), f"{self.source}/{shard}")

    def fetch(self, shard: str, folder: Path | None, check: Callable[[], None]) -> None:
        """Brings a shard here if it is not: into `folder`, or into the Hugging Face cache, to stay."""
        with self._fetching[shard]:
            if shard in self._paths:
                return
            path = self._cached(shard)
            if path is None:
                path = self._download(shard, folder, check)
                if folder is not None:
                    self._temporary.add(shard)
            self._check_header(shard, path)
            status = path.stat()
            self._stamps[shard] = status.st_mtime_ns, status.st_size
            self._paths[shard] = path

    def discard(self, shard: str) -> None:
        """Removes a shard that was fetched into a folder; leaves any other."""
        with self._fetching[shard]:
            path = self._paths.pop(shard, None)
            if path is not None and shard in self._temporary:
                self._temporary.remove(shard)
                path.unlink(missing_ok=True)

    def _ask_for_header(self, shard: str, nbytes: int, where: str) -> ShardFile:
        start = self.read_range(shard, 0, min(_FIRST_NBYTES, nbytes))
        length = header_nbytes(start, nbytes, where)
        if len(start) < 8 + length:
            start += self.read_range(shard, len(start), 8 + length - len(start))
        header = parse_header(start[8 : 8 + length], nbytes, where)
        self._headers[shard] = hashlib.sha256(start[: 8 + length]).hexdigest()
        return ShardFile(shard, header, nbytes, 0, 0, self._headers[shard])

    def _check_header(self, shard: str, path: Path) -> None:
        """Refuses a shard whose header is another one than came before by itself."""
        expected = self._headers.get(shard)
        if expected is not None and read_shard_header(path.parent, path.name).header_sha256 != expected:
            raise NetworkError(
                f"{self.source}/{shard}: its header was damaged when it came by itself; run the same command "
                "again"
            )

    def _sibling(self, name: str) -> RepoSibling:
        if name not in self._siblings:
            raise CheckpointError(f"{self.source}/{name}: there is no such file on the Hub")
        return self._siblings[name]

    def _small(self, name: str) -> Path:
        """Returns where a small file is in the Hugging Face cache, fetched if it is not there yet."""
        return self._cached(name) or self._download(name, None, lambda: None)

    def _cached(self, name: str) -> Path | None:
        """Returns where the Hugging Face cache has a file."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo.name, name, revision=self.repo.commit)
        return Path(found) if isinstance(found, str) else None

    def _ask_for_range(self, name: str, start: int, nbytes: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import hf_raise_for_status, http_stream_backoff

        url = hf_hub_url(self.repo.name, name, revision=self.repo.commit)
        part = {"Range": f"bytes={start}-{start + nbytes - 1}", "Accept-Encoding": "identity"}
        headers = {**build_hf_headers(), **part}
        with http_stream_backoff("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:  # all of it may be gigabytes
                raise DamagedDownload(f"a part was asked for, the answer is {response.status_code}")
            data: bytes = response.read()
        if len(data) != nbytes:
            raise DamagedDownload(f"got {len(data):,} bytes, expected {nbytes:,}")
        return data

    def _ask_for_file(self, name: str, folder: Path | None, check: Callable[[], None]) -> Path:
        from huggingface_hub import hf_hub_download

        def download(revision: str | None, **where: Any) -> Path:
            bar = _silent(check)
            return Path(hf_hub_download(self.repo.name, name, revision=revision, tqdm_class=bar, **where))

        if folder is not None:
            return download(self.repo.commit, local_dir=folder)
        if name == CONFIG_NAME:  # by the branch's name, so that the cache knows it when there is no network
            path = download(self.repo.revision)
            if path.parent.name == self.repo.commit:
                return path
        return download(self.repo.commit)

    def _download(self, name: str, folder: Path | None, check: Callable[[], None]) -> Path:
        """Returns where a file is after it came whole, and has the hash that the Hub states."""
        sibling = self._sibling(name)

        def request() -> Path:
            path = self._ask_for_file(name, folder, check)
            problem = _content_problem(path, sibling, check)
            if problem is not None:
                path.resolve().unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                raise DamagedDownload(problem)
            return path

        return patiently(request, f"{self.source}/{name}", check=check)


def _content_problem(path: Path, sibling: RepoSibling, check: Callable[[], None]) -> str | None:
    """Returns what is wrong with a downloaded file: its size, or its hash as the Hub states it."""
    nbytes = path.stat().st_size
    if sibling.size is not None and nbytes != sibling.size:
        return f"got {nbytes:,} bytes, the Hub has {sibling.size:,}"
    digest = hashlib.sha256()
    expected = sibling.blob_id if sibling.lfs is None else sibling.lfs.sha256
    if expected is None:
        return None
    if sibling.lfs is None:  # git's own hash of a small file
        digest = hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        while block := file.read(_HASH_NBYTES):
            check()
            digest.update(block)
    found = digest.hexdigest()
    return None if found == expected else f"its hash is {found}, the Hub states {expected}"


def _silent(check: Callable[[], None]) -> Any:
    """Returns a progress bar that shows nothing, and calls `check` with every chunk."""
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **{**keywords, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            check()
            return bool(super().update(n))

    return Silent
