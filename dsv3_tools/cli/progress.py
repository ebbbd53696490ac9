"""How a run shows that it goes on: a bar on a terminal, otherwise one plain line a minute."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dsv3_tools.cli.output import print_note, size
from dsv3_tools.conversion.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["shown_progress"]

_LINE_SECONDS = 60.0
_BAR_SECONDS = 0.1


@contextmanager
def shown_progress(
    what: str, *, pieces: str = "shards", quiet: bool = False
) -> Iterator[Callable[[Progress], None]]:
    """Yields the function that a run calls with its progress; `quiet` shows nothing.

    `pieces` are what the run counts besides bytes.
    """
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _bar(what, pieces) as update:
            yield update
    else:
        yield _Lines(what, pieces)


class _Lines:
    """A line a minute, for logs."""

    def __init__(self, what: str, pieces: str) -> None:
        self._what = what
        self._pieces = pieces
        self._began = self._printed = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, progress: Progress) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._printed < _LINE_SECONDS:
                return
            self._printed = now
        rate = max(1, progress.nbytes_done) / (now - self._began)
        left = (progress.nbytes_total - progress.nbytes_done) / rate / 60
        print_note(
            f"{self._what}: {size(progress.nbytes_done)} of {size(progress.nbytes_total)}, "
            f"{progress.shards_done} of {progress.shards_total} {self._pieces}, {size(rate)}/s, "
            f"{left:.0f} minutes left"
        )


@contextmanager
def _bar(what: str, pieces: str) -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shards]} " + pieces, markup=False),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, shards="")
        shown = 0.0
        lock = threading.Lock()

        def update(progress: Progress) -> None:
            nonlocal shown
            with lock:
                now = time.monotonic()
                if now - shown < _BAR_SECONDS:
                    return
                shown = now
            bar.update(
                task,
                completed=min(progress.nbytes_done, progress.nbytes_total),
                total=progress.nbytes_total,
                shards=f"{progress.shards_done}/{progress.shards_total}",
            )

        yield update
