"""Who has the cores of a CPU while weights are read ahead: the threads that read, or those of torch.

torch's threads (libgomp's) spin at the end of every operation until the last of them is done. Where others
want the same cores, as the threads that read and decode do, an operation then takes as long as it takes the
system to notice: 2 threads of each kind on 2 cores took 3 times as long as 1 and 2. `OMP_WAIT_POLICY=passive`
mends that, but only if it is in the environment before torch is loaded.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["WAIT_POLICY", "available_cores", "reading_threads", "sharing_cores"]

WAIT_POLICY = "OMP_WAIT_POLICY"

_MAX_READERS = 12


def available_cores(processes_here: int = 1) -> int:
    """Returns how many cores this process may use, of those that it shares with others of its kind."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, processes_here))


def reading_threads(device_type: str, processes_here: int = 1) -> int:
    """Returns how many threads read: half the cores where they also decode, else one for each."""
    cores = available_cores(processes_here)
    if device_type == "cpu":
        return max(1, min(_MAX_READERS, cores // 2))
    return max(2, min(_MAX_READERS, cores))


class _Sharing:
    """How many readers are at work in this process, and how many threads torch had before the first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.before = 0


_sharing = _Sharing()


@contextmanager
def sharing_cores(readers: int, processes_here: int = 1) -> Iterator[None]:
    """Leaves torch only the cores that `readers` threads don't need; as before when the last one leaves.

    The count is that of the calling thread, and of threads that torch sees for the first time meanwhile.
    """
    import torch

    with _sharing.lock:
        if _sharing.users == 0:
            _sharing.before = torch.get_num_threads()
            if os.environ.get(WAIT_POLICY, "").lower() != "passive":
                left = max(1, available_cores(processes_here) - readers)
                torch.set_num_threads(min(_sharing.before, left))
        _sharing.users += 1
    try:
        yield
    finally:
        with _sharing.lock:
            _sharing.users -= 1
            if _sharing.users == 0:
                torch.set_num_threads(_sharing.before)
