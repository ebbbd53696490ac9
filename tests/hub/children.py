"""A process that is killed."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable

import torch
from huggingface_hub.utils import _http


def in_child(act: Callable[[], object], kill_after: float) -> int:
    """Runs `act` in a forked child that gets SIGKILL; returns 0, 1 if it failed, or minus the signal."""
    _http.close_session()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the hub's threads stay behind
        child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    time.sleep(kill_after)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
