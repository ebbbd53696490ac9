"""Writes one shard: header first, tensors streamed to their place, renamed when complete."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from dsv3_tools.checkpoint.durable import (
    close_quietly,
    create_temporary,
    destination_errors,
    preallocate,
    publish,
    remove_quietly,
    start_writeback,
)
from dsv3_tools.errors import DestinationError

__all__ = ["ShardWriter"]

_READ_BACK_BYTES = 4 << 20

_LARGE_NBYTES = 256 << 10
"""Smaller writes (the scales of a stripe) are not worth a thread, and asking the disk to start on their
pages would have it write the same page again and again."""


class ShardWriter:
    """One output file of known size, hidden under a temporary name until it is complete.

    Use as a context manager: leaving it without `commit()` removes the temporary file.

    The SHA-256 runs along with writes that arrive in file order. Bytes that arrive early are read back,
    from the page cache, when it comes to them. Where it is stuck until the end (FP8 scales lie before
    their codes but are known after them), all that follows is read back then.

    Args:
        final: where the shard will be, in an existing directory of the same filesystem as `folder`.
        folder: where its temporary file lies.
        label: middle part of the temporary name.
        header: the encoded header.
        nbytes: size of the whole file.
        hash_aside: hash large writes in a thread of their own while they are written, for when there are
            cores to spare; SHA-256 is about as fast as a write to the page cache.

    Raises:
        DestinationError: from every method, when the disk does not do its part.
    """

    def __init__(
        self,
        final: Path,
        *,
        folder: Path,
        label: str,
        header: bytes,
        nbytes: int,
        hash_aside: bool = False,
    ) -> None:
        self._final = final
        self._nbytes = nbytes
        self._written = 0
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._early: dict[int, int] = {}  # start and end of what was written beyond what is hashed
        self._hashing = ThreadPoolExecutor(1, "dsv3-hash") if hash_aside else None
        self._committed = False
        with destination_errors(final, f"creating a file of {nbytes:,} bytes"):
            self._descriptor, self._temporary = create_temporary(folder, f"{final.name}.{label}")
            try:
                preallocate(self._descriptor, nbytes)
            except OSError:
                self._discard()
                raise
        try:
            self.write(0, memoryview(header))
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._committed:
            self._stop_hashing()
            close_quietly(self._descriptor)
        else:
            self._discard()

    def write(self, offset: int, data: memoryview) -> None:
        """Writes `data` at `offset` of the file; every byte of the file is written once."""
        in_order = offset == self._hashed
        hashed = self._update_hash(data) if in_order else None
        done = 0
        with destination_errors(self._final, f"writing {len(data):,} bytes at {offset:,}"):
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done:], offset + done)
        self._written += len(data)
        if len(data) >= _LARGE_NBYTES:
            start_writeback(self._descriptor, offset, len(data))
        if hashed is not None:
            hashed.result()
        if in_order:
            self._catch_up()
        else:
            self._early[offset] = offset + len(data)

    def commit(self, *, check: Callable[[], None] = lambda: None) -> str:
        """Checks the length, makes the file durable and visible; returns its SHA-256 in hexadecimal.

        `check` is called while bytes are read back for the hash, and may raise to give up.
        """
        if self._written != self._nbytes:
            raise DestinationError(
                f"{self._final}: {self._written:,} bytes were written, expected {self._nbytes:,}"
            )
        with destination_errors(self._final, f"reading {self._nbytes:,} bytes back for their SHA-256"):
            self._hash_until(self._nbytes, check)
        with destination_errors(self._final, f"making {self._nbytes:,} bytes durable"):
            publish(self._descriptor, self._temporary, self._final)
        self._committed = True
        return self._hash.hexdigest()

    def _update_hash(self, data: memoryview) -> Future[None] | None:
        """Hashes `data`, the next bytes of the file, now or aside; the caller waits for what it returns."""
        self._hashed += len(data)
        if self._hashing is not None and len(data) >= _LARGE_NBYTES:
            return self._hashing.submit(self._hash.update, data)
        self._hash.update(data)
        return None

    def _catch_up(self) -> None:
        """Hashes what was written early and is next."""
        while self._hashed in self._early:
            end = self._early.pop(self._hashed)
            with destination_errors(
                self._final, f"reading {end - self._hashed:,} bytes back for their SHA-256"
            ):
                self._hash_until(end, lambda: None)

    def _hash_until(self, end: int, check: Callable[[], None]) -> None:
        buffer = memoryview(bytearray(min(_READ_BACK_BYTES, end - self._hashed)))
        while self._hashed < end:
            check()
            count = os.preadv(self._descriptor, [buffer[: end - self._hashed]], self._hashed)
            if count == 0:
                raise OSError(None, f"the file ended at byte {self._hashed:,}")
            self._hash.update(buffer[:count])
            self._hashed += count

    def _discard(self) -> None:
        self._stop_hashing()
        close_quietly(self._descriptor)
        remove_quietly(self._temporary)

    def _stop_hashing(self) -> None:
        if self._hashing is not None:
            self._hashing.shutdown()
