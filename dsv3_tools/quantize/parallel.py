"""The cores of a CPU on a layer's experts and blocks, a thread for each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from dsv3_tools.model.cores import available_cores

if TYPE_CHECKING:
    import torch

__all__ = ["in_parallel"]

Item = TypeVar("Item")


def in_parallel(
    items: Iterable[Item], work: Callable[[Item], None], device: torch.device, processes_here: int
) -> None:
    """Does `work` for each item: one after the other on a GPU, by a thread for each core on a CPU.

    There torch gets one thread for each, so that sums do not depend on how many cores there are. No more
    items are asked for than are worked on.
    """
    if device.type != "cpu":
        for item in items:
            work(item)
        return
    count = available_cores(processes_here)
    running: deque[Future[None]] = deque()
    with ThreadPoolExecutor(count, "dsv3-quantize", _use_one_thread) as pool:
        try:
            for item in items:
                if len(running) == count:
                    running.popleft().result()
                running.append(pool.submit(_without_gradients, work, item))
            while running:
                running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _without_gradients(work: Callable[[Item], None], item: Item) -> None:
    """Does `work`; what a thread is told of gradients it is told alone."""
    import torch

    with torch.no_grad():
        work(item)
