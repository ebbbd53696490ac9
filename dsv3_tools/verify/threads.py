"""Threads of a check: they share the work, and end soon when somebody asks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from dsv3_tools.conversion.progress import Stop
from dsv3_tools.errors import Interrupted

__all__ = ["share_out", "wait_for"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_POLL_SECONDS = 0.2


def wait_for(tasks: Sequence[Future[Any]], stop: Stop) -> None:
    """Waits in short steps, so that a signal handler of the main thread gets its turn."""
    try:
        while wait(tasks, timeout=_POLL_SECONDS).not_done:
            pass
    except BaseException:
        stop.set()
        raise


def share_out(
    items: Sequence[Item], make: Callable[[Stop], Callable[[Item], Result]], workers: int, stop: Stop
) -> list[Result]:
    """Returns a result for each item, in their order, whichever worker was free for it.

    `make` is called once in each worker's thread, with what ends its work early, and returns the function
    that does one item.

    Raises:
        Interrupted: somebody has asked `stop`.
    """
    results: dict[int, Result] = {}
    waiting, lock, ended = iter(enumerate(items)), threading.Lock(), Stop(stop)

    def loop() -> None:
        try:
            do = make(ended)
            while True:
                ended.check()
                with lock:
                    number, item = next(waiting, (-1, None))
                if number < 0:
                    return
                results[number] = do(item)  # type: ignore[arg-type]
        except BaseException:
            ended.set()
            raise

    with ThreadPoolExecutor(max(1, min(workers, len(items)))) as pool:
        tasks = [pool.submit(loop) for _ in range(max(1, min(workers, len(items))))]
        wait_for(tasks, ended)
    failures = [error for task in tasks if (error := task.exception()) is not None]
    if failures:  # those that only ended because another failed come last
        raise min(failures, key=lambda error: isinstance(error, Interrupted))
    return [results[number] for number in range(len(items))]
