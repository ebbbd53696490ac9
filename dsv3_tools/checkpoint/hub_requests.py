"""Requests to the Hub: tried again where that helps, their failures named in this program's words.

huggingface_hub retries what it knows to be worth it first; this goes on after server errors, broken downloads
and rate limits that it gives up on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from dsv3_tools.errors import CheckpointError, DestinationError, Dsv3Error, NetworkError, UsageError

__all__ = ["DamagedDownload", "patiently", "translated"]

T = TypeVar("T")

ATTEMPTS = 5
_LONGEST_WAIT_SECONDS = 320.0
"""The Hub counts requests in windows of 5 minutes."""

_RETRIABLE_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_RATE_LIMIT = re.compile(r"\bt=(\d+)")  # RateLimit: "api";r=0;t=55, of an IETF draft that the Hub follows


class DamagedDownload(Exception):
    """What came is not what the Hub says it has: worth another try."""


def patiently(request: Callable[[], T], what: str, *, check: Callable[[], None] = lambda: None) -> T:
    """Returns what `request` returns, which is called again after failures that may pass.

    Args:
        request: asks the Hub for something.
        what: for messages.
        check: called every now and then while waiting; may raise `Interrupted`.

    Raises:
        CheckpointError: the Hub has no such model, revision or file.
        DestinationError: the disk did not take it.
        NetworkError: anything else, in the end.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except Dsv3Error:  # noqa: PERF203
            raise
        except Exception as error:
            origin = _origin(error)
            if attempt == ATTEMPTS or not _may_pass(origin):
                raise translated(origin, what) from error
            _wait(_seconds_asked(origin) or 2.0 ** (attempt - 1), check)
    raise AssertionError("unreachable")


def _wait(seconds: float, check: Callable[[], None]) -> None:
    end = time.monotonic() + min(seconds, _LONGEST_WAIT_SECONDS)
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, 0.2))


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _RETRIABLE_STATUS
    passing = (DamagedDownload, _http_error(), ConnectionError, TimeoutError)
    return isinstance(error, passing) or _is_inconsistent(error) or type(error).__module__ == "hf_xet"


def _origin(error: BaseException) -> BaseException:
    """Returns what the network did, if it is that which an error comes from, else the error.

    huggingface_hub (2.4.0) makes a RuntimeError of what goes wrong in an upload, and of a connection reset
    within a download, and says that a file is not in the cache when it could not be asked for.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    found: BaseException | None = error
    while found is not None:
        is_symptom = isinstance(found, LocalEntryNotFoundError)
        if not is_symptom and isinstance(found, (_http_error(), ConnectionError, TimeoutError)):
            return found
        found = found.__cause__ or found.__context__
    return error


def _http_error() -> type[BaseException]:
    """Returns the base of all errors of the HTTP library that huggingface_hub uses, whichever it is."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


def _is_inconsistent(error: BaseException) -> bool:
    """Whether huggingface_hub found fewer or more bytes than it was promised."""
    return isinstance(error, OSError) and error.errno is None and "onsistency check" in str(error)


def _seconds_asked(error: BaseException) -> float | None:
    """Returns how long the Hub asks to wait, if it does."""
    response = getattr(error, "response", None)
    headers: Mapping[str, str] = getattr(response, "headers", {})
    retry_after = headers.get("retry-after", "")
    if retry_after.isdigit():
        return float(retry_after)
    limited = getattr(response, "status_code", None) == 429
    found = _RATE_LIMIT.search(headers.get("ratelimit", "")) if limited else None
    return float(found[1]) if found else None


def translated(error: BaseException, what: str) -> Dsv3Error:
    """Returns an error of this program for one of huggingface_hub's.

    Args:
        error: what was raised.
        what: the file or model that was asked for.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return UsageError(f"{what}: is no name that a model on the Hub can have")
    if isinstance(error, OfflineModeIsEnabled):
        return NetworkError(f"{what}: HF_HUB_OFFLINE is set, and this is not in the Hugging Face cache")
    if isinstance(error, GatedRepoError):
        return NetworkError(
            f"{what}: is gated: ask for access on the model's page, and log in (hf auth login, or HF_TOKEN)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"{what}: the Hub has no such model, or shows it to others only; for a private one log in (hf "
            "auth login, or HF_TOKEN)"
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"{what}: the model has no such revision on the Hub, or has it no more")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return CheckpointError(f"{what}: there is no such file on the Hub")
    if isinstance(error, HfHubHTTPError):
        return NetworkError(f"{what}: the Hub answers {error.response.status_code}{_advice(error)}")
    if isinstance(error, DamagedDownload):
        return NetworkError(f"{what}: {error}, {ATTEMPTS} times; run the same command again later")
    of_disk = isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError))
    if of_disk and isinstance(error, OSError) and error.errno is not None:
        return DestinationError(f"{what}: {error.strerror} ({error.filename or 'downloading'})")
    reason = _without_queries(" ".join(str(error).split()))[:300] or type(error).__name__
    if isinstance(error, ValueError):  # of the Hub, about what was sent
        return NetworkError(f"{what}: the Hub refuses it: {reason}")
    return NetworkError(f"{what}: the Hub could not be reached: {reason}; run the same command again later")


def _without_queries(text: str) -> str:
    """Returns `text` without the queries of URLs, which may hold signatures."""
    return re.sub(r"(https?://[^\s?]+)\?\S*", r"\1?...", text)


def _advice(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in _RETRIABLE_STATUS:
        return f" after {ATTEMPTS} attempts; run the same command again later"
    reason = _without_queries(" ".join(str(getattr(error, "server_message", None) or "").split()))[:300]
    login = "a token that may do this is needed (hf auth login, or HF_TOKEN)" if status in (401, 403) else ""
    return "".join(f"; {part}" for part in (reason, login) if part)
