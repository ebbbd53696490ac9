"""What a run tells its caller while it goes on, and how the caller stops it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from dsv3_tools.errors import Interrupted

__all__ = ["Meter", "Progress", "Stop"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: bytes of source tensors and output shards, done and in all."""

    nbytes_done: int
    nbytes_total: int
    shards_done: int
    shards_total: int


class Meter:
    """Adds up the progress of all workers; `on_progress` is called with every step, from any thread."""

    def __init__(self, nbytes: int, shards: int, on_progress: Callable[[Progress], None] | None) -> None:
        self._lock = threading.Lock()
        self._now = Progress(0, nbytes, 0, shards)
        self._on_progress = on_progress

    def add(self, nbytes: int, *, shards: int = 0) -> None:
        """Counts bytes read, and finished shards."""
        with self._lock:
            now = self._now
            self._now = Progress(
                now.nbytes_done + nbytes, now.nbytes_total, now.shards_done + shards, now.shards_total
            )
            if self._on_progress is not None:
                self._on_progress(self._now)


class Stop:
    """A request to stop, set from a signal handler or by the first worker that fails.

    Args:
        parent: another request that counts as this one; setting this one leaves it alone.
    """

    def __init__(self, parent: Stop | None = None) -> None:
        self._event = threading.Event()
        self._parent = parent
        self._signum: int | None = None

    def set(self, signum: int | None = None) -> None:
        """Asks every worker to stop at its next piece; `signum` says which signal asked."""
        if signum is not None:
            self._signum = signum
        self._event.set()

    @property
    def signum(self) -> int | None:
        """The signal that asked, if one did."""
        return self._parent.signum if self._signum is None and self._parent is not None else self._signum

    @property
    def is_set(self) -> bool:
        """Whether somebody has asked."""
        return self._event.is_set() or (self._parent is not None and self._parent.is_set)

    def check(self) -> None:
        """Raises `Interrupted` when somebody has asked."""
        if self.is_set:
            raise Interrupted(self.signum or 2, "stopped")
