"""Writing files so that a crash leaves either the old state or the new one, never half a file."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from dsv3_tools.errors import DestinationError

__all__ = [
    "close_quietly",
    "create_temporary",
    "destination_errors",
    "fsync_directory",
    "preallocate",
    "publish",
    "remove_quietly",
    "start_writeback",
    "write_file",
]

_SYNC_FILE_RANGE_WRITE = 2


@contextmanager
def destination_errors(path: Path, doing: str) -> Iterator[None]:
    """Turns an `OSError` into one `DestinationError` line that names the file and what was being done."""
    try:
        yield
    except OSError as error:
        remedy = {
            errno.ENOSPC: "; free some space and run the same command again",
            errno.EDQUOT: "; raise the quota and run the same command again",
            errno.EROFS: "; choose a destination that can be written",
            errno.EACCES: "; choose a destination that can be written",
        }.get(error.errno or 0, "; run the same command again once the disk is well")
        raise DestinationError(f"{path}: {doing}: {error.strerror or error}{remedy}") from error


def create_temporary(folder: Path, name: str) -> tuple[int, Path]:
    """Creates `folder/name.<unique>.tmp` exclusively, mode 0666 & ~umask; returns descriptor and path."""
    path = folder / f"{name}.{secrets.token_hex(8)}.tmp"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return os.open(path, flags, 0o666), path


def publish(descriptor: int, temporary: Path, final: Path) -> None:
    """Makes a complete file visible under its final name: fsync, rename, fsync of the directory."""
    os.fsync(descriptor)
    os.rename(temporary, final)
    fsync_directory(final.parent)


def write_file(final: Path, data: bytes, *, folder: Path) -> None:
    """Writes a small file durably and atomically, by way of a temporary file in `folder`.

    Raises:
        DestinationError: under the final name lies what was there before, or all of `data` (when only
            the last fsync, of the directory, failed).
    """
    with destination_errors(final, f"writing {len(data):,} bytes"):
        descriptor, temporary = create_temporary(folder, final.name)
        try:
            written = 0
            while written < len(data):
                written += os.write(descriptor, data[written:])
            publish(descriptor, temporary, final)
        except BaseException:
            remove_quietly(temporary)
            raise
        finally:
            close_quietly(descriptor)


def close_quietly(descriptor: int) -> None:
    """Closes a file that is either durable by its fsync or about to be removed: no error matters now."""
    with suppress(OSError):
        os.close(descriptor)


def remove_quietly(temporary: Path) -> None:
    """Removes a temporary file, or leaves it to the next run: what went wrong before it matters more."""
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def fsync_directory(path: Path) -> None:
    """Makes renames and creations in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def preallocate(descriptor: int, nbytes: int) -> None:
    """Reserves the file's space, so that a full disk shows at once; sets only the length elsewhere.

    Calls `fallocate` itself: glibc's `posix_fallocate` writes a byte into every block of filesystems
    that cannot reserve.
    """
    fallocate = _libc_function("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate is not None and fallocate(descriptor, 0, 0, nbytes) == -1:
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, nbytes)


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Starts writing these bytes to the disk without waiting, so that the last fsync finds little to do.

    A hint only: an error here would show again at fsync.
    """
    sync = _libc_function("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    if sync is not None:
        sync(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


@cache
def _libc_function(name: str, *argument_types: type) -> Callable[..., int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.argtypes = argument_types
        function.restype = ctypes.c_int
    return function
