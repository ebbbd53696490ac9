"""Threads that take shards from a queue until it is empty, one fails, or somebody asks to stop.

Threads are enough: reading, hashing, writing and the kernels all release the interpreter lock.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from dsv3_tools.checkpoint.writer import ShardWriter
from dsv3_tools.conversion.findings import Findings
from dsv3_tools.conversion.plan import ShardPlan
from dsv3_tools.conversion.progress import Stop
from dsv3_tools.errors import Dsv3Error, Interrupted

__all__ = ["Pipeline", "work_off"]

_POLL_SECONDS = 0.2


class Pipeline(Protocol):
    """Fills shards one after another, with buffers and a device of its own."""

    def fill(self, shard: ShardPlan, writer: ShardWriter, findings: Findings) -> None:
        """Writes every tensor of `shard`."""

    def close(self) -> None:
        """Releases the buffers."""


def work_off(
    shards: Sequence[ShardPlan],
    workers: Sequence[Callable[[], Callable[[ShardPlan], None]]],
    stop: Stop,
    *,
    given_up: Callable[[], bool],
) -> None:
    """Lets every worker take shards until none is left, or until the other processes have `given_up`.

    Each entry of `workers` is called in a thread of its own and returns the function that does one
    shard.

    Raises:
        Interrupted: a signal asked to stop.
        Dsv3Error: the first failure of a worker, naming its shard; the others have stopped.
    """
    waiting: queue.SimpleQueue[ShardPlan] = queue.SimpleQueue()
    for shard in shards:
        waiting.put(shard)
    failures: list[BaseException] = []

    def loop(make: Callable[[], Callable[[ShardPlan], None]]) -> None:
        try:
            do = make()
            while not stop.is_set:
                try:
                    shard = waiting.get_nowait()
                except queue.Empty:
                    return
                _do_one(do, shard)
        except BaseException as error:
            if not (isinstance(error, Interrupted) and stop.is_set):
                failures.append(error)
            stop.set()

    others_failed = False
    threads = [threading.Thread(target=loop, args=(make,), daemon=True) for make in workers]
    for thread in threads:
        thread.start()
    try:
        # Short waits, so that a signal handler gets its turn.
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(_POLL_SECONDS)
            if given_up():
                stop.set()
                others_failed = True
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join()
        raise
    if failures:
        raise failures[0]
    if stop.is_set and not others_failed:
        stop.check()


def _do_one(do: Callable[[ShardPlan], None], shard: ShardPlan) -> None:
    try:
        do(shard)
    except Dsv3Error:
        raise
    except Exception as error:
        raise Dsv3Error(
            f"{shard.name}: the worker on this shard failed: {type(error).__name__}: {error}"
        ) from error
