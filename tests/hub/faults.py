"""What can go wrong between a client and the hub, and at which request it does."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Fault:
    """What one answer suffers; `Fault()` alone is none. `dataclasses.replace` combines them."""

    wait: float = 0.0
    """Seconds that pass before the request is looked at."""
    code: int | None = None
    """This status instead of an answer; the request has no effect."""
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = ""
    read_at_most: int | None = None
    """So many bytes of the request's body are read, then the connection ends; no effect."""
    silent: bool = False
    """The connection ends where the answer would begin."""
    effect: bool = False
    """With `silent`: the request is carried out, only its answer is lost."""
    send_at_most: int | None = None
    """So many bytes of the body are sent under the right Content-Length, then the connection ends."""
    reset: bool = False
    """The connection ends with a TCP reset and not in order."""
    flip_at: int | None = None
    """This byte of the body is another one; negative counts from its end."""
    shorten_by: int = 0
    """So many bytes are missing at the end of the body, and Content-Length agrees."""

    @classmethod
    def drop(cls, *, reset: bool = False) -> Fault:
        """The connection ends before the answer; the request has no effect."""
        return cls(silent=True, reset=reset)

    @classmethod
    def lose_answer(cls, *, reset: bool = False) -> Fault:
        """The request is carried out and the connection ends before the answer."""
        return cls(silent=True, effect=True, reset=reset)

    @classmethod
    def drop_after(cls, nbytes: int) -> Fault:
        """A TCP reset once `nbytes` of the body have arrived."""
        return cls(send_at_most=nbytes, reset=True)

    @classmethod
    def drop_upload_after(cls, nbytes: int) -> Fault:
        """A TCP reset once `nbytes` of the request's body have been read."""
        return cls(read_at_most=nbytes, reset=True)

    @classmethod
    def truncated(cls, nbytes: int) -> Fault:
        """The right Content-Length, `nbytes` of the body, and an orderly end of the connection."""
        return cls(send_at_most=nbytes)

    @classmethod
    def status(cls, code: int, *, retry_after: int | None = None, message: str = "") -> Fault:
        """An answer with this status, say 500, 503 or 403."""
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        return cls(code=code, headers=headers, message=message or f"The test asked for status {code}.")

    @classmethod
    def rate_limited(cls, seconds: int = 1, *, retry_after: int | None = None) -> Fault:
        """429 with the headers that say when to come back."""
        limits = {
            "RateLimit": f'"api";r=0;t={seconds}',
            "RateLimit-Policy": '"fixed window";"api";q=500;w=300',
        }
        if retry_after is not None:
            limits["Retry-After"] = str(retry_after)
        return cls(code=429, headers=limits, message="We had to rate limit you.")

    @classmethod
    def corrupt(cls, at: int = 0) -> Fault:
        """A body of the right length with byte `at` changed."""
        return cls(flip_at=at)

    @classmethod
    def short(cls, by: int = 1) -> Fault:
        """A body that lacks its last bytes, with a Content-Length that agrees."""
        return cls(shorten_by=by)

    @classmethod
    def delay(cls, seconds: float) -> Fault:
        """The right answer, late."""
        return cls(wait=seconds)


NO_FAULT = Fault()


@dataclass
class Rule:
    """A fault for requests whose method and path fit: of those the `first`, and `times - 1` after it.

    The path is unquoted and without its query; both are patterns as file names have them ("*.safetensors").
    `times=None` is for ever.
    """

    fault: Fault
    method: str = "*"
    path: str = "*"
    first: int = 1
    times: int | None = 1
    seen: int = field(default=0, init=False)
    """How many requests fitted so far."""

    def consult(self, method: str, path: str) -> Fault | None:
        """Counts the request if it fits, and gives the fault if it is its turn."""
        if not (fnmatchcase(method, self.method) and fnmatchcase(path, self.path)):
            return None
        self.seen += 1
        turn = self.seen - self.first
        return self.fault if turn >= 0 and (self.times is None or turn < self.times) else None


class Throttle:
    """Shares a rate in bytes/s among all connections; a rate of None is no limit."""

    def __init__(self, rate: float | None = None) -> None:
        self.rate = rate
        self._free_at = 0.0
        self._lock = threading.Lock()

    @property
    def piece(self) -> int:
        """How many bytes to send at once: a fiftieth of a second's, or much."""
        return 1 << 24 if self.rate is None else max(1 << 10, min(1 << 20, int(self.rate / 50)))

    def take(self, nbytes: int) -> None:
        """Waits until the line has had time for `nbytes`."""
        rate = self.rate
        if rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + nbytes / rate
            wait = self._free_at - now
        time.sleep(wait)
