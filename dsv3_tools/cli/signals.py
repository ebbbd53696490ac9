"""Ctrl-C, TERM and HUP end a run cleanly: what is finished stays, what is half-written goes."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dsv3_tools.cli.output import print_note
from dsv3_tools.conversion.progress import Stop
from dsv3_tools.errors import Interrupted

__all__ = ["stop_on_signals"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_on_signals(*, resumes: bool = True) -> Iterator[Stop]:
    """Yields a `Stop` that the first signal sets; a second Ctrl-C ends the process at once."""
    stop = Stop()

    def handle(signum: int, _frame: FrameType | None) -> None:
        if stop.is_set and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set(signum)

    # What is ignored stays ignored: nohup does that with HUP, a shell with INT for background jobs.
    wanted = [signum for signum in _SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, handle) for signum in wanted}
    try:
        yield stop
    except Interrupted:
        if resumes:
            print_note(f"to go on, run again: {shlex.join(['dsv3', *sys.argv[1:]])}")
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
